"""Scores of all runs of a study, aligned by example: what every comparison reads.

Reads `plan.json`, `metrics/<run>.json` and `runs/<run>/predictions.jsonl`. Runs that were not scored on the same
examples, by the same version of the metrics, are refused here, so that nothing after this module can pair what does
not belong together. Runs of other length limits have other tokens: their answers can be compared, their losses not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from finegrid.analysis.corpus import CORPUS
from finegrid.errors import UserError, nearest

SCORES = ("exact_match", "f1", "rouge1", "rouge2", "rougeL", "bleu", "chrf")
"""Per-example scores between 0 and 1, higher is better."""
METRICS = ("loss", *SCORES)
"""All that arms are described by; `loss` is in nats per label token, lower is better."""
METRIC_NAMES = {
    "loss": "loss",
    "exact_match": "exact match",
    "f1": "token F1",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "bleu": "sentence BLEU",
    "chrf": "chrF",
}
"""As a metric is called inside a sentence."""
NAMED = 5  # ids named in a message; the rest is counted


@dataclass(frozen=True)
class Run:
    """One planned run of one arm."""

    run: str
    arm: str
    tuned: dict[str, str]
    seed: int | None
    base: str | None
    train: bool


@dataclass(frozen=True)
class Arm:
    """One row of the paper's table."""

    arm: str
    label: str
    factors: dict[str, str]
    base: str | None


@dataclass(frozen=True)
class Plan:
    """What the comparison needs of `plan.json`."""

    study: str
    title: str
    baseline: str
    metric: str
    margin: float | None
    select: str
    arms: list[Arm]
    runs: list[Run]
    seeds: list[int] = field(default_factory=list)

    @property
    def metric_name(self) -> str:
        """The primary metric as a sentence calls it."""
        return METRIC_NAMES[self.metric]

    def label(self, arm: str) -> str:
        """The arm as a reader knows it."""
        return next(known.label for known in self.arms if known.arm == arm)

    def runs_of(self, arm: str) -> list[Run]:
        """The arm's runs, in the plan's order."""
        return [run for run in self.runs if run.arm == arm]


@dataclass(frozen=True)
class Scores:
    """Per-example scores of the compared split, aligned: row r is `runs[r]`, column e is `ids[e]`.

    `values[m]` has shape (runs, examples) for each score of SCORES that exists; `nll` (runs, examples) holds sums
    of natural-log losses over `label_tokens` (runs, examples). `statistics` (runs, examples, counts), by `bleu` and
    `chrf`, is what corpus scores are made of; empty where predictions do not keep it.
    """

    split: str
    ids: list[str]
    runs: list[str]
    values: dict[str, np.ndarray]
    nll: np.ndarray
    label_tokens: np.ndarray
    metrics: dict[str, dict]
    statistics: dict[str, np.ndarray] = field(default_factory=dict)

    def rows(self, runs: Iterable[str]) -> list[int]:
        """Row numbers of the runs."""
        position = {run: row for row, run in enumerate(self.runs)}
        return [position[run] for run in runs]

    def same_tokens(self, runs: Iterable[str]) -> bool:
        """Whether the runs were scored on the same tokens, so that their losses can be compared."""
        return len({self.metrics[run]["data"]["tokens"] for run in runs}) == 1


def load_plan(path: Path) -> Plan:
    """Read `plan.json`.

    Raises:
        UserError: the plan asks for no comparison, or its baseline or metrics are unknown.
    """
    content = _read_json(path)
    wanted = content.get("compare") or {}
    arms = [Arm(a["arm"], a["label"], dict(a.get("factors") or {}), a.get("base")) for a in content["arms"]]
    runs = [
        Run(r["run"], r["arm"], dict(r.get("tuned") or {}), r.get("seed"), r.get("base"), bool(r.get("train", True)))
        for r in content["runs"]
    ]
    names = [arm.arm for arm in arms]
    problems = []
    if wanted.get("baseline") not in names:
        hint = nearest(str(wanted.get("baseline")), names)
        problems.append(f"{path}: compare.baseline: {wanted.get('baseline')!r} is no arm of {', '.join(names)}{hint}")
    for key, name in (("metric", wanted.get("metric", "rougeL")), ("select", wanted.get("select", "loss"))):
        if name not in METRICS:
            problems.append(f"{path}: compare.{key}: {name!r} is none of {', '.join(METRICS)}{nearest(name, METRICS)}")
    if problems:
        raise UserError(*problems)
    margin = wanted.get("margin")
    return Plan(
        study=content["study"],
        title=content.get("title") or content["study"],
        baseline=wanted["baseline"],
        metric=wanted.get("metric", "rougeL"),
        margin=None if margin is None else float(margin),
        select=wanted.get("select", "loss"),
        arms=arms,
        runs=runs,
        seeds=list(content.get("seeds") or []),
    )


