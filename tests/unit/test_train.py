"""A whole training run: what it writes, that it loads elsewhere, that it resumes to the same bits, that it refuses."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from finegrid.errors import UserError
from finegrid.evaluation.likelihood import label_nll
from finegrid.settings import RunSettings, TrainingSettings
from finegrid.training import progress as progress_module
from finegrid.training import train as train_module
from finegrid.training import trainer as trainer_module
from finegrid.training.model import load_base, load_trained
from finegrid.training.train import train
from finegrid.training.validation import label_tokens
from token_rows import plain_loss, random_rows, write_tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

LORA = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.1}
WITHOUT_DROPOUT = LORA | {"lora_dropout": 0.0}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
VALIDATION = random_rows(7, seed=1, split="validation")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens"), train=random_rows(22), validation=VALIDATION)


@pytest.fixture(autouse=True)
def a_line_each_step(monkeypatch):
    monkeypatch.setattr(progress_module, "SECONDS_BETWEEN_LINES", 0.0)


def recipe(
    peft_config=None, quantization_config=None, dtype="float32", early_stopping=None, **training_args
) -> RunSettings:
    defaults = {
        "use_cpu": True,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 1,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "save_strategy": "no",
    }
    return RunSettings(
        model={"model_name_or_path": "data/models/tiny", "dtype": dtype},
        peft_config=peft_config,
        quantization_config=quantization_config,
        early_stopping=early_stopping,
        training_args=defaults | training_args,
    )


def run(settings: RunSettings, tokens: Path, model: Path, folder: Path, progress=lambda line: None, **options) -> dict:
    return train(
        settings,
        tokens=tokens,
        model=model,
        output=folder / "adapter",
        history=folder / "history.csv",
        summary=folder / "summary.json",
        checkpoints=folder / "scratch" / "run",
        progress=progress,
        **options,
    )


def read_history(folder: Path) -> list[dict[str, float | None]]:
    with (folder / "history.csv").open() as file:
        return [{key: float(value) if value else None for key, value in row.items()} for row in csv.DictReader(file)]


def numbers(folder: Path) -> list[tuple]:
    """The history without what a clock or the machine's memory decides."""
    return [tuple(v for k, v in row.items() if k not in ("seconds", "memory_mb")) for row in read_history(folder)]


def weights(folder: Path, name="adapter_model.safetensors") -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter" / name)


def assert_equal_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# ---------------------------------------------------------------- what is written


