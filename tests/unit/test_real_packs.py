"""A step made for several runs at once against the run alone, on the real model and data: 200 steps of SmolLM2-135M."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from finegrid.settings import RunSettings
from test_joint import losses, one, together
from token_rows import write_tokens
from transformers import AutoTokenizer

STEPS = 200
# With the steep rate a run goes where its roundings lead, and so does any run whose first steps are large:
# tests/benchmarks/packed.py has more rates. Here the steep one is the neighbour, which must not be felt, nor its end.
RATE, STEEP = 2e-4, 3e-3


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def short_rows(model: Path, data: Path) -> list[dict]:
    """Return the first rows of InsuranceQA with a short question, and of each answer its first words."""
    tokenizer, rows = AutoTokenizer.from_pretrained(model), []
    with gzip.open(data / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            pair = json.loads(line)
            prompt, answer = tokenizer(pair["question"] + "\n").input_ids, tokenizer(pair["answer"]).input_ids[:6]
            if len(prompt) <= 10:
                row = {"id": str(len(rows)), "input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
                rows.append(row | {"prompt_length": len(prompt), "truncated_prompt": False, "truncated_answer": True})
    return rows[:STEPS]


def recipe(rate: float, steps: int = STEPS) -> RunSettings:
    arguments = {"max_steps": steps, "learning_rate": rate, "warmup_steps": 0.1, "per_device_train_batch_size": 1}
    arguments |= {"logging_steps": 1, "save_strategy": "no", "use_cpu": True, "bf16": False}
    adapter = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    return RunSettings(model={"model_name_or_path": "data/models/real"}, peft_config=adapter, training_args=arguments)


def test_beside_a_steep_run_each_loss_of_200_steps_is_the_run_alones(smollm2_dir, insuranceqa_dir, tmp_path):
    rows = short_rows(smollm2_dir, insuranceqa_dir)
    assert len(rows) == STEPS
    tokens = write_tokens(tmp_path / "tokens", train=rows, validation=[])
    one(recipe(RATE), tokens, smollm2_dir, tmp_path / "alone")
    together({"own": recipe(RATE), "steep": recipe(STEEP, steps=60)}, tokens, smollm2_dir, tmp_path)
    expected, found, steep = (losses(tmp_path / name) for name in ("alone", "own", "steep"))
    assert (len(expected), len(steep)) == (STEPS, 60)
    assert found == pytest.approx(expected, abs=1e-4)
    assert sum(expected[-50:]) < sum(expected[:50])
    assert max(abs(one - other) for one, other in zip(steep, expected[:60], strict=True)) > 0.5
