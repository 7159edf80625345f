"""A grid of 12 LoRA runs through snakemake, against 12 scripts around transformers' Trainer, and around TRL's.

    python tests/benchmarks/grid.py [--models 1M 10M 135M] [--sides …] [--repeats 3]

Four learning rates × three seeds, batch 4, fp32; every run evaluates its validation rows before and after training,
saves its adapter, and its loss on the test rows is computed. Rows are text of InsuranceQA of mixed lengths, those of
`single_run.py` (mean about 90, at most 256 tokens, the last four in ten taught); with ``--rows answers`` its questions
and whole answers. All sides read the same token rows from the same Arrow files. 1M and 10M are random Llamas with a
vocabulary of 8,192 tokens; 135M is SmolLM2.

The scripts are what a user writes: a process a run, AutoModel, peft, Trainer, the collator that pads each batch. They
run one after the other with two threads (`sequential`) and two at a time with a thread each (`pairs`); `harsh` is pairs
with the allocator's settings of `finegrid.memory`; `trl` is pairs around SFTTrainer, its defaults but the same
tokens, masks and precision (if it is installed). Finegrid's side is all that `snakemake` does from the tokens to
the metrics of the 12 runs. Printed are wall seconds, the most memory that a side's processes had together, the largest
difference of the runs' training losses to the scripts', and ratios of medians.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
from finegrid import layout

PROJECT = Path(__file__).resolve().parents[2]
SIZES = {  # hidden, intermediate, layers, heads; steps
    "1M": ((64, 192, 4, 4), 100),
    "10M": ((256, 768, 8, 8), 100),
    "135M": (None, 10),
}
VOCABULARY = 8192
RATES = (1e-4, 2e-4, 5e-4, 1e-3)  # higher ones diverge for a while on a random model, differently by a rounding
SEEDS = (0, 1, 2)
BATCH = 4
ROWS = {"train": 400, "validation": 32, "test": 32}
TAUGHT = 0.4  # of a row's tokens
PAIRS_A_ROW = 4  # at most, of a row of 256 tokens
TEMPLATE_TOKENS, TOKENS_A_WORD = 31, 1.2  # of the chat template, and about so many of a word
SIDES = ("sequential", "pairs", "harsh", "trl", "finegrid")
STUDY = """\
title: Which learning rate?
recipe: config/recipes/grid.yaml
factors:
  rate: {{key: training_args.learning_rate, levels: {rates}}}
seeds: {seeds}
compare: {{baseline: {{rate: {first}}}, metric: loss, margin: 0.01}}
"""
RECIPE = """\
model: {{model_name_or_path: data/models/{model}}}
data_config:
  train_file: data/raw/grid/train.jsonl
  val_file: data/raw/grid/validation.jsonl
  test_file: data/raw/grid/test.jsonl
  format: columns
  columns: {{prompt: question, answer: answer, id: id}}
  limits: {{truncated_answers: 1, dropped: 1}}
max_input_length: 256
max_output_length: 256
training_args:
  max_steps: {steps}
  learning_rate: 1.0e-3
  per_device_train_batch_size: 4
  per_device_eval_batch_size: 8
  weight_decay: 0.0
  lr_scheduler_type: linear
  warmup_steps: 0
  logging_steps: 1
  eval_strategy: "no"
  save_strategy: "no"
  use_cpu: true
  bf16: false
peft_config: {{peft_type: LORA, r: 8, lora_alpha: 16, lora_dropout: 0.0, target_modules: all-linear}}
evaluation: {{batch_size: 8, generate: false}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--sides", nargs="*", default=list(SIDES), choices=SIDES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", default="mixed", choices=["mixed", "answers"])
    parser.add_argument("--held-out", type=int, default=ROWS["test"], help="rows of validation, and of test")
    parser.add_argument("--config", nargs="*", default=[], help="more of snakemake's --config, such as pack=off")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(**options.worker)
        return
    sides = [side for side in options.sides if side != "trl" or find_spec("trl")]
    if "trl" not in sides and "trl" in options.sides:
        print("trl is not installed: pip install trl==1.16.0 to see its side")
    for model in options.models:
        with tempfile.TemporaryDirectory() as name:
            counts = ROWS | {"validation": options.held_out, "test": options.held_out}
            project = prepare(model, Path(name) / "project", counts=counts, kind=options.rows)
            print(f"{model}: {lengths(project)}", flush=True)
            results: dict[str, list[Side]] = {side: [] for side in sides}
            for _ in range(options.repeats):
                for side, found in results.items():
                    found.append(run_side(side, model, project, options.config))
            report(model, results)


# ---------------------------------------------------------------- the project


