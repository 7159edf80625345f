"""The plan: made of little, exact where the data is known, stopped by errors, left alone when times alone moved."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from finegrid.errors import UserError
from finegrid.plan import (
    Context,
    evaluates_without_gpu,
    evaluation_needs,
    hardware_of,
    make_plan,
    pack_needs,
    totals,
    training_needs,
    write_plan,
)
from finegrid.plan_table import print_plan
from finegrid.study import load_study

HUB = {"model_name_or_path": "Qwen/Qwen2.5-3B-Instruct", "revision": "0123456789abcdef0123456789abcdef01234567"}
RECIPE = {
    "model": HUB,
    "data_config": {
        "train_file": "data/raw/sums/train.jsonl",
        "val_file": "data/raw/sums/val.jsonl",
        "test_file": "data/raw/sums/test.jsonl",
    },
    "training_args": {
        "max_steps": 10,
        "evaluation_strategy": "steps",
        "eval_steps": 5,
        "learning_rate": 1e-4,
        "bf16": True,
    },
}
STUDY = {
    "title": "Which method?",
    "recipe": "recipe.yaml",
    "factors": {
        "method": {
            "full": {"peft_config": None, "training_args.learning_rate": 1e-5},
            "lora": {"peft_config": {"r": 8}, "model.dtype": "bfloat16"},
        }
    },
    "seeds": [0, 1, 2],
}
SPLIT = {
    "rows_in": 100,
    "rows": 100,
    "truncated_answers": 5,
    "dropped": {},
    "label_tokens": 1000,
    "tokens": 3000,
    "prompt_lengths": {"quantiles": {"max": 40}},
    "answer_lengths": {"quantiles": {"50": 10, "90": 12, "99": 15, "max": 20}},
}
ROW = {"instruction": "How much is two and two?", "input": "", "output": "It is four, as everybody knows."}


@pytest.fixture
def project(tmp_path):
    """A project folder with raw files, and a function that loads a study with changes to study and recipe."""
    raw = tmp_path / "data/raw/sums"
    raw.mkdir(parents=True)
    for split, count in {"train": 64, "val": 8, "test": 8}.items():
        (raw / f"{split}.jsonl").write_text((json.dumps(ROW) + "\n") * count)

    def study(recipe: dict | None = None, **changes):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | (recipe or {})))
        (tmp_path / "sums.yaml").write_text(yaml.safe_dump(STUDY | changes))
        return load_study(Path("sums.yaml"), tmp_path)

    return tmp_path, study


def tokenise(study, folder, **train) -> None:
    """Lay out the token reports that the data stage would have written."""
    clean = {"rows": {"train": {"in": 100, "rejected": 10}}, "leaks": {"rows_left": 0}}
    splits = {"train": SPLIT | train, "validation": SPLIT, "test": SPLIT}
    for run in study.all_runs:
        path = folder / "data/tokens" / f"{run.dataset}-{run.tokens_id}" / "report.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"splits": splits, "clean": clean, "findings": []}))


def entries(plan, arm) -> list[dict]:
    return [run for run in plan["runs"] if run["arm"] == arm]


# ---------------------------------------------------------------- before anything is there


def test_plan_of_a_hub_model_needs_neither_its_weights_nor_prepared_data_nor_torch(project):
    folder, study = project
    study(hardware={"gpus": ["a100-80gb"]})
    (folder / "config/studies").mkdir(parents=True)
    (folder / "sums.yaml").rename(folder / "config/studies/sums.yaml")
    code = (
        "import sys; from finegrid.cli import app; sys.argv = ['finegrid', 'plan', 'sums']\n"
        "try: app()\nexcept SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'pandas', 'numpy', 'matplotlib'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    plan = json.loads((folder / "results/sums/plan.json").read_text())
    lora = entries(plan, "lora")[0]
    assert lora["device"] == "a100-80gb"
    assert lora["fits"] is True
    assert lora["memory"]["weights"] == 2 * 3_085_938_688  # the published number of parameters, in bf16
    assert lora["steps"] == 10
    assert lora["exact"] is False
    assert "raw files" in done.stdout


def test_preview_gives_way_to_the_token_report(project):
    folder, study = project
    the_study = study()
    before = entries(make_plan(the_study, folder), "lora")[0]
    tokenise(the_study, folder)
    after = entries(make_plan(the_study, folder), "lora")[0]
    assert (before["train_rows"], before["exact"]) == (64, False)
    assert (after["train_rows"], after["exact"]) == (100, True)
    # batch 8 (transformers' default) on 100 rows: 10 steps see 80 of them.
    assert after["label_tokens"] == 800
    assert after["tokens_seen"] == 2400
    # The longest row is now known: 40 tokens of prompt and 20 of answer.
    assert after["memory"] != before["memory"]


def test_files_hold_a_row_for_each_arm_and_run_and_every_finding(project):
    folder, study = project
    the_study = study(seeds=[0])
    tokenise(the_study, folder)
    write_plan(the_study, folder)
    plan = json.loads((folder / "results/sums/plan.json").read_text())
    # Weights in fp32 and in bf16 are two bases.
    assert [(run["method"], run["train"]) for run in plan["runs"]] == [
        ("base", False),
        ("base", False),
        ("full", True),
        ("lora", True),
    ]
    assert {"seeds"} <= {finding["place"] for finding in plan["findings"]}
    assert any("evaluation_strategy" in note and "eval_strategy" in note for note in plan["notes"])
    with (folder / "results/sums/plan.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [row["run"] for row in rows] == [run["run"] for run in plan["runs"]]
    lora = rows[-1]
    product = int(lora["per_device_train_batch_size"]) * int(lora["gpus"]) * int(lora["gradient_accumulation_steps"])
    assert product == int(lora["effective_batch_size"])
    assert int(lora["total"]) == plan["runs"][-1]["memory"]["total"]


def test_run_of_two_arms_counts_once_in_the_totals():
    run = {"run": "full-1", "train": True, "seconds": 60, "gpu_hours": 1.0, "label_tokens": 5, "output_bytes": 7,
           "disk_bytes": 9, "memory": {"total": 3}}  # fmt: skip
    base = {"run": "base-1", "train": False}
    found = totals([base, run | {"arm": "a"}, run | {"arm": "b"}])
    assert (found["runs"], found["base_runs"], found["gpu_hours"], found["memory_bytes"]) == (1, 1, 1.0, 3)
    unknown = totals([base, run, run | {"run": "full-2", "gpu_hours": None}])
    assert unknown["gpu_hours"] is None
    assert unknown["seconds"] == 120


# ---------------------------------------------------------------- what is written when


def test_plan_that_differs_in_times_alone_is_left_as_it_is(project):
    folder, study = project
    the_study = study()
    path = folder / "results/sums/plan.json"
    write_plan(the_study, folder)
    recorded = json.loads(path.read_text())
    for run in recorded["runs"]:
        if run["train"]:
            run |= {"seconds": 1, "gpu_hours": 0.5, "time_source": "another day"}
    recorded["totals"] |= {"seconds": 6, "gpu_hours": 3.0}
    path.write_text(json.dumps(recorded))
    write_plan(the_study, folder)
    assert json.loads(path.read_text()) == recorded
    tokenise(the_study, folder)  # now something else differs
    write_plan(the_study, folder)
    assert json.loads(path.read_text()) != recorded


def test_look_leaves_the_plan_that_results_were_made_with_until_the_study_has_other_runs(project):
    folder, study = project
    path = folder / "results/sums/plan.json"
    write_plan(study(), folder, "a100-80gb")
    before = path.read_bytes()
    shown = write_plan(study(), folder, "h100-80gb", keep=True)
    assert {run["device"] for run in shown["runs"] if run["train"]} == {"h100-80gb"}
    assert path.read_bytes() == before
    write_plan(study(seeds=[0, 1, 2, 3]), folder, "h100-80gb", keep=True)
    assert path.read_bytes() != before


def test_plan_with_an_error_is_not_written(project):
    folder, study = project
    plan = write_plan(study(hardware={"gpus": ["rtx-4090"]}), folder)
    assert [finding["severity"] for finding in plan["findings"]].count("error") == 1
    assert plan["findings"][0]["severity"] == "error"
    assert not (folder / "results").exists()


def test_lowered_limit_is_an_error_though_the_data_is_made(project):
    folder, study = project

    def limited(**limits):
        the_study = study({"data_config": RECIPE["data_config"] | {"limits": limits}})
        tokenise(the_study, folder)
        found = make_plan(the_study, folder)["findings"]
        return " ".join(finding["message"] for finding in found if finding["severity"] == "error")

    assert limited() == ""
    assert "5 of 100" in limited(truncated_answers=0.01)
    assert "10 of 100" in limited(dropped=0.05)


# ---------------------------------------------------------------- hardware


def test_each_run_is_planned_for_the_first_gpu_that_holds_it(project):
    folder, study = project
    plan = make_plan(study(hardware={"gpus": ["rtx-4090", "a100-80gb"]}), folder)
    assert {run["device"] for run in entries(plan, "lora")} == {"rtx-4090"}
    # 3.1e9 parameters x 16 bytes in fp32 with AdamW: more than 24 GiB.
    assert {run["device"] for run in entries(plan, "full")} == {"a100-80gb"}


def test_what_is_named_for_the_machine_goes_before_what_the_study_names(project):
    folder, study = project
    the_study = study(hardware={"gpus": ["rtx-4090"]})
    (folder / "config").mkdir()
    assert [card.name for card in hardware_of(the_study, folder).gpus] == ["rtx-4090"]
    (folder / "config/config.yaml").write_text("gpus: [a100-80gb]\n")
    assert [card.name for card in hardware_of(the_study, folder).gpus] == ["a100-80gb"]
    assert [card.name for card in hardware_of(the_study, folder, "h100-80gb, rtx-3090").gpus] == [
        "h100-80gb",
        "rtx-3090",
    ]
    mine = hardware_of(the_study, folder, '[{"name": "mine", "memory": "10GB"}]')
    assert mine.gpus[0].name == "mine"
    assert hardware_of(the_study, folder, "[]").gpus == ()
    assert [card.name for card in hardware_of(the_study, folder, "auto").gpus] == ["rtx-4090"]
    with pytest.raises(UserError, match=r"rtx-4099.*did you mean 'rtx-409"):
        hardware_of(the_study, folder, "rtx-4099")


def test_run_that_asks_for_the_cpu_is_planned_for_it(project):
    folder, study = project
    arguments = RECIPE["training_args"] | {"use_cpu": True}
    plan = make_plan(study({"training_args": arguments}, hardware={"gpus": ["rtx-4090"]}), folder)
    run = entries(plan, "lora")[0]
    assert (run["device"], run["fits"]) == ("cpu", None)


def test_run_is_planned_as_if_it_were_alone(project):
    """Runs that differ in seed and learning rate alone share their facts, and no others do."""
    folder, study = project
    factors = {
        "warmup": {"key": "training_args.warmup_steps", "levels": [0, 3]},
        "rows": {"key": "training_args.per_device_train_batch_size", "levels": [1, 4]},
        "answer": {"key": "max_output_length", "levels": [8, 512]},
        "beams": {"key": "generation_config.max_new_tokens", "levels": [8, 64]},
        "type": {"key": "model.dtype", "levels": ["float32", "bfloat16"]},
    }
    tune = {"rate": {"key": "training_args.learning_rate", "levels": [1e-5, 1e-4]}}
    the_study = study({"peft_config": {"r": 8}}, factors=factors, tune=tune, seeds=[0, 1])
    hardware = hardware_of(the_study, folder, "rtx-4090")
    shared = Context(the_study.name, folder, hardware)
    for run in the_study.runs:
        alone = Context(the_study.name, folder, hardware)
        assert shared.facts(run) == alone.facts(run)
        assert training_needs(shared, run) == training_needs(alone, run)
        assert evaluation_needs(shared, run) == evaluation_needs(alone, run)


# ---------------------------------------------------------------- what jobs ask for


def test_jobs_ask_for_what_the_plan_says(project):
    folder, study = project
    the_study = study(hardware={"gpus": ["a100-80gb"]})
    plan = make_plan(the_study, folder)
    context = Context(the_study.name, folder, hardware_of(the_study, folder))
    run = the_study.run(entries(plan, "full")[0]["run"])
    needs = training_needs(context, run)
    assert needs["gpus"] == 1
    assert needs["mem_mb"] * 1e6 > 4 * 3_085_938_688  # the weights pass through the host's memory
    assert needs["runtime"] * 60 > entries(plan, "full")[0]["seconds"]
    assert evaluation_needs(context, run)["gpus"] == 1


def test_a_job_of_several_nodes_asks_for_its_part_of_each(project, capsys):
    folder, study = project
    recipe = {"peft_config": {"r": 8}, "model": HUB | {"dtype": "bfloat16"}, "gpus": 4}
    found = {}
    for nodes in (1, 2):
        the_study = study(recipe | {"nodes": nodes}, factors={"arm": {"a": {}}}, hardware={"gpus": ["a100-80gb"]})
        context = Context(the_study.name, folder, hardware_of(the_study, folder))
        found[nodes] = training_needs(context, the_study.runs[0])
    assert [found[2][key] for key in ("nodes", "gpus", "processes")] == [2, 4, 4]
    assert found[1]["mem_mb"] == found[2]["mem_mb"]  # on each
    print_plan(make_plan(the_study, folder))
    assert "64 = 8×(2·4)×1" in capsys.readouterr().out


def test_jobs_on_the_cpu_ask_for_half_as_much_again_as_the_process_needs_since_the_allocator_holds_more(project):
    folder, study = project
    arguments = RECIPE["training_args"] | {"use_cpu": True}
    the_study = study({"training_args": arguments})
    context = Context(the_study.name, folder, hardware_of(the_study, folder))
    for run in the_study.runs:
        total = context.facts(run)["memory"]["total"]
        assert training_needs(context, run)["mem_mb"] * 1e6 == pytest.approx(1.5 * total, rel=0.01)
        assert training_needs(context, run)["gpus"] == 0


def test_gpus_of_the_clusters_file_count_where_nothing_else_names_some(project, monkeypatch):
    folder, study = project
    monkeypatch.setattr("finegrid.plan.detected", lambda: [])
    assert hardware_of(study(), folder).is_a_guess
    (folder / "profiles/slurm").mkdir(parents=True)
    cluster = folder / "profiles/slurm/cluster.yaml"
    cluster.write_text("gpus: [a100-80gb]\npartitions: {gpu: {max_gpu: 4}}\n")
    found = hardware_of(study(), folder, "auto")
    assert [card.name for card in found.gpus] == ["a100-80gb"]
    assert found.source == "named by profiles/slurm/cluster.yaml"
    assert hardware_of(study(hardware={"gpus": ["rtx-4090"]}), folder, "auto").source == "named by the study"
    assert hardware_of(study(), folder, "rtx-4090").source == "named by `gpus`"
    cluster.write_text("gpus: []\n")
    found = hardware_of(study(), folder, "auto")
    assert (found.gpus, found.is_a_guess) == ((), False)
    cluster.write_text("partitions: {cpu: {}}\n")
    assert hardware_of(study(), folder).is_a_guess


def test_evaluations_hold_a_gpu_only_where_a_cpu_would_take_long(project):
    folder, study = project
    small = HUB | {"model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct"}
    few = {"model": small, "generation_config": {"max_new_tokens": 16}}

    def without_gpu(recipe: dict, **changes) -> bool:
        the_study = study(recipe, hardware={"gpus": ["a100-80gb"]}, **changes)
        context = Context(the_study.name, folder, hardware_of(the_study, folder))
        found = evaluates_without_gpu(context, the_study)
        for run in the_study.all_runs:
            needs = evaluation_needs(context, run, without_gpu=found)
            assert needs["gpus"] == (0 if found else 1)
            assert needs["runtime"] * 60 > needs["seconds"] + 300
        return found

    assert without_gpu(few)  # 8 test rows
    assert not without_gpu({})  # 3 billion parameters
    assert not without_gpu(few | {"generation_config": {"max_new_tokens": 16000}})
    nf4 = {"peft_config": {"r": 8}, "quantization_config": {"load_in_4bit": True}}
    one_of_them = {"method": {"lora": {"peft_config": {"r": 8}}, "qlora": nf4}}
    assert not without_gpu(few, factors=one_of_them)  # the others go with it


def test_evaluations_before_the_rows_are_known_ask_for_no_time(project):
    folder, study = project
    hub = {"dataset": {"path": "some/data", "revision": HUB["revision"], "test_split": "test"}}
    the_study = study({"data_config": hub, "training_args": {"max_steps": 10}}, hardware={"gpus": ["a100-80gb"]})
    context = Context(the_study.name, folder, hardware_of(the_study, folder))
    assert not evaluates_without_gpu(context, the_study)
    needs = evaluation_needs(context, the_study.runs[0])
    assert (needs["gpus"], "runtime" in needs) == (1, False)


@pytest.mark.parametrize("quantised", [None, {"load_in_4bit": True}])
def test_on_a_gpu_the_runs_of_a_pack_step_together_on_a_base_of_4_bits_too(project, quantised):
    folder, study = project
    recipe = {"peft_config": {"r": 8}, "quantization_config": quantised}
    the_study = study(recipe, factors=None, hardware={"gpus": ["a100-80gb"]})
    context = Context(the_study.name, folder, hardware_of(the_study, folder))
    assert pack_needs(context, the_study.runs)["together"] == 3


# ---------------------------------------------------------------- on the terminal


def test_plan_says_who_is_packed_what_that_saves_and_who_is_not(project, capsys):
    folder, study = project
    levels = {"full": {"peft_config": None}, "lora": {"peft_config.r": 4}, "wide": {"peft_config.r": 16}}
    recipe = {"peft_config": {"r": 8}, "model": HUB | {"dtype": "bfloat16"}}
    the_study = study(recipe, factors={"method": levels}, seeds=[0, 1, 2])
    plan = make_plan(the_study, folder)
    (group,) = plan["packs"]["groups"]
    assert len(group["runs"]) == 6
    assert not [run for run in group["runs"] if run.startswith("full")]
    assert group["seconds_alone"] - group["seconds"] == pytest.approx(5 * 20, abs=2)  # five starts of 20 s
    assert plan["packs"]["alone"] == {"full fine-tuning changes the base": 3}
    print_plan(plan)
    assert "3 alone: full fine-tuning changes the base" in " ".join(capsys.readouterr().out.split())
    (folder / "config").mkdir()
    (folder / "config/config.yaml").write_text("pack: off\n")
    assert make_plan(the_study, folder)["packs"]["groups"] == []


@pytest.mark.parametrize(
    ("in_arms", "column", "told"),
    [
        ([], False, ["searched in each arm: learning_rate 0.0001, 0.0003"]),
        ([{"arms": {"method": "full"}, "levels": [1e-5, 3e-5]}], True, []),
    ],
)
def test_what_every_arm_searches_is_told_once_and_else_beside_each_arm(project, capsys, in_arms, column, told):
    folder, study = project
    rate = {"key": "training_args.learning_rate", "levels": [1e-4, 3e-4], "in_arms": in_arms}
    factors = {"method": {"full": {"peft_config": None}, "lora": {"peft_config": {"r": 8}}}}
    print_plan(make_plan(study(factors=factors, tune={"learning_rate": rate}, seeds=[0]), folder))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert any(text.startswith("arm searched") for text in lines) is column
    assert [text for text in lines if text.startswith("searched in each arm")] == told
    assert any(text.startswith("full 1e-5, 3e-5 2 ") for text in lines) is column


def test_printed_plan_counts_one_of_a_kind_in_the_singular(project, capsys):
    folder, study = project
    print_plan(make_plan(study({"peft_config": {"r": 8}}, factors={}, seeds=[0]), folder))
    assert "1 run to train, 1 untrained base model to score" in capsys.readouterr().out


def test_printed_plan_fits_100_columns_and_leaves_the_rest_to_the_file(project, capsys):
    folder, study = project
    ranks = {"key": "peft_config.r", "levels": list(range(1, 61))}
    long = {"a very long name of a level that nobody would choose": {"training_args.weight_decay": 0.1}, "b": {}}
    factors = {"rank": ranks, "decay of the weights": long}
    recipe = {"peft_config": {"r": 8}, "model": HUB | {"dtype": "bfloat16"}}
    print_plan(make_plan(study(recipe, factors=factors, hardware={"gpus": ["a100-80gb"]}), folder))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert any("more rows" in line and "plan.tsv" in line for line in lines)
    assert any("effective batch" in line for line in lines)