def load_scores(plan: Plan, metrics: list[Path], predictions: list[Path]) -> Scores:
    """Read the scores of every run of the plan, on the split that was generated (`test` wherever it exists).

    Args:
        metrics: `metrics/<run>.json` of every run; files of runs that the plan does not name are left alone.
        predictions: `runs/<run>/predictions.jsonl` of every run.

    Raises:
        UserError: a run's file is missing or broken, or runs differ in examples, references or metric
            version; every problem names the run and up to five ids.
    """
    wanted = list(dict.fromkeys(run.run for run in plan.runs))
    described = {path.stem: path for path in metrics}
    written = {path.parent.name: path for path in predictions}
    missing = [f"run {run}: no metrics file among those given" for run in wanted if run not in described]
    missing += [f"run {run}: no predictions among those given" for run in wanted if run not in written]
    if missing:
        raise UserError(*missing)
    summary = {run: _read_metrics(described[run]) for run in wanted}
    _same_definition(summary)
    tables = {run: _read_predictions(written[run]) for run in wanted}
    splits = {str(split) for table in tables.values() for split in table["split"].unique()}
    split = "test" if "test" in splits else "validation"
    tokens = {run: summary[run]["data"]["tokens"] for run in wanted}
    aligned = _align({run: table[table["split"] == split] for run, table in tables.items()}, split, tokens)
    first = aligned[wanted[0]]
    values = {}
    for name in SCORES:
        stacked = np.stack([table[name].to_numpy(float) for table in aligned.values()])
        if not np.isnan(stacked).all():
            values[name] = stacked
    return Scores(
        split=split,
        ids=first.index.tolist(),
        runs=wanted,
        values=values,
        nll=np.stack([table["nll"].to_numpy(float) for table in aligned.values()]),
        label_tokens=np.stack([table["label_tokens"].to_numpy(float) for table in aligned.values()]),
        metrics=summary,
        statistics=_statistics(aligned),
    )


def _statistics(aligned: dict[str, pd.DataFrame]) -> dict[str, np.ndarray]:
    """What corpus scores are made of, (runs, examples, counts); refused where only some runs keep it."""
    lacking = [run for run, table in aligned.items() if table["statistics"].isna().any()]
    if len(lacking) == len(aligned):
        return {}
    if lacking:
        having = next(run for run in aligned if run not in lacking)
        raise UserError(
            *(
                f"run {run}: its predictions lack the statistics of BLEU and chrF that those of {having} have; "
                "expected the same for all runs of a comparison: evaluate again"
                for run in lacking
            )
        )
    return {
        kind: np.array([[row[kind] for row in table["statistics"]] for table in aligned.values()], dtype=float)
        for kind, _ in CORPUS.values()
    }


def load_training(paths: Iterable[Path]) -> pd.DataFrame:
    """Read training summaries; index is the run (the file's name), columns are the summary's keys."""
    rows = {path.stem: _read_json(path) for path in paths}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("run")


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected what an earlier stage writes") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); expected what an earlier stage writes") from None


def _read_metrics(path: Path) -> dict:
    """A run's metrics file, with at least its splits and the hashes of its data."""
    content = _read_json(path)
    if not isinstance(content, dict) or not all(isinstance(content.get(key), dict) for key in ("data", "splits")):
        raise UserError(f"{path}: not the metrics of a run; expected metrics_version, signatures, data, splits, …")
    return content


