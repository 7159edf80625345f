"""A Slurm that the tests start and end, and a copy of the project in which a user types `snakemake --profile slurm`."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Iterator

import pytest
from cluster import Slurm, why_not
from login_node import CLUSTER, Project


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """A Slurm of this test process alone: two nodes with 2 GPUs each, partitions `cpu` and `gpu`."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with Slurm(nodes=2) as running:
        yield running


@pytest.fixture(scope="module")
def cluster_project(slurm, project, tiny_model_dir, insuranceqa_dir, tmp_path_factory) -> Iterator[Project]:
    """A copy of the project with a small data set, a tiny model and the cluster's file edited."""
    folder = tmp_path_factory.mktemp("login") / "project"
    folder.mkdir()
    for name in ("Snakefile", "config", "workflow", "profiles", "envs", "pyproject.toml"):
        if (project / name).is_dir():
            shutil.copytree(project / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(project / name, folder / name)
    (folder / "slurm").symlink_to(os.readlink(project / "slurm"))
    shutil.copytree(tiny_model_dir, folder / "data/models/tiny")
    (folder / "data/raw/tiny").mkdir(parents=True)
    for split, count in {"train": 16, "validation": 8, "test": 8}.items():
        with gzip.open(insuranceqa_dir / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [line for line in file if len(json.loads(line)["answer"]) < 300]
        (folder / f"data/raw/tiny/{split}.jsonl").write_text("".join(rows[:count]))
    (folder / "profiles/slurm/cluster.yaml").write_text(CLUSTER)
    profile = folder / "profiles/slurm/config.yaml"
    text = profile.read_text()
    assert "status-checks: 15" in text
    profile.write_text(text.replace("status-checks: 15", "status-checks: 1"))
    settings = folder / "config/config.yaml"  # each run is a job of its own, unless a test says otherwise
    assert "pack: auto" in settings.read_text()
    settings.write_text(settings.read_text().replace("pack: auto", "pack: off"))
    made = Project(folder, slurm)
    yield made
    made.stop()