def prepare(
    model: str, project: Path, recipe: str = RECIPE, counts: dict[str, int] = ROWS, kind: str = "answers"
) -> Path:
    """Return a copy of the project with the study, its model and its tokens.

    Args:
        counts: rows of each split.
        kind: of rows, see the module: `mixed` or `answers`.
    """
    project.mkdir()
    for name in ("Snakefile", "config", "workflow", "profiles", "envs", "pyproject.toml"):
        copy = shutil.copytree if (PROJECT / name).is_dir() else shutil.copy
        copy(PROJECT / name, project / name)
    source = demo_model()
    if model == "135M":
        (project / "data/models").mkdir(parents=True)
        os.symlink(source, project / "data/models/135M")
    else:
        random_model(model, source, project / "data/models" / model)
    rows(project / "data/raw/grid", counts, kind)
    steps = SIZES[model][1]
    (project / "config/recipes/grid.yaml").write_text(recipe.format(model=model, steps=steps))
    study = STUDY.format(rates=[f"{rate:.1e}" for rate in RATES], seeds=list(SEEDS), first=f"{RATES[0]:.1e}")
    (project / "config/studies/grid.yaml").write_text(study.replace("'", ""))
    snakemake(project, ["results/grid/plan.json"], [])
    return project


def demo_model() -> Path:
    from finegrid.data.demo import convert_model

    folder = PROJECT / layout.DEMO_MODEL
    if not (folder / "model.safetensors").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        convert_model(folder)
    return folder


def raw(split: str) -> list[dict[str, Any]]:
    import gzip

    from finegrid.data.demo import export_insuranceqa

    folder = PROJECT / layout.DEMO_DATA
    if not (folder / "test.jsonl.gz").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        export_insuranceqa(folder)
    with gzip.open(folder / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def random_model(model: str, source: Path, folder: Path) -> None:
    """Write a random Llama with a byte-pair tokenizer of its own, trained on the questions and answers."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    texts = [f"{row['question']} {row['answer']}" for row in raw("train")[:4000]]
    tokenizer = AutoTokenizer.from_pretrained(source).train_new_from_iterator(texts, VOCABULARY)
    hidden, intermediate, layers, heads = SIZES[model][0]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def rows(folder: Path, counts: dict[str, int], kind: str) -> None:
    folder.mkdir(parents=True)
    for number, (split, count) in enumerate(counts.items()):
        pairs = raw(split)
        if kind == "mixed":
            starts = itertools.count(0, PAIRS_A_ROW)
            made = [
                mixed(pairs[place:], tokens)
                for place, tokens in zip(starts, drawn_lengths(count, number), strict=False)
            ]
        else:
            made = pairs[:count]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))


def drawn_lengths(count: int, seed: int) -> list[int]:
    """Return tokens of rows: a mean of about 90 and a long tail up to 256."""
    import numpy as np

    return np.clip(np.exp(np.random.default_rng(seed).normal(4.3, 0.6, count)), 16, 256).astype(int).tolist()


def mixed(pairs: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """Return a row of about so many tokens: the words of the first pairs, the last four tokens in ten taught."""
    count = max(6, round((tokens - TEMPLATE_TOKENS) / TOKENS_A_WORD))
    words = " ".join(f"{pair['question']} {pair['answer']}" for pair in pairs[:PAIRS_A_ROW]).split()
    count = min(count, len(words))
    taught = min(count - 2, round(TAUGHT * tokens / TOKENS_A_WORD))
    asked = count - taught
    return pairs[0] | {"question": " ".join(words[:asked]), "answer": " ".join(words[asked:count])}


def lengths(project: Path) -> str:
    from datasets import Dataset

    train = Dataset.from_file(str(tokens_of(project) / "train.arrow"))
    sizes = [len(row) for row in train["input_ids"]]
    taught = sum(label != -100 for row in train["labels"] for label in row)
    share = taught / sum(sizes)
    return f"{len(sizes)} rows of {statistics.mean(sizes):.0f} tokens, {max(sizes)} at most, {share:.0%} label tokens"


def tokens_of(project: Path) -> Path:
    return next((project / "data/tokens").iterdir())


# ---------------------------------------------------------------- the sides


class Side:
    """Wall seconds, peak of memory in MiB of all processes, and the loss curve of each run, of one repeat."""

    def __init__(self, seconds: float, memory: float, losses: dict[str, list[float]]):
        self.seconds, self.memory, self.losses = seconds, memory, losses


def run_side(side: str, model: str, project: Path, config: list[str]) -> Side:
    with most_memory() as memory:
        start = time.perf_counter()
        losses = finegrid(project, config) if side == "finegrid" else scripts(side, model, project)
        seconds = time.perf_counter() - start
    print(f"{model} {side}: {seconds:.1f} s, {memory[0]:,.0f} MiB", flush=True)
    return Side(seconds, memory[0], losses)


@contextlib.contextmanager
def most_memory():
    """Give a list with the most that this process's children had resident together, in MiB; shared pages once."""
    found, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.25):
            total = 0
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    total += child.memory_full_info().pss
            found[0] = max(found[0], total / 2**20)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def finegrid(project: Path, config: list[str]) -> dict[str, list[float]]:
    from finegrid.study import load_study

    for name in ("runs", "metrics", "history", "training", "settings", "provenance"):
        shutil.rmtree(project / "results/grid" / name, ignore_errors=True)
    runs = load_study(Path("config/studies/grid.yaml"), project).runs
    snakemake(project, [f"results/grid/metrics/{run.id}.json" for run in runs], config)
    found = {}
    for run in runs:
        lines = (project / f"results/grid/history/{run.id}.csv").read_text().splitlines()
        column = lines[0].split(",").index("loss")
        arguments = run.settings.training_args
        key = f"{float(arguments['learning_rate']):.1e}-{arguments['seed']}"
        found[key] = [float(line.split(",")[column]) for line in lines[1:] if line.split(",")[column]]
    return found


