"""The stage `compare`: from the scores of all runs to arms with intervals and differences with verdicts.

Reads `plan.json`, the metrics and predictions of every run, and the training summaries; writes `arms.tsv`,
`comparisons.tsv`, `pairs.tsv`, `mcnemar.tsv` (:mod:`finegrid.analysis.pairs` says what their columns hold) and
`comparison.json`. Tuned levels are chosen on validation alone; the test split is read once, for the level chosen. The
statistics are in :mod:`finegrid.analysis.comparison`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from finegrid.analysis import comparison, pairs
from finegrid.analysis.corpus import CORPUS
from finegrid.analysis.pairs import LOWER_IS_BETTER
from finegrid.analysis.scores import METRICS, Plan, Run, Scores, finite, load_plan, load_scores, load_training
from finegrid.errors import UserError
from finegrid.files import write_json, write_text
from finegrid.fingerprint import file_hash, short_hash

COSTS = ("peak_memory_mb", "train_seconds", "tokens_per_second", "trainable_parameters")
NAMED = 5  # arms named in a sentence; more are counted
EMPTY_SHARE = 0.1  # more empty predictions than this are a finding


@dataclass(frozen=True)
class Level:
    """One tuned level of an arm: its runs and what validation says of it."""

    tuned: dict[str, str]
    runs: list[Run]
    validation: float  # mean over seeds of `compare.select` on validation; NaN if a run diverged
    diverged: list[str]


def compare(
    plan: Path,
    metrics: list[Path],
    predictions: list[Path],
    output: Path,
    training: Iterable[Path] = (),
    histories: Iterable[Path] = (),
    resamples: int = comparison.RESAMPLES,
) -> dict:
    """Compare the arms of a study and write the five files of the comparison into `output`.

    Args:
        plan: the study's `plan.json`.
        metrics: `metrics/<run>.json` of every planned run, in any order.
        predictions: `runs/<run>/predictions.jsonl` of every planned run.
        output: folder of the files; made if need be.
        training: `training/<run>.json` summaries, for the costs; runs without one have empty cost columns.
        histories: `history/<run>.csv`, which figures are drawn from; only their content is named here.
        resamples: of the bootstrap.

    Returns:
        What `comparison.json` holds: selected levels, statistics, findings.

    Raises:
        UserError: runs are missing, were not scored on the same examples, or lack the metric that is compared.
    """
    training = list(training)
    wanted = load_plan(plan)
    scores = load_scores(wanted, metrics, predictions)
    summaries = load_training(training)
    if wanted.metric != "loss" and wanted.metric not in scores.values:
        raise UserError(
            f"{plan}: compare.metric: no run has {wanted.metric} on {scores.split}; "
            "expected generated answers (evaluation.generate), or metric: loss"
        )
    if wanted.metric == "loss" and not scores.same_tokens(scores.runs):
        raise UserError(
            f"{plan}: compare.metric: loss can't be compared between runs with other length limits or tokenizers, "
            "whose losses are means over other tokens; expected a metric of the answers, such as rougeL"
        )
    levels = {arm.arm: _levels(wanted, arm.arm, scores) for arm in wanted.arms}
    chosen = {arm: _best(wanted, arm, tried, scores) for arm, tried in levels.items()}
    _same_seeds(wanted, chosen)
    runs = {arm: [run.run for run in level.runs] for arm, level in chosen.items()}
    table = pairs.measure(scores, runs, resamples)
    arms = _arms_table(wanted, chosen, scores, summaries, table)
    same_tokens = scores.same_tokens(scores.runs)
    first = dict.fromkeys([wanted.metric, *(["loss"] if same_tokens else [])])
    untrained = {run.arm for run in wanted.runs if not run.train}
    shared = (list(runs), wanted.baseline), ({wanted.metric: wanted.margin}, untrained)
    differences = pairs.against_baseline(table, *shared[0], first, *shared[1])
    compared = pairs.compared_metrics(table, wanted.metric, same_tokens)
    every = pairs.all_pairs(table, *shared[0], compared, *shared[1])
    matches = pairs.mcnemar_table(scores, runs, {run.run: run.seed for run in wanted.runs}, every)
    result = {
        "study": wanted.study,
        "baseline": wanted.baseline,
        "metric": wanted.metric,
        "margin": wanted.margin,
        "select": wanted.select,
        "split": scores.split,
        "metrics_version": next(iter(scores.metrics.values())).get("metrics_version"),
        "selected": {arm: _selection(chosen[arm], levels[arm]) for arm in levels},
        "statistics": _statistics(resamples, differences, every),
        "cannot_claim": _cannot_claim(wanted, levels, chosen, scores, differences),
        "inputs": _content([*metrics, *predictions, *training, *histories]),
        "findings": _findings(wanted, levels, chosen, scores, arms, differences),
    }
    write_text(output / "arms.tsv", _tsv(arms))
    write_text(output / "comparisons.tsv", _tsv(differences))
    write_text(output / "pairs.tsv", _tsv(every))
    write_text(output / "mcnemar.tsv", _tsv(matches))
    write_json(output / "comparison.json", finite(result))
    return result


def _content(files: Iterable[Path]) -> str:
    """Return a hash of files, in any order.

    Figures, tables and report read these files too but wait for `comparison.json` alone: it changes whenever one of
    them does, and Snakemake need not follow thousands of files into every figure.
    """
    return short_hash(sorted([path.parent.name, path.name, file_hash(path)] for path in files))


# ---------------------------------------------------------------------------------------------- tuned levels


def _levels(plan: Plan, arm: str, scores: Scores) -> list[Level]:
    """The arm's tuned levels in the plan's order; an arm that is not tuned has one."""
    grouped: dict[tuple, list[Run]] = {}
    for run in plan.runs_of(arm):
        grouped.setdefault(tuple(sorted(run.tuned.items())), []).append(run)
    if not grouped:
        raise UserError(f"plan: arm {arm} has no run; expected at least one")
    return [_level(runs, plan.select, scores) for runs in grouped.values()]


def _level(runs: list[Run], select: str, scores: Scores) -> Level:
    runs = sorted(runs, key=lambda run: (run.seed is not None, run.seed))
    measured = [_validation(scores, run.run, select) for run in runs]
    losses = scores.nll[scores.rows(run.run for run in runs)]
    sound = [
        (value is None or math.isfinite(value)) and bool(np.isfinite(row).all())
        for value, row in zip(measured, losses, strict=True)
    ]
    diverged = [run.run for run, ok in zip(runs, sound, strict=True) if not ok]
    usable = not diverged and None not in measured
    return Level(runs[0].tuned, runs, float(np.mean(measured)) if usable else float("nan"), diverged)


def _validation(scores: Scores, run: str, metric: str) -> float | None:
    """The run's value of a metric on validation: None if it was not measured, NaN if it is no number."""
    measured = scores.metrics[run]["splits"].get("validation", {})
    if metric not in measured:
        return None
    return float("nan") if measured[metric] is None else float(measured[metric])


