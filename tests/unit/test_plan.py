"""The plan's arithmetic against transformers' Trainer, and the limits that the data is held against."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from finegrid.errors import UserError
from finegrid.plan import make_plan, training_arithmetic, write_plan
from finegrid.settings import RunSettings
from finegrid.study import load_study

RECIPE = {
    "model": {"model_name_or_path": "./model"},
    "data_config": {
        "train_file": "data/raw/sums/train.jsonl",
        "val_file": "data/raw/sums/val.jsonl",
        "test_file": "data/raw/sums/test.jsonl",
    },
    "training_args": {"max_steps": 10, "evaluation_strategy": "steps", "eval_steps": 5, "learning_rate": 1e-4},
}
STUDY = {
    "recipe": "recipe.yaml",
    "factors": {"method": {"full": {"peft_config": None}, "lora": {"peft_config": {"r": 8}}}},
    "seeds": [0],
}
TRAIN = {"rows_in": 100, "rows": 100, "truncated_answers": 5, "dropped": {}, "label_tokens": 1000}


def arithmetic(rows: int, **arguments) -> dict:
    recipe = RunSettings(model={"model_name_or_path": "./model"}, training_args=arguments)
    return training_arithmetic(recipe, {"rows": rows, "label_tokens": 10 * rows})


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 31, 32, 100])
@pytest.mark.parametrize("accumulation", [1, 3, 4])
@pytest.mark.parametrize("length", [{"max_steps": 5}, {"num_train_epochs": 3.0}, {"num_train_epochs": 0.4}])
def test_steps_and_epochs_are_the_trainers(rows, accumulation, length, tmp_path):
    import torch
    from transformers import Trainer, TrainingArguments

    given = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": accumulation, **length}
    data = torch.utils.data.TensorDataset(torch.zeros(rows))
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, **given)
    trainer = Trainer(torch.nn.Linear(1, 1), args, train_dataset=data)
    theirs = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
    ours = arithmetic(rows, **given)
    assert ours["steps"] == theirs[-1]
    assert ours["effective_batch_size"] == theirs[4]
    assert ours["epochs"] == pytest.approx(theirs[-1] / theirs[1], abs=1e-4)


def test_warmup_below_one_is_a_share_of_the_steps():
    assert arithmetic(100, max_steps=30, warmup_steps=0.1)["warmup_steps"] == 3
    assert arithmetic(100, max_steps=30, warmup_steps=0.01)["warmup_steps"] == 1
    assert arithmetic(100, max_steps=30, warmup_steps=7)["warmup_steps"] == 7


def test_label_tokens_of_whole_and_part_epochs():
    # 10 rows, batch 4: 3 steps an epoch, the last one of 2 rows; 10 label tokens a row.
    assert arithmetic(10, max_steps=3, per_device_train_batch_size=4)["label_tokens"] == 100
    assert arithmetic(10, max_steps=6, per_device_train_batch_size=4)["label_tokens"] == 200
    assert arithmetic(10, max_steps=5, per_device_train_batch_size=4)["label_tokens"] == 180


@pytest.fixture
def planned(tmp_path):
    """Return a function that lays out a project with a token report and loads its study."""

    def plan(limits: dict | None = None, **train):
        recipe = RECIPE | {"data_config": RECIPE["data_config"] | {"limits": limits or {}}}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        (tmp_path / "sums.yaml").write_text(yaml.safe_dump(STUDY))
        study = load_study("sums.yaml", tmp_path)
        clean = {"rows": {"train": {"in": 100, "rejected": 10}}, "leaks": {"rows_left": 0}}
        report = {"splits": {"train": TRAIN | train}, "clean": clean, "findings": []}
        for run in study.all_runs:
            folder = tmp_path / "data/tokens" / f"{run.dataset}-{run.tokens_id}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "report.json").write_text(json.dumps(report))
        return study

    return plan


def test_plan_lists_base_runs_findings_and_notes(planned, tmp_path):
    study = planned()
    write_plan(study, tmp_path)
    plan = json.loads((tmp_path / "results/sums/plan.json").read_text())
    assert [(run["arm"], run["train"]) for run in plan["runs"]] == [("base", False), ("full", True), ("lora", True)]
    places = {finding["place"] for finding in plan["findings"]}
    assert places == {"seeds", "training_args.learning_rate"}
    assert any("evaluation_strategy" in note and "eval_strategy" in note for note in plan["notes"])
    assert len((tmp_path / "results/sums/plan.tsv").read_text().splitlines()) == 4


def test_lowered_limit_is_told_though_the_data_is_made(planned, tmp_path):
    make_plan(planned(), tmp_path)
    with pytest.raises(UserError, match=r"truncated_answers: 1\.0% allowed, 5 of 100 answers of train are cut"):
        make_plan(planned({"truncated_answers": 0.01}), tmp_path)
    with pytest.raises(UserError, match=r"dropped: 5\.0% allowed, cleaning rejected 10 of 100"):
        make_plan(planned({"dropped": 0.05}), tmp_path)


def test_missing_token_report_says_what_makes_it(planned, tmp_path):
    study = planned()
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(UserError, match="`snakemake plan --config study=sums` makes it"):
        make_plan(study, tmp_path)
