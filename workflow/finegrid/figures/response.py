"""Figure: how an arm answers to a factor that is a number, the learning rate mostly, with the best level marked.

Of a tuned factor it shows what the level was chosen by: validation, every seed, arm by arm; a best level on the edge of
its range is flagged, since a better one may lie beyond. Of an ordinary factor it shows the compared metric.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from finegrid.figures import design, style
from finegrid.figures.style import Study

PANELS = 3  # factors that get a panel
WIDE = 3  # levels further apart than this factor are spaced by their logarithm
STEEP = 3  # values that differ by more than this factor get a logarithmic axis
LINES = 8
APART = 2  # curves this many times further apart than their levels are drawn from their own best level


@dataclass(frozen=True)
class Curve:
    """One line of a panel: what it is called, its arm (None where each point is one), and its rows of the table."""

    name: str
    arm: str | None
    rows: pd.DataFrame


def draw(study_dir: Path, output: Path) -> None:
    """Draw from `results/<study>/` and write `output`.pdf, .png, .csv."""
    style.save(*plot(study_dir), output)


def plot(study_dir: Path) -> tuple[Figure, pd.DataFrame]:
    """Return the figure and its table: factor, curve (an arm, or the levels of the other factors), arm, level, seed
    (empty in the rows of means), metric, split, value, above_best (the curve's best level), low, high, diverged (runs),
    best, edge."""
    study = style.load_study(study_dir)
    tuned = _tuned(study)
    table = tuned if len(tuned) else _untuned(study)
    factors = list(dict.fromkeys(table["factor"]))[:PANELS]
    width = style.SINGLE if len(factors) == 1 else style.DOUBLE
    figure, axes = style.start(width, 2.5, 1, len(factors), sharey=True, squeeze=False)
    table = _with_distance(table)
    relative = _far_apart(table)
    shown = table.assign(value=table["above_best"]) if relative else table
    curves = {factor: _curves(study, shown[shown["factor"] == factor]) for factor in factors}
    named, more = _named(study, curves, bool(len(tuned)))
    for panel, factor in zip(axes[0], factors, strict=True):
        _panel(panel, factor, curves[factor], named, study)
    axes[0, 0].set_ylabel(_axis_name(study, table, relative))
    _scale(axes[0, 0], shown)
    style.legend(figure, _handles(study, table, named, bool(len(tuned))), more)
    style.message(figure, _message(study, table[table["factor"] == factors[0]], bool(len(tuned))))
    return figure, table


# ---------------------------------------------------------------- the table


def _tuned(study: Study) -> pd.DataFrame:
    """Rows of all tuned factors: a level stands with the best levels of the other tuned factors."""
    rows = []
    for arm in study.trained:
        selection = study.comparison["selected"][arm.arm]
        for factor in selection["tuned"]:
            tried = _best_by_level(selection["levels"], factor, study.plan.select)
            if len(tried) > 1:
                rows += _level_rows(study, arm.arm, factor, tried, selection["tuned"][factor])
    return _frame(rows)


def _best_by_level(levels: list[dict], factor: str, select: str) -> list[dict]:
    best: dict[str, dict] = {}
    for level in levels:
        known = best.get(level["tuned"][factor])
        if known is None or _rank(level, select) < _rank(known, select):
            best[level["tuned"][factor]] = level
    return list(best.values())


def _rank(level: dict, select: str) -> float:
    if level["validation"] is None:
        return math.inf
    return level["validation"] if select == "loss" else -level["validation"]


def _level_rows(study: Study, arm: str, factor: str, tried: list[dict], chosen: str) -> list[dict]:
    select, seeds = study.plan.select, {run.run: run.seed for run in study.plan.runs}
    numbers = [number for level in tried if (number := design.number(level["tuned"][factor])) is not None]
    rows = []
    for level in tried:
        name = level["tuned"][factor]
        best = name == chosen
        edge = best and len(numbers) == len(tried) and design.number(name) in (min(numbers), max(numbers))
        row = {"factor": factor, "curve": arm, "arm": arm, "level": name, "metric": select, "split": "validation"}
        values = [style.measured(study, run, "validation", select) for run in level["runs"]]
        mean = level["validation"]
        rows.append(row | {"value": mean, "diverged": len(level["diverged"]), "best": best, "edge": edge})
        rows += [
            row | {"seed": seeds[run], "value": value}
            for run, value in zip(level["runs"], values, strict=True)
            if seeds[run] is not None
        ]
    return rows


def _untuned(study: Study) -> pd.DataFrame:
    """Rows of the numeric factors: a curve for each combination of the other factors."""
    arms = [arm.factors for arm in study.trained]
    factors, metric = design.varying(arms), study.plan.metric
    rows = []
    for factor in design.numeric(arms):
        groups: dict[tuple, list] = {}
        for arm in study.trained:
            if arm.factors.get(factor) is not None:
                others = tuple((other, arm.factors.get(other)) for other in factors if other != factor)
                groups.setdefault(others, []).append(arm.arm)
        for others, members in groups.items():
            if len(members) < 2:
                continue
            curve = ", ".join(study.level(*other) for other in others) or design.words(factor)
            rows += _arm_rows(study, factor, curve, members, metric)
    return _frame(rows)


def _arm_rows(study: Study, factor: str, curve: str, members: list[str], metric: str) -> list[dict]:
    sign = 1 if metric == "loss" else -1
    levels = {arm.arm: arm.factors[factor] for arm in study.trained if arm.arm in members}
    means = {arm: study.arms.loc[arm, metric] for arm in members}
    known = {arm: mean for arm, mean in means.items() if pd.notna(mean)}
    best = min(known, key=lambda arm: sign * known[arm]) if known else None
    ends = [extreme(map(design.number, levels.values())) for extreme in (min, max)]
    row = {"factor": factor, "curve": curve, "metric": metric, "split": study.comparison["split"]}
    rows = [
        row
        | {"arm": arm, "level": levels[arm], "value": means[arm], "diverged": int(pd.isna(means[arm]))}
        | {end: study.arms.loc[arm, f"{metric}_{end}"] for end in ("low", "high")}
        | {"best": arm == best, "edge": arm == best and design.number(levels[arm]) in ends}
        for arm in members
    ]
    seeds = style.seed_values(study, members)
    rows += [
        row | {"arm": seed["arm"], "level": levels[seed["arm"]], "seed": seed["seed"], "value": seed["value"]}
        for seed in seeds.to_dict("records")
    ]
    return rows


def _frame(rows: list[dict]) -> pd.DataFrame:
    columns = ["factor", "curve", "arm", "level", "seed", "metric", "split", "value", "low", "high", "diverged", "best"]
    table = pd.DataFrame(rows, columns=[*columns, "edge"])
    numbers = dict.fromkeys(("value", "low", "high"), float)
    return table.astype({"seed": "Int64", "diverged": "Int64", "best": "boolean", "edge": "boolean"} | numbers)


def _with_distance(table: pd.DataFrame) -> pd.DataFrame:
    """The table with `above_best`: how far each value lies from that of its curve's best level."""
    best = table[table["seed"].isna() & table["best"].fillna(False)].set_index(["factor", "curve"])["value"]
    own = [best.get(key, math.nan) for key in zip(table["factor"], table["curve"], strict=True)]
    table.insert(table.columns.get_loc("value") + 1, "above_best", table["value"] - pd.Series(own, table.index))
    return table


def _far_apart(table: pd.DataFrame) -> bool:
    """Whether tuned arms lie further apart than their levels do, which then could not be read."""
    means = table[table["seed"].isna()]
    best = means.loc[means["best"].fillna(False), "value"]
    within = means.groupby(["factor", "curve"])["above_best"].agg(lambda values: values.max() - values.min()).max()
    return bool(means["low"].isna().all() and len(best) > 1 and best.max() - best.min() > APART * within)


def _axis_name(study: Study, table: pd.DataFrame, relative: bool) -> str:
    metric, split = table["metric"].iloc[0], table["split"].iloc[0]
    if relative:
        unit = " (nats per label token)" if metric == "loss" else ""
        name = f"{split.capitalize()} {style.METRIC_NAMES[metric]} minus that of the arm's chosen level{unit}"
    else:
        name = style.metric_name(study, metric, split)
    return style.wrapped(name, 34)


# ---------------------------------------------------------------- drawing


def _curves(study: Study, table: pd.DataFrame) -> list[Curve]:
    found = []
    for name, rows in table.groupby("curve", sort=False):
        arms = set(rows["arm"])
        arm = arms.pop() if len(arms) == 1 else None
        found.append(Curve(study.label(arm) if arm == name else name, arm if arm == name else None, rows))
    return found


def _named(study: Study, curves: dict[str, list[Curve]], tuned: bool) -> tuple[dict[str, str], str | None]:
    """Curves that the legend names, each with its marker; and in words what it leaves out."""
    every: dict[str, float] = {}
    sign = 1 if (study.plan.select if tuned else study.plan.metric) == "loss" else -1
    baseline = study.label(study.plan.baseline)
    for curve in (curve for found in curves.values() for curve in found):
        value = (sign * curve.rows.loc[curve.rows["seed"].isna(), "value"]).min()
        value = value if math.isfinite(value) else math.inf
        every[curve.name] = min(every.get(curve.name, math.inf), value)
    if len(every) <= LINES:
        return dict(zip(every, style.MARKERS, strict=False)), None
    best = sorted(every, key=every.get)[: LINES - 3]
    names = [name for name in every if name in best or (tuned and name == baseline)]
    return dict(zip(names, style.MARKERS, strict=False)), f"and {len(every) - len(names)} more: see the table"


def _panel(panel: Axes, factor: str, curves: list[Curve], named: dict[str, str], study: Study) -> None:
    levels = list(dict.fromkeys(level for curve in curves for level in curve.rows["level"]))
    numbers = [design.number(level) for level in levels]
    as_numbers = None not in numbers
    places = dict(zip(levels, numbers if as_numbers else range(len(levels)), strict=True))
    if as_numbers and min(numbers) > 0 and max(numbers) > WIDE * min(numbers):
        panel.set_xscale("log")
    for curve in sorted(curves, key=lambda curve: curve.name in named):
        _curve(panel, curve, places, named.get(curve.name), study)
    if not as_numbers or len(levels) <= 7:
        names = [f"{number:g}" if as_numbers else level for level, number in zip(levels, numbers, strict=True)]
        upright = sum(map(len, names)) > 26
        panel.set_xticks(
            list(places.values()), names, rotation=45 if upright else 0, ha="right" if upright else "center"
        )
        panel.set_xticks([], minor=True)
    panel.margins(x=0.09)
    panel.set_xlabel(style.capital(design.words(factor)))


def _curve(panel: Axes, curve: Curve, places: dict, marker: str | None, study: Study) -> None:
    means = curve.rows[curve.rows["seed"].isna()].copy()
    means["place"] = means["level"].map(places)
    means = means.sort_values("place")
    sound = means[means["value"].notna()]
    colour = study.colours[curve.arm] if curve.arm else "0.55"
    options = {"linewidth": 1.1, "zorder": 3} if marker else {"linewidth": 0.5, "alpha": 0.35, "zorder": 2}
    panel.plot(sound["place"], sound["value"], color=colour, **options)
    if not marker:
        return
    seeds = curve.rows[curve.rows["seed"].notna() & curve.rows["value"].notna()]
    if seeds.groupby("level").size().gt(1).any():
        panel.plot(
            seeds["level"].map(places), seeds["value"], "_", color=colour, markersize=5, markeredgewidth=0.6, alpha=0.8
        )
    for row in sound.to_dict("records"):
        own = study.colours[row["arm"]]
        if math.isfinite(row["low"]):
            panel.plot([row["place"]] * 2, [row["low"], row["high"]], color=own, linewidth=0.9, zorder=3)
        panel.plot(
            row["place"],
            row["value"],
            marker,
            color=own,
            markersize=4,
            markeredgecolor="white",
            markeredgewidth=0.4,
            zorder=4,
        )
        if row["best"]:
            ring = {
                "markersize": 9,
                "markerfacecolor": "none",
                "markeredgecolor": own if curve.arm else "0.2",
                "zorder": 5,
            }
            panel.plot(row["place"], row["value"], "o", markeredgewidth=1, **ring)
        if row["edge"]:
            _flag(panel, row, means["place"], own)
    for place in means.loc[means["value"].isna(), "place"]:
        panel.plot(place, 0.97, "x", color=colour, markersize=5, transform=panel.get_xaxis_transform(), clip_on=False)


def _flag(panel: Axes, row: dict, places: pd.Series, colour) -> None:
    """An arrow from the best level out of the range that was tried."""
    outward = -1 if row["place"] == places.min() else 1
    arrow = {"arrowstyle": "<|-", "color": colour, "linewidth": 1, "shrinkA": 0, "shrinkB": 5, "mutation_scale": 7}
    place = {"xy": (row["place"], row["value"]), "xytext": (17 * outward, 0), "textcoords": "offset points"}
    panel.annotate("", **place, arrowprops=arrow, annotation_clip=False)


def _scale(panel: Axes, table: pd.DataFrame) -> None:
    values = table["value"].dropna()
    if len(values) and values.min() > 0 and values.max() > STEEP * values.min():
        panel.set_yscale("log")


def _handles(study: Study, table: pd.DataFrame, named: dict[str, str], tuned: bool) -> list[Line2D]:
    colours = {study.label(arm.arm): study.colours[arm.arm] for arm in study.trained} if tuned else {}
    only = not tuned and len(named) == 1
    handles = [
        Line2D(
            [],
            [],
            color=colours.get(name, "0.55"),
            marker=marker,
            markersize=4,
            label=f"mean, {style.interval(study)}" if only else name,
        )
        for name, marker in named.items()
    ]
    means = table[table["seed"].isna()]
    grey = {"color": "0.3", "linestyle": "none"}
    if table[table["seed"].notna()].groupby(["curve", "factor", "level"]).size().gt(1).any():
        handles.append(Line2D([], [], marker="_", markersize=6, label="each seed", **grey))
    handles.append(
        Line2D(
            [],
            [],
            marker="o",
            markersize=8,
            markerfacecolor="none",
            markeredgewidth=1,
            label="best level" if not tuned else "chosen level",
            **grey,
        )
    )
    if means["edge"].any():
        handles.append(
            Line2D(
                [],
                [],
                marker=r"$\rightarrow$",
                markersize=9,
                markeredgewidth=0,
                label="on the edge of its range",
                **grey,
            )
        )
    if means["diverged"].fillna(0).gt(0).any():
        handles.append(Line2D([], [], marker="x", markersize=5, label="diverged", **grey))
    return handles


def _message(study: Study, table: pd.DataFrame, tuned: bool) -> str:
    means = table[table["seed"].isna()]
    best = means[means["best"].fillna(False)]
    factor, several = design.words(table["factor"].iloc[0]), means["curve"].nunique() > 1
    if best.empty:
        return f"No {factor} gave a number: every run diverged"
    levels = sorted(set(best["level"]), key=lambda level: design.number(level) or 0)
    if not tuned:
        where = levels[0] if len(levels) == 1 else f"{levels[0]} to {levels[-1]}, by curve"
        extreme = "lowest" if study.lower_is_better else "highest"
        text = f"Mean {style.METRIC_NAMES[study.plan.metric]} is {extreme} at {factor} {where}"
    elif len(levels) > 1:
        text = f"The best {factor} is {levels[0]} to {levels[-1]}, by arm"
    elif several:
        text = f"The best {factor} of every arm is {levels[0]}"
    else:
        text = f"The best {factor} is {levels[0]}"
    edges = best[best["edge"].fillna(False)]
    if None in map(design.number, means["level"]):
        return text
    if edges.empty:
        return f"{text}, inside the range that was tried"
    if len(edges) == len(best):
        return f"{text}, on the edge of what was tried: a better one may lie beyond"
    names = [study.label(arm) for arm in edges["arm"]] if tuned else list(edges["curve"])
    which = style.few(names, f"{len(names)} of {len(best)}")
    return f"{text}; on the edge of what was tried with {which}: a better one may lie beyond"
