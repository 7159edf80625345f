"""Rows per second of import, cleaning and tokenising, on all 21,325 training pairs of InsuranceQA.

    python tests/benchmarks/data.py [--num-proc N]

Each stage is run three times in a process of its own, the median is printed; the start of Python and the imports of the
stages are not counted. Near duplicates are searched too.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
RAW = PROJECT / "data/raw/insuranceqa"
MODEL = PROJECT / "data/models/SmolLM2-135M-Instruct"


def settings(num_proc: int):
    """Return the recipe of the measurement: the demo's data, whole, with near duplicates."""
    from finegrid.settings import RunSettings

    return RunSettings(
        model={"model_name_or_path": str(MODEL)},
        data_config={
            "name": "insuranceqa",
            "train_file": str(RAW / "train.jsonl.gz"),
            "val_file": str(RAW / "validation.jsonl.gz"),
            "test_file": str(RAW / "test.jsonl.gz"),
            "format": "columns",
            "columns": {"prompt": "question", "answer": "answer", "id": "id"},
            "num_proc": num_proc,
            "cleaning": {"near_duplicates": True},
            "limits": {"truncated_answers": 1, "dropped": 1},
        },
        max_input_length=256,
        max_output_length=512,
    )


def measure(stage: str, folder: Path, num_proc: int, queue) -> None:
    """Run one stage and put its seconds and the rows that came in."""
    from finegrid.data.cleaning import clean
    from finegrid.data.importing import import_data
    from finegrid.data.tokenising import tokenise

    recipe = settings(num_proc)
    start = time.perf_counter()
    if stage == "import":
        import_data(recipe, PROJECT, folder / "imported", print)
    elif stage == "clean":
        clean(recipe, folder / "imported", folder / "clean", print)
    else:
        tokenise(recipe, folder / "clean", MODEL, folder / "tokens", print)
    queue.put(time.perf_counter() - start)


def main() -> None:
    """Print one line a stage."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--num-proc", type=int, default=1)
    num_proc = parser.parse_args().num_proc
    context = multiprocessing.get_context("spawn")
    total = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for stage in ("import", "clean", "tokenise"):
            seconds = []
            for _ in range(3):
                queue = context.Queue()
                process = context.Process(target=measure, args=(stage, folder, num_proc, queue))
                process.start()
                seconds.append(queue.get(timeout=600))
                process.join()
            source = {"import": None, "clean": folder / "imported", "tokenise": folder / "clean"}[stage]
            rows = count_rows(source)
            median = statistics.median(seconds)
            total += median
            print(f"{stage}: {rows:,} rows in {median:.2f} s, {rows / median:,.0f} rows/s (num_proc {num_proc})")
        size = sum(path.stat().st_size for path in (folder / "imported").glob("*.jsonl"))
        print(f"all three: {total:.2f} s, {size / 1e6 / total:.2f} MB/s of imported rows")


def count_rows(folder: Path | None) -> int:
    """Return the rows of all three splits."""
    if folder is None:
        import gzip

        return sum(sum(1 for _ in gzip.open(path)) for path in RAW.glob("*.jsonl.gz"))
    return sum(sum(1 for _ in (folder / f"{split}.jsonl").open()) for split in ("train", "validation", "test"))


if __name__ == "__main__":
    main()
