"""The history of a run: one row for each log event, made of the trainer's own log.

The trainer keeps its log in every checkpoint, so a resumed run's history has each step once: rows after the checkpoint
that died with the process are gone with it.
"""

from __future__ import annotations

import contextlib
import csv
import resource
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from finegrid.files import whole

COLUMNS = [
    "step",
    "epoch",
    "loss",
    "learning_rate",
    "grad_norm",
    "eval_loss",
    "label_tokens",
    "tokens",
    "seconds",
    "memory_mb",
]

SHARE = 0.01  # of a run's time, for the file that shows how it goes
_told = [0.0]  # the highest peak that was told


def history_rows(log: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the history of a trainer's ``log_history``: the training rows (``loss``) and the evaluations
    (``eval_loss``), in their order; other entries are no part of it."""
    return [
        {column: entry.get(column) for column in COLUMNS} for entry in log if "loss" in entry or "eval_loss" in entry
    ]


def write_history(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write history rows as CSV, atomically; a missing value is an empty field, numbers keep all their digits."""
    with whole(path) as half, half.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


class HistoryFile(TrainerCallback):
    """Keeps a CSV of the history up to date while the run trains, for whoever wants to look.

    It is written as a whole, which takes the longer the longer the run is: so often as takes :data:`SHARE` of the time.
    """

    def __init__(self, path: Path):
        self.path = path
        self._again = 0.0

    def on_log(self, args, state, control, **kwargs) -> None:
        start = time.monotonic()
        if start >= self._again and state.is_world_process_zero:
            write_history(self.path, history_rows(state.log_history))
            end = time.monotonic()
            self._again = end + (end - start) / SHARE

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._again = 0.0
        self.on_log(args, state, control)


def peak_memory_mb(device: torch.device) -> float:
    """Return the peak of memory in MiB since the process started or :func:`forget_peak` was called: what torch
    allocated on the GPU, or the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError, StopIteration):  # no Linux
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 2**10
        _told[0] = max(_told[0], peak)  # Linux counts in parts, and a little less now and then
        return _told[0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def forget_peak() -> None:
    """Let the peak be that of what comes: a run in a pack has none of the runs before it, but what they left lying.

    Where the system keeps the process's peak to itself (no Linux, a container that forbids it), it stays.
    """
    _told[0] = 0.0
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
