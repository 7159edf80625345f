"""Advice: curves made to show each case, real trainings at wrong learning rates, and the study that comes of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from finegrid.analysis.advice import advise, print_advice, write_advice
from finegrid.analysis.curves import read_curve, signs
from finegrid.analysis.next_study import next_name
from finegrid.errors import UserError
from finegrid.study import load_study
from finegrid.yaml_file import read_yaml
from study_results import make_results

RECORDED = Path(__file__).parents[1] / "data/curves"


def history(
    level, steps=100, evals=10, noise=0.05, rate=1e-3, schedule="cosine", norm=None, validation=None, seed=0
) -> pd.DataFrame:
    """A history whose losses follow `level(share of training done)`; validation as well, or a function of its own."""
    rng = np.random.default_rng(seed)
    at = np.arange(1, steps + 1)
    decay = 0.5 * (1 + np.cos(np.pi * at / steps)) if schedule == "cosine" else np.ones(steps)
    rates = rate * decay * np.minimum(1, at / (0.1 * steps))
    loss = np.array([level(step / steps) for step in at]) + rng.normal(0, noise, steps)
    norms = rng.uniform(0.8, 1.2, steps) if norm is None else norm(at, rng)
    trained = pd.DataFrame({"step": at, "loss": loss, "learning_rate": rates, "grad_norm": norms, "eval_loss": np.nan})
    marks = np.linspace(0, steps, evals + 1).astype(int)
    measured = [(validation or level)(step / steps) for step in marks]
    evaluated = pd.DataFrame({"step": marks, "eval_loss": measured})
    return pd.concat([trained, evaluated]).sort_values("step", kind="stable").reset_index(drop=True)


def good(done):
    """Falls fast, then slowly, and still a little at the end."""
    return 2.2 + 1.2 * np.exp(-5 * done)


def cases(table) -> list[str]:
    return [sign.case for sign in signs(read_curve("lora-00000000", table))]


def spiky(at, rng):
    norms = rng.uniform(0.8, 1.2, len(at))
    norms[len(at) * 3 // 5] = 30
    return norms


CURVES = {
    "slow": {"level": lambda done: 3.4 - 0.01 * done},
    "slow, in proportion to the rate": {"level": lambda done: 3.4 - 0.3 * done, "schedule": "constant"},
    "swings": {"level": lambda done: good(done) + 0.6 * np.sin(25 * done) ** 2 * (done > 0.2), "validation": good},
    "swings, of validation": {"level": good, "validation": lambda done: good(done) + 0.2 * (0.35 < done < 0.55)},
    "swings, of a high rate": {"level": good, "noise": None},
    "diverged": {"level": lambda done: 3.4 if done < 0.3 else float("nan")},
    "diverged, upwards": {"level": lambda done: 3.4 + 4 * done},
    "overfitting": {"level": good, "validation": lambda done: good(done) + 0.8 * max(0, done - 0.4)},
    "plateau": {"level": lambda done: 2.2 + 1.2 * np.exp(-20 * done)},
    "unfinished": {"level": lambda done: 3.4 - 0.9 * done - 0.5 * (1 - np.exp(-6 * done)), "schedule": "constant"},
    "spikes": {"level": good, "norm": spiky},
}


@pytest.mark.parametrize("name", CURVES)
def test_a_curve_made_to_show_a_case_shows_it_with_evidence(name):
    given = dict(CURVES[name])
    if given.get("noise", 0) is None:
        table = history(**given | {"noise": 0.02})
        trained = table["loss"].notna()
        calm = np.random.default_rng(1).normal(0, 1, trained.sum()) * 0.3 * table.loc[trained, "learning_rate"] / 1e-3
        table.loc[trained, "loss"] += calm
    else:
        table = history(**given)
    case = name.split(",")[0]
    found = {sign.case: sign for sign in signs(read_curve("lora-00000000", table))}
    assert list(found) == [case]
    sign = found[case]
    assert sign.evidence
    assert all(row["run"] == "lora-00000000" for row in sign.evidence)
    assert sign.step is not None
    assert (
        str(sign.step) in sign.message
        or "rose from" in sign.message
        or "gain of" in sign.message
        or "jumps" in sign.message
    )


def test_a_good_curve_shows_nothing_whatever_its_noise():
    found = [cases(history(good, noise=noise, seed=seed)) for noise in (0.02, 0.1, 0.4) for seed in range(100)]
    assert sum(map(bool, found)) <= 3


def test_few_points_and_no_evaluations_show_nothing():
    assert cases(history(good, steps=6, evals=2)) == []
    table = history(good)
    assert cases(table[table["loss"].notna()]) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [("lora-too-low", {"slow"}), ("lora-right", set()), ("full-right", set()), ("qlora-right", set())],
)
def test_recorded_trainings_of_the_demo_model(name, expected):
    """SmolLM2-135M-Instruct on InsuranceQA, 30 steps of 4; the learning rate as in the demo, or 30 times as low."""
    assert set(cases(pd.read_csv(RECORDED / f"{name}.csv"))) == expected


def test_a_recorded_training_of_the_demo_model_at_a_rate_30_times_too_high():
    assert cases(pd.read_csv(RECORDED / "lora-too-high.csv"))[0] in ("diverged", "swings")


@pytest.fixture(scope="module")
def real(tiny_model_dir, tmp_path_factory):
    """Histories of real trainings of a tiny model: learning rate right, 30 times too low, 30 times too high."""
    from finegrid.settings import RunSettings
    from finegrid.training.train import train
    from token_rows import random_rows, write_tokens

    folder = tmp_path_factory.mktemp("rates")
    rows = {"train": random_rows(160), "validation": random_rows(40, seed=1, split="validation")}
    tokens = write_tokens(folder / "tokens", **rows)
    found = {}
    for name, rate in (("right", 1e-2), ("low", 1e-2 / 30), ("high", 0.3)):
        settings = RunSettings(
            model={"model_name_or_path": "data/models/tiny", "dtype": "float32"},
            training_args={
                "use_cpu": True,
                "max_steps": 60,
                "per_device_train_batch_size": 8,
                "gradient_accumulation_steps": 1,
                "learning_rate": rate,
                "warmup_steps": 4,
                "lr_scheduler_type": "cosine",
                "logging_steps": 1,
                "save_strategy": "no",
                "eval_strategy": "steps",
                "eval_steps": 10,
                "seed": 0,
            },
        )
        path = folder / f"{name}.csv"
        train(settings, tokens, tiny_model_dir, folder / name, path, folder / f"{name}.json", folder / "scratch" / name)
        found[name] = set(cases(pd.read_csv(path)))
    return found


@pytest.mark.slow
def test_real_trainings_at_too_high_and_too_low_a_rate_are_told_apart(real):
    assert real["low"] == {"slow"}
    assert real["high"] & {"swings", "diverged"}
    assert not real["right"] & {"slow", "swings", "diverged"}


# ------------------------------------------------------------------------------------------------ a whole study

STUDY = """
recipe: config/recipes/lora.yaml
model: {model_name_or_path: data/models/SmolLM2-135M-Instruct}
settings:
  max_input_length: 64
  max_output_length: 96
  training_args: {max_steps: 40, num_train_epochs: null}
