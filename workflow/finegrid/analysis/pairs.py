"""Differences between arms: each against the baseline, all pairs, and run against run for exact matches.

`comparisons.tsv` answers the study's question, every arm against the baseline; `pairs.tsv` answers what a table of
results makes a reader ask, every arm against every other; `mcnemar.tsv` counts exact matches run against run. Columns
of the first two (`other` in place of `baseline` in pairs):

==================================  ==================================================================================
`metric, arm, baseline`             `difference` is arm minus baseline
`low, high, p`                      95 % interval and two-sided p, both for this comparison alone
`p_adjusted, verdict`               Holm within the family of this file and metric; the verdict rests on it
`smallest_detectable_difference`    found with 80 % power at 5 %
`family`                            `arms`, or `untrained` where a base model takes part
`covers`                            what the luck of is in the interval: `seeds and examples`, or `examples`
`test`                              `random effects`, or `McNemar` (exact match of one run against one run)
`p_equivalence, …_adjusted`         two one-sided tests against the margin, Holm in the family; empty without a margin
`bootstrap_low, …_high, p_…`        the same by the hierarchical bootstrap
`smallest_detectable_adjusted`      found with 80 % power at 5 % / the family's size: what Holm asks of the first
==================================  ==================================================================================

Untrained models are a family of their own. Whether training did anything is another question than which arm is
better; it is asked of every study, with p-values that are next to nothing. Among the arms they would change nobody's
verdict where training worked, and where it did not they would make real differences between arms harder to see.
Differences and equivalence are two kinds of claims: each has a family error of at most 5 %.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from finegrid.analysis import comparison, corpus
from finegrid.analysis.comparison import Difference, Error
from finegrid.analysis.scores import METRICS, Scores

LOWER_IS_BETTER = frozenset({"loss"})
MOST_PAIRED = 40  # arms; more of them are paired with the best one only: a thousand arms have half a million pairs
COLUMNS = ["metric", "arm", "baseline", "difference", "low", "high", "p", "p_adjusted", "verdict", "seeds", "examples"]
COLUMNS += ["smallest_detectable_difference", "family", "covers", "test", "p_equivalence", "p_equivalence_adjusted"]
COLUMNS += ["bootstrap_low", "bootstrap_high", "p_bootstrap", "smallest_detectable_adjusted"]
MCNEMAR = ["arm", "other", "seed", "run", "other_run", "both", "arm_only", "other_only", "neither", "p", "p_adjusted"]


@dataclass(frozen=True)
class Measured:
    """An arm in one metric: values (seeds, examples) and weights as in :func:`comparison.mean_and_error`, the mean
    with its error, and how resampled examples move it."""

    values: np.ndarray
    weights: np.ndarray | None
    mean: float
    error: Error
    deviations: np.ndarray

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval by the hierarchical bootstrap."""
        return comparison.bootstrap_interval(self.mean, comparison.hierarchical(self.deviations, self.error))


Table = dict[tuple[str, str], Measured]


def measure(scores: Scores, runs: dict[str, list[str]], resamples: int) -> Table:
    """Return every arm in every metric that was scored, corpus metrics too.

    Args:
        runs: the runs that stand for each arm, one a seed.
    """
    names = [name for name in METRICS if name == "loss" or name in scores.values]
    names += [name for name, (kind, _) in corpus.CORPUS.items() if kind in scores.statistics]
    cells = {(arm, name): _values(scores, runs[arm], name) for name in names for arm in runs}
    plain = [cell for cell in cells if cell[1] not in corpus.CORPUS]
    pooled = [cell for cell in cells if cell[1] in corpus.CORPUS]
    deviations = comparison.resampled_deviations(
        np.column_stack([cells[cell][0].mean(axis=0) for cell in plain]),
        [cells[cell][1] for cell in plain],
        resamples,
        [(_statistics(scores, runs[arm], name), corpus.CORPUS[name][1]) for arm, name in pooled],
    )
    table = {}
    for cell, moved in zip([*plain, *pooled], deviations.T, strict=True):
        values, weights = cells[cell]
        table[cell] = Measured(
            values, weights, *comparison.mean_and_error(values, weights), np.ascontiguousarray(moved)
        )
    return table


