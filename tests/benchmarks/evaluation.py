"""Scoring 12 adapters on 64 prompts through snakemake, against 12 scripts around transformers' ``generate``.

    python tests/benchmarks/evaluation.py [--models 1M 10M 135M] [--sides …] [--repeats 3]

The adapters are those of the grid of `grid.py`, trained for a few steps before. Every side computes the loss of 64 test
rows and generates at most 48 tokens for each of their prompts, in batches of 16 rows a run. The scripts are what a user
writes: a process a run, AutoModel and peft, prompts padded on the left, in the rows' order; they run one after the
other with two threads (`sequential`) and two at a time with a thread each (`pairs`). Finegrid's side is all that
`snakemake` does from the trained adapters to predictions and metrics, ROUGE, BLEU and chrF included. Printed are wall
seconds, the most memory that a side's processes had together, the share of equal answers and the ratio of medians.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from finegrid.study import load_study
from grid import RECIPE, ROWS, SIZES, most_memory, prepare, snakemake, tokens_of

PROMPTS, BATCH, NEW_TOKENS = 64, 16, 48
SIDES = ("sequential", "pairs", "finegrid")
EVALUATION = f"evaluation: {{{{batch_size: {BATCH}}}}}\ngeneration_config: {{{{max_new_tokens: {NEW_TOKENS}}}}}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--sides", nargs="+", default=list(SIDES[:-1]), choices=SIDES[:-1], help="of the scripts")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(**options.worker)
        return
    recipe = RECIPE.replace("evaluation: {{batch_size: 8, generate: false}}\n", EVALUATION)
    recipe = recipe.replace("max_steps: {steps}", "max_steps: 3")
    for model in options.models:
        with tempfile.TemporaryDirectory() as name:
            project = prepare(model, Path(name) / "project", recipe, ROWS | {"test": PROMPTS})
            runs = [run.id for run in load_study(Path("config/studies/grid.yaml"), project).runs]
            snakemake(project, [f"results/grid/training/{run}.json" for run in runs], [])
            compare(model, project, runs, [*options.sides, SIDES[-1]], options.repeats)


def compare(model: str, project: Path, runs: list[str], sides: list[str], repeats: int) -> None:
    """Let the sides take turns, and print medians and the ratio."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    memory: dict[str, list[float]] = {side: [] for side in sides}
    answers: dict[str, dict[str, list[str]]] = {}
    for _ in range(repeats):
        for side in sides:
            with most_memory() as peak:
                start = time.perf_counter()
                answers[side] = ours(project, runs) if side == "finegrid" else scripts(side, model, project, runs)
                seconds[side].append(time.perf_counter() - start)
            memory[side].append(peak[0])
            print(f"{model} {side}: {seconds[side][-1]:.1f} s, {peak[0]:,.0f} MiB", flush=True)
    middle = {side: statistics.median(found) for side, found in seconds.items()}
    for side in sides:
        print(f"{model}: {side}: {middle[side]:.1f} s, {statistics.median(memory[side]):,.0f} MiB")
    pairs = [
        (one, other)
        for run in runs
        for one, other in zip(answers["finegrid"][run], answers[sides[0]][run], strict=True)
    ]
    print(f"{model}: {sum(one == other for one, other in pairs) / len(pairs):.1%} of {len(pairs)} answers are equal")
    scripts_took = min(middle[side] for side in sides if side != "finegrid")
    print(f"{model}: finegrid / the better of the scripts: {middle['finegrid'] / scripts_took:.2f}")


def ours(project: Path, runs: list[str]) -> dict[str, list[str]]:
    shutil.rmtree(project / "results/grid/metrics", ignore_errors=True)
    for run in runs:
        (project / f"results/grid/runs/{run}/predictions.jsonl").unlink(missing_ok=True)
    snakemake(project, [f"results/grid/metrics/{run}.json" for run in runs], [])
    return {run: predictions(project / f"results/grid/runs/{run}/predictions.jsonl") for run in runs}


def predictions(path: Path) -> list[str]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row["prediction"] for row in rows if row["split"] == "test"]


def scripts(side: str, model: str, project: Path, runs: list[str]) -> dict[str, list[str]]:
    at_once, threads = (1, 2) if side == "sequential" else (2, 1)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}

    def one(run: str) -> tuple[str, list[str]]:
        output = project.parent / f"{run}.json"
        work = json.dumps({"model": model, "project": str(project), "run": run, "output": str(output)})
        command = [sys.executable, __file__, "--worker", work]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        return run, json.loads(output.read_text())

    with ThreadPoolExecutor(at_once) as pool:
        return dict(pool.map(one, runs))


def worker(model: str, project: str, run: str, output: str) -> None:
    """A user's script: one run."""
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

    folder = Path(project) / "data/models" / model
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trained = PeftModel.from_pretrained(base, Path(project) / f"results/grid/runs/{run}/adapter").eval()
    rows = Dataset.from_file(str(tokens_of(Path(project)) / "test.arrow"))
    labelled = [{key: row[key] for key in ("input_ids", "labels")} for row in rows]
    pad = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    answers, losses = [], []
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    with torch.no_grad():
        for start in range(0, len(labelled), BATCH):
            losses.append(trained(**pad(labelled[start : start + BATCH])).loss.item())
        tokenizer.padding_side = "left"
        for start in range(0, len(labelled), BATCH):
            part = rows.select(range(start, min(start + BATCH, len(rows))))
            prompts = [row["input_ids"][: row["prompt_length"]] for row in part]
            batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
            new = trained.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=ends)
            new = new[:, batch["input_ids"].shape[1] :]
            answers += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    Path(output).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
