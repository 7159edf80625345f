"""Predicted against measured memory of whole training processes on this CPU.

    python tests/benchmarks/memory.py

Full fine-tuning, LoRA and QLoRA, with and without activation checkpointing, on two models: each is trained for two
steps by ``finegrid.training.train`` in a fresh process, on made-up rows of one length (one row a batch is a token
shorter, so that there is padding as in real data). Measured is the most memory the process ever had resident, which is
what a job asks its machine for; predicted is ``finegrid.memory.training_memory(...).total`` from config.json alone.

The processes run with ``MALLOC_MMAP_THRESHOLD_=262144``: a tensor's memory goes back to the system when the tensor
goes. By its default glibc keeps most of it, in pieces that later tensors often do not fit, differently from run to run:
``--allocator default`` measures 1.1 to 2.2 times the prediction, for about a fifth less CPU time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from finegrid import layout
from finegrid.memory import ALLOCATOR, shape_of, training_memory
from finegrid.settings import RunSettings, resolve

PROJECT = Path(__file__).resolve().parents[2]
STEPS = 2
ADAPTER = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
METHODS = {
    "full": {},
    "LoRA": {"peft_config": ADAPTER},
    "QLoRA": {"peft_config": ADAPTER, "quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}},
}
# Rows, length and label tokens a row.
BATCHES = {"135M": (4, 256, 96), "39M": (16, 256, 64)}
SMALL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(BATCHES), choices=list(BATCHES))
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--allocator", default="returning", choices=["returning", "default", "keeping"])
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        train_once(**options.worker)
        return
    print("model  method checkpointing predicted MiB measured MiB   error     s")
    with tempfile.TemporaryDirectory() as folder:
        for model in options.models:
            for method in options.methods:
                for checkpointing in (False, True):
                    compare(model, method, checkpointing, Path(folder), options.allocator)


def compare(model: str, method: str, checkpointing: bool, folder: Path, allocator: str) -> None:
    """Train once in a process of its own and print a line of the table."""
    place = model_folder(model, folder)
    settings, (rows, length, labels) = recipe(model, method, checkpointing), BATCHES[model]
    shape = shape_of(json.loads((place / "config.json").read_text()))
    memory = training_memory(settings, shape, rows=rows, length=length, labels=labels * rows, device="cpu")
    work = {"model": model, "method": method, "checkpointing": checkpointing, "folder": str(folder)}
    start = time.monotonic()
    subprocess.run([sys.executable, __file__, "--worker", json.dumps(work)], check=True, env=environment(allocator))
    seconds = time.monotonic() - start
    measured = json.loads((folder / "summary.json").read_text())["peak_memory_mb"]
    predicted = memory.total / 2**20
    print(
        f"{model:6} {method:6} {'on' if checkpointing else 'off':13} {predicted:13.0f} {measured:12.0f} "
        f"{100 * (predicted / measured - 1):+6.1f}% {seconds:5.0f}",
        flush=True,
    )


def environment(allocator: str = "default") -> dict[str, str]:
    given = {"returning": {"MALLOC_MMAP_THRESHOLD_": str(2**18)}, "keeping": ALLOCATOR}.get(allocator, {})
    return {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | os.environ | given


def recipe(model: str, method: str, checkpointing: bool) -> RunSettings:
    rows = BATCHES[model][0]
    arguments = {"max_steps": STEPS, "per_device_train_batch_size": rows, "learning_rate": 1e-4}
    arguments |= {"use_cpu": True, "bf16": False}
    arguments |= {"activation_checkpointing": checkpointing, "save_strategy": "no"}
    mapping = {
        "model": {"model_name_or_path": layout.DEMO_MODEL},
        "data_config": {"train_file": "rows.jsonl", "test_size": 1},
        "training_args": arguments,
        **METHODS[method],
    }
    return resolve(mapping, place="benchmark", project=PROJECT)[0]


def model_folder(model: str, folder: Path) -> Path:
    """The demo's real model, or a random one that is made here."""
    if model == "135M":
        from finegrid.data.demo import convert_model

        place = PROJECT / layout.DEMO_MODEL
        if not (place / "model.safetensors").exists():
            convert_model(place)
        return place
    place = folder / model
    if not place.exists():
        code = (
            "import sys, json; from transformers import LlamaConfig, LlamaForCausalLM; "
            "LlamaForCausalLM(LlamaConfig(**json.loads(sys.argv[1]))).save_pretrained(sys.argv[2])"
        )
        subprocess.run([sys.executable, "-c", code, json.dumps(SMALL), str(place)], check=True, env=environment())
        (place / "tokenizer").mkdir(exist_ok=True)
    return place


def train_once(model: str, method: str, checkpointing: bool, folder: str) -> None:
    """Train; the child process does nothing else."""
    from finegrid.training import train as stage

    # The tokenizer is copied into a whole model's folder; the made-up model has none.
    stage._write_tokenizer = lambda *_: None
    place, settings = Path(folder), recipe(model, method, checkpointing)
    stage.train(
        settings,
        tokens=token_files(model, place),
        model=model_folder(model, place),
        output=place / "out",
        history=place / "history.csv",
        summary=place / "summary.json",
        checkpoints=place / "checkpoints",
    )


def token_files(model: str, folder: Path) -> Path:
    """Write rows of one length, every batch's last one a token shorter."""
    from datasets import Dataset
    from datasets.arrow_writer import ArrowWriter

    rows, length, labels = BATCHES[model]
    place = folder / f"tokens-{model}"
    place.mkdir(exist_ok=True)
    columns = {"id": [], "input_ids": [], "labels": []}
    for number in range(rows * STEPS):
        size = length - number % 2
        ids = [3 + (number * 7919 + position * 104729) % 30000 for position in range(size)]
        columns["id"].append(str(number))
        columns["input_ids"].append(ids)
        columns["labels"].append([-100] * (size - labels) + ids[size - labels :])
    for split, part in (("train", columns), ("validation", {key: value[:0] for key, value in columns.items()})):
        data = Dataset.from_dict(part, features=features())
        with ArrowWriter(path=str(place / f"{split}.arrow"), features=features()) as writer:
            for row in data:
                writer.write(row)
            writer.finalize()
    return place


def features():
    from datasets import Features, List, Value

    return Features({"id": Value("string"), "input_ids": List(Value("int32")), "labels": List(Value("int32"))})


if __name__ == "__main__":
    main()
