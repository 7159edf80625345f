"""A process imports bitsandbytes where a run is of it, and only there."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import sys
from finegrid.settings import RunSettings
from finegrid.startup import leave_out_unused
runs = [RunSettings(model={"model_name_or_path": "m"}, **settings) for settings in eval(sys.argv[1])]
leave_out_unused(runs)
import finegrid.training.train
print(sys.modules.get("bitsandbytes") is not None)
"""


@pytest.mark.parametrize(
    ("runs", "imported"),
    [
        ([{}, {"peft_config": {"r": 4}, "training_args": {"optim": "adafactor"}}], False),
        ([{}, {"training_args": {"optim": "adamw_bnb_8bit"}}], True),
        ([{"peft_config": {"r": 4}, "quantization_config": {"load_in_4bit": True}}], True),
    ],
    ids=["plain", "8-bit optimiser", "4-bit weights"],
)
def test_bitsandbytes_is_imported_where_a_run_needs_it(runs, imported):
    done = subprocess.run([sys.executable, "-c", CODE, repr(runs)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(imported)]
