"""What may be compared: runs on the same examples and metrics; everything else is refused by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
from finegrid.analysis.scores import load_plan, load_scores, load_training
from finegrid.errors import UserError
from study_results import make_results


@pytest.fixture
def study(tmp_path):
    return make_results(tmp_path, levels=0, examples=12)


def load(study):
    plan = load_plan(study / "plan.json")
    runs = list(dict.fromkeys(run.run for run in plan.runs))
    metrics = [study / "metrics" / f"{run}.json" for run in runs]
    return load_scores(plan, metrics, [study / "runs" / run / "predictions.jsonl" for run in runs])


def rewrite(study, run, change):
    """Change a run's prediction rows: `change(rows)` returns the new ones."""
    path = study / "runs" / run / "predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in change(rows)), "utf-8")


def a_run(study, arm="lora"):
    return next(run.run for run in load_plan(study / "plan.json").runs_of(arm))


def edit(path, change):
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), "utf-8")


def test_scores_are_aligned_by_id_whatever_the_order_of_rows(study):
    before = load(study)
    run = a_run(study)
    rewrite(study, run, lambda rows: rows[::-1])
    after = load(study)
    assert after.ids == before.ids
    assert np.array_equal(after.values["rougeL"], before.values["rougeL"])
    row = json.loads((study / "runs" / run / "predictions.jsonl").read_text("utf-8").splitlines()[-1])
    place = (after.runs.index(run), after.ids.index(row["id"]))
    assert after.values["rougeL"][place] == row["scores"]["rougeL"]
    assert after.nll[place] == row["nll"]


def test_only_the_generated_split_is_read(study):
    scores = load(study)
    assert scores.split == "test"
    assert scores.nll.shape == (len(scores.runs), 12)
    assert all(name.startswith("test-") for name in scores.ids)


def test_validation_is_compared_where_there_is_no_test(study):
    for run in {run.run for run in load_plan(study / "plan.json").runs}:
        rewrite(study, run, lambda rows: [row | {"split": "validation"} for row in rows if row["split"] == "test"])
    assert load(study).split == "validation"


def test_missing_examples_are_refused_with_run_and_ids(study):
    run = a_run(study)
    rewrite(study, run, lambda rows: [row for row in rows if row["id"] not in ("test-0003", "test-0007")])
    with pytest.raises(UserError, match=rf"run {run}: lacks test examples .*: test-0003, test-0007$"):
        load(study)


def test_extra_and_doubled_examples_are_refused_together(study):
    first, second = a_run(study), a_run(study, "qlora")
    rewrite(study, first, lambda rows: [*rows, rows[0] | {"id": "test-9999"}])
    rewrite(study, second, lambda rows: [*rows, rows[0]])
    with pytest.raises(UserError) as caught:
        load(study)
    assert any(f"run {first}: has test examples" in p and "test-9999" in p for p in caught.value.problems)
    assert any(f"run {second}: test ids given more than once: test-0000" in p for p in caught.value.problems)


def test_long_lists_of_ids_are_counted(study):
    run = a_run(study)
    rewrite(study, run, lambda rows: rows[10:])
    with pytest.raises(UserError, match="test-0004 and 5 more"):
        load(study)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": "something else"}, "other reference answers"),
        ({"label_tokens": 7}, "other label tokens"),
        ({"scores": None}, "rougeL is there in"),
    ],
)
def test_an_example_that_is_not_the_same_is_refused(study, change, message):
    run = a_run(study)
    rewrite(study, run, lambda rows: [row | change if row["id"] == "test-0002" else row for row in rows])
    with pytest.raises(UserError, match="test-0002") as caught:
        load(study)
    assert any(message in problem and run in problem for problem in caught.value.problems)


def test_references_may_differ_in_white_space(study):
    def spaced(rows: list[dict]) -> list[dict]:
        return [row | {"reference": f" {row['reference'].replace(' ', '  ')}"} for row in rows]

    expected = load(study).ids
    rewrite(study, a_run(study), spaced)
    assert load(study).ids == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics_version": "2"}, "scored with metric version 2, but"),
        ({"signatures": {"bleu": "version:1", "rouge_score": "0.1.2"}}, "scored with metric bleu version:1, but"),
        ({"data": {"examples": "ffff", "tokens": "ffff"}}, "scored on another version of the data than"),
    ],
)
def test_other_metrics_or_data_are_refused(study, change, message):
    run = a_run(study)
    edit(study / "metrics" / f"{run}.json", lambda content: content.update(change))
    with pytest.raises(UserError, match=f"run {run}: {message}") as caught:
        load(study)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("content", ["[]", '{"data": {}}', '{"data": {}, "splits": null}'])
def test_metrics_of_another_shape_are_named_by_file(study, content):
    path = study / "metrics" / f"{a_run(study)}.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=f"{path.name}: not the metrics of a run"):
        load(study)


def test_runs_of_other_length_limits_keep_their_own_label_tokens(study):
    run = a_run(study)
    edit(study / "metrics" / f"{run}.json", lambda content: content["data"].update(tokens="ffff"))
    rewrite(study, run, lambda rows: [row | {"label_tokens": 7} for row in rows])
    scores = load(study)
    assert (scores.label_tokens[scores.rows([run])] == 7).all()
    assert (scores.label_tokens[scores.rows([scores.runs[0]])] != 7).any()
    assert not scores.same_tokens(scores.runs)
    assert scores.same_tokens(other for other in scores.runs if other != run)


def test_a_missing_run_is_refused(study):
    plan = load_plan(study / "plan.json")
    with pytest.raises(UserError, match=f"run {a_run(study)}: no predictions"):
        load_scores(plan, sorted((study / "metrics").glob("*.json")), [])


def test_a_broken_row_is_named_by_file_and_line(study):
    run = a_run(study)
    path = study / "runs" / run / "predictions.jsonl"
    lines = path.read_text("utf-8").splitlines()
    lines[4] = lines[4][:20]
    path.write_text("\n".join(lines), "utf-8")
    with pytest.raises(UserError, match=r"predictions\.jsonl:5: not a row of predictions"):
        load(study)


def test_a_baseline_that_is_no_arm_is_refused_with_the_nearest(study):
    edit(study / "plan.json", lambda plan: plan["compare"].update(baseline="fulll", metric="rouge_l"))
    with pytest.raises(UserError) as caught:
        load_plan(study / "plan.json")
    assert "did you mean 'full'?" in caught.value.problems[0]
    assert "compare.metric: 'rouge_l'" in caught.value.problems[1]


def test_training_summaries_are_indexed_by_run(study):
    table = load_training((study / "training").glob("*.json"))
    assert table.loc[a_run(study), "trainable_parameters"] == 2_442_240
    assert load_training([]).empty
