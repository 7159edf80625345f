"""Findings: what a plan tells before anything runs, each with its counterpart that is told nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from finegrid.gpus import gpu
from finegrid.power import SPREAD, examples_needed, smallest_detectable_difference
from finegrid.study import METRICS
from planned import GIB, MEMORY, all_findings, report, sentences, write_study

PROJECT = Path(__file__).resolve().parents[2]
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
ARGUMENTS = {
    "max_steps": 100,
    "per_device_train_batch_size": 4,
    "learning_rate": 2e-4,
    "save_steps": 50,
    "eval_strategy": "steps",
    "eval_steps": 50,
    "logging_steps": 10,
}
STUDY = {
    "model": {"model_name_or_path": "data/models/tiny"},
    "settings": {
        "data_config": {"train_file": "train.jsonl", "val_file": "dev.jsonl", "test_file": "test.jsonl"},
        "training_args": ARGUMENTS,
        "peft_config": {"r": 8},
    },
    "factors": {"rank": {"key": "peft_config.r", "levels": [8, 64]}},
    "seeds": [0, 1, 2],
    "compare": {"metric": "rougeL", "margin": 0.02},
}
METHODS = {"full": {"peft_config": None}, "lora": {}}
RATE = "training_args.learning_rate"


@pytest.fixture
def study(tmp_path):
    """Write and load the study with changes at its top; `args` are laid over its training arguments."""

    def write(args: dict | None = None, **change):
        settings = STUDY["settings"] | change.pop("settings", {})
        settings |= {"training_args": {k: v for k, v in (ARGUMENTS | (args or {})).items() if v is not None}}
        return write_study(tmp_path, STUDY | {"settings": settings} | change)

    return write


def places(found: list[dict]) -> dict[str, str]:
    return {finding["place"]: finding["severity"] for finding in found}


def only(found: list[dict], place: str) -> dict[str, str]:
    (finding,) = [finding for finding in found if finding["place"] == place]
    return finding


def test_a_sound_study_has_no_findings(study):
    assert all_findings(study()) == []


def test_errors_come_first(study):
    found = all_findings(study({"warmup_steps": 200, "save_steps": 500}, seeds=[0]))
    severities = [finding["severity"] for finding in found]
    assert severities == sorted(severities, key=["error", "warning", "note"].index)
    assert severities[0] == "error"
    assert all(set(finding) == {"severity", "place", "message", "mend"} for finding in found)


# --- the data ---


def test_data_past_a_limit_is_an_error_that_says_which_length_would_do(study):
    found = only(all_findings(study(), report({"truncated_answers": 20})), "data_config.limits.truncated_answers")
    assert found["severity"] == "error"
    assert found["message"] == (
        "5.0% allowed, but 20 of 100 answers of train are longer than max_output_length 512 (20.0%) and are cut"
    )
    assert "99 % of the answers have at most 180 tokens" in found["mend"]


def test_dropped_rejected_and_leaked_rows_are_held_against_their_limits(study):
    clean = {"rows": {"train": {"in": 1000, "rejected": 300}}, "leaks": {"rows_left": 7}}
    train = {"rows": 80, "dropped": {"prompt over max_input_length": 20}}
    told = sentences(all_findings(study(), report(train, clean)))
    assert any("limits.dropped: 10.0% allowed, but 20 of 100 rows of train are dropped for" in one for one in told)
    assert any("limits.dropped: 10.0% allowed, but cleaning rejected 300 of 1,000 rows" in one for one in told)
    assert any("limits.leaked: 0 allowed, but 7 rows of train share a question or an answer" in one for one in told)


def test_cleaning_is_told_once_for_all_lengths(study):
    lengths = {"length": {"key": "max_output_length", "levels": [64, 128, 256, 512]}}
    clean = {"rows": {"train": {"in": 1000, "rejected": 300}}}
    found = all_findings(study(factors=lengths), report(clean=clean))
    assert len([finding for finding in found if "cleaning rejected" in finding["message"]]) == 1


def test_a_preview_warns_of_what_it_only_estimates(study):
    preview = {
        "splits": {
            "train": {"rows": 90, "label_tokens": 6300, "tokens": 9900, "truncated_answers": 30, "dropped": 0},
            "validation": {"rows": 50, "label_tokens": 3500, "tokens": 5500},
            "test": {"rows": 500, "label_tokens": 3500, "tokens": 5500},
        },
        "source": "estimated from the raw files: 90 of 90 rows read",
        "unknown": None,
    }
    found = all_findings(study(), preview)
    limit = only(found, "data_config.limits.truncated_answers")
    assert limit["severity"] == "warning"
    assert "about 30 of 90 answers" in limit["message"]
    assert only(found, "data_config")["severity"] == "note"
    assert "are estimated from the raw files" in only(found, "data_config")["message"]


def test_rows_that_make_no_batch_are_an_error(study):
    found = all_findings(study({"dataloader_drop_last": True, "per_device_train_batch_size": 128}))
    assert "100 rows of train, 128 rows at once" in only(found, "data_config")["message"]


# --- how it learns ---


@pytest.mark.parametrize(
    ("warmup", "severity"), [(0.1, None), (50, None), (51, "warning"), (99, "warning"), (100, "error"), (500, "error")]
)
def test_a_warmup_that_takes_the_run_is_told(study, warmup, severity):
    assert places(all_findings(study({"warmup_steps": warmup}))).get("training_args.warmup_steps") == severity


def test_a_schedule_without_warmup_is_left_alone(study):
    assert all_findings(study({"warmup_steps": 500, "lr_scheduler_type": "constant"})) == []


def test_the_same_trouble_of_many_runs_is_told_once_with_the_arms_that_have_it(study):
    steps = {"steps": {"key": "training_args.max_steps", "levels": [20, 30, 40, 50, 60, 70, 100]}}
    found = all_findings(study({"warmup_steps": 80}, factors=steps, compare={"margin": 0.02}))
    first, second = (finding for finding in found if finding["place"] == "training_args.warmup_steps")
    assert first["message"].startswith(
        "a warmup of 80 steps in a run of 20 steps, in 18 of 21 runs (arms 20, 30, 40, 50, … (6 in all)): "
    )
    assert ", in 3 of 21 runs (arm 100)" in second["message"]


@pytest.mark.parametrize("rates", [(2e-4, 2e-4), (1e-4, 2e-4)])
def test_full_fine_tuning_and_adapters_at_one_learning_rate(study, rates):
    methods = {name: bundle | {RATE: rate} for (name, bundle), rate in zip(METHODS.items(), rates, strict=True)}
    told = places(all_findings(study(factors={"method": methods})))
    assert (RATE in told) == (rates[0] == rates[1])


@pytest.mark.parametrize(("levels", "told"), [(["1e-4", "2e-4"], True), (["1e-5", "1e-4", "1e-3"], False)])
def test_a_search_over_one_narrow_range_is_one_learning_rate_too(study, levels, told):
    tuned = study(factors={"method": METHODS}, tune={"lr": {"key": RATE, "levels": levels}})
    assert (RATE in places(all_findings(tuned))) is told


@pytest.mark.parametrize(
    ("args", "place", "severity"),
    [
        ({"save_steps": 500}, "training_args.save_steps", "warning"),
        ({"save_steps": None}, "training_args.save_steps", "note"),
        ({"eval_steps": 101}, "training_args.eval_steps", "warning"),
        ({"logging_steps": 200}, "training_args.logging_steps", "warning"),
        ({"save_steps": 100}, "training_args.save_steps", None),
        ({"save_steps": 0.5}, "training_args.save_steps", None),
        ({"save_steps": 500, "save_strategy": "no"}, "training_args.save_steps", None),
        ({"save_steps": 500, "eval_steps": 50, "load_best_model_at_end": True}, "training_args.save_steps", None),
    ],
)
def test_what_never_happens_in_a_run_is_told(study, args, place, severity):
    assert places(all_findings(study(args))).get(place) == severity


def test_what_never_happens_names_what_was_found_and_the_steps(study):
    found = only(all_findings(study({"save_steps": 500})), "training_args.save_steps")
    assert found["message"] == (
        "500 is more than the 100 steps of a run: no checkpoint is written, and a killed run starts anew"
    )
    assert found["mend"] == "set save_steps to 25, or to 0.25, which is four times a run"


def test_evaluations_that_take_a_fifth_of_the_compute_are_told_with_an_interval_that_takes_a_tenth(study):
    dear, cheap = report(validation={"tokens": 55_000}), report()
    found = only(all_findings(study({"eval_steps": 10}), dear), "training_args.eval_steps")
    # 100 steps of 4 rows of 110 tokens, three passes; 9 evaluations of 55,000 tokens besides first and last.
    assert "11 evaluations of 55,000 tokens in 100 steps take 79% of the compute" in found["message"]
    assert "training_args.eval_steps" not in places(all_findings(study({"eval_steps": 25}), cheap))
    told = only(all_findings(study({"eval_steps": 5}), cheap), "training_args.eval_steps")
    every = int(told["mend"].split("eval_steps to ")[1].split(",")[0])
    inside = -(-100 // every) - 1  # besides the last
    assert inside * 5_000 <= 0.1 * (inside * 5_000 + 3 * 44_000) < (inside + 1) * 5_000


def test_early_stopping_makes_the_plan_an_upper_bound(study):
    stopping = {"early_stopping": {"patience": 3}}
    found = all_findings(study({"load_best_model_at_end": True}, settings=STUDY["settings"] | stopping))
    assert places(found) == {"early_stopping": "note"}


# --- the comparison ---


def test_one_seed_is_told(study):
    assert places(all_findings(study(seeds=[0], compare={"margin": 0.1}))) == {"seeds": "warning"}


def test_unequal_tuning_effort_is_told(study):
    rates = {"key": RATE, "levels": ["1e-4", "1e-3"], "in_arms": [{"arms": {"rank": 64}, "levels": ["1e-4"]}]}
    found = only(all_findings(study(tune={"lr": rates})), "tune.lr")
    assert found["message"].startswith("arm 8 has 2 tuned levels to choose the best of, arm 64 only 1")
    equal = rates | {"in_arms": [{"arms": {"rank": 64}, "levels": ["1e-5", "1e-4"]}]}
    assert all_findings(study(tune={"lr": equal})) == []


def test_arms_with_other_data_that_see_fewer_label_tokens_are_told(study, tmp_path):
    fraction = {"rows": {"key": "data_config.train_fraction", "levels": [1.0, 0.5]}}
    by_epochs = study({"max_steps": None, "num_train_epochs": 4}, factors=fraction)
    every, half = (f"data-{run.tokens_id}" for run in by_epochs.runs[::3])
    reports = {every: report(), half: report({"rows": 50, "label_tokens": 3_400, "tokens": 5_400})}
    found = only(all_findings(by_epochs, reports), "factors")
    assert found["message"].startswith(
        "arm 0.5 learns from 13,600 label tokens, arm 1 from 28,000 (51% fewer): their rows or lengths differ"
    )
    assert "training_args.max_steps" in found["mend"]


def test_arms_that_train_longer_on_the_same_data_are_told(study):
    steps = {"steps": {"key": "training_args.max_steps", "levels": [100, 200]}}
    found = only(all_findings(study(factors=steps)), "factors")
    assert "one of them simply trains longer" in found["message"]
    nearly = {"steps": {"key": "training_args.max_steps", "levels": [100, 102]}}
    assert all_findings(study(factors=nearly)) == []


# --- what a comparison can see ---


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
@pytest.mark.parametrize("metric", METRICS)
def test_the_smallest_difference_is_the_one_of_the_comparison(metric, seeds):
    """As comparison.py computes it from scores whose mean squares are those expected of the assumed spread."""
    from finegrid.analysis.comparison import paired_difference

    examples, spread = 60, SPREAD[metric]
    shared = _standard(np.arange(examples)) * spread.examples
    noise = np.zeros((seeds, examples))
    if seeds > 1 and spread.rest:
        noise = _crossed_noise(seeds, examples) * spread.rest
    elif seeds == 1:
        shared = _standard(np.arange(examples)) * np.hypot(*spread)
    found = paired_difference(shared + noise, np.zeros((seeds, examples)))
    assert smallest_detectable_difference(metric, examples, seeds) == pytest.approx(found.smallest_detectable, rel=1e-3)


def _standard(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / values.std(ddof=1)


def _crossed_noise(seeds: int, examples: int) -> np.ndarray:
    """Noise whose rows, columns and rest all have the mean squares that independent noise of variance 1 has."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((seeds, examples))
    rest = noise - noise.mean(axis=1, keepdims=True) - noise.mean(axis=0) + noise.mean()
    # Free of the shared part, so that the examples' mean square is the sum of both.
    shared = _standard(np.arange(examples))
    rest -= np.outer(rest @ shared, shared) / (shared @ shared)
    rest /= np.sqrt((rest**2).sum() / ((seeds - 1) * (examples - 1)))
    by_seed = _standard(np.arange(seeds)) / np.sqrt(examples)
    by_example = rng.standard_normal(examples)
    by_example -= by_example.mean()
    by_example -= (by_example @ shared) / (shared @ shared) * shared
    by_example *= np.sqrt((examples - 1) / seeds / (by_example @ by_example))
    return rest + by_seed[:, None] + by_example


