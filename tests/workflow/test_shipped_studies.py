"""The shipped studies run to their reports: the same files, smaller in model, rows, steps and seeds alone."""

from __future__ import annotations

import csv
import gzip
import json
import math
from pathlib import Path

import pytest
import yaml
from finegrid import layout
from finegrid.settings import check_files
from finegrid.study import Study, load_study

SHIPPED = ("data_strategy", "optimisation_strategy", "training_strategy", "peft")
MADE = ("data/models/SmolLM2-135M-Instruct", "data/raw/insuranceqa")  # by the workflow


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_study_resolves_at_full_size(project, name):
    study = load_study(Path(f"config/studies/{name}.yaml"), project)
    assert [problem for run in study.runs for problem in check_files(run.settings, project, made=MADE)] == []
    assert study.seeds == (0, 1, 2)
    for run in study.runs:
        assert run.settings.model.revision is not None
        assert len(run.settings.model.revision) == 40
        batch, accumulation = (
            run.settings.training_arg(key) for key in ("per_device_train_batch_size", "gradient_accumulation_steps")
        )
        assert batch * accumulation * run.settings.gpus == 32
    text = study_text(project, name)
    trained = len(study.runs)
    assert f"= {trained} " in text, f"the file's comment gives another number of runs than {trained}"
    assert f"# {len(study.arms)} arms x" in text


def study_text(folder: Path, name: str) -> str:
    return (folder / f"config/studies/{name}.yaml").read_text(encoding="utf-8")


# ---------------------------------------------------------------- a reduced copy


