"""GPUs that a study may run on: their memory and speed, from the package's table, a mapping or the machine itself.

``gpus.json`` beside this file has one entry a card: ``title``; ``pattern``, a regular expression of the name that
nvidia-smi prints; ``memory_mib``, what nvidia-smi shows (with ECC on where the card comes so), which is up to 6 % less
than the number on the box; the vendor's peak of dense bf16 matrix products in TFLOP/s (never the figure "with
sparsity"), which is that of fp16 where ``bf16`` is false; the peak in fp32; and the memory's GB/s.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from finegrid.errors import UserError, nearest

FILE = Path(__file__).with_name("gpus.json")
MIB, GIB = 2**20, 2**30
UNITS = {"k": 2**10, "m": MIB, "g": GIB, "t": 2**40}
KEYS = ("name", "memory", "bf16_tflops", "fp32_tflops", "bandwidth_gb", "bf16")
SMI = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
SMI_SECONDS = 10


@dataclass(frozen=True)
class Gpu:
    """One card.

    Args:
        name: its name in ``gpus.json``, the user's own, or nvidia-smi's.
        memory: bytes of the whole card.
        bf16_tflops: peak of dense bf16 matrix products (fp16 where ``bf16`` is False), TFLOP/s; None where unknown.
        fp32_tflops: the same in fp32.
        bandwidth_gb: the memory's, in 10^9 bytes a second.
        bf16: whether the card computes in bf16.
    """

    name: str
    memory: int
    bf16_tflops: float | None = None
    fp32_tflops: float | None = None
    bandwidth_gb: float | None = None
    bf16: bool = True


def gpu(entry: str | Mapping[str, Any]) -> Gpu:
    """Return a card of the table by name (`rtx-4090`, also `RTX 4090`), or one described by a mapping
    ``{name, memory: "24GB", bf16_tflops, fp32_tflops, bandwidth_gb, bf16}`` of which name and memory must be there.

    Raises:
        UserError: no such card, or a key or value of the mapping that is none.
    """
    if isinstance(entry, Mapping):
        return _described(entry)
    keys = {_squash(key): key for key in _table()}
    wanted = _squash(str(entry))
    if wanted in keys:
        return _of_table(keys[wanted])
    several = [key for squashed, key in keys.items() if wanted and squashed.startswith(wanted)]
    hint = f"; did you mean '{several[0]}'?" if several else nearest(str(entry).lower(), _table())
    raise UserError(
        f"gpu '{entry}': not in Finegrid's table{hint}; there are {', '.join(_table())}; "
        "another card is written {name: mine, memory: 24GB, bf16_tflops: 100}"
    )


def gpu_names() -> list[str]:
    """Return the names of the table, consumer cards first."""
    return list(_table())


def parse_bytes(text: str) -> int:
    """Return the bytes of a size such as `24GB`, `24 GiB`, `24g` or `512MB`.

    GB is read as GiB (2^30 bytes), for that is how cards are sold and how Slurm counts: a card of "24 GB" has
    24 x 2^30 bytes (the H200's 141 are the exception).

    Raises:
        UserError: not a positive number and a unit.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt])i?b?\s*", str(text), re.IGNORECASE)
    if not found or float(found[1]) == 0:
        raise UserError(f"memory '{text}': not a size; write a number and its unit, such as 24GB or 16000MB")
    return round(float(found[1]) * UNITS[found[2].lower()])


def detected() -> list[Gpu]:
    """Return this machine's NVIDIA cards with the memory that nvidia-smi shows; none where it doesn't answer."""
    try:
        answer = subprocess.run(SMI, capture_output=True, text=True, timeout=SMI_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [found for line in answer.splitlines() if (found := _of_smi(line))]


def name_of(device: str) -> str:
    """Return the table's name of the card that torch and nvidia-smi call ``device``; another name as it is."""
    return next((key for key, card in _table().items() if re.search(card["pattern"], device, re.IGNORECASE)), device)


@cache
def _table() -> dict[str, dict[str, Any]]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def _squash(name: str) -> str:
    """`NVIDIA GeForce RTX 4090`, `rtx_4090` and `rtx-4090` are one card, and so are `A100 80 GB` and `a100-80gb`."""
    return re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", name.lower())


def _of_table(key: str, memory: int | None = None) -> Gpu:
    card = _table()[key]
    return Gpu(
        key,
        memory or card["memory_mib"] * MIB,
        card["bf16_tflops"],
        card["fp32_tflops"],
        card["bandwidth_gb"],
        card.get("bf16", True),
    )


def _of_smi(line: str) -> Gpu | None:
    name, _, mebibytes = line.rpartition(",")
    if not mebibytes.strip().isdigit():  # a card in slices (MIG) or one that fell off the bus shows [N/A]
        return None
    memory = int(mebibytes) * MIB
    key = name_of(name.strip())
    return _of_table(key, memory) if key in _table() else Gpu(key, memory)


def _described(entry: Mapping[str, Any]) -> Gpu:
    problems = [
        f"gpu: '{key}' is no key of a card{nearest(str(key), KEYS)}; there are {', '.join(KEYS)}"
        for key in entry
        if key not in KEYS
    ]
    problems += [f"gpu {dict(entry)}: no '{key}'" for key in ("name", "memory") if not entry.get(key)]
    numbers = {key: entry.get(key) for key in ("bf16_tflops", "fp32_tflops", "bandwidth_gb")}
    problems += [
        f"gpu '{entry.get('name')}': {key} is {value!r}; expected a positive number"
        for key, value in numbers.items()
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value <= 0)
    ]
    if problems:
        raise UserError(*problems)
    return Gpu(str(entry["name"]), parse_bytes(entry["memory"]), **numbers, bf16=bool(entry.get("bf16", True)))