def test_the_examples_that_are_asked_for_are_enough_and_not_too_many():
    for metric, margin, seeds in [("rougeL", 0.01, 2), ("loss", 0.01, 3), ("chrf", 0.005, 5), ("f1", 0.02, 1)]:
        examples = examples_needed(metric, margin, seeds)
        assert smallest_detectable_difference(metric, examples, seeds) == pytest.approx(margin, rel=0.02)
    assert examples_needed("exact_match", 1e-4, 2) is None


def test_the_assumed_spread_is_the_demos():
    runs = PROJECT / "results/insurance/runs"
    if not (runs / "full-11642119/predictions.jsonl").exists():
        pytest.skip("the demo has not run here")
    study = {"full": ("11642119", "0a099cb8"), "lora": ("5dc3096e", "5d41e0d8"), "qlora": ("5411e506", "632e6cda")}
    rows = {}
    for method, ids in study.items():
        for seed, run in enumerate(ids):
            lines = (runs / f"{method}-{run}/predictions.jsonl").read_text().splitlines()
            rows[method, seed] = [row for row in map(json.loads, lines) if row["split"] == "test"]
    labels = np.array([row["label_tokens"] for row in rows["full", 0]])
    for metric in set(METRICS) - {"exact_match"}:
        parts = []
        for arm, other in (("lora", "full"), ("qlora", "full"), ("qlora", "lora")):
            scores = [
                np.array([[row["nll"] if metric == "loss" else row["scores"][metric] for row in rows[name, seed]]
                          for seed in (0, 1)])
                for name in (arm, other)
            ]  # fmt: skip
            difference = scores[0] - scores[1]
            if metric == "loss":
                ratio = difference.mean() / labels.mean()
                difference = difference / labels.mean() - ratio * (labels / labels.mean() - 1)
            rest = difference - difference.mean(1, keepdims=True) - difference.mean(0) + difference.mean()
            ms_rest = (rest**2).sum() / (difference.shape[1] - 1)
            parts.append((difference.mean(0).var(ddof=1) - ms_rest / 2, ms_rest))
        by_example, ms_rest = np.mean(parts, axis=0)
        assert SPREAD[metric].examples == pytest.approx(np.sqrt(max(by_example, 0)), abs=0.002)
        assert SPREAD[metric].rest == pytest.approx(np.sqrt(ms_rest), abs=0.002)