def test_the_adapter_loads_in_plain_peft_with_the_loss_of_the_summary(tokens, tiny_model_dir, tmp_path):
    from peft import PeftModel

    result = run(recipe(LORA), tokens, tiny_model_dir, tmp_path)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), tmp_path / "adapter").eval()
    total, count = plain_loss(plain, VALIDATION)
    assert result["final_eval_loss"] == pytest.approx(total / count, abs=1e-5)
    ours = load_trained(recipe(LORA), tiny_model_dir, tmp_path / "adapter", "cpu")
    input_ids = torch.tensor([VALIDATION[0]["input_ids"]])
    assert torch.equal(ours(input_ids).logits, plain(input_ids).logits)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "data/models/tiny"
    assert config["target_modules"] == sorted(config["target_modules"])
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_the_model_loads_in_plain_transformers_with_the_loss_of_the_summary(tokens, tiny_model_dir, tmp_path):
    result = run(recipe(), tokens, tiny_model_dir, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    total, count = plain_loss(plain, VALIDATION)
    assert result["final_eval_loss"] == pytest.approx(total / count, abs=1e-5)
    assert result["final_eval_loss"] < result["base_eval_loss"]
    ours = load_trained(recipe(), tiny_model_dir, tmp_path / "adapter", "cpu")
    input_ids = torch.tensor([VALIDATION[0]["input_ids"]])
    assert torch.equal(ours(input_ids).logits, plain(input_ids).logits)
    assert plain.config.use_cache, "training without a cache must not slow down whoever generates"
    expected = AutoTokenizer.from_pretrained(tiny_model_dir)
    found = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    assert found.chat_template == expected.chat_template
    assert found("Is hail damage covered?") == expected("Is hail damage covered?")
    assert not list((tmp_path / "adapter").glob("*.bin")), "no pickle"


def test_history_and_summary_tell_the_run(tokens, tiny_model_dir, tmp_path):
    lines: list[str] = []
    settings = recipe(LORA, eval_strategy="steps", eval_steps=4, logging_steps=4, predict_with_generate=True)
    result = run(settings, tokens, tiny_model_dir, tmp_path, lines.append)
    rows = read_history(tmp_path)
    assert [(row["step"], row["eval_loss"] is not None) for row in rows] == [
        (0, True),
        (4, False),
        (4, True),
        (6, False),
        (6, True),
    ]
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    total, count = plain_loss(base, VALIDATION)
    assert rows[0]["eval_loss"] == pytest.approx(total / count, abs=1e-5)
    seen = random_rows(22)  # 6 windows of 8, 8 and 6 rows: both epochs whole
    label_tokens = 2 * sum(label != -100 for row in seen for label in row["labels"])
    assert result["label_tokens"] == rows[-1]["label_tokens"] == label_tokens
    assert result["tokens"] == rows[-1]["tokens"] == 2 * sum(len(row["input_ids"]) for row in seen)
    assert json.loads((tmp_path / "summary.json").read_text()) == result
    assert (
        result
        | {
            "method": "lora",
            "steps": 6,
            "epochs": 2.0,
            "effective_batch_size": 8,
            "device": "cpu",
            "dtype": "float32",
            "compute_dtype": "float32",
            "base_eval_loss": rows[0]["eval_loss"],
            "final_eval_loss": rows[-1]["eval_loss"],
            "best_eval_loss": min(rows[2]["eval_loss"], rows[4]["eval_loss"]),
            "resumed_from": None,
            "notes": [],
        }
        == result
    )
    counts = [rows[1]["label_tokens"], rows[3]["label_tokens"] - rows[1]["label_tokens"]]
    mean = (rows[1]["loss"] * counts[0] + rows[3]["loss"] * counts[1]) / label_tokens
    assert result["train_loss"] == pytest.approx(mean, rel=1e-9)
    assert 0 < rows[-1]["seconds"] <= result["train_seconds"] + 1e-3
    assert result["trainable_parameters"] == sum(weight.numel() for weight in weights(tmp_path).values())
    assert any("step 4/6 · loss" in line and "lr" in line and "left" in line for line in lines), lines
    assert any("step 0/6 · validation loss" in line for line in lines)
    assert not (tmp_path / "scratch/run").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "history.csv", "summary.json", "scratch"}


def test_rerunning_gives_the_same_bits_and_another_seed_another_adapter(tokens, tiny_model_dir, tmp_path):
    for name, seed in [("a", 3), ("b", 3), ("c", 4)]:
        run(recipe(LORA, seed=seed), tokens, tiny_model_dir, tmp_path / name)
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")
    assert_equal_weights(weights(tmp_path / "a"), weights(tmp_path / "b"))
    for name, weight in weights(tmp_path / "a").items():
        assert not torch.equal(weight, weights(tmp_path / "c")[name]), name


def test_runs_on_one_base_find_its_loss_to_the_bit(tokens, tiny_model_dir, tmp_path, monkeypatch):
    passes = []
    own = trainer_module.LabelTokenTrainer.validation_loss
    monkeypatch.setattr(
        trainer_module.LabelTokenTrainer,
        "validation_loss",
        lambda self, rows: passes.append(self.state.global_step) or own(self, rows),
    )
    losses: dict = {}
    alone = [run(recipe(LORA | {"r": r}, seed=r), tokens, tiny_model_dir, tmp_path / f"alone-{r}") for r in (2, 5)]
    assert passes == [0, 6] * 2
    passes.clear()
    beside = [
        run(recipe(LORA | {"r": r}, seed=r), tokens, tiny_model_dir, tmp_path / f"beside-{r}", base_losses=losses)
        for r in (2, 5)
    ]
    assert passes == [0, 6, 6]
    assert list(losses.values()) == [alone[0]["base_eval_loss"]]
    for r, one, other in zip((2, 5), alone, beside, strict=True):
        assert other["base_eval_loss"] == one["base_eval_loss"]
        assert numbers(tmp_path / f"beside-{r}") == numbers(tmp_path / f"alone-{r}")
    # Batches of another size round otherwise, and an adapter that starts with an update of its own is no base.
    run(recipe(LORA, per_device_eval_batch_size=3), tokens, tiny_model_dir, tmp_path / "size", base_losses=losses)
    run(recipe(LORA | {"init_lora_weights": "pissa"}), tokens, tiny_model_dir, tmp_path / "start", base_losses=losses)
    assert passes[3:] == [0, 6] * 2
    assert len(losses) == 2


