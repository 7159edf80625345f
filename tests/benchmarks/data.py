"""Import, cleaning and tokenising of all of InsuranceQA, against a ``datasets.map`` pipeline with the same steps.

    python tests/benchmarks/data.py [--num-proc 1 2] [--sides finegrid datasets] [--repeats 3]

21,325 training pairs, 27,987 rows with validation and test; near duplicates are searched. Each stage is a process of
its own, as in the workflow. Printed are medians: a stage's own seconds (start of Python and the imports of the stage's
module are not in them; transformers is imported inside tokenise and is), then both sides as whole processes from start
to end: wall time, CPU time (user and system, children's too), and the most memory that a side's processes hold
together (each shared page counted once), and the ratios. The sides take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

PROJECT = Path(__file__).resolve().parents[2]
RAW = PROJECT / "data/raw/insuranceqa"
MODEL = PROJECT / "data/models/SmolLM2-135M-Instruct"
SPLITS = ("train", "validation", "test")
STAGES = ("import", "clean", "tokenise")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass
class Measured:
    """One process with its children: seconds of wall and CPU time, the most MiB at a time, what it printed last."""

    wall: float
    cpu: float
    memory: float
    printed: str


def main() -> None:
    """Print a line a stage, then one a side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-proc", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sides", nargs="+", default=["finegrid", "datasets"], choices=["finegrid", "datasets"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--stage", nargs=3, metavar=("STAGE", "FOLDER", "NUM_PROC"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        stage, folder, num_proc = options.stage
        print(run_stage(stage, Path(folder), settings(int(num_proc))))
        return
    for num_proc in options.num_proc:
        compare(num_proc, options.sides, options.repeats)


def compare(num_proc: int, sides: list[str], repeats: int) -> None:
    """Run the sides in turn and print medians and ratios."""
    found: dict[str, list[list[Measured]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as name:
        for _ in range(repeats):
            for side in sides:
                folder = Path(name) / side
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                found[side].append(finegrid(folder, num_proc) if side == "finegrid" else datasets(folder, num_proc))
                print_run(side, found[side][-1])
        if "finegrid" in found:
            print_stages(found["finegrid"], Path(name) / "finegrid", num_proc)
    whole = {side: [total(processes) for processes in runs] for side, runs in found.items()}
    for side, runs in whole.items():
        wall, cpu, memory = (median([getattr(run, key) for run in runs]) for key in ("wall", "cpu", "memory"))
        print(f"{side}, num_proc {num_proc}: {wall:.2f} s wall, {cpu:.2f} s CPU, {memory:.0f} MiB; {runs[-1].printed}")
    if len(whole) == 2:
        ratios = [
            median([getattr(run, key) for run in whole["finegrid"]])
            / median([getattr(run, key) for run in whole["datasets"]])
            for key in ("wall", "cpu", "memory")
        ]
        print("ratio: {:.2f} of its wall time, {:.2f} of its CPU time, {:.2f} of its memory".format(*ratios))


def print_run(side: str, processes: list[Measured]) -> None:
    times = ", ".join(f"{process.wall:.1f} s wall {process.cpu:.1f} s CPU" for process in processes)
    print(f"  {side}: {times}", file=sys.stderr, flush=True)


def print_stages(runs: list[list[Measured]], folder: Path, num_proc: int) -> None:
    sources = {"import": folder / "imported", "clean": folder / "imported", "tokenise": folder / "clean"}
    seconds = [median([float(run[number].printed) for run in runs]) for number in range(len(STAGES))]
    for number, stage in enumerate(STAGES):
        rows = sum(sum(1 for _ in (sources[stage] / f"{split}.jsonl").open("rb")) for split in SPLITS)
        cpu, memory = (median([getattr(run[number], key) for run in runs]) for key in ("cpu", "memory"))
        print(
            f"{stage}, num_proc {num_proc}: {rows:,} rows in {seconds[number]:.2f} s, "
            f"{rows / seconds[number]:,.0f} rows/s; the whole process {cpu:.2f} s CPU, {memory:.0f} MiB"
        )
    size = sum((folder / "imported" / f"{split}.jsonl").stat().st_size for split in SPLITS) / 1e6
    print(f"all three, num_proc {num_proc}: {sum(seconds):.2f} s, {size / sum(seconds):.2f} MB/s of imported rows")


# ---------------------------------------------------------------- the two sides


def finegrid(folder: Path, num_proc: int) -> list[Measured]:
    """Run the three stages, each in its own process."""
    return [
        measure([sys.executable, __file__, "--stage", stage, str(folder), str(num_proc)], folder) for stage in STAGES
    ]


def datasets(folder: Path, num_proc: int) -> list[Measured]:
    """Run the pipeline of ``data_map.py``, with a cache that is empty."""
    script = Path(__file__).with_name("data_map.py")
    command = [sys.executable, str(script), str(RAW), str(MODEL), str(folder / "tokens"), str(num_proc)]
    return [measure(command, folder)]


def settings(num_proc: int, raw: Path = RAW, suffix: str = ".jsonl.gz"):
    """Return the recipe of the measurement: the demo's data, whole, with near duplicates."""
    from finegrid.settings import RunSettings

    return RunSettings(
        model={"model_name_or_path": str(MODEL)},
        data_config={
            "name": "insuranceqa",
            "train_file": str(raw / f"train{suffix}"),
            "val_file": str(raw / f"validation{suffix}"),
            "test_file": str(raw / f"test{suffix}"),
            "format": "columns",
            "columns": {"prompt": "question", "answer": "answer", "id": "id"},
            "num_proc": num_proc,
            "cleaning": {"near_duplicates": True},
            "limits": {"truncated_answers": 1, "dropped": 1},
        },
        max_input_length=256,
        max_output_length=512,
    )


def run_stage(stage: str, folder: Path, recipe) -> float:
    """Run one stage here and return its seconds."""
    from finegrid.data.cleaning import clean
    from finegrid.data.importing import import_data
    from finegrid.data.tokenising import tokenise

    start = time.perf_counter()
    if stage == "import":
        import_data(recipe, PROJECT, folder / "imported")
    elif stage == "clean":
        clean(recipe, folder / "imported", folder / "clean")
    else:
        tokenise(recipe, folder / "clean", MODEL, folder / "tokens")
    return time.perf_counter() - start


# ---------------------------------------------------------------- measuring


def measure(command: list[str], folder: Path) -> Measured:
    """Run a command to its end; raise if it fails."""
    environment = os.environ | ENVIRONMENT | {"HF_DATASETS_CACHE": str(folder / "cache"), "TMPDIR": str(folder)}
    with (folder / "printed").open("w+") as printed, (folder / "told").open("w+") as told:
        start, before = time.perf_counter(), os.times()
        process = subprocess.Popen(command, env=environment, stdout=printed, stderr=told)
        peak, root = 0.0, psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, tree_memory(root))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
        wall, after = time.perf_counter() - start, os.times()
        told.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed ({process.returncode}):\n{told.read()}")
        printed.seek(0)
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        return Measured(wall, cpu, peak / 2**20, printed.read().strip().rpartition("\n")[2])


def tree_memory(root: psutil.Process) -> float:
    """Return the bytes that a process and its children hold, a page that several share counted once."""
    found = 0.0
    with contextlib.suppress(psutil.Error):
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                found += process.memory_full_info().pss
    return found


def total(processes: list[Measured]) -> Measured:
    """Return processes that ran one after the other as one."""
    return Measured(
        sum(process.wall for process in processes),
        sum(process.cpu for process in processes),
        max(process.memory for process in processes),
        processes[-1].printed if len(processes) == 1 else "",
    )


def median(values: list[float]) -> float:
    return statistics.median(values)


if __name__ == "__main__":
    main()