def write_rows(source: Path, folder: Path) -> None:
    """Write a few of the demo's rows under its own names, such as a study of the data meets: long ones and repeated
    ones, in train a nearly repeated and a leaked one as well."""
    folder.mkdir(parents=True)
    splits = {split: read_rows(source / f"{split}.jsonl.gz") for split in ("train", "validation", "test")}
    long = {split: max(rows, key=lambda row: len(row["answer"])) for split, rows in splits.items()}
    few = {split: [row for row in rows if 30 <= len(row["answer"].split()) <= 80] for split, rows in splits.items()}
    train = few["train"][:44]
    nearly = train[1] | {"id": "nearly", "answer": train[1]["answer"] + " Ask."}
    rows = {
        "train": [*train, long["train"], train[0] | {"id": "again"}, nearly, few["test"][0] | {"id": "leaked"}],
        "validation": [*few["validation"][:6], few["validation"][0] | {"id": "again"}],
        "test": [*few["test"][:7], long["test"]],
    }
    for split, content in rows.items():
        with gzip.open(folder / f"{split}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in content)


def read_rows(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# What a study varies twice in the same way: a job costs seconds, all of them its start.
LEFT_OUT = {
    "text": ["text_as_it_came"],
    "duplicates": ["duplicates_kept"],
    "max_answer": ["answer_256"],
    "fraction": [0.25],
    "scheduler": ["constant_with_warmup"],
    "warmup": ["warmup_10"],
    "batch": ["batch_2x16"],
    "weight_decay": [0],
    "optimiser": ["adafactor"],
    "length": ["four_epochs"],
    "sharding": ["zero2", "zero3"],
    "method": ["lora_r64", "lora_qv"],
}


def drop_level(factor: dict, level: str | float) -> None:
    """Remove a level from a factor, which has named bundles, or a key with a list or a mapping of values."""
    levels = factor.get("levels", factor)
    if isinstance(levels, list):
        levels.remove(level)
    else:
        del levels[level]


def reduce(study: dict) -> dict:
    """Return a study as it is shipped, for the tiny model on the CPU, with one seed, few steps and fewer levels."""
    settings = study["settings"]
    study["model"] = {"model_name_or_path": "data/models/tiny"}
    study["seeds"] = [0]
    settings["training_args"] |= {"use_cpu": True, "logging_steps": 1}
    if "generation_config" in settings:
        settings["generation_config"]["max_new_tokens"] = 4
    for factor in study["factors"].values():
        for level in factor.values() if "key" not in factor else ():
            if "training_args.max_steps" in level:
                level["training_args.max_steps"] = 3
    for factor, levels in LEFT_OUT.items():
        for level in levels if factor in study["factors"] else ():
            drop_level(study["factors"][factor], level)
    if "include" in study:  # one pair of scheduler and warmup
        del study["include"][1:]
    for factor in study.get("tune", {}).values():
        factor["levels"] = factor["levels"][-1:]
        for entry in factor.get("in_arms", ()):
            entry["levels"] = entry["levels"][-1:]
    return study


def run_reduced(fresh, insuranceqa_dir: Path, name: str) -> tuple[Study, Path]:
    write_rows(insuranceqa_dir, fresh.folder / "data/raw/insuranceqa")
    path = fresh.folder / f"config/studies/{name}.yaml"
    path.write_text(yaml.safe_dump(reduce(yaml.safe_load(path.read_text())), sort_keys=False))
    fresh.study = name
    fresh.snakemake()
    return load_study(Path(f"config/studies/{name}.yaml"), fresh.folder), fresh.folder / f"results/{name}"


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def losses(study: Study, results: Path) -> dict[str, float]:
    """Check that every arm was trained, scored and compared; return their validation losses."""
    planned = {run["run"]: run for run in read(results / "plan.json")["runs"]}
    found = {}
    for arm in study.arms:
        for run in arm.runs:
            summary = read(results / f"training/{run}.json")
            assert summary["steps"] >= 1
            assert summary["label_tokens"] > 0
            assert math.isfinite(summary["train_loss"])
            assert summary["final_eval_loss"] != summary["base_eval_loss"], arm.name
            assert planned[run]["effective_batch_size"] == summary["effective_batch_size"] == 32
            if study.run(run).settings.early_stopping is None:
                whole = float(summary["epochs"]).is_integer()
                assert planned[run]["steps"] == summary["steps"], arm.name
                assert planned[run]["epochs"] == pytest.approx(summary["epochs"], abs=1e-4), arm.name
                # Of a part of an epoch the plan knows the rows' share.
                tolerance = 0 if whole else 0.1
                assert planned[run]["label_tokens"] == pytest.approx(summary["label_tokens"], rel=tolerance), arm.name
            assert read(results / f"metrics/{run}.json")["splits"]["test"]["examples"] == 8
            found[arm.name] = summary["final_eval_loss"]
    metric = study.compare.metric
    compared = {row["arm"] for row in table(results / "comparison/comparisons.tsv") if row["metric"] == metric}
    assert {arm.name for arm in study.arms} - {study.compare.baseline} <= compared
    assert (results / "report.html").exists()
    return found


@pytest.mark.slow
def test_the_data_strategy_runs_to_its_report(fresh, insuranceqa_dir):
    study, results = run_reduced(fresh, insuranceqa_dir, "data_strategy")
    losses(study, results)
    reports = {
        level: read(results / f"data/{layout.tokens_folder(study.run(arm.runs[0])).name}.json")["splits"]["train"]
        for arm in study.arms
        for level in arm.factors.values()
        if arm.name == study.compare.baseline or level not in study.arms[0].factors.values()
    }
    rows = {level: report["rows"] for level, report in reports.items()}
    assert rows["text_mended"] == 46  # without the repeated and the leaked row
    assert rows["leaks_kept"] == 47
    assert rows["near_duplicates_removed"] == 45
    assert rows["0.5"] == 23
    assert reports["text_mended"]["truncated_answers"] == 1
    assert reports["answer_128"]["label_tokens"] < reports["text_mended"]["label_tokens"]


@pytest.mark.slow
def test_the_optimisation_strategy_runs_to_its_report(fresh, insuranceqa_dir):
    study, results = run_reduced(fresh, insuranceqa_dir, "optimisation_strategy")
    loss = losses(study, results)
    baseline = loss[study.compare.baseline]
    assert loss["batch_4x8"] == pytest.approx(baseline, rel=1e-4)


@pytest.mark.slow
def test_the_training_strategy_runs_to_its_report(fresh, insuranceqa_dir):
    study, results = run_reduced(fresh, insuranceqa_dir, "training_strategy")
    loss = losses(study, results)
    baseline = loss[study.compare.baseline]
    for level in ("one_gpu", "zero3_offload", "activations_recomputed"):
        assert loss[level] == pytest.approx(baseline, rel=1e-4), level


@pytest.mark.slow
def test_the_methods_run_to_their_report(fresh, insuranceqa_dir):
    losses(*run_reduced(fresh, insuranceqa_dir, "peft"))