def _values(scores: Scores, runs: Sequence[str], name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Values (seeds, examples) and the weights of a ratio: the loss is nll over label tokens, over the whole split."""
    rows = scores.rows(runs)
    if name == "loss":
        return scores.nll[rows], scores.label_tokens[rows[0]]
    if name in corpus.CORPUS:
        return corpus.values(_statistics(scores, runs, name), corpus.CORPUS[name][1]), None
    return scores.values[name][rows], None


def _statistics(scores: Scores, runs: Sequence[str], name: str) -> np.ndarray:
    return scores.statistics[corpus.CORPUS[name][0]][scores.rows(runs)]


def compared_metrics(table: Table, primary: str, same_tokens: bool) -> list[str]:
    """The metrics of `pairs.tsv`: the primary one, the loss, exact matches if any answer is one, corpus scores.

    Losses over other tokens are not compared.
    """
    names = dict.fromkeys(name for _, name in table)
    loss = ["loss"] if same_tokens else []
    matches = [name for name in ("exact_match",) if any(cell[1] == name and table[cell].mean for cell in table)]
    return list(dict.fromkeys([primary, *loss, *matches, *(name for name in names if name in corpus.CORPUS)]))


def against_baseline(
    table: Table, arms: Sequence[str], baseline: str, metrics: Iterable[str], margins: dict[str, float], untrained: set
) -> pd.DataFrame:
    """Every arm against the baseline, metric by metric; `margins` by metric, `untrained` names base arms."""
    pairs = [(arm, baseline) for arm in arms if arm != baseline]
    tables = [_metric(table, pairs, name, margins.get(name), untrained, None) for name in metrics]
    return pd.concat(tables, ignore_index=True)


def all_pairs(
    table: Table, arms: Sequence[str], baseline: str, metrics: Iterable[str], margins: dict[str, float], untrained: set
) -> pd.DataFrame:
    """Every arm against every other. Of more than :data:`MOST_PAIRED` arms, the best in the metric against each: it
    was picked by the numbers that are tested, so its p-values are adjusted for all pairs (Bonferroni)."""
    tables = []
    for name in metrics:
        pairs, size = [_ordered(pair, baseline) for pair in itertools.combinations(arms, 2)], None
        if len(arms) > MOST_PAIRED:
            best, size = _best(table, arms, name), len(pairs)
            pairs = [(best, arm) for arm in arms if arm != best]
        tables.append(_metric(table, pairs, name, margins.get(name), untrained, size))
    return pd.concat(tables, ignore_index=True).rename(columns={"baseline": "other"})


def _ordered(pair: tuple[str, str], baseline: str) -> tuple[str, str]:
    return pair if pair[1] == baseline else pair[::-1]


def _best(table: Table, arms: Sequence[str], name: str) -> str:
    sign = 1 if name in LOWER_IS_BETTER else -1
    return min(
        (arm for arm in arms if math.isfinite(table[arm, name].mean)), key=lambda arm: sign * table[arm, name].mean
    )


def _metric(
    table: Table,
    pairs: list[tuple[str, str]],
    name: str,
    margin: float | None,
    untrained: set[str],
    size: int | None,
) -> pd.DataFrame:
    """The rows of one metric; `size` is that of the family where not all of it is in `pairs`."""
    rows, found = [], []
    for arm, other in pairs:
        ours, theirs = table[arm, name], table[other, name]
        difference = comparison.paired_difference(ours.values, theirs.values, margin or None, ours.weights)
        found.append(difference)
        row = {"metric": name, "arm": arm, "baseline": other} | _estimate(difference)
        row |= {"p_adjusted": math.nan, "verdict": "not distinguishable", "p_equivalence_adjusted": math.nan}
        seeds = max(len(ours.values), len(theirs.values))
        row |= {"seeds": _seeds(ours, theirs, untrained, (arm, other)), "examples": ours.values.shape[1]}
        row |= {"family": "untrained" if {arm, other} & untrained else "arms", "test": "random effects"}
        row["covers"] = "seeds and examples" if seeds > 1 else "examples"
        if name == "exact_match" and seeds == 1 and math.isfinite(difference.p):
            row |= {"test": "McNemar", "p": comparison.mcnemar(ours.values[0], theirs.values[0])["p"]}
        rows.append(row | _bootstrapped(difference, ours, theirs))
    for family in ("arms", "untrained"):
        # A diverged arm has no number: it is no member of the family and gets no verdict of its own.
        of = [i for i, row in enumerate(rows) if row["family"] == family and math.isfinite(row["p"])]
        _adjust([rows[i] for i in of], [found[i] for i in of], name, size)
    return pd.DataFrame(rows, columns=COLUMNS)


def _seeds(ours: Measured, theirs: Measured, untrained: set[str], pair: tuple[str, str]) -> int:
    """Seeds behind a difference: an untrained model has none."""
    return max(
        [len(side.values) for arm, side in zip(pair, (ours, theirs), strict=True) if arm not in untrained] or [0]
    )


def _estimate(found: Difference) -> dict[str, float]:
    row = {name: getattr(found, name) for name in ("difference", "low", "high", "p", "p_equivalence")}
    return row | {"smallest_detectable_difference": found.smallest_detectable, "smallest_detectable_adjusted": math.nan}


def _bootstrapped(found: Difference, ours: Measured, theirs: Measured) -> dict[str, float]:
    if found.error is None:
        return dict.fromkeys(("bootstrap_low", "bootstrap_high", "p_bootstrap"), math.nan)
    errors = comparison.hierarchical(ours.deviations - theirs.deviations, found.error)
    low, high = comparison.bootstrap_interval(found.difference, errors)
    p = comparison.bootstrap_p(found.difference, errors)
    return {"bootstrap_low": low, "bootstrap_high": high, "p_bootstrap": p}


def _adjust(rows: list[dict], found: list[Difference], name: str, size: int | None) -> None:
    """Write adjusted p-values, verdicts and the smallest detectable difference of a family into its rows."""
    adjusted = _adjusted([row["p"] for row in rows], size)
    equivalence = [math.nan] * len(rows)
    if rows and math.isfinite(rows[0]["p_equivalence"]):
        equivalence = _adjusted([row["p_equivalence"] for row in rows], size)
    for row, difference, p, p_equivalence in zip(rows, found, adjusted, equivalence, strict=True):
        row |= {"p_adjusted": p, "p_equivalence_adjusted": p_equivalence}
        row["verdict"] = comparison.verdict(difference, p, name in LOWER_IS_BETTER, p_equivalence)
        row["smallest_detectable_adjusted"] = comparison.smallest_detectable(difference.error, size or len(rows))


def _adjusted(p: list[float], size: int | None) -> list[float]:
    return comparison.holm(p) if size is None else [min(1.0, size * value) for value in p]


def mcnemar_table(scores: Scores, runs: dict[str, list[str]], seeds: dict[str, int | None], pairs: pd.DataFrame):
    """Exact matches, run against run of the same seed: one row a pair of arms and seed.

    The answers of several seeds to one example are no independent trials, so no McNemar test pools them: each row
    speaks of two trained models, and :func:`all_pairs` of the arms.

    Args:
        seeds: of each run; None for untrained models, which stand beside every seed.
        pairs: rows of :func:`all_pairs`.
    """
    rows = []
    matches = scores.values.get("exact_match")
    wanted = pairs[pairs["metric"] == "exact_match"] if matches is not None else pairs[:0]
    for arm, other in zip(wanted["arm"], wanted["other"], strict=True):
        count = max(len(runs[arm]), len(runs[other]))
        for ours, theirs in zip(_each(runs[arm], count), _each(runs[other], count), strict=True):
            seed = seeds[ours] if seeds[ours] is not None else seeds[theirs]
            row = {"arm": arm, "other": other, "seed": seed, "run": ours, "other_run": theirs}
            rows.append(row | comparison.mcnemar(*matches[scores.rows([ours, theirs])]))
    for row, adjusted in zip(rows, comparison.holm([row["p"] for row in rows]), strict=True):
        row["p_adjusted"] = adjusted
    return pd.DataFrame(rows, columns=MCNEMAR)


def _each(runs: list[str], count: int) -> list[str]:
    return runs * count if len(runs) == 1 else runs