@pytest.mark.parametrize("quantised", [None, NF4], ids=["lora", "qlora"])
def test_the_losses_of_the_last_validation_are_those_of_scoring_to_the_bit(tokens, tiny_model_dir, tmp_path, quantised):
    found: list[float] = []
    settings = recipe(LORA, quantised, eval_strategy="steps", eval_steps=4)
    result = run(settings, tokens, tiny_model_dir, tmp_path, validated=found.extend)
    scored = load_trained(settings, tiny_model_dir, tmp_path / "adapter", "cpu")
    assert label_nll(scored, VALIDATION, batch_size=8) == found
    assert sum(found) / sum(map(label_tokens, VALIDATION)) == pytest.approx(result["final_eval_loss"], rel=1e-12)


def test_losses_that_scoring_would_compute_otherwise_are_not_told(tokens, tiny_model_dir, tmp_path):
    found: list[float] = []
    for name, values in {"bf16": {"bf16": True}, "checkpointing": {"activation_checkpointing": True}}.items():
        run(recipe(LORA, **values), tokens, tiny_model_dir, tmp_path / name, validated=found.extend)
    padded = recipe(LORA).model_copy(update={"training": TrainingSettings(padding_free=False)})
    run(padded, tokens, tiny_model_dir, tmp_path / "padded", validated=found.extend)
    assert not found