factors:
  method:
    full: {peft_config: null}
    lora: {}
    qlora: {quantization_config: {load_in_4bit: true}}
%s
seeds: [0, 1]
compare: {baseline: {method: full}, metric: rougeL, margin: 0.01}
"""
TUNE = "tune:\n  learning_rate: {key: training_args.learning_rate, levels: [5.0e-4, 1.0e-3]}"


def study_file(folder: Path, project: Path, tune: str = TUNE) -> Path:
    path = folder / "synthetic.yaml"
    path.write_text(STUDY % tune, encoding="utf-8")
    return path


def written(study: Path, file: Path, project: Path) -> tuple[dict, dict]:
    """The advice, and the mapping of the next study."""
    mapping, _ = read_yaml(file, file.as_posix())
    result = write_advice(study, file, mapping, lambda path: load_study(path, project))
    return result, yaml.safe_load(Path(result["next_study"]).read_text("utf-8"))


def cut_answers(study: Path, share: float) -> None:
    """Let the data report say that this share of the answers was cut."""
    for path in (study / "data").glob("*.json"):
        report = json.loads(path.read_text("utf-8"))
        train = report["splits"]["train"]
        train["truncated_answers"] = round(share * train["rows"])
        train["answer_lengths"]["quantiles"]["99"] = 150 if share else 90
        if not share:
            train["answer_lengths"] |= {"edges": [0, 50, 90], "counts": [10, 10]}
        path.write_text(json.dumps(report), "utf-8")


def bend(study: Path, arm: str, level, **given) -> None:
    """Let the histories of an arm's chosen runs follow another curve."""
    selected = json.loads((study / "comparison/comparison.json").read_text("utf-8"))["selected"][arm]["runs"]
    for run in selected:
        history(level, steps=40, evals=8, **given).to_csv(study / "history" / f"{run}.csv", index=False)


def test_the_best_level_on_an_edge_gets_a_level_beyond_it(tmp_path, project):
    study = make_results(tmp_path, levels=2)
    cut_answers(study, 0)
    result, following = written(study, study_file(tmp_path, project), project)
    edges = [advice for advice in result["advice"] if advice["case"] == "edge"]
    assert {advice["arm"] for advice in edges} == {"full", "lora", "qlora"}
    assert all("0.001, is the largest that was tried" in advice["message"] for advice in edges)
    assert [row["value"] for row in edges[0]["evidence"]] != []
    assert following["tune"]["learning_rate"]["levels"] == [0.0005, 0.001, 0.002]
    assert following["seeds"] == [0, 1, 2]
    before, after = load_study(study_file(tmp_path, project), project), load_study(Path(result["next_study"]), project)
    assert {run.id for run in before.runs} < {run.id for run in after.runs}  # nothing is trained twice


