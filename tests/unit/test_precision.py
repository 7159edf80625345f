"""What a CPU computes in where the recipe doesn't say: the rule, and that training, plan and report follow it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from finegrid import precision
from finegrid.forecast import compute_dtype
from finegrid.memory import shape_of, training_memory
from finegrid.precision import cpu_chooses_bf16, cpu_has_bf16, width_of
from finegrid.publication.report import findings
from finegrid.publication.results import load_results
from finegrid.settings import RunSettings
from finegrid.training.train import train
from study_results import make_results
from token_rows import random_rows, write_tokens
from transformers import LlamaConfig, LlamaForCausalLM

LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"]}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
SIZES = {"vocab_size": 256, "hidden_size": 512, "intermediate_size": 64, "num_hidden_layers": 1}


@pytest.fixture(params=[True, False], ids=["with bf16", "without"])
def processor(request, monkeypatch) -> bool:
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: request.param)
    return request.param


def recipe(dtype="float32", quantization_config=None, **training_args) -> RunSettings:
    return RunSettings(
        model={"model_name_or_path": "data/models/wide", "dtype": dtype},
        peft_config=LORA,
        quantization_config=quantization_config,
        training_args={"use_cpu": True, "max_steps": 3, "save_strategy": "no"} | training_args,
    )


@pytest.mark.parametrize(
    ("settings", "width", "chosen"),
    [
        (recipe(), 512, True),
        (recipe(), 511, False),
        (recipe(), None, False),
        (recipe(bf16=False), 4096, False),
        (recipe(bf16=True), 4096, False),  # asked for, not chosen
        (recipe(fp16=True), 4096, False),
        (recipe(deepspeed="config/deepspeed/zero2.json"), 4096, False),
        (recipe(dtype="bfloat16"), 4096, False),
        (recipe(quantization_config=NF4), 4096, False),
    ],
)
def test_a_wide_model_whose_recipe_does_not_say(settings, width, chosen, processor):
    assert cpu_chooses_bf16(settings, width) == (chosen and processor)
    asked = settings.training_args.get("bf16")
    if not settings.training_args.get("fp16") and settings.model.dtype == "float32":
        expected = "bfloat16" if asked or (chosen and processor) else "float32"
        assert compute_dtype(settings, None, width) == expected


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("processor\t: 0\nflags\t\t: fpu sse2 avx512f avx512_bf16 fsrm\n\nprocessor\t: 1\n", True),
        ("flags\t\t: fpu avx512f amx_bf16 amx_tile\n", True),
        ("flags\t\t: fpu sse2 avx2 avx512f\n", False),
        ("model name\t: avx512_bf16\nflags\t\t: fpu\n", False),
        ("Features\t: fp asimd bf16\n", False),  # ARM: nothing was measured
        (None, False),
    ],
)
def test_the_processors_instructions_are_looked_up(text, found, tmp_path, monkeypatch):
    path = tmp_path / "cpuinfo"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(precision, "CPU_INFO", path)
    cpu_has_bf16.cache_clear()
    try:
        assert cpu_has_bf16() == found
    finally:
        cpu_has_bf16.cache_clear()


@pytest.mark.skipif(not precision.CPU_INFO.exists(), reason="not Linux")
def test_torch_finds_the_same_instructions():
    found = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert cpu_has_bf16() == found


def test_the_width_is_the_texts():
    assert width_of({"hidden_size": 576}) == 576
    assert width_of({"hidden_size": 64, "text_config": {"hidden_size": 1024}}) == 1024
    assert width_of({"n_embd": 768}) is None


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> tuple[Path, Path]:
    """Return token rows and a small model that is wide enough."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=8)).save_pretrained(folder / "model")
    rows = {"train": random_rows(12), "validation": random_rows(3, seed=1, split="validation")}
    return write_tokens(folder / "tokens", **rows), folder / "model"


def run(settings: RunSettings, wide: tuple[Path, Path], folder: Path, progress=lambda line: None) -> dict:
    names = {"output": "adapter", "history": "history.csv", "summary": "summary.json", "checkpoints": "scratch/run"}
    places = {key: folder / name for key, name in names.items()}
    return train(settings, tokens=wide[0], model=wide[1], progress=progress, **places)


def test_training_computes_in_what_was_chosen_and_says_so(wide, processor, tmp_path):
    found = run(recipe(), wide, tmp_path / "left")
    said = run(recipe(bf16=processor), wide, tmp_path / "said")
    assert found["compute_dtype"] == said["compute_dtype"] == ("bfloat16" if processor else "float32")
    assert found["dtype"] == "float32"
    chosen = [note for note in found["notes"] if note.startswith("bf16 compute")]
    assert len(chosen) == processor
    assert all("the model is 512 wide" in note for note in chosen)
    assert found["train_loss"] == said["train_loss"]


def test_a_checkpoint_of_a_machine_with_another_type_is_not_gone_on_from(wide, monkeypatch, tmp_path):
    class Stopped(Exception):
        pass

    def stop(line: str) -> None:
        if line.startswith("step 2"):
            raise Stopped

    monkeypatch.setattr("finegrid.training.progress.SECONDS_BETWEEN_LINES", 0.0)
    settings = recipe(save_strategy="steps", save_steps=1, logging_steps=1)
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
    with pytest.raises(Stopped):
        run(settings, wide, tmp_path, progress=stop)
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)
    found = run(settings, wide, tmp_path)
    assert (found["resumed_from"], found["compute_dtype"]) == (None, "float32")
    assert "started anew: the checkpoints at hand were of other compute type" in found["notes"]


def test_a_plan_counts_the_memory_of_what_will_be_chosen(wide, processor):
    shape = shape_of(json.loads((wide[1] / "config.json").read_text()))
    batch = {"rows": 4, "length": 256, "labels": 400, "device": "cpu"}
    left, said = (training_memory(settings, shape, **batch) for settings in (recipe(), recipe(bf16=processor)))
    other = training_memory(recipe(bf16=not processor), shape, **batch)
    assert left == said != other
    on_gpu = training_memory(recipe(bf16=False, use_cpu=None), shape, **batch | {"device": "cuda"})
    assert on_gpu != training_memory(recipe(use_cpu=None), shape, **batch | {"device": "cuda"})


def test_runs_that_machines_computed_in_different_types_are_told(tmp_path):
    study = make_results(tmp_path)
    assert not [row for row in findings(load_results(study)) if row["place"] == "training_args.bf16"]
    paths = sorted((study / "training").glob("lora-*.json"))
    for path in paths:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"compute_dtype": "bfloat16"}))
    (found,) = [row for row in findings(load_results(study)) if row["place"] == "training_args.bf16"]
    assert found["severity"] == "warning"
    assert f"{len(paths)} run" in found["message"]
    assert "in bfloat16" in found["message"]
    assert "in float32" in found["message"]
    for path in paths:  # what a recipe asks for is a level, no accident
        settings = study / "settings" / path.name
        content = json.loads(settings.read_text())
        settings.write_text(json.dumps(content | {"training_args": content["training_args"] | {"bf16": True}}))
    assert not [row for row in findings(load_results(study)) if row["place"] == "training_args.bf16"]
