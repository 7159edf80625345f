"""What a process that trains or scores need not import."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finegrid.settings import RunSettings

OPTIMISERS = (None, "adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "rmsprop", "adagrad")  # torch's and ours


def leave_out_unused(runs: Iterable[RunSettings]) -> None:
    """Spare this process bitsandbytes where neither weights nor optimiser of any of its runs are of it.

    peft and transformers import it wherever it is installed, which is a second of each start. To be called before any
    of them is imported; to this process, bitsandbytes is then not installed.
    """
    if not any(run.quantization_config or run.training_args.get("optim") not in OPTIMISERS for run in runs):
        sys.modules.setdefault("bitsandbytes", None)
