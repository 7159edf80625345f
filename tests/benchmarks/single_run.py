"""One training run: Finegrid against transformers' Trainer with dynamic padding, on the same rows and settings.

    python tests/benchmarks/single_run.py [--models 1M 10M 135M] [--methods LoRA full QLoRA QLoRA-kept]
                                          [--computes fp32 bf16] [--rows text drawn]

Rows of mixed lengths (mean about 90 tokens, at most 256, four tokens in ten with a label), batch 4, one thread: `text`
are those of `grid.py`, text of InsuranceQA in SmolLM2's chat template, all of which begin with its system message;
`drawn` are random tokens that have nothing in common. Each side is a process of its own, and both make the same steps
from the same weights in the same order; Finegrid's has the allocator's settings that the workflow's jobs have, the
Trainer's has none. Printed are CPU seconds a step, without start-up and without the first two steps, the median of
three repeats, each side's most resident memory, and the largest difference of the two loss curves; the last column is
the ratio. bf16 is autocast over weights in fp32, on both sides.

The Trainer's side of QLoRA is as peft and bitsandbytes come: `prepare_model_for_kbit_training(model)` turns gradient
checkpointing on. Finegrid turns it on where a plan says that the memory isn't enough, and here it isn't. `QLoRA-kept`
is the harsh baseline, whose script turns it off.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
REPEATS = 3
FIRST = 2  # steps that warm up
BATCH = 4
ADAPTER = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}  # as QLoRA's paper
METHODS = {"LoRA": (ADAPTER, None), "full": (None, None), "QLoRA": (ADAPTER, NF4), "QLoRA-kept": (ADAPTER, NF4)}
STEPS = {"1M": 42, "10M": 22, "135M": 8}
VOCABULARY = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--computes", nargs="*", default=["fp32"], choices=["fp32", "bf16"])
    parser.add_argument("--rows", nargs="*", default=["text", "drawn"], choices=["text", "drawn"])
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(**options.worker)
        return
    columns = "Trainer, s/step   Finegrid, s/step   MiB, MiB   largest difference of losses   ratio"
    print("model rows  method compute  ", columns)
    with tempfile.TemporaryDirectory() as name:
        for model, rows in itertools.product(options.models, options.rows):
            folder = Path(name) / f"{model}-{rows}"
            prepare(model, rows, folder)
            for method, compute in itertools.product(options.methods, options.computes):
                compare(model, rows, method, compute, folder)


def compare(model: str, rows: str, method: str, compute: str, folder: Path) -> None:
    """Run both sides in turn and print a line."""
    from finegrid.memory import ALLOCATOR

    found: dict[str, list[dict]] = {"trainer": [], "finegrid": []}
    for _ in range(REPEATS):
        for side, results in found.items():
            work = {"side": side, "model": model, "method": method, "compute": compute, "folder": str(folder)}
            environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
            environment |= ALLOCATOR if side == "finegrid" else {}
            command = [sys.executable, __file__, "--worker", json.dumps(work)]
            subprocess.run(command, check=True, env=environment | os.environ, stdout=subprocess.DEVNULL)
            results.append(json.loads((folder / f"{side}.json").read_text()))
    seconds = {side: statistics.median(result["seconds"] for result in results) for side, results in found.items()}
    memory = {side: statistics.median(result["memory_mb"] for result in results) for side, results in found.items()}
    curves = zip(found["trainer"][0]["losses"], found["finegrid"][0]["losses"], strict=True)
    difference = max(abs(one - other) for one, other in curves)
    print(
        f"{model:5} {rows:5} {method:6} {compute:7} {seconds['trainer']:17.3f} {seconds['finegrid']:18.3f}   "
        f"{memory['trainer']:.0f}, {memory['finegrid']:.0f}   {difference:.1e}   "
        f"{seconds['finegrid'] / seconds['trainer']:.2f}",
        flush=True,
    )


def worker(side: str, model: str, method: str, compute: str, folder: str) -> None:
    import torch

    torch.set_num_threads(1)
    values = arguments(model, Path(folder), bf16=compute == "bf16")
    result = {"trainer": plain_trainer, "finegrid": finegrid_trainer}[side](model, method, values, Path(folder))
    (Path(folder) / f"{side}.json").write_text(json.dumps(result))


# ---------------------------------------------------------------- rows and models


def prepare(model: str, kind: str, folder: Path) -> None:
    """Make the folder with the model and its token rows."""
    import grid
    from datasets import Dataset

    folder.mkdir()
    if kind == "text":
        project = grid.prepare(model, folder / "project", kind="mixed")
        shutil.move(project / "data/models" / model, folder / "model")
        train = Dataset.from_file(str(grid.tokens_of(project) / "train.arrow"))
        rows = train.select_columns(["id", "input_ids", "labels"]).to_list()
    else:
        if model == "135M":
            os.symlink(grid.demo_model(), folder / "model")
        else:
            grid.random_model(model, grid.demo_model(), folder / "model")
        rows = token_rows(STEPS[model] * BATCH)
    (folder / "rows.json").write_text(json.dumps(rows))


def token_rows(count: int) -> list[dict[str, Any]]:
    """Return rows whose lengths have a mean of about 90 and a long tail up to 256, each with 40 % label tokens."""
    import numpy as np

    random = np.random.default_rng(0)
    lengths = np.clip(np.exp(random.normal(4.3, 0.6, count)).astype(int), 16, 256)
    rows = []
    for number, length in enumerate(lengths):
        ids = random.integers(3, VOCABULARY, length).tolist()
        prompt = int(length * 0.6)
        rows.append({"id": str(number), "input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


# ---------------------------------------------------------------- the two sides


def arguments(model: str, folder: Path, **values: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "out"),
        "max_steps": STEPS[model],
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        **values,
    }


def callback():
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """CPU seconds at the end of each step."""

        def __init__(self):
            self.ends: list[float] = []

        def on_step_end(self, args, state, control, **kwargs):
            self.ends.append(time.process_time())

        def seconds(self) -> float:
            return (self.ends[-1] - self.ends[FIRST - 1]) / (len(self.ends) - FIRST)

    return Clock()


def trained(trainer: Any) -> dict[str, Any]:
    from finegrid.training.history import peak_memory_mb  # not `ru_maxrss`, which begins with what the parent had

    clock = callback()
    trainer.add_callback(clock)
    trainer.train()
    return {
        "seconds": clock.seconds(),
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "memory_mb": peak_memory_mb(trainer.args.device),
    }


def plain_trainer(model: str, method: str, values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """As a user writes it: AutoModel, peft, bitsandbytes as it comes, the collator that pads each batch."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import (
        AutoModelForCausalLM,
        BitsAndBytesConfig,
        DataCollatorForSeq2Seq,
        PreTrainedTokenizerFast,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    adapter, quantised = METHODS[method]
    set_seed(0)
    options = {"quantization_config": BitsAndBytesConfig(**quantised)} if quantised else {}
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32", **options)
    if quantised:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=method == "QLoRA")
    if adapter:
        base = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **adapter))
    rows = json.loads((folder / "rows.json").read_text())
    data = Dataset.from_list([{key: row[key] for key in ("input_ids", "labels")} for row in rows])
    collator = DataCollatorForSeq2Seq(padding_tokenizer(PreTrainedTokenizerFast), label_pad_token_id=-100)
    return trained(Trainer(base, TrainingArguments(**values), train_dataset=data, data_collator=collator))


def padding_tokenizer(kind: type) -> Any:
    from tokenizers import Tokenizer, models

    return kind(tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>")), pad_token="<pad>")


def finegrid_trainer(model: str, method: str, values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """As ``finegrid train`` does."""
    from datasets import Dataset
    from finegrid.settings import resolve
    from finegrid.training.model import attach_adapter, load_base
    from finegrid.training.trainer import LabelTokenTrainer
    from transformers import Seq2SeqTrainingArguments, set_seed

    adapter, quantised = METHODS[method]
    recipe = {
        "model": {"model_name_or_path": str(folder / "model")},
        "data_config": {"train_file": "rows.jsonl", "test_size": 1},
        "training_args": {"use_cpu": True, "max_steps": 1},
    }
    recipe |= {"peft_config": adapter} if adapter else {}
    recipe |= {"quantization_config": quantised} if quantised else {}
    settings = resolve(recipe, place="benchmark", project=PROJECT)[0]
    set_seed(0)
    built = attach_adapter(settings, load_base(settings, folder / "model", "cpu"))
    data = Dataset.from_list(json.loads((folder / "rows.json").read_text()))
    return trained(LabelTokenTrainer(built, Seq2SeqTrainingArguments(**values), data))


if __name__ == "__main__":
    main()
