"""Wall time and peak memory of the demo, and tokens per second of each method.

    python tests/benchmarks/demo.py

Runs `make demo` from the beginning (what an earlier demo made is removed first, the environment stays) and samples
the memory of all its processes twice a second: resident memory, pages that are shared between processes counted once
(the proportional set size).
"""

from __future__ import annotations

import contextlib
import csv
import json
import shutil
import statistics
import subprocess
import time
from pathlib import Path

import psutil

PROJECT = Path(__file__).resolve().parents[2]
MADE = (
    "results/insurance",
    "data/clean",
    "data/tokens",
    "data/models",
    "data/raw/insuranceqa",
    "scratch",
    ".snakemake",
)


def memory(root: psutil.Process) -> int:
    """Return the bytes that a process and all its children hold."""
    total = 0
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            total += process.memory_full_info().pss
    return total


def main() -> None:
    """Run the demo and print one line a figure."""
    for name in MADE:
        shutil.rmtree(PROJECT / name, ignore_errors=True)
    start, peak = time.monotonic(), 0
    demo = subprocess.Popen(["make", "demo"], cwd=PROJECT)
    root = psutil.Process(demo.pid)
    while demo.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            peak = max(peak, memory(root))
        time.sleep(0.5)
    print(f"make demo: exit status {demo.returncode}, {(time.monotonic() - start) / 60:.1f} min", end=", ")
    print(f"peak memory of all processes {peak / 2**30:.2f} GiB")
    speeds: dict[str, list[float]] = {}
    for path in sorted((PROJECT / "results/insurance/training").glob("*.json")):
        summary = json.loads(path.read_text())
        speeds.setdefault(summary["method"], []).append(summary["tokens_per_second"])
    for method, values in speeds.items():
        print(f"{method}: {statistics.median(values):.0f} tokens/s (median of {len(values)} runs)")
    for stage in ("train", "evaluate"):
        for path in sorted((PROJECT / f"benchmarks/{stage}/insurance").glob("*.tsv")):
            row = next(csv.DictReader(path.open(), delimiter="\t"))
            print(f"{stage} {path.stem}: {float(row['s']):.0f} s, {row['max_rss']} MB")


if __name__ == "__main__":
    main()
