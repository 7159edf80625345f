"""Runs that make their steps together, held against the same runs by themselves, which are the oracle."""

from __future__ import annotations

import csv
import itertools
import os
import signal
from pathlib import Path

import pytest
import torch
from finegrid.errors import UserError
from finegrid.settings import RunSettings
from finegrid.training.joint import JointPass, merged
from finegrid.training.lockstep import Lane, run_together
from finegrid.training.model import load_base
from finegrid.training.resident import ResidentBase
from finegrid.training.stopping import Stop, Stopped
from finegrid.training.train import train
from token_rows import random_rows, with_system_message, write_tokens

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
EAGER = {"patience": 1, "threshold": 100.0}
# All that may differ between the runs of a pack: rate, schedule, decay, rank, alpha, targets, dropout, seed and so data
# order, batch, accumulation, steps, clipping.
RUNS = {
    "plain": ({"r": 4}, {"learning_rate": 1e-2}),
    "short": ({"r": 2, "lora_alpha": 32}, {"learning_rate": 3e-3, "max_steps": 3, "weight_decay": 0.1, "seed": 5}),
    "narrow": (
        {"r": 8, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
        {"learning_rate": 1e-3, "lr_scheduler_type": "linear", "per_device_train_batch_size": 3, "seed": 1},
    ),
    "dropped": ({"r": 4, "lora_dropout": 0.2}, {"gradient_accumulation_steps": 1, "max_grad_norm": 0.01, "seed": 2}),
}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    rows, validation = random_rows(22), random_rows(7, seed=1, split="validation")
    return write_tokens(tmp_path_factory.mktemp("tokens"), train=rows, validation=validation)


def recipe(adapter: dict, arguments: dict, quantised: dict | None = None, early_stopping=None) -> RunSettings:
    defaults = {
        "use_cpu": True,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 1,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
    }
    return RunSettings(
        model={"model_name_or_path": "data/models/tiny"},
        peft_config={"target_modules": "all-linear"} | adapter,
        quantization_config=quantised,
        early_stopping=early_stopping,
        training_args=defaults | arguments,
    )


def one(settings: RunSettings, tokens: Path, model: Path, folder: Path, **options) -> dict:
    return train(
        settings,
        tokens=tokens,
        model=model,
        output=folder / "adapter",
        history=folder / "history.csv",
        summary=folder / "summary.json",
        checkpoints=folder / "scratch" / folder.name,
        **options,
    )


def together(
    runs: dict[str, RunSettings], tokens: Path, model: Path, folder: Path, load=None, at_once: int = 9, **options
) -> dict[str, dict]:
    """Train runs together and return their summaries; one that fails for its own reason has none."""
    base = ResidentBase()
    load = load or base.base
    first = next(iter(runs.values()))
    joint = JointPass(lambda trainer: load(first, model, "cpu"))
    summaries = {}

    def work(lane: Lane) -> None:
        try:
            found = one(runs[lane.name], tokens, model, folder / lane.name, load=load, company=(lane, joint), **options)
        except UserError as error:
            found = {"failed": str(error)}
        summaries[lane.name] = found
        joint.leave(lane)

    for name in runs:
        (folder / name).mkdir(parents=True, exist_ok=True)
    run_together([Lane(name, work, folder / name / "log") for name in runs], at_once, joint)
    return summaries


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter/adapter_model.safetensors")


def losses(folder: Path) -> list[float]:
    with (folder / "history.csv").open() as file:
        return [float(row["loss"] or row["eval_loss"]) for row in csv.DictReader(file)]


def furthest(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max((found[name] - expected[name]).abs().max().item() for name in expected)


def in_double(settings: RunSettings, folder: Path, device: str):
    return load_base(settings, folder, device).double()


def test_in_fp64_each_run_is_the_run_alone(tokens, tiny_model_dir, tmp_path):
    runs = {name: recipe(*given) for name, given in RUNS.items()}
    summaries = together(runs, tokens, tiny_model_dir, tmp_path / "together", load=in_double)
    for name, settings in runs.items():
        alone = one(settings, tokens, tiny_model_dir, tmp_path / "alone" / name, load=in_double)
        assert any("together" in note for note in summaries[name]["notes"])
        for key in ("steps", "epochs", "label_tokens", "tokens", "trainable_parameters"):
            assert summaries[name][key] == alone[key]
        found, expected = tmp_path / "together" / name, tmp_path / "alone" / name
        assert losses(found) == pytest.approx(losses(expected), abs=1e-9)
        assert weights(found)[next(iter(weights(found)))].dtype == torch.float64
        assert furthest(weights(found), weights(expected)) < 1e-9


@pytest.mark.parametrize("quantised", [None, NF4], ids=["fp32", "nf4"])
def test_in_fp32_losses_are_those_of_the_run_alone(tokens, tiny_model_dir, tmp_path, quantised):
    runs = {name: recipe(*given, quantised) for name, given in RUNS.items()}
    together(runs, tokens, tiny_model_dir, tmp_path / "together")
    for name, settings in runs.items():
        one(settings, tokens, tiny_model_dir, tmp_path / "alone" / name)
        found, expected = losses(tmp_path / "together" / name), losses(tmp_path / "alone" / name)
        assert found == pytest.approx(expected, abs=1e-4)


def test_with_two_at_once_the_others_wait_for_their_turn(tokens, tiny_model_dir, tmp_path):
    runs = {name: recipe(*given) for name, given in RUNS.items()}
    summaries = together(runs, tokens, tiny_model_dir, tmp_path / "pairs", load=in_double, at_once=2)
    one(runs["dropped"], tokens, tiny_model_dir, tmp_path / "alone", load=in_double)
    assert summaries.keys() == runs.keys()
    assert furthest(weights(tmp_path / "pairs/dropped"), weights(tmp_path / "alone")) < 1e-9


def test_a_run_that_diverges_leaves_and_the_others_numbers_stay(tokens, tiny_model_dir, tmp_path):
    calm = recipe(*RUNS["plain"])
    wild = recipe({"r": 4}, {"learning_rate": 1e30, "seed": 3})
    summaries = together({"wild": wild, "calm": calm}, tokens, tiny_model_dir, tmp_path, load=in_double)
    assert "loss" in summaries["wild"]["failed"] or "gradient" in summaries["wild"]["failed"]
    one(calm, tokens, tiny_model_dir, tmp_path / "alone", load=in_double)
    assert furthest(weights(tmp_path / "calm"), weights(tmp_path / "alone")) < 1e-9


def test_a_stopped_pack_saves_each_run_and_goes_on_to_the_same_numbers(tokens, tiny_model_dir, tmp_path):
    runs = {name: recipe(*RUNS[name]) for name in ("plain", "dropped")}
    stop, steps = Stop(), itertools.count()

    def tell(**facts):
        if "loss" in facts and next(steps) == 3:
            stop.asked = signal.SIGTERM

    with pytest.raises(Stopped):
        together(runs, tokens, tiny_model_dir, tmp_path / "stopped", load=in_double, stop=stop, tell=tell)
    summaries = together(runs, tokens, tiny_model_dir, tmp_path / "stopped", load=in_double)
    for name, settings in runs.items():
        assert summaries[name]["resumed_from"] in (1, 2, 3)
        one(settings, tokens, tiny_model_dir, tmp_path / "alone" / name, load=in_double)
        assert furthest(weights(tmp_path / "stopped" / name), weights(tmp_path / "alone" / name)) < 1e-9


def test_early_stopping_ends_one_run_alone(tokens, tiny_model_dir, tmp_path):
    runs = {"plain": recipe(*RUNS["plain"])}
    adapter, arguments = RUNS["plain"]
    runs["eager"] = recipe(adapter, arguments | {"metric_for_best_model": "loss"}, early_stopping=EAGER)
    summaries = together(runs, tokens, tiny_model_dir, tmp_path)
    assert summaries["eager"]["steps"] < summaries["plain"]["steps"] == 6


def test_what_can_not_be_joined_trains_beside_with_a_reason(tokens, tiny_model_dir, tmp_path):
    runs = {
        "plain": recipe(*RUNS["plain"]),
        "saving": recipe({"r": 4}, {"activation_checkpointing": True}),
        "head": recipe({"r": 4, "target_modules": ["q_proj", "lm_head"]}, {}),
    }
    summaries = together(runs, tokens, tiny_model_dir, tmp_path)
    for name, reason in {"plain": "together", "saving": "computed again", "head": "head"}.items():
        (note,) = [note for note in summaries[name]["notes"] if "steps were made" in note]
        assert reason in note


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_where_a_pass_fails_each_run_makes_its_step_alone(tokens, tiny_model_dir, tmp_path, monkeypatch, place):
    runs = {name: recipe(*RUNS[name]) for name in ("plain", "dropped")}

    def no_room(*given, **options):
        raise torch.OutOfMemoryError("no room")

    if place == "forward":
        monkeypatch.setattr(JointPass, "_losses", no_room)
    else:
        monkeypatch.setattr(torch.autograd, "grad", no_room)
    together(runs, tokens, tiny_model_dir, tmp_path / "together")
    for name, settings in runs.items():
        one(settings, tokens, tiny_model_dir, tmp_path / "alone" / name)
        assert furthest(weights(tmp_path / "together" / name), weights(tmp_path / "alone" / name)) == 0


def test_a_lack_of_memory_in_one_lane_ends_all(tmp_path):
    ended = []

    def wants_too_much(lane: Lane) -> None:
        raise RuntimeError("out of memory")

    def waits(lane: Lane) -> None:
        try:
            lane.hand_in(1)
        finally:
            ended.append(lane.name)

    lanes = [Lane("first", waits, tmp_path / "a"), Lane("big", wants_too_much, tmp_path / "b")]
    lanes.append(Lane("late", waits, tmp_path / "c"))
    with pytest.raises(RuntimeError, match="out of memory"):
        run_together(lanes, 2, lambda running: None)
    assert ended == ["first"]


def test_merged_rows_stand_where_one_batch_of_them_would_put_them():
    from finegrid.training.collation import Collator

    rows = random_rows(5)
    whole = Collator(flat=True)(rows)
    found = merged([Collator(flat=True)(rows[:2]), Collator(flat=True)(rows[2:])])
    for name in ("input_ids", "position_ids", "positions", "targets", "cells", "starts"):
        assert torch.equal(found[name], whole[name]), name
    assert (found["grid"], found["shared"]) == (whole["grid"], ())


def test_merged_rows_share_what_their_own_batch_shares():
    from finegrid.training.collation import Collator

    collate = Collator(flat=True, shares=True)
    alike = collate(with_system_message(random_rows(3)))
    alone = collate(random_rows(2))
    found = merged([alike, alone, alike])
    assert found["shared"] == ((0, 3, 12), (5, 3, 12))
    assert found["input_ids"].shape[1] == 2 * alike["input_ids"].shape[1] + alone["input_ids"].shape[1]


def test_a_lane_keeps_random_numbers_and_output_to_itself(tmp_path):
    drawn = {}

    def draw(lane: Lane) -> None:
        torch.manual_seed(3)
        drawn[lane.name] = [torch.rand(1).item()]
        lane.hand_in(None)
        os.write(1, f"said by {lane.name}\n".encode())  # pytest has taken print's place
        drawn[lane.name].append(torch.rand(1).item())

    run_together([Lane(name, draw, tmp_path / name) for name in "ab"], 2, lambda running: torch.rand(9))
    torch.manual_seed(3)
    assert drawn["a"] == drawn["b"] == [torch.rand(1).item(), torch.rand(1).item()]
    assert (tmp_path / "b").read_text() == "said by b\n"
