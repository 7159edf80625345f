"""What is paid before any step: starts of commands, a snakemake with nothing to do, and a further run in a pack.

    python tests/benchmarks/starts.py [--runs 150] [--repeats 5]

Printed are medians of wall seconds. The study with nothing to do is that of `versions.py`: its results are random bytes
and nothing was trained. A further run is one of the twelve LoRA runs of `grid.py` (1M, one step each, one pack,
one core): the time that twelve take more than one, divided by eleven, without the seconds of the steps. In it are
the adapter, the dataset, the validation (the base's is known), the files, their hashes, and what snakemake does to put
them in place.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import grid
import versions
from finegrid.study import load_study

IMPORTS = "from finegrid.startup import importing\nwith importing():\n    import finegrid.training.train"
RUNS_IN_A_PACK = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=150)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    program = str(Path(sys.executable).parent / "finegrid")
    show("finegrid --help", [seconds([program, "--help"]) for _ in range(options.repeats)])
    command = [sys.executable, "-c", IMPORTS]
    show("imports of a process that trains", [seconds(command) for _ in range(options.repeats)])
    with tempfile.TemporaryDirectory() as name:
        nothing_to_do(Path(name) / "project", options.runs, options.repeats)
    with tempfile.TemporaryDirectory() as name:
        further_run(Path(name) / "project", options.repeats)


def nothing_to_do(project: Path, runs: int, repeats: int) -> None:
    versions.make_project(project, runs)
    versions.make_results(project, weights_kb=300)
    command = ["snakemake", "--config", "study=many"]
    versions.run(project, *command, "--touch", "--forceall")
    jobs = len((project / "results/many/jobs.jsonl").read_text().splitlines())
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        said = versions.run(project, *command)
        found.append(time.perf_counter() - started)
        assert "Nothing to be done" in said, said
    show(f"snakemake, nothing to do, {jobs} finished jobs", found)


def further_run(project: Path, repeats: int) -> None:
    recipe = grid.RECIPE.replace("max_steps: {steps}", "max_steps: 1")
    grid.prepare("1M", project, recipe, kind="mixed")
    runs = load_study(Path("config/studies/grid.yaml"), project).runs[:RUNS_IN_A_PACK]
    found = []
    for _ in range(repeats):
        one, many = (trained(project, [run.id for run in some]) for some in (runs[:1], runs))
        found.append((many - one) / (len(runs) - 1))
    show("a run more in a pack", found)


def trained(project: Path, ids: list[str]) -> float:
    """Return the seconds that training takes so many runs in one pack, without their steps."""
    for name in ("runs", "metrics", "history", "training", "settings", "provenance"):
        shutil.rmtree(project / "results/grid" / name, ignore_errors=True)
    summaries = [f"results/grid/training/{each}.json" for each in ids]
    started = time.perf_counter()
    grid.snakemake(project, summaries, [f"pack={RUNS_IN_A_PACK}"], cores=1)
    wall = time.perf_counter() - started
    return wall - sum(json.loads((project / path).read_text())["train_seconds"] for path in summaries)


def seconds(command: list[str]) -> float:
    environment = os.environ | {"PYTHONPATH": str(versions.PROJECT / "workflow")}
    started = time.perf_counter()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return time.perf_counter() - started


def show(name: str, found: list[float]) -> None:
    print(f"{name:<50} {statistics.median(found):5.2f} s  ({min(found):.2f} to {max(found):.2f})", flush=True)


if __name__ == "__main__":
    main()
