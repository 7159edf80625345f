"""What `snakemake --report` says on its landing page: commits, data and lock of the study's runs."""

from __future__ import annotations

import json
import subprocess

from finegrid.publication.metadata import report_metadata
from study_results import make_results


def test_metadata_names_commits_and_every_hashed_input_once(tmp_path):
    study = make_results(tmp_path, arms=2, seeds=1, levels=0, examples=4)
    data = {"file": "data/tokens/x/train.arrow", "sha256": "ab" * 32}
    for number, path in enumerate(sorted((study / "provenance").glob("*.json"))):
        record = json.loads(path.read_text()) | {"inputs": {"train": data}, "lock": "cd" * 32, "dirty": number == 0}
        path.write_text(json.dumps(record))

    found = report_metadata("synthetic", tmp_path)

    commit = "``c12167a0000000000000000000000000000000ff``"
    assert sorted(found["Commits of the runs"]) == [commit, f"{commit} with changes that were not committed"]
    assert found["Data and models (SHA-256)"] == [f"``data/tokens/x/train.arrow`` ``{'ab' * 16}`` ``{'ab' * 16}``"]
    assert found["Locked packages (SHA-256)"] == [f"``envs/lock.txt`` ``{'cd' * 16}`` ``{'cd' * 16}``"]
    assert found["Commit of this checkout"] == ["not in a git checkout"]
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", *who, "commit", "-q", "--allow-empty", "-m", "x"], cwd=tmp_path, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True).stdout.strip()
    assert report_metadata("synthetic", tmp_path)["Commit of this checkout"] == [f"``{head}``"]


def test_metadata_of_a_study_without_results_says_so(tmp_path):
    found = report_metadata("nothing", tmp_path)

    assert found["Commits of the runs"] == ["no run has provenance yet"]
    assert all(found.values())