def _read_predictions(path: Path) -> pd.DataFrame:
    """One row an example and split; scores that were not computed are NaN."""
    try:
        with path.open(encoding="utf-8") as lines:
            rows = [_prediction_row(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected the predictions of an evaluated run") from None
    return pd.DataFrame(rows, columns=["id", "split", "reference", "nll", "label_tokens", "statistics", *SCORES])


def _prediction_row(line: str, place: str) -> tuple:
    try:
        row = json.loads(line)
        scores = row.get("scores") or {}
        nll = row["nll"] if row["nll"] is not None else float("nan")
        # The text itself is not kept: its hash tells whether two runs answered the same question. White space that
        # cleaning left or folded is no difference to any metric.
        reference = hash(" ".join(row["reference"].split()))
        fixed = (row["id"], row["split"], reference, nll, row["label_tokens"], row.get("statistics"))
        return (*fixed, *(scores.get(name, float("nan")) for name in SCORES))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{place}: not a row of predictions ({error!r}); expected id, split, nll, scores, …") from None


def _same_definition(summary: dict[str, dict]) -> None:
    """Refuse runs scored by different metrics or on different data."""
    first, reference = next(iter(summary.items()))
    problems = []
    for run, content in summary.items():
        ours, theirs = _definition(content), _definition(reference)
        problems += [
            f"run {run}: scored with metric {what} {ours.get(what)}, but {first} with {theirs.get(what)}; "
            "expected the same for all runs of a comparison: evaluate again"
            for what in dict.fromkeys([*theirs, *ours])
            if ours.get(what) != theirs.get(what)
        ]
        # The hash of questions and references: another version of the test data has another one.
        ours, theirs = (str(data["data"].get("examples")) for data in (content, reference))
        if ours != theirs:
            problems.append(
                f"run {run}: scored on another version of the data than {first} (hash {ours[:12]}, not {theirs[:12]}); "
                "expected the same questions and references for all runs of a comparison: evaluate again"
            )
    if problems:
        raise UserError(*problems)


def _definition(metrics: dict) -> dict[str, object]:
    """What defines a run's metrics: our version, and the signature of each library."""
    return {"version": metrics.get("metrics_version"), **(metrics.get("signatures") or {})}


def _align(tables: dict[str, pd.DataFrame], split: str, tokens: dict[str, str]) -> dict[str, pd.DataFrame]:
    """Every run's table indexed by id in the first run's order, refused unless all hold the same examples."""
    first, reference = next(iter(tables.items()))
    expected = reference["id"].tolist()
    aligned, problems = {}, []
    for run, table in tables.items():
        found = table["id"].tolist()
        twice = table["id"][table["id"].duplicated()]
        if len(twice):
            problems.append(f"run {run}: {split} ids given more than once: {_named(twice)}; expected each once")
            continue
        if lacking := _without(expected, found):
            problems.append(f"run {run}: lacks {split} examples that {first} has: {_named(lacking)}")
        if extra := _without(found, expected):
            problems.append(f"run {run}: has {split} examples that {first} lacks: {_named(extra)}")
        if lacking or extra:
            continue
        aligned[run] = table.set_index("id").loc[expected]
    for run, table in aligned.items():
        same_tokens = tokens[run] == tokens[first]
        problems += _differences(run, table, first, aligned[first], split, same_tokens)
    if not len(reference):
        problems.append(f"run {first}: no example of split {split}; expected at least 2")
    elif len(reference) < 2:
        problems.append(f"run {first}: 1 example of split {split}; expected at least 2, else nothing can be compared")
    if problems:
        raise UserError(*problems)
    return aligned


def _differences(
    run: str, table: pd.DataFrame, first: str, reference: pd.DataFrame, split: str, same_tokens: bool
) -> list[str]:
    problems = []
    fixed = {"reference": "reference answers"} | ({"label_tokens": "label tokens"} if same_tokens else {})
    for column, what in fixed.items():
        different = table.index[table[column].to_numpy() != reference[column].to_numpy()]
        if len(different):
            problems.append(f"run {run}: other {what} than {first} in {split}: {_named(different)}; expected the same")
    for name in SCORES:
        holes = table.index[table[name].isna().to_numpy() & ~reference[name].isna().to_numpy()]
        holes = holes.union(table.index[~table[name].isna().to_numpy() & reference[name].isna().to_numpy()])
        if len(holes):
            problems.append(f"run {run}: {name} is there in {run} or in {first} only for {split}: {_named(holes)}")
    return problems


def _without(ids: list[str], others: list[str]) -> list[str]:
    known = set(others)
    return [name for name in ids if name not in known]


def _named(ids: Iterable[str]) -> str:
    ids = list(ids)
    rest = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
    return ", ".join(map(str, ids[:NAMED])) + rest


def finite(value: Any) -> Any:
    """Return what JSON can hold of a value, lists and mappings included: null stands for a number that is not there."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
