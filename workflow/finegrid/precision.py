"""Whether a run computes in bfloat16 where its recipe doesn't say: by autocast, over weights that stay float32.

On a GPU that has bfloat16 it does. On a CPU it does where that is faster by measurement (tests/benchmarks/README.md):
the processor has instructions for it (AVX512-BF16 or AMX; without them each number is converted on its way), and the
model is wide enough that its products outweigh the casts. `training_args: {bf16: false}` is float32 anywhere, and what
a run computed in stands in its summary. Pure Python: plans read it, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finegrid.settings import RunSettings

WIDE = 512  # hidden size, from which it was measured to be faster
INSTRUCTIONS = {"avx512_bf16", "amx_bf16"}  # as Linux names them
CPU_INFO = Path("/proc/cpuinfo")


def cpu_chooses_bf16(settings: RunSettings, width: int | None) -> bool:
    """Return whether a run on this machine's CPU computes in bfloat16 without being asked to.

    Not with weights that are stored in fewer bits or quantised (they have a type to compute in), nor under DeepSpeed,
    whose bf16 rounds the weights.

    Args:
        width: the model's hidden size; None if it is not known.
    """
    arguments = settings.training_args
    said = arguments.get("bf16") is not None or arguments.get("fp16") or arguments.get("deepspeed")
    plain = settings.model.dtype == "float32" and not settings.quantization_config
    return not said and plain and width is not None and width >= WIDE and cpu_has_bf16()


@lru_cache(maxsize=1)
def cpu_has_bf16() -> bool:
    """Return whether this machine's processor has instructions for products of bfloat16."""
    try:
        lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return False
    flags = next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")
    return not INSTRUCTIONS.isdisjoint(flags.split())


def width_of(config: Mapping[str, Any]) -> int | None:
    """Return the hidden size in a model's config.json; of one with several parts, its text's."""
    config = config.get("text_config") or config
    width = config.get("hidden_size")
    return width if isinstance(width, int) else None
