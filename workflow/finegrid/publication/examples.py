"""Sample answers for the report: those in which the arms differ most, side by side, and some drawn at random."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass

from finegrid.analysis.compare import LOWER_IS_BETTER
from finegrid.publication.results import Results, decimal

MOST = 10  # examples of each kind
ARMS = 8  # answers that are readable side by side
# What the kinds of examples are called on the filters' buttons.
TAGS = {
    "gain": "gained most",
    "loss": "lost most",
    "ahead": "ahead of the baseline",
    "behind": "behind the baseline",
    "random": "random",
}


@dataclass(frozen=True)
class Column:
    """One answer of each example: the arm, the run that gave it, and the run of its untrained base (None of a base)."""

    arm: str
    label: str
    run: str
    base: str | None


Answers = dict[str, dict[str, dict]]  # run -> example's id -> row of predictions.jsonl


def examples(results: Results) -> dict:
    """Return sample predictions of every arm beside its untrained base.

    Ten each where the arms gained and lost most against their own bases in the primary metric (mean over arms), where
    the best arm is furthest ahead of the baseline and furthest behind it (or the second best, where the best is the
    baseline), and ten at random, always the same ones. Of many arms the baseline and the best ones are shown.

    Returns:
        `columns`, `shown`, `total`, `rival` (labels of the best arm and the baseline, or None), `left_out` (arms),
        `missing` (a sentence, or empty).
    """
    columns, left_out = _columns(results)
    answers = {column.run: _answers(results, column.run) for column in columns}
    found = {"columns": columns, "shown": [], "total": 0, "rival": None, "left_out": left_out, "missing": ""}
    if any(rows is None for rows in answers.values()):
        return found | {"missing": "The predictions are not on this machine: `dvc pull` brings them."}
    ids = list(next(iter(answers.values()), {}))
    if not ids:
        return found | {"missing": "No answers were generated in this study (evaluation.generate)."}
    gains = {key: _gain(columns, answers, key, results.metric) for key in ids}
    rival = _rival(results, columns)
    leads = {key: _lead(*rival, answers, key, results.metric) for key in ids} if rival else {}
    shown = [
        _example(key, tags, gains[key], leads.get(key), columns, answers, results.metric)
        for key, tags in _chosen(gains, leads).items()
    ]
    names = rival and [column.label for column in rival]
    return found | {"shown": shown, "total": len(ids), "rival": names}


def _columns(results: Results) -> tuple[list[Column], int]:
    """The bases first, then the arms in the plan's order: all, or the baseline and those with the best means."""
    arms = _best_first(results)
    first = [results.baseline] if results.baseline in arms else []
    kept = {*first, *[arm for arm in arms if arm not in first][: ARMS - len(first)]}
    trained = [
        Column(arm, results.label(arm), results.selected_runs(arm)[0], results.base_of(arm))
        for arm in results.trained
        if arm in kept
    ]
    names = {run["run"]: run["arm"] for run in results.plan["runs"] if not run["train"]}
    bases = dict.fromkeys(column.base for column in trained if column.base in names)
    untrained = [Column(names[run], results.label(names[run]), run, None) for run in bases]
    return untrained + trained, len(arms) - len(trained)


def _best_first(results: Results) -> list[str]:
    means = results.arms.loc[results.trained, results.metric]
    return list(means.sort_values(ascending=results.metric in LOWER_IS_BETTER, na_position="last").index)


def _rival(results: Results, columns: list[Column]) -> tuple[Column, Column] | None:
    """The best arm and the baseline; the second best where the baseline is the best."""
    shown = {column.arm: column for column in columns}
    best = next((arm for arm in _best_first(results) if arm != results.baseline and arm in shown), None)
    return (shown[best], shown[results.baseline]) if best and results.baseline in shown else None


def _answers(results: Results, run: str) -> dict[str, dict] | None:
    path = results.folder / "runs" / run / "predictions.jsonl"
    if not path.exists():
        return None
    with path.open(encoding="utf-8") as file:
        rows = (json.loads(line) for line in file)
        split = results.comparison["split"]
        return {row["id"]: row for row in rows if row["split"] == split and row["prediction"] is not None}


def _score(row: dict, metric: str) -> float:
    """The example's score, the larger the better; of the loss, what a label token cost, below zero."""
    if metric in row["scores"]:
        return row["scores"][metric]
    return -row["nll"] / row["label_tokens"] if row["nll"] is not None and row["label_tokens"] else float("nan")


def _gain(columns: list[Column], answers: Answers, key: str, metric: str) -> float:
    """Mean over the trained arms of score minus the score of the arm's own base; 0 where there is no base."""
    gains = [_change(column, answers, key, metric) for column in columns if column.base in answers]
    gains = [gain for gain in gains if math.isfinite(gain)]
    return sum(gains) / len(gains) if gains else 0.0


def _change(column: Column, answers: Answers, key: str, metric: str) -> float:
    return _score(answers[column.run][key], metric) - _score(answers[column.base][key], metric)


def _lead(best: Column, baseline: Column, answers: Answers, key: str, metric: str) -> float:
    lead = _score(answers[best.run][key], metric) - _score(answers[baseline.run][key], metric)
    return lead if math.isfinite(lead) else 0.0


def _chosen(gains: dict[str, float], leads: dict[str, float]) -> dict[str, list[str]]:
    """Return the ids of the examples to show -> their tags."""
    chosen: dict[str, list[str]] = {}
    for values, up, down in ((gains, "gain", "loss"), (leads, "ahead", "behind")):
        order = sorted(values, key=lambda key: -values[key])
        for tag, keys, sign in ((up, order, 1), (down, order[::-1], -1)):
            for key in keys[:MOST]:
                if sign * values[key] > 0:
                    chosen.setdefault(key, []).append(tag)
    rest = [key for key in gains if key not in chosen]
    for key in random.Random(0).sample(rest, min(MOST, len(rest))):
        chosen[key] = ["random"]
    return chosen


def _example(
    key: str, tags: list[str], gain: float, lead: float | None, columns: list[Column], answers: Answers, metric: str
) -> dict:
    first = answers[columns[0].run][key]
    return {
        "id": key,
        "tags": tags,
        "gain": decimal(gain, sign=True),
        "lead": None if lead is None else decimal(lead, sign=True),
        "prompt": first["prompt"],
        "reference": first["reference"],
        "answers": [_answer(column, answers, key, metric) for column in columns],
    }


def _answer(column: Column, answers: Answers, key: str, metric: str) -> dict:
    row = answers[column.run][key]
    change = _change(column, answers, key, metric) if column.base in answers else None
    return {
        "arm": column.arm,
        "label": column.label,
        "text": row["prediction"],
        "score": decimal(abs(_score(row, metric))),
        "change": None if change is None else decimal(change, sign=True),
        "up": change is not None and change > 0,
    }