def test_tensorboard_gets_the_losses_of_the_history(tokens, tiny_model_dir, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(recipe(LORA, report_to="tensorboard"), tokens, tiny_model_dir, tmp_path)
    events = EventAccumulator(str(tmp_path / "scratch/tensorboard/run"))
    events.Reload()
    rows = read_history(tmp_path)
    logged = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert logged == [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in rows if row["loss"]]
    evaluated = [event.value for event in events.Scalars("eval/loss")]
    assert evaluated == [pytest.approx(row["eval_loss"], rel=1e-6) for row in rows if row["eval_loss"]]


def test_without_validation_rows_training_works_and_says_so(tiny_model_dir, tmp_path):
    tokens = write_tokens(tmp_path / "tokens", train=random_rows(8), validation=[])
    result = run(recipe(LORA, eval_strategy="steps", max_steps=2), tokens, tiny_model_dir, tmp_path)
    assert result["final_eval_loss"] is None
    assert result["notes"] == ["no validation rows: nothing was evaluated while training"]


# ---------------------------------------------------------------- methods


@pytest.mark.parametrize(
    "peft_config",
    [
        LORA | {"use_rslora": True},
        LORA | {"use_dora": True},
        LORA | {"init_lora_weights": "pissa"},
        {"peft_type": "IA3", "target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4},
        {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4},
    ],
    ids=["rslora", "dora", "pissa", "ia3", "prompt", "prefix"],
)
def test_methods_of_peft_train_and_load(tiny_model_dir, tmp_path, peft_config):
    rows = random_rows(8)
    tokens = write_tokens(tmp_path / "tokens", train=rows, validation=rows)
    settings = recipe(peft_config, max_steps=8, learning_rate=0.05, gradient_accumulation_steps=1)
    result = run(settings, tokens, tiny_model_dir, tmp_path)
    base = plain_loss(load_base(settings, tiny_model_dir, "cpu").eval(), rows)
    assert result["base_eval_loss"] == pytest.approx(base[0] / base[1], abs=1e-4), "the base row is the base model's"
    assert result["final_eval_loss"] < result["base_eval_loss"] - 1e-3
    trained = plain_loss(load_trained(settings, tiny_model_dir, tmp_path / "adapter", "cpu"), rows)
    assert trained[0] / trained[1] == pytest.approx(result["final_eval_loss"], abs=1e-4)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_qlora_trains_on_the_cpu_and_its_adapter_loads(tokens, tiny_model_dir, tmp_path, compute):
    settings = recipe(
        WITHOUT_DROPOUT, NF4 | {"bnb_4bit_compute_dtype": compute, "bnb_4bit_use_double_quant": True}, max_steps=9
    )
    result = run(settings, tokens, tiny_model_dir, tmp_path)
    assert (result["method"], result["dtype"], result["compute_dtype"]) == ("qlora", "nf4", compute)
    assert result["final_eval_loss"] < result["base_eval_loss"]
    trained = plain_loss(load_trained(settings, tiny_model_dir, tmp_path / "adapter", "cpu"), VALIDATION)
    assert trained[0] / trained[1] == pytest.approx(
        result["final_eval_loss"], abs=1e-4 if compute == "float32" else 2e-2
    )


def test_bf16_is_honoured_on_the_cpu_with_float32_weights(tokens, tiny_model_dir, tmp_path):
    half = run(recipe(bf16=True, use_cpu=None), tokens, tiny_model_dir, tmp_path / "half")
    single = run(recipe(), tokens, tiny_model_dir, tmp_path / "single")
    assert (half["dtype"], half["compute_dtype"]) == ("float32", "bfloat16")
    assert all(weight.dtype == torch.float32 for weight in weights(tmp_path / "half", "model.safetensors").values())
    assert half["final_eval_loss"] != single["final_eval_loss"]
    assert half["final_eval_loss"] == pytest.approx(single["final_eval_loss"], abs=0.02)


@pytest.mark.parametrize("peft_config", [None, WITHOUT_DROPOUT], ids=["full", "lora"])
def test_gradient_checkpointing_changes_no_number(tokens, tiny_model_dir, tmp_path, peft_config):
    run(recipe(peft_config), tokens, tiny_model_dir, tmp_path / "plain")
    run(recipe(peft_config, gradient_checkpointing=True), tokens, tiny_model_dir, tmp_path / "checkpointed")
    losses = [
        [row["loss"] for row in read_history(tmp_path / name) if row["loss"]] for name in ("plain", "checkpointed")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_neftune_and_other_optimisers_pass_through(tokens, tiny_model_dir, tmp_path):
    run(recipe(LORA, max_steps=3), tokens, tiny_model_dir, tmp_path / "plain")
    run(recipe(LORA, max_steps=3, neftune_noise_alpha=5), tokens, tiny_model_dir, tmp_path / "noise")
    run(recipe(LORA, max_steps=3, optim="adafactor"), tokens, tiny_model_dir, tmp_path / "adafactor")
    losses = {name: [row["loss"] for row in read_history(tmp_path / name)] for name in ("plain", "noise", "adafactor")}
    assert losses["plain"][1] == losses["adafactor"][1] != losses["noise"][1]
    assert losses["plain"][3] != losses["adafactor"][3]


@pytest.mark.parametrize(
    "option",
    [
        {"auto_find_batch_size": True},
        {"train_sampling_strategy": "group_by_length"},
        {"dataloader_num_workers": 1},
        {"label_smoothing_factor": 0.1},
        {"eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch"},
        {"save_strategy": "steps", "save_steps": 1, "save_only_model": True},
        {"max_steps": -1, "num_train_epochs": 1},
    ],
    ids=lambda option: next(iter(option)),
)
def test_options_of_the_library_pass_through(tokens, tiny_model_dir, tmp_path, option):
    result = run(recipe(LORA, **option), tokens, tiny_model_dir, tmp_path)
    assert result["steps"] == (3 if "num_train_epochs" in option else 6)
    assert result["final_eval_loss"] != result["base_eval_loss"]
    steps = [row["step"] for row in read_history(tmp_path) if row["loss"]]
    assert steps == ([3, 6] if "logging_strategy" in option else list(range(1, result["steps"] + 1)))


def test_the_best_weights_are_kept_if_the_recipe_says_so(tokens, tiny_model_dir, tmp_path):
    settings = recipe(
        LORA,
        learning_rate=0.3,  # overshoots: the best is early
        lr_scheduler_type="constant",
        max_steps=6,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
    )
    result = run(settings, tokens, tiny_model_dir, tmp_path)
    rows = [row for row in read_history(tmp_path) if row["eval_loss"] and row["step"]]
    assert result["best_eval_loss"] < rows[-1]["eval_loss"]
    assert result["final_eval_loss"] == pytest.approx(result["best_eval_loss"], abs=1e-6)
    trained = plain_loss(load_trained(settings, tiny_model_dir, tmp_path / "adapter", "cpu"), VALIDATION)
    assert trained[0] / trained[1] == pytest.approx(result["best_eval_loss"], abs=1e-5)


# An overshooting learning rate: the best evaluation is an early one.
STOPPING = {
    "early_stopping": {"patience": 3},
    "learning_rate": 0.3,
    "lr_scheduler_type": "constant",
    "max_steps": 40,
    "load_best_model_at_end": True,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
}


def test_a_run_that_stops_improving_ends_early_with_its_best_weights(tokens, tiny_model_dir, tmp_path):
    settings = recipe(LORA, **STOPPING)
    result = run(settings, tokens, tiny_model_dir, tmp_path)
    losses = [row["eval_loss"] for row in read_history(tmp_path) if row["eval_loss"] is not None][1:]
    best = losses.index(min(losses)) + 1
    assert best + 3 == result["steps"] == len(losses) < 40
    assert result["notes"] == [
        f"stopped early after step {best + 3} of 40: no lower validation loss in 3 evaluations",
        f"the weights are those of step {best}, the best by validation loss",
    ]
    trained = plain_loss(load_trained(settings, tiny_model_dir, tmp_path / "adapter", "cpu"), VALIDATION)
    assert trained[0] / trained[1] == pytest.approx(min(losses), abs=1e-5)


# ---------------------------------------------------------------- resuming


class Stopped(Exception):
    pass


def stop_at(step: int):
    def progress(line: str) -> None:
        if line.startswith(f"step {step}/"):
            raise Stopped

    return progress


# Three steps are an epoch: checkpoints of every third lie between two epochs, those of every fourth inside one.
CHECKPOINTED = {"max_steps": 10, "save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 2}


@pytest.fixture(scope="module")
def undisturbed(tokens, tiny_model_dir, tmp_path_factory):
    """Return the folder and summary of a run of these settings that nothing stopped; made once for each settings."""
    made: dict[str, tuple[Path, dict]] = {}

    def get(settings: RunSettings) -> tuple[Path, dict]:
        key = settings.model_dump_json()
        if key not in made:
            folder = tmp_path_factory.mktemp("undisturbed")
            made[key] = folder, run(settings, tokens, tiny_model_dir, folder)
        return made[key]

    return get


KILLED = """
import json, os, signal, sys
import torch
from pathlib import Path
from finegrid.settings import RunSettings
from finegrid.training import progress
from finegrid.training.train import train

settings, tokens, model, folder, step, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
progress.SECONDS_BETWEEN_LINES = 0.0
folder = Path(folder)

def kill(line):
    if line.startswith(f"step {step}/"):
        os.kill(os.getpid(), signal.SIGKILL)

train(RunSettings(**json.loads(settings)), Path(tokens), Path(model), folder / "adapter", folder / "history.csv",
      folder / "summary.json", folder / "scratch" / "run", kill)
"""


def test_a_killed_run_goes_on_to_the_same_bits(tokens, tiny_model_dir, tmp_path, undisturbed):
    settings = recipe(LORA, **CHECKPOINTED | {"save_steps": 4, "logging_steps": 3})
    expected, summary = undisturbed(settings)
    arguments = [settings.model_dump_json(), tokens, tiny_model_dir, tmp_path / "killed", 7, torch.get_num_threads()]
    killed = subprocess.run([sys.executable, "-c", KILLED, *map(str, arguments)], capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    assert not (tmp_path / "killed/adapter").exists()
    assert not (tmp_path / "killed/history.csv").exists()
    resumed = run(settings, tokens, tiny_model_dir, tmp_path / "killed")
    assert resumed["resumed_from"] == 4
    assert numbers(tmp_path / "killed") == numbers(expected)
    assert_equal_weights(weights(tmp_path / "killed"), weights(expected))
    for key in ("label_tokens", "tokens", "train_loss", "base_eval_loss", "final_eval_loss", "best_eval_loss", "steps"):
        assert resumed[key] == summary[key], key
    seconds = [row["seconds"] for row in read_history(tmp_path / "killed")]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize(
    ("save_steps", "stop", "resumed_from"), [(4, 6, 4), (3, 5, 3), (3, 10, 9)], ids=["inside", "between", "at the end"]
)
def test_a_stopped_full_run_goes_on_to_the_same_bits(
    tokens, tiny_model_dir, tmp_path, undisturbed, save_steps, stop, resumed_from
):
    settings = recipe(**CHECKPOINTED | {"save_steps": save_steps})
    expected, _ = undisturbed(settings)
    with pytest.raises(Stopped):
        run(settings, tokens, tiny_model_dir, tmp_path / "stopped", stop_at(stop))
    resumed = run(settings, tokens, tiny_model_dir, tmp_path / "stopped")
    assert resumed["resumed_from"] == resumed_from
    assert numbers(tmp_path / "stopped") == numbers(expected)
    name = "model.safetensors"
    assert_equal_weights(weights(tmp_path / "stopped", name), weights(expected, name))


def test_a_run_stopped_after_its_last_step_only_finishes(tokens, tiny_model_dir, tmp_path, undisturbed):
    settings = recipe(LORA, **CHECKPOINTED | {"save_steps": 5, "eval_strategy": "no"})
    expected, _ = undisturbed(settings)

    def at_the_final_evaluation(line: str) -> None:
        if line.startswith("step 10/10 · validation"):
            raise Stopped

    with pytest.raises(Stopped):
        run(settings, tokens, tiny_model_dir, tmp_path / "stopped", at_the_final_evaluation)
    resumed = run(settings, tokens, tiny_model_dir, tmp_path / "stopped")
    assert resumed["resumed_from"] == 10
    assert numbers(tmp_path / "stopped") == numbers(expected)
    assert_equal_weights(weights(tmp_path / "stopped"), weights(expected))


@pytest.mark.parametrize("patience_left", [2, 0])
def test_a_resumed_run_stops_early_where_it_would_have(
    tokens, tiny_model_dir, tmp_path, undisturbed, monkeypatch, patience_left
):
    settings = recipe(LORA, **STOPPING)
    expected, summary = undisturbed(settings)
    step = summary["steps"] - patience_left

    def stop(*ignored) -> None:
        if (tmp_path / f"stopped/scratch/run/checkpoint-{step}/trainer_state.json").exists():
            raise Stopped

    with monkeypatch.context() as patch:
        if not patience_left:  # between the last step and the first file of the results nothing is said
            patch.setattr(train_module, "_final_evaluation", stop)
        with pytest.raises(Stopped):
            run(settings, tokens, tiny_model_dir, tmp_path / "stopped", stop)
    resumed = run(settings, tokens, tiny_model_dir, tmp_path / "stopped")
    assert resumed["resumed_from"] == step
    assert resumed["steps"] == summary["steps"]
    assert numbers(tmp_path / "stopped") == numbers(expected)
    assert_equal_weights(weights(tmp_path / "stopped"), weights(expected))


@pytest.mark.parametrize("damage", ["cut state", "no state", "empty weights", "no optimiser"])
def test_a_half_written_checkpoint_is_passed_over(tokens, tiny_model_dir, tmp_path, undisturbed, damage):
    settings = recipe(LORA, **CHECKPOINTED)
    expected, _ = undisturbed(settings)
    with pytest.raises(Stopped):
        run(settings, tokens, tiny_model_dir, tmp_path / "stopped", stop_at(8))
    last = tmp_path / "stopped/scratch/run/checkpoint-6"
    state = last / "trainer_state.json"
    if damage == "cut state":
        state.write_text(state.read_text()[:-100])
    elif damage == "no state":
        state.unlink()
    elif damage == "empty weights":
        (last / "adapter_model.safetensors").write_bytes(b"")
    else:
        (last / "optimizer.pt").unlink()
    resumed = run(settings, tokens, tiny_model_dir, tmp_path / "stopped")
    assert resumed["resumed_from"] == 3
    assert numbers(tmp_path / "stopped") == numbers(expected)
    assert_equal_weights(weights(tmp_path / "stopped"), weights(expected))


def test_checkpoints_of_other_settings_or_data_are_not_resumed(tokens, tiny_model_dir, tmp_path):
    settings, other = recipe(LORA, **CHECKPOINTED), recipe(LORA, **CHECKPOINTED, weight_decay=0.5)
    with pytest.raises(Stopped):
        run(settings, tokens, tiny_model_dir, tmp_path, stop_at(8))
    with pytest.raises(Stopped):
        run(other, tokens, tiny_model_dir, tmp_path, stop_at(8))
    other_rows = write_tokens(tmp_path / "tokens", train=random_rows(22, seed=9), validation=VALIDATION)
    result = run(other, other_rows, tiny_model_dir, tmp_path)
    assert result["resumed_from"] is None
    assert result["notes"] == ["started anew: the checkpoints at hand were of other tokens"]


def test_a_strangers_file_in_the_scratch_folder_is_left_alone(tokens, tiny_model_dir, tmp_path):
    scratch = tmp_path / "scratch/run"
    scratch.mkdir(parents=True)
    (scratch / "notes.txt").write_text("mine")
    run(recipe(LORA, max_steps=1), tokens, tiny_model_dir, tmp_path)
    assert [path.name for path in scratch.iterdir()] == ["notes.txt"]


# ---------------------------------------------------------------- refusals


def test_a_loss_that_is_no_number_stops_and_leaves_no_output(tokens, tiny_model_dir, tmp_path):
    settings = recipe(learning_rate=1e30, lr_scheduler_type="constant", warmup_steps=0, max_grad_norm=0.0)
    with pytest.raises(
        UserError, match=r"step 2: the (loss of|gradient's norm on) rows train-\d+, train-\d+.* is (nan|inf)"
    ):
        run(settings, tokens, tiny_model_dir, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {"scratch"}


def test_a_row_whose_loss_is_no_number_is_named(tiny_model_dir, tmp_path):
    rows = random_rows(8)
    for number, row in enumerate(rows):
        row["input_ids"] = [30000 if number == 5 else token for token in row["input_ids"]]
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        model.get_input_embeddings().weight[30000] = math.nan
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    model.save_pretrained(tmp_path / "poisoned")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "poisoned")
    tokens = write_tokens(tmp_path / "tokens", train=rows, validation=[])
    settings = recipe(LORA, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    with pytest.raises(UserError, match=r"step 1: the loss of rows train-5 is nan"):
        run(settings, tokens, tmp_path / "poisoned", tmp_path)


def test_no_rows_to_train_on_is_an_error(tiny_model_dir, tmp_path):
    tokens = write_tokens(tmp_path / "tokens", train=[], validation=VALIDATION)
    with pytest.raises(UserError, match=r"train\.arrow: no rows"):
        run(recipe(LORA), tokens, tiny_model_dir, tmp_path)


def test_missing_tokens_are_an_error(tiny_model_dir, tmp_path):
    with pytest.raises(UserError, match=r"train\.arrow: can't be read"):
        run(recipe(LORA), tmp_path / "nowhere", tiny_model_dir, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (recipe(LORA, deepspeed="zero3.json"), "torchrun"),
        (recipe(LORA).model_copy(update={"gpus": 2}), "gpus: the recipe asks for 2, but 1 processes train"),
        (recipe(LORA, bf16=True, fp16=True), "training_args: At most one of fp16 and bf16"),
        (recipe(LORA, metric_for_best_model="rouge"), "metric_for_best_model: 'rouge'"),
        (recipe({"target_modules": ["nonesuch"]}), "peft_config: does not fit the model"),
        (recipe({"peft_type": "LORRA"}), "did you mean 'LORA'"),
        (recipe(None, NF4), "quantised weights can't be trained"),
    ],
    ids=["deepspeed", "gpus", "bf16 and fp16", "metric", "target modules", "peft type", "full nf4"],
)
def test_what_the_libraries_refuse_is_said_with_its_place(tokens, tiny_model_dir, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        run(settings, tokens, tiny_model_dir, tmp_path)
    assert not (tmp_path / "adapter").exists()


def test_a_folder_without_a_model_is_an_error(tokens, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    with pytest.raises(UserError, match="can't be loaded as a causal language model"):
        run(recipe(LORA), tokens, tmp_path / "model", tmp_path)


def test_nothing_of_this_machine_is_in_what_is_written(tokens, tiny_model_dir, tmp_path):
    run(recipe(LORA, max_steps=1), tokens, tiny_model_dir, tmp_path)
    for path in [tmp_path / "summary.json", tmp_path / "history.csv", tmp_path / "adapter/adapter_config.json"]:
        assert os.sep + "tmp" not in path.read_text()
        assert str(tiny_model_dir) not in path.read_text()
