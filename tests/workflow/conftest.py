"""A copy of the project with a tiny study that has been run once, for tests of what reruns and what does not."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

STUDY = """\
title: Does the adapter learn as well as full fine-tuning?
recipe: config/recipes/tiny.yaml
factors:
  method:
    full: {peft_config: null, training_args.learning_rate: 1.0e-3}
    lora: {peft_config.r: 4}
seeds: [0, 1]
compare: {baseline: {method: full}, metric: rougeL, margin: 0.01}
"""

RECIPE = """\
model: {model_name_or_path: data/models/tiny}
data_config:
  train_file: data/raw/tiny/train.jsonl
  val_file: data/raw/tiny/validation.jsonl
  test_file: data/raw/tiny/test.jsonl
  format: columns
  columns: {prompt: question, answer: answer, id: id}
max_input_length: 64
max_output_length: 96
training_args:
  max_steps: 4
  learning_rate: 1.0e-2
  per_device_train_batch_size: 4
  logging_steps: 1
  eval_strategy: steps
  eval_steps: 2
  save_strategy: steps
  save_steps: 2
peft_config: {peft_type: LORA, r: 8, lora_alpha: 16, target_modules: all-linear}
generation_config: {max_new_tokens: 8}
evaluation: {batch_size: 8}
"""


class Checkout:
    """A project folder in which `snakemake` is run as a user would."""

    def __init__(self, folder: Path, study: str = "tiny"):
        self.folder = folder
        self.study = study

    def snakemake(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
        environment = os.environ | {
            "PYTHONPATH": str(self.folder / "workflow"),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        command = ["snakemake", "--config", f"study={self.study}", "--cores", "2", *arguments]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done

    def pending(self, *targets: str) -> dict[str, int]:
        """Return how many jobs of each rule a dry run would start, the named targets apart."""
        text = self.snakemake("--dry-run", "--quiet", "rules", "--", *targets).stdout
        rows = re.findall(r"^(\w+) +(\d+)$", text, flags=re.MULTILINE)
        jobs = {name: int(count) for name, count in rows}
        if not jobs:
            assert "Nothing to be done" in text, text
        return {name: count for name, count in jobs.items() if name not in ("total", "report")}

    def edit(self, file: str, old: str, new: str) -> None:
        path = self.folder / file
        text = path.read_text()
        assert old in text, f"{old!r} is not in {file}"
        path.write_text(text.replace(old, new, 1))


def raw_rows(source: Path, split: str, count: int) -> list[dict]:
    with gzip.open(source / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    short = [row for row in rows if len(row["answer"]) < 300]
    return short[:count]


def copy_project(project: Path, tiny_model: Path, folder: Path) -> None:
    """Copy what a user clones, without data and results, and put the tiny model where base models lie."""
    folder.mkdir()
    for name in ("Snakefile", "config", "workflow", "profiles", "envs", "pyproject.toml"):
        if (project / name).is_dir():
            shutil.copytree(project / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(project / name, folder / name)
    shutil.copytree(tiny_model, folder / "data/models/tiny")


def write_tiny_study(folder: Path, rows: Path, study: str = STUDY, recipe: str = RECIPE) -> None:
    """Write a study called tiny into a project, and a few of the demo's rows that it trains and is scored on."""
    (folder / "data/raw/tiny").mkdir(parents=True)
    for split, count in {"train": 16, "validation": 8, "test": 8}.items():
        lines = [json.dumps(row) + "\n" for row in raw_rows(rows, split, count)]
        (folder / f"data/raw/tiny/{split}.jsonl").write_text("".join(lines))
    (folder / "config/studies/tiny.yaml").write_text(study)
    (folder / "config/recipes/tiny.yaml").write_text(recipe)


@pytest.fixture(scope="session")
def finished(project, tiny_model_dir, insuranceqa_dir, tmp_path_factory) -> Checkout:
    """A copy of the project whose tiny study has been run to its report."""
    folder = tmp_path_factory.mktemp("checkout") / "project"
    copy_project(project, tiny_model_dir, folder)
    write_tiny_study(folder, insuranceqa_dir)
    checkout = Checkout(folder)
    checkout.snakemake()
    return checkout


@pytest.fixture
def checkout(finished, tmp_path) -> Checkout:
    """A clone of the finished project that a test may edit; dates and metadata come along."""
    folder = tmp_path / "project"
    shutil.copytree(finished.folder, folder, symlinks=True)
    return Checkout(folder)


@pytest.fixture
def fresh(project, tiny_model_dir, tmp_path) -> Checkout:
    """A copy of the project in which nothing has been run; the test names the study."""
    folder = tmp_path / "project"
    copy_project(project, tiny_model_dir, folder)
    return Checkout(folder)
