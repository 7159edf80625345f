"""Each run is held against its own untrained base."""

from __future__ import annotations

import json

import pytest
from finegrid.analysis.learning import learning, print_learning
from finegrid.errors import UserError


def write_study(folder, losses: dict[str, float], answers: dict[str, list[str]]):
    runs = [{"run": "base-00000000", "arm": "base", "base": "base-00000000", "train": False}]
    runs += [{"run": run, "arm": "lora", "base": "base-00000000", "train": True} for run in losses if "base" not in run]
    (folder / "metrics").mkdir()
    (folder / "plan.json").write_text(json.dumps({"runs": runs}))
    for run, loss in losses.items():
        (folder / f"metrics/{run}.json").write_text(json.dumps({"splits": {"validation": {"loss": loss}}}))
        (folder / "runs" / run).mkdir(parents=True)
        rows = [{"id": str(n), "split": "test", "prediction": text} for n, text in enumerate(answers[run])]
        (folder / "runs" / run / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_run_above_its_base_did_not_learn(tmp_path, capsys):
    losses = {"base-00000000": 3.0, "lora-00000001": 2.5, "lora-00000002": 3.1}
    answers = {"base-00000000": ["a", "b"], "lora-00000001": ["a", "c"], "lora-00000002": ["a", "b"]}
    write_study(tmp_path, losses, answers)
    entries = {entry.run: entry for entry in learning(tmp_path)}
    assert entries["lora-00000001"].learned
    assert not entries["lora-00000002"].learned
    assert [entry.changed_answers for entry in entries.values()] == [1, 0]
    assert not print_learning(tmp_path)
    assert "did not learn" in capsys.readouterr().out


def test_unfinished_study_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="run `snakemake`"):
        learning(tmp_path)