def test_every_list_of_levels_grows_alike(tmp_path, project):
    """LoRA's best is on the edge of its own list: the others get a level too, in the middle."""
    tune = TUNE.replace("]}", "], in_arms: [{arms: {method: lora}, levels: [5.0e-4, 1.0e-3]}]}")
    study = make_results(tmp_path, levels=2)
    result, following = written(study, study_file(tmp_path, project, tune), project)
    tuned = following["tune"]["learning_rate"]
    assert len(tuned["levels"]) == len(tuned["in_arms"][0]["levels"]) == 3
    counts = {len({run.tuned["learning_rate"] for run in load_study(Path(result["next_study"]), project).runs})}
    assert counts == {3}


def test_a_slow_arm_gets_higher_rates_and_the_others_as_many(tmp_path, project):
    study = make_results(tmp_path, levels=0, seeds=3)
    bend(study, "lora", lambda done: 3.4 - 0.005 * done)
    bend(study, "full", lambda done: 3.4 + 3 * done)
    bend(study, "qlora", good)
    bundles = "tune: null"
    file = study_file(tmp_path, project, bundles)
    text = file.read_text("utf-8").replace("lora: {}", "lora: {training_args.learning_rate: 1.0e-3}")
    text = text.replace(
        "full: {peft_config: null}", "full: {peft_config: null, training_args: {learning_rate: 1.0e-3}}"
    )
    file.write_text(text, "utf-8")
    result, following = written(study, file, project)
    by_case = {advice["case"]: advice for advice in result["advice"]}
    assert by_case["slow"]["arm"] == "lora"
    assert "try 0.003 and 0.01" in by_case["slow"]["mend"]
    assert by_case["diverged"]["arm"] == "full"
    assert by_case["diverged"]["severity"] == "error"
    assert following["factors"]["method"] == {
        "full": {"peft_config": None},
        "lora": {},
        "qlora": {"quantization_config": {"load_in_4bit": True}},
    }
    after = load_study(Path(result["next_study"]), project)
    rates = {arm.name: sorted({float(after.run(run).tuned["learning_rate"]) for run in arm.runs}) for arm in after.arms}
    assert rates == {
        "lora": [0.001, 0.003, 0.01],
        "full": [0.0001, 0.00033, 0.001],
        "qlora": [0.00033, 0.001, 0.003],
    }


def test_longer_training_early_stopping_and_longer_answers_reach_the_next_study(tmp_path, project):
    study = make_results(tmp_path, levels=0, seeds=3)
    bend(study, "lora", **CURVES["unfinished"])
    for run in json.loads((study / "comparison/comparison.json").read_text("utf-8"))["selected"]["full"]["runs"]:
        table = history(good, steps=100, validation=CURVES["overfitting"]["validation"])
        table.to_csv(study / "history" / f"{run}.csv", index=False)
    cut_answers(study, 0.2)
    file = study_file(tmp_path, project, "")
    file.write_text(
        file.read_text("utf-8").replace(
            "num_train_epochs: null}", "num_train_epochs: null, eval_strategy: epoch, save_strategy: epoch}"
        )
    )
    result, following = written(study, file, project)
    assert {"unfinished", "overfitting", "truncation"} <= {advice["case"] for advice in result["advice"]}
    assert following["settings"]["training_args"]["max_steps"] == 80
    assert following["settings"]["max_output_length"] == 160
    assert following["settings"]["early_stopping"] == {"patience": 2}
    assert following["settings"]["training_args"]["load_best_model_at_end"] is True
    assert not result["left_to_you"]


def test_what_a_study_can_not_take_is_left_to_the_user_and_the_rest_is_done(tmp_path, project):
    study = make_results(tmp_path, levels=0)
    bend(study, "lora", **CURVES["unfinished"])
    file = study_file(tmp_path, project, "  steps: {key: training_args.max_steps, levels: [40]}")
    result, following = written(study, file, project)
    assert following["settings"]["training_args"]["max_steps"] == 40
    assert any("factors.steps: sets it" in line for line in result["left_to_you"])
    assert following["seeds"] == [0, 1, 2]


def test_advice_is_printed_for_people(tmp_path, project, capsys):
    study = make_results(tmp_path, levels=2)
    result, _ = written(study, study_file(tmp_path, project), project)
    print_advice(result)
    text = capsys.readouterr().out
    assert "warning: arm lora: tune.learning_rate" in text
    assert "→ add the level 0.002" in text
    assert "config/studies/synthetic_next.yaml" in text.replace("\n", "")


def test_a_study_that_has_not_run_is_told(tmp_path):
    with pytest.raises(UserError, match=r"plan.json: not there yet"):
        advise(tmp_path)


def test_names_of_further_studies_count():
    assert [next_name(name) for name in ("a", "a_next", "a_next2")] == ["a_next", "a_next2", "a_next3"]