def _best(plan: Plan, arm: str, tried: list[Level], scores: Scores) -> Level:
    """The level with the best validation value; the first one where all diverged."""
    if len(tried) == 1:
        return tried[0]
    if not any(math.isfinite(level.validation) or level.diverged for level in tried):
        raise UserError(
            f"plan: arm {arm}: {len(tried)} tuned levels, but no run has {plan.select} on validation; "
            "expected a validation split to choose by (data_config.val_file or validation_size)"
        )
    if plan.select == "loss" and not scores.same_tokens(run.run for level in tried for run in level.runs):
        raise UserError(
            f"plan: arm {arm}: its tuned levels have other length limits, so their validation losses are means over "
            "other tokens; expected a length limit as a factor rather than under `tune`"
        )
    sign = 1 if plan.select in LOWER_IS_BETTER else -1
    return min(tried, key=lambda level: sign * level.validation if math.isfinite(level.validation) else math.inf)


def _same_seeds(plan: Plan, chosen: dict[str, Level]) -> None:
    """Refuse arms that can't be paired with the baseline by seed; models without training have no seed."""
    expected = _seeds(chosen[plan.baseline])
    found = {arm: _seeds(level) for arm, level in chosen.items()}
    expected = expected or next((seeds for seeds in found.values() if seeds), [])
    problems = [
        f"plan: arm {arm} has seeds {seeds}; expected {expected} as the other arms, to pair run by run"
        for arm, seeds in found.items()
        if seeds and seeds != expected
    ]
    if problems:
        raise UserError(*problems)