def snakemake(project: Path, targets: list[str], config: list[str], cores: int = 2) -> None:
    environment = os.environ | {
        "PYTHONPATH": str(project / "workflow"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    command = ["snakemake", "--config", "study=grid", *config, "--cores", str(cores), "--", *targets]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)


def scripts(side: str, model: str, project: Path) -> dict[str, list[float]]:
    """Run the 12 scripts and return their losses."""
    from finegrid.memory import ALLOCATOR

    at_once, threads = (1, 2) if side == "sequential" else (2, 1)
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        **(ALLOCATOR if side == "harsh" else {}),
    }
    output = project.parent / side
    shutil.rmtree(output, ignore_errors=True)

    def one(rate: float, seed: int) -> tuple[str, list[float]]:
        key = f"{rate:.1e}-{seed}"
        work = {"side": side, "model": model, "project": str(project), "output": str(output / key)}
        command = [sys.executable, __file__, "--worker", json.dumps(work | {"rate": rate, "seed": seed})]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        return key, json.loads((output / key / "losses.json").read_text())

    with ThreadPoolExecutor(at_once) as pool:
        return dict(pool.map(lambda pair: one(*pair), [(rate, seed) for rate in RATES for seed in SEEDS]))


def worker(side: str, model: str, project: str, output: str, rate: float, seed: int) -> None:
    """A user's script: one run."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, set_seed

    set_seed(seed)
    folder, tokens = Path(project) / "data/models" / model, tokens_of(Path(project))
    columns = ["input_ids", "labels"]
    train, validation, test = (
        Dataset.from_file(str(tokens / f"{split}.arrow")).select_columns(columns)
        for split in ("train", "validation", "test")
    )
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    values = {
        "output_dir": output,
        "max_steps": SIZES[model][1],
        "learning_rate": rate,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": 8,
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_on_start": True,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "seed": seed,
    }
    trainer = (trl_trainer if side == "trl" else plain_trainer)(
        base, values, train, validation, DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    )
    trainer.train()
    trainer.evaluate()
    trainer.evaluate(test, metric_key_prefix="test")
    trainer.save_model(output)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    (Path(output) / "losses.json").write_text(json.dumps(losses))


def adapter() -> Any:
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")


def plain_trainer(base, values: dict[str, Any], train, validation, collator) -> Any:
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    model = get_peft_model(base, adapter())
    return Trainer(
        model, TrainingArguments(**values), train_dataset=train, eval_dataset=validation, data_collator=collator
    )


def trl_trainer(base, values: dict[str, Any], train, validation, collator) -> Any:
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(**values, dataset_kwargs={"skip_prepare_dataset": True}, gradient_checkpointing=False)
    return SFTTrainer(
        base, arguments, train_dataset=train, eval_dataset=validation, data_collator=collator, peft_config=adapter()
    )


# ---------------------------------------------------------------- what is printed


def report(model: str, results: dict[str, list[Side]]) -> None:
    seconds = {side: statistics.median(each.seconds for each in found) for side, found in results.items()}
    memory = {side: statistics.median(each.memory for each in found) for side, found in results.items()}
    for side in results:
        print(f"{model}: {side}: {seconds[side]:.1f} s, {memory[side]:,.0f} MiB")
    if "finegrid" not in results:
        return
    plain = [side for side in ("sequential", "pairs") if side in seconds]
    against = {"the better of the scripts": min((seconds[side] for side in plain), default=None)}
    against |= {side: seconds.get(side) for side in ("harsh", "trl")}
    for name, other in against.items():
        if other:
            print(f"{model}: finegrid / {name}: {seconds['finegrid'] / other:.2f}")
    ours = results["finegrid"][0].losses
    for side in plain[:1]:
        theirs = results[side][0].losses
        largest = max(abs(a - b) for key in theirs for a, b in zip(theirs[key], ours[key], strict=True))
        print(f"{model}: losses differ by at most {largest:.1e} ({side})")


if __name__ == "__main__":
    main()
