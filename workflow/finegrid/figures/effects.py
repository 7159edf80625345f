"""Figure: what each factor does: the difference that a level makes where it is all that differs.

One-at-a-time studies have one arm for each level: its difference to the baseline with interval and verdict. In crossed
ones a level is held against the baseline's level in every combination of the other factors: a point each, and their
mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from finegrid.figures import design, style
from finegrid.figures.style import Study

ROWS = 46  # lines on a page, headings included
LETTERS = 30  # of a level's name
ROW = 0.19  # inches
NUMBER = 0.45  # inches: width of a number on an axis
MANY = 40  # pairs of a level that are drawn as points of their own


@dataclass(frozen=True)
class Line:
    """A line of the figure: a factor's heading, or a level with its rows of the table."""

    text: str
    rows: pd.DataFrame | None = None


def draw(study_dir: Path, output: Path) -> None:
    """Draw from `results/<study>/` and write `output`.pdf, .png, .csv."""
    style.save(*plot(study_dir), output)


def plot(study_dir: Path) -> tuple[Figure, pd.DataFrame]:
    """Return the figure and its table, one row a pair of arms that differ in one factor alone: factor, level,
    reference_level, arm, reference, difference (in the primary metric), and where the reference is the baseline low,
    high, p_adjusted, verdict."""
    study = style.load_study(study_dir)
    table = _table(study)
    single = bool(
        (table.groupby(["factor", "level"]).size() == 1).all() and (table["reference"] == study.plan.baseline).all()
    )
    lines, more = _lines(study, table)
    figure, panel = style.start(style.DOUBLE, 0.55 + ROW * len(lines))
    if study.plan.margin:
        panel.axvspan(-study.plan.margin, study.plan.margin, color="0.93", linewidth=0, zorder=0)
    panel.axvline(0, color="0.2", linewidth=0.8, zorder=1)
    for place, line in enumerate(lines):
        if line.rows is not None:
            (_single if single else _paired)(panel, place, line.rows, study)
    _axis(panel, lines, study, single)
    style.legend(figure, _handles(study, table, single), more)
    style.message(figure, _message(study, table, single))
    figure.draw_without_rendering()  # the names leave the panel what width they leave
    width = panel.get_position().width * figure.get_figwidth()
    panel.xaxis.set_major_locator(MaxNLocator(max(2, int(width / NUMBER)), steps=[1, 2, 5, 10]))
    return figure, table


def _table(study: Study) -> pd.DataFrame:
    arms = {arm.arm: arm.factors for arm in study.trained}
    metric, baseline = study.plan.metric, study.plan.baseline
    compared = study.comparisons[study.comparisons["metric"] == metric].set_index("arm")
    rows = []
    for factor, levels in design.contrasts(arms, baseline).items():
        for level, pairs in levels.items():
            for arm, reference in pairs:
                row = {"factor": factor, "level": level, "reference_level": arms[reference].get(factor, design.RECIPE)}
                row |= {"arm": arm, "reference": reference}
                row["difference"] = study.arms.loc[arm, metric] - study.arms.loc[reference, metric]
                if reference == baseline and arm in compared.index:
                    row |= compared.loc[arm, ["difference", "low", "high", "p_adjusted", "verdict"]].to_dict()
                rows.append(row)
    columns = ["factor", "level", "reference_level", "arm", "reference", "difference", "low", "high", "p_adjusted"]
    table = pd.DataFrame(rows, columns=[*columns, "verdict"])
    return table.astype(dict.fromkeys(columns[5:], float))


def _means(table: pd.DataFrame) -> pd.Series:
    """Mean difference by factor and level."""
    return table.groupby(["factor", "level"], sort=False)["difference"].mean()


def _lines(study: Study, table: pd.DataFrame) -> tuple[list[Line], str | None]:
    """Factors by their largest effect, and under each its levels in the study's order; what a page does not hold is
    told."""
    means = _means(table)
    size = means.abs().groupby("factor").max().sort_values(ascending=False, kind="stable", na_position="last")
    lines, levels = [], 0
    for factor in size.index:
        found = list(dict.fromkeys(table.loc[table["factor"] == factor, "level"]))
        kept = sorted(found, key=lambda level: -abs(means[factor, level]))[: max(0, ROWS - len(lines) - 1)]
        if not kept:
            break
        reference = table.loc[table["factor"] == factor, "reference_level"].iloc[0]
        lines.append(Line(f"{design.words(factor)}, from {study.level(factor, reference)}"))
        for level in found:
            if level in kept:
                rows = table[(table["factor"] == factor) & (table["level"] == level)]
                name = study.level(factor, None if level == design.RECIPE else level)
                lines.append(Line(f"to {name}", rows))
                levels += 1
    left_out = len(means) - levels
    return lines, f"{left_out} levels of smaller effect are in the table alone" if left_out else None