def _seeds(level: Level) -> list[int]:
    return [run.seed for run in level.runs if run.seed is not None]


# ---------------------------------------------------------------------------------------------------- tables


def _arms_table(
    plan: Plan, chosen: dict[str, Level], scores: Scores, summaries: pd.DataFrame, table: pairs.Table
) -> pd.DataFrame:
    """One row an arm: its factors, chosen level, every metric with its interval, and what it cost."""
    rows = []
    for arm in plan.arms:
        level = chosen[arm.arm]
        row = {"arm": arm.arm, "label": arm.label} | arm.factors | level.tuned
        row |= {"seeds": len(_seeds(level)), "examples": len(scores.ids)}
        row |= _cells(METRICS, arm.arm, table, len(scores.ids)) | _costs(level, summaries)
        row["validation_loss"] = _mean_validation_loss(scores, [run.run for run in level.runs])
        row["base_validation_loss"] = _mean_validation_loss(scores, [arm.base] if arm.base in scores.runs else [])
        rows.append(row | _cells(CORPUS, arm.arm, table, len(scores.ids)))
    return pd.DataFrame(rows)[list(dict.fromkeys(key for key in _ordered(rows)))]


def _cells(names: Iterable[str], arm: str, table: pairs.Table, examples: int) -> dict[str, float | None]:
    """`m`, `m_low` and `m_high` of each metric; None where it was not scored."""
    cells = {}
    for name in names:
        measured = table.get((arm, name))
        mean, (low, high) = (measured.mean, measured.interval) if measured else (None, (None, None))
        if name == "exact_match" and mean in (0.0, 1.0):
            low, high = comparison.proportion_interval(mean, examples)
        if measured:
            # A score is at least 0 and at most 1 (a corpus score 100), a loss at least 0: so are the ends.
            top = {"loss": math.inf}.get(name, 100.0 if name in CORPUS else 1.0)
            low, high = np.clip([low, high], 0.0, top)
        cells |= {name: mean, f"{name}_low": low, f"{name}_high": high}
    return cells


def _ordered(rows: list[dict]) -> list[str]:
    """Columns of all rows: names, factors and tuned levels of any arm first, then what every row has."""
    first = [key for row in rows for key in row if key not in rows[0]]
    keys = list(rows[0])
    at = keys.index("seeds")
    return keys[:at] + first + keys[at:]


def _costs(level: Level, summaries: pd.DataFrame) -> dict[str, float | None]:
    found = summaries.reindex([run.run for run in level.runs])
    costs = {name: pd.to_numeric(found[name]).mean() if name in found else None for name in COSTS}
    return {name: None if value is None or pd.isna(value) else float(value) for name, value in costs.items()}


def _mean_validation_loss(scores: Scores, runs: list[str]) -> float | None:
    losses = [_validation(scores, run, "loss") for run in runs]
    return None if not losses or None in losses else float(np.mean(losses))


# -------------------------------------------------------------------------------------------------- findings


def _findings(
    plan: Plan,
    levels: dict[str, list[Level]],
    chosen: dict[str, Level],
    scores: Scores,
    arms: pd.DataFrame,
    differences: pd.DataFrame,
) -> list[dict[str, str]]:
    """What a reader must know before believing the tables, as the plan's findings: severity, place, message, mend."""
    found = [*_about_seeds(chosen), *_about_divergence(levels)]
    for arm in arms.to_dict("records"):
        found += _about_learning(arm)
        found += _about_edges(arm["arm"], levels[arm["arm"]], chosen[arm["arm"]])
        found += _about_empty(arm["arm"], chosen[arm["arm"]], scores)
    if scores.split == "validation" and any(len(tried) > 1 for tried in levels.values()):
        found.append(
            _finding(
                "warning",
                "compare",
                "tuned levels were chosen on the examples that are compared: tuned arms look better than they are",
                "compare on a test split (evaluation.split: test)",
            )
        )
    if not scores.same_tokens(scores.runs):
        message = "runs with other length limits or tokenizers have losses over other tokens: losses are not compared"
        found.append(_finding("warning", "loss", message, "read each loss against its own base model's alone"))
    primary = differences[(differences["metric"] == plan.metric) & (differences["family"] == "arms")]
    blind = primary[primary["smallest_detectable_difference"] > (plan.margin or math.inf)]
    if len(blind):
        largest = blind["smallest_detectable_difference"].max()
        found.append(
            _finding(
                "warning",
                "compare.margin",
                f"{len(blind)} of {len(primary)} comparisons could see only differences in {plan.metric} larger than "
                f"the margin {plan.margin:g} (up to {largest:.2g}): no verdict there does not mean no difference",
                "add seeds or test examples",
            )
        )
    return found


