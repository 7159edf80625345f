"""How a process starts quickly: what it need not import, and imports without looking for garbage."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finegrid.settings import RunSettings

OPTIMISERS = (None, "adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "rmsprop", "adagrad")  # torch's and ours


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Look for no garbage while the block imports large libraries, and afterwards never among what they made.

    Their classes and functions stay as long as the process, and Python looks through all of them again whenever they
    have become some more: a third of the time (6.0 s against 3.8 for torch, transformers, peft and datasets).
    """
    looked = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if looked:
            gc.enable()


def leave_out_unused(runs: Iterable[RunSettings]) -> None:
    """Spare this process bitsandbytes where neither weights nor optimiser of any of its runs are of it.

    peft and transformers import it wherever it is installed, which is a second of each start. To be called before any
    of them is imported; to this process, bitsandbytes is then not installed.
    """
    if not any(run.quantization_config or run.training_args.get("optim") not in OPTIMISERS for run in runs):
        sys.modules.setdefault("bitsandbytes", None)