def _single(panel: Axes, place: int, rows: pd.DataFrame, study: Study) -> None:
    row = rows.iloc[0]
    if pd.notna(row["difference"]):
        colour = study.colours[row["arm"]]
        panel.plot([row["low"], row["high"]], [place] * 2, color=colour, linewidth=1.6, solid_capstyle="butt")
        panel.plot(row["difference"], place, "o", color=colour, markersize=4.5)


def _paired(panel: Axes, place: int, rows: pd.DataFrame, study: Study) -> None:
    """A point for each pair in its arm's colour, their range where there are too many, and the mean."""
    values = rows["difference"].dropna()
    if not len(values):
        return
    if len(values) <= MANY:
        colours = [study.colours[arm] for arm in rows.loc[values.index, "arm"]]
        panel.scatter(values, [place] * len(values), s=9, c=colours, linewidths=0, alpha=0.8, zorder=2)
    else:
        panel.plot([values.min(), values.max()], [place] * 2, color="0.7", linewidth=1)
        panel.plot(values.quantile([0.25, 0.75]), [place] * 2, color="0.5", linewidth=3, solid_capstyle="butt")
    panel.plot(
        values.mean(), place, "D", color="0.1", markersize=4, markeredgecolor="white", markeredgewidth=0.5, zorder=3
    )


def _axis(panel: Axes, lines: list[Line], study: Study, single: bool) -> None:
    names = [style.cut(line.text, LETTERS + (14 if line.rows is None else 0)) for line in lines]
    panel.set_yticks(range(len(lines)), names)
    panel.tick_params(axis="y", length=0)
    for label, line in zip(panel.get_yticklabels(), lines, strict=True):
        label.set_fontweight("bold" if line.rows is None else "normal")
    panel.set_ylim(len(lines) - 0.4, -0.6)
    panel.grid(axis="y", visible=False)
    beside = panel.secondary_yaxis("right")
    beside.set_yticks(range(len(lines)), [_beside(line, study, single) for line in lines])
    beside.tick_params(length=0)
    beside.spines["right"].set_visible(False)
    better = "lower is better" if study.lower_is_better else "higher is better"
    panel.set_xlabel(f"Difference in {style.METRIC_NAMES[study.plan.metric]} ({better})")


def _beside(line: Line, study: Study, single: bool) -> str:
    if line.rows is None:
        return ""
    if single:
        return style.verdict(line.rows.iloc[0], study)
    mean, count = line.rows["difference"].mean(), line.rows["difference"].count()
    return (
        f"{style.signed(mean)} over {count} pair{'' if count == 1 else 's'}"
        if math.isfinite(mean)
        else "no number: diverged"
    )


def _handles(study: Study, table: pd.DataFrame, single: bool) -> list:
    grey = {"color": "0.3", "linestyle": "none"}
    if single:
        handles = [
            Line2D(
                [],
                [],
                color="0.3",
                marker="o",
                markersize=4.5,
                label=f"difference to the baseline, {style.interval(study)}",
            )
        ]
    else:
        handles = [Line2D([], [], marker="o", markersize=3, label="two arms that differ in this alone", **grey)]
        handles.append(Line2D([], [], color="0.1", marker="D", markersize=4, linestyle="none", label="their mean"))
    if study.plan.margin:
        handles.append(Patch(facecolor="0.93", label=f"margin ±{study.plan.margin:g}"))
    return handles + (style.adjusted(table["p_adjusted"]) if single else [])


def _message(study: Study, table: pd.DataFrame, single: bool) -> str:
    name = style.METRIC_NAMES[study.plan.metric]
    means = _means(table)
    if means.isna().all():
        return f"{style.capital(name)} by factor: no pair of arms has a number"
    factor, level = means.abs().idxmax()
    count = table["factor"].nunique()
    rows = table[(table["factor"] == factor) & (table["level"] == level)]
    names = [
        study.level(factor, None if text == design.RECIPE else text)
        for text in (rows["reference_level"].iloc[0], level)
    ]
    step = f"{design.words(factor)}, {names[0]} to {names[1]} ({style.signed(means[factor, level])})"
    if not single:
        return f"Of {count} factors, the largest mean change in {name} comes from {step}"
    decided = table[table["verdict"].isin(["better", "worse"])]
    if decided.empty:
        return f"None of {len(table)} changes of one factor makes {name} better or worse; the largest is {step}"
    moving = [design.words(one) for one in dict.fromkeys(decided["factor"])]
    which = style.few(moving, f"{len(moving)} of {count} factors")
    change = "changes" if len(moving) == 1 else "change"
    return f"{style.capital(which)} {change} {name}; the largest step is {step}: {rows['verdict'].iloc[0]}"