def test_too_few_examples_for_the_margin_are_told_with_numbers_that_would_do(study):
    found = only(all_findings(study(compare={"metric": "rougeL", "margin": 0.005})), "compare.margin")
    assert found["severity"] == "warning"
    assert found["message"].startswith(
        "500 examples and 3 seeds show differences in rougeL from about 0.0078 on "
        "(if scores spread as they did in the demo), but the margin is 0.005"
    )
    assert found["mend"] == (
        "it takes about 1,300 examples with 3 seeds, or 770 examples with 4 seeds, or 630 examples with 5 seeds"
    )


def test_without_a_margin_the_plan_says_what_can_be_seen(study):
    found = all_findings(study(compare={"metric": "loss"}))
    assert places(found) == {"compare.margin": "note"}


def test_before_the_test_rows_are_counted_nothing_is_said_about_them(study):
    assert "compare.margin" not in places(all_findings(study(compare={"margin": 0.001}), {}))


# --- hardware, and what is not known ---


def test_runs_that_fit_no_gpu_are_an_error_with_what_would_help(study):
    methods = METHODS | {"qlora": {"quantization_config": NF4}}
    large = {
        "full": {"fits": False},
        "lora": {"fits": False, "memory": MEMORY | {"optimiser": GIB, "activations": 90 * GIB}},
    }
    cards = (gpu("rtx-3090"), gpu("rtx-4090"))
    rates = {"lr": {"key": RATE, "levels": ["1e-5", "1e-4", "1e-3"]}}
    found = all_findings(study(factors={"method": methods}, tune=rates), change=large, hardware=cards)
    full, lora = (finding for finding in found if finding["place"] == "hardware.gpus")
    assert full["severity"] == "error"
    assert full["message"].startswith(
        "runs need up to 74.0 GiB on each GPU, in 9 of 27 runs (arm full); the largest GPU has 2"
    )
    assert "most of it is optimiser (32.0 GiB)" in full["message"]
    assert full["mend"].startswith("try an adapter (peft_config) instead of full fine-tuning, training_args.deepspeed")
    assert "per_device_train_batch_size: 1 with gradient_accumulation_steps: 4" in lora["mend"]
    assert lora["mend"].startswith("try training_args.activation_checkpointing: true")
    assert "QLoRA" in lora["mend"]


def test_what_is_not_known_is_noted_with_its_reason(study):
    stream = STUDY["settings"]["data_config"] | {"streaming": True}
    found = all_findings(study(settings=STUDY["settings"] | {"data_config": stream}), {})
    (note,) = found
    assert note["severity"] == "note"
    assert note["message"] == (
        "not known: epochs, train rows, label tokens, tokens; a stream's rows are counted when the data stage has "
        "read them"
    )


def test_a_thousand_runs_have_a_handful_of_findings(study):
    factors = {
        "rank": {"key": "peft_config.r", "levels": [4, 8, 16, 32, 64]},
        "steps": {"key": "training_args.max_steps", "levels": list(range(10, 110, 10))},
    }
    tune = {"lr": {"key": RATE, "levels": ["1e-5", "1e-4", "1e-3", "1e-2"]}}
    large = study({"save_steps": 500, "warmup_steps": 80}, factors=factors, tune=tune, seeds=[0, 1, 2, 3, 4])
    assert len(large.runs) == 1000
    found = all_findings(large, change={"4-10": {"fits": False}})
    assert len(found) < 10