def _finding(severity: str, place: str, message: str, mend: str) -> dict[str, str]:
    return {"severity": severity, "place": place, "message": message, "mend": mend}


def _cannot_claim(
    plan: Plan, levels: dict[str, list[Level]], chosen: dict[str, Level], scores: Scores, differences: pd.DataFrame
) -> list[str]:
    """What this study can't say, in sentences for whoever writes about it."""
    claims = []
    if {len(_seeds(level)) for level in chosen.values()} - {0} == {1}:
        claims.append(
            "that one method beats another: each arm was trained once, so the verdicts speak of these trained models "
            "on examples like these, and another seed may turn them"
        )
    if not plan.margin:
        claims.append("that any two arms are equivalent: the study sets no margin (compare.margin)")
    primary = differences[(differences["metric"] == plan.metric) & (differences["family"] == "arms")]
    open_ = primary[primary["verdict"] == "not distinguishable"]
    if len(open_):
        smallest = open_["smallest_detectable_adjusted"].max()
        size = (
            "" if pd.isna(smallest) else f": differences below {smallest:.2g} in {plan.metric_name} would not be seen"
        )
        claims.append(f"that {plan.label(plan.baseline)} does as well as {_named(plan, open_['arm'])}{size}")
    if not scores.same_tokens(scores.runs):
        claims.append("which arm has the lower loss: the losses are means over other tokens")
    if scores.split == "validation" and any(len(tried) > 1 for tried in levels.values()):
        claims.append("how good a tuned arm is on new examples: its level was chosen on the examples that are compared")
    wholly = [arm for arm, tried in levels.items() if all(level.diverged for level in tried)]
    if wholly:
        claims.append(f"anything of {_named(plan, wholly)}: every run diverged")
    return claims


def _named(plan: Plan, arms: Iterable[str]) -> str:
    """A few arms by their labels, quoted where one holds a comma; many are counted."""
    labels = [plan.label(arm) for arm in arms]
    if len(labels) > NAMED:
        return f"{len(labels)} other arms"
    if len(labels) > 1 and any("," in label for label in labels):
        labels = [f"“{label}”" for label in labels]
    *most, last = labels
    return f"{', '.join(most)} and {last}" if most else last


def _about_seeds(chosen: dict[str, Level]) -> list[dict[str, str]]:
    counts = {len(_seeds(level)) for level in chosen.values()} - {0}
    if counts == {1}:
        message = (
            "one seed: intervals and p-values cover the examples only; they speak of these trained models and can't "
            "claim that one method beats another, since the spread between seeds was not measured"
        )
        return [_finding("warning", "seeds", message, "add seeds: three or more")]
    if counts == {2}:
        message = (
            "two seeds: the spread between seeds is known from one difference each, so intervals are wide where "
            "seeds disagree, and real differences may stay not distinguishable"
        )
        return [_finding("warning", "seeds", message, "add a third seed: it narrows the seeds' part threefold")]
    return []


def _about_divergence(levels: dict[str, list[Level]]) -> list[dict[str, str]]:
    found = []
    for arm, tried in levels.items():
        whole = all(level.diverged for level in tried)
        for level in tried:
            for run in level.diverged:
                rest = "the arm has no number" if whole else "its level was not chosen"
                message = f"run {run} diverged: its loss is not a finite number; {rest}"
                mend = "lower the learning rate or warm up longer"
                found.append(_finding("error" if whole else "warning", f"arm {arm}", message, mend))
    return found


