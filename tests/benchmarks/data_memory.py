"""Import, cleaning and tokenising of a file larger than the memory that they may take.

    python tests/benchmarks/data_memory.py [--gigabytes 2] [--limit 1] [--num-proc 2] [--stages import clean]

The file's questions and answers are sentences of InsuranceQA, drawn and put together anew; near duplicates are
searched. Each stage is a process of its own, and neither it nor any of its workers may have more than the limit of
memory of their own: the kernel enforces it (RLIMIT_DATA). Printed are each stage's wall and CPU time and the most that
all its processes held together (each shared page counted once).
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import resource
import sys
import tempfile
from pathlib import Path

from data import RAW, STAGES, measure, run_stage, settings


def main() -> None:
    """Print a line a stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--limit", type=float, default=1, help="GB")
    parser.add_argument("--num-proc", type=int, default=2)
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        limit = int(options.limit * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        folder = Path(options.folder)
        print(run_stage(options.stage, folder, settings(options.num_proc, folder, ".jsonl")))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = write_raw(folder, int(options.gigabytes * 1e9))
        print(f"{rows:,} rows, {options.gigabytes} GB; limit {options.limit} GB", flush=True)
        own = ["--limit", str(options.limit), "--num-proc", str(options.num_proc), "--folder", name]
        for stage in options.stages:
            found = measure([sys.executable, __file__, "--stage", stage, *own], folder)
            speed = options.gigabytes * 1e3 / found.wall
            print(
                f"{stage}: {found.wall:.0f} s wall, {found.cpu:.0f} s CPU, {speed:.1f} MB/s, {found.memory:.0f} MiB",
                flush=True,
            )


def write_raw(folder: Path, size: int) -> int:
    """Write three splits, train of so many bytes; return the rows of train."""
    with gzip.open(RAW / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        pairs = [json.loads(line) for line in file]
    questions = [pair["question"] for pair in pairs]
    sentences = sorted({sentence for pair in pairs for sentence in re.split(r"(?<=[.?!])\s+", pair["answer"])})
    draw, rows = random.Random(0), {}
    for split, wanted in (("train", size), ("validation", size // 1000), ("test", size // 1000)):
        written = rows[split] = 0
        with (folder / f"{split}.jsonl").open("wb") as file:
            while written < wanted:
                rows[split] += 1
                question = f"{draw.choice(questions)} {draw.choice(questions)}"
                answer = "  ".join(draw.choices(sentences, k=draw.randrange(2, 10)))
                row = {"id": f"{split}-{rows[split]}", "question": question, "answer": answer}
                written += file.write(json.dumps(row).encode() + b"\n")
    return rows["train"]


if __name__ == "__main__":
    main()
