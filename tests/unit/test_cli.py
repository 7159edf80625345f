"""The command line: mistakes read well, and what the libraries print goes to the log."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

RECIPE = {
    "model": {"model_name_or_path": "./model"},
    "data_config": {"train_file": "data/raw/sums/train.jsonl", "test_file": "data/raw/sums/test.jsonl"},
    "training_args": {"max_steps": 10},
}


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "config/studies").mkdir(parents=True)
    (tmp_path / "config/recipes").mkdir()
    (tmp_path / "data/raw/sums").mkdir(parents=True)
    (tmp_path / "config/recipes/sums.yaml").write_text(yaml.safe_dump(RECIPE))
    (tmp_path / "config/studies/sums.yaml").write_text(yaml.safe_dump({"recipe": "config/recipes/sums.yaml"}))
    rows = [{"instruction": f"{n} + {n}?", "input": "", "output": str(2 * n)} for n in range(20)]
    for split, part in {"train": rows[:16], "test": rows[16:]}.items():
        lines = [json.dumps(row) + "\n" for row in part]
        (tmp_path / f"data/raw/sums/{split}.jsonl").write_text("".join(lines))
    return tmp_path


def finegrid(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FINEGRID_")}
    command = [Path(sys.executable).parent / "finegrid", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def data_id(folder: Path) -> str:
    from finegrid.layout import clean_folder
    from finegrid.study import load_study

    return clean_folder(load_study(Path("config/studies/sums.yaml"), folder).runs[0]).name


def test_unknown_study_names_the_nearest(folder):
    done = finegrid(folder, "plan", "sume")
    assert done.returncode == 1
    assert (
        done.stderr
        == "error: study 'sume': there is no config/studies/sume.yaml; did you mean 'sums'?; there are sums\n"
    )


def test_unknown_run_is_told_before_anything_is_loaded(folder):
    done = finegrid(folder, "train", "sums", "lora-00000000", "--log", "train.log")
    assert done.returncode == 1
    assert "'lora-00000000' is no run of this study" in done.stderr
    assert "'lora-00000000' is no run of this study" in (folder / "train.log").read_text()


def test_stage_writes_where_its_rule_looks_and_says_that_it_started(folder):
    name = data_id(folder)
    done = finegrid(folder, "import", name, "--log", "logs/import.log")
    assert done.returncode == 0, done.stderr
    assert f"import {name}: started" in done.stderr
    rows = (folder / f"data/clean/{name}/imported/train.jsonl").read_text().splitlines()
    assert len(rows) == 16
    assert json.loads(rows[3])["messages"][1] == {"role": "assistant", "content": "6"}


def test_broken_data_ends_with_file_and_line_and_leaves_nothing(folder):
    with (folder / "data/raw/sums/train.jsonl").open("a") as file:
        file.write('{"instruction": "cut off\n')
    name = data_id(folder)
    done = finegrid(folder, "import", name, "--log", "import.log")
    assert done.returncode == 1
    assert "data/raw/sums/train.jsonl:17" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((folder / "data/clean").rglob("*.jsonl"))


def test_a_recipe_alone_is_checked_and_printed_as_it_will_be_used(folder, project):
    recipe = project / "tests/data/sft.yaml"
    done = finegrid(folder, "resolve", str(recipe))
    assert done.returncode == 1
    assert "model.model_name_or_path: is missing" in done.stderr
    done = finegrid(folder, "resolve", str(recipe), "--model", "./model")
    assert done.returncode == 0, done.stderr
    resolved = yaml.safe_load(done.stdout)
    assert resolved["model"]["model_name_or_path"] == "model"
    assert resolved["training_args"]["learning_rate"] == 2e-5
    assert resolved["training_args"]["weight_decay"] == 0.01
    assert "evaluation_strategy: read as 'eval_strategy'" in done.stderr


def test_data_set_of_no_study_says_where_it_looked(folder):
    done = finegrid(folder, "clean", "sums-00000000")
    assert done.returncode == 1
    assert done.stderr == "error: data set 'sums-00000000': no study uses it; looked in sums\n"


def test_a_figure_that_does_not_fit_the_study_is_refused_with_what_it_needs(folder):
    done = finegrid(folder, "figure", "sums", "heatmap")
    assert done.returncode == 1
    assert "figure 'heatmap': needs two factors whose levels are combined with each other" in done.stderr
    done = finegrid(folder, "figure", "sums", "qualty")
    assert "did you mean 'quality'?" in done.stderr