def _about_learning(arm: dict) -> list[dict[str, str]]:
    loss, base = arm["validation_loss"], arm["base_validation_loss"]
    if not arm["seeds"] or loss is None or base is None or not loss >= base:
        return []
    message = f"validation loss {loss:.3f} is not below its base model's {base:.3f}: training did not help"
    return [_finding("warning", f"arm {arm['arm']}", message, "train longer, or try other learning rates")]


def _about_edges(arm: str, tried: list[Level], chosen: Level) -> list[dict[str, str]]:
    """A best level at the end of its range: a better one may lie beyond."""
    found = []
    for factor, level in chosen.tuned.items():
        numbers = sorted({number for other in tried if (number := _number(other.tuned.get(factor))) is not None})
        value = _number(level)
        if len(numbers) < 2 or value not in (numbers[0], numbers[-1]):
            continue
        side, beyond = ("largest", value * value / numbers[-2])
        if value == numbers[0]:
            side, beyond = ("smallest", value * value / numbers[1])
        message = f"best {factor} {level} is the {side} that was tried: a better one may lie beyond"
        mend = f"add a level near {beyond:.2g}" if beyond > 0 else f"add a {side[:-3]}er level"
        found.append(_finding("warning", f"arm {arm}: tune.{factor}", message, mend))
    return found


def _number(text: str | None) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def _about_empty(arm: str, level: Level, scores: Scores) -> list[dict[str, str]]:
    split = [scores.metrics[run.run]["splits"].get(scores.split, {}) for run in level.runs]
    empty, asked = sum(s.get("empty_predictions") or 0 for s in split), sum(s.get("examples") or 0 for s in split)
    if empty <= EMPTY_SHARE * asked:
        return []
    message = f"{empty} of {asked} generated answers are empty and score 0"
    return [_finding("warning", f"arm {arm}", message, "look at the chat template and at generation_config")]


# --------------------------------------------------------------------------------------------------- writing


def _selection(chosen: Level, tried: list[Level]) -> dict:
    return {
        "tuned": chosen.tuned,
        "runs": [run.run for run in chosen.runs],
        "validation": chosen.validation,
        "levels": [
            {
                "tuned": level.tuned,
                "runs": [run.run for run in level.runs],
                "validation": level.validation,
                "diverged": level.diverged,
            }
            for level in tried
        ],
    }


def _statistics(resamples: int, differences: pd.DataFrame, every: pd.DataFrame) -> dict:
    """The settings of the statistics, in words that a methods section can use."""
    primary = differences[differences["metric"] == differences["metric"].iloc[0]] if len(differences) else differences
    families = primary["family"].value_counts()
    return {
        "unit": "scores of single examples, paired by example and seed",
        "confidence": 1 - comparison.ALPHA,
        "arms": "hierarchical bootstrap: seeds (t with S-1 degrees of freedom), then examples (with replacement)",
        "resamples": resamples,
        "rng_seed": comparison.RNG_SEED,
        "differences": "two-way random effects (seeds x examples), Behrens-Fisher distribution of the mean",
        "bootstrap": "beside each difference: the hierarchical bootstrap of the arms, on the paired differences",
        "adjustment": "Holm over the arms compared in one metric; the primary metric is the family that counts",
        "family": int(families.get("arms", families.get("untrained", 0))),
        "families": "trained arms are one family, untrained models another: did training help is another question",
        "pairs": int((every["metric"] == every["metric"].iloc[0]).sum()) if len(every) else 0,
        "pairs_adjustment": "Holm over all pairs of arms in one metric"
        if differences["arm"].nunique() < pairs.MOST_PAIRED
        else "the best arm against each other one, Bonferroni over all pairs",
        "equivalence": "two one-sided tests at 5 % against the margin, Holm over the family",
        "smallest_detectable_difference": "found with 80 % power at 5 %, not adjusted; _adjusted: at 5 % / family",
        "loss": "sum of nll / sum of label tokens, as a ratio of two sums",
        "corpus": "BLEU and chrF from sums of sufficient statistics, resampled; their error by the jackknife",
        "mcnemar": "exact matches, run against run of the same seed, exact test; the test of a one-seed study",
    }


def _tsv(table: pd.DataFrame) -> str:
    # Ten digits: enough for any use, and the same on every machine.
    return table.to_csv(sep="\t", index=False, lineterminator="\n", float_format="%.10g")
