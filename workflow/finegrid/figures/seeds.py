"""Figure: how far the seeds of one arm lie apart, held against how far the arms do: what one run could not tell."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from finegrid.figures import style
from finegrid.figures.style import Study

ROWS = 24  # arms that get a line with their name; more stand side by side without
LETTERS = 30  # of an arm's label


def draw(study_dir: Path, output: Path) -> None:
    """Draw from `results/<study>/` and write `output`.pdf, .png, .csv."""
    style.save(*plot(study_dir), output)


def plot(study_dir: Path) -> tuple[Figure, pd.DataFrame]:
    """Return the figure and its table, one row a run: arm, label, run, seed, value (the primary metric), deviation from
    the mean of the arm's seeds."""
    study = style.load_study(study_dir)
    table = style.seed_values(study, [arm.arm for arm in study.trained])
    table["deviation"] = table["value"] - table.groupby("arm")["value"].transform("mean")
    spread = _spread(table)
    arms = [arm.arm for arm in study.trained]
    if len(arms) <= ROWS:
        labels = [style.cut(study.label(arm), LETTERS) for arm in arms]
        figure, panel = style.start(style.SINGLE, 0.5 + 0.17 * max(len(arms), 4))
        _rows(panel, table, arms, labels, study)
        panel.set_xlabel(style.wrapped(f"Seed's {style.METRIC_NAMES[study.plan.metric]} minus its arm's mean", 26))
        panel.axvspan(-spread, spread, color="0.9", linewidth=0, zorder=0)
        panel.axvline(0, color="0.5", linewidth=0.6, zorder=1)
    else:
        figure, panel = style.start(style.DOUBLE, 2.2)
        _side_by_side(panel, table, study)
        panel.axhspan(-spread, spread, color="0.9", linewidth=0, zorder=0)
        panel.axhline(0, color="0.5", linewidth=0.6, zorder=1)
    handles = [
        Line2D([], [], color="0.3", marker="o", markersize=4, linestyle="none", label="one seed"),
        Patch(facecolor="0.9", label=f"standard deviation over seeds, all arms: ±{spread:.2g}"),
    ]
    style.legend(figure, handles)
    style.message(figure, _message(study, table, spread))
    return figure, table


def _spread(table: pd.DataFrame) -> float:
    """The standard deviation between seeds of one arm, pooled over arms."""
    known = table[table["deviation"].notna()]
    freedom = len(known) - known["arm"].nunique()
    return math.sqrt((known["deviation"] ** 2).sum() / freedom) if freedom > 0 else 0.0


def _rows(panel: Axes, table: pd.DataFrame, arms: list[str], labels: list[str], study: Study) -> None:
    for row, arm in enumerate(arms):
        values = table.loc[table["arm"] == arm, "deviation"].dropna()
        colour = study.colours[arm]
        if len(values):
            panel.plot([values.min(), values.max()], [row, row], color=colour, linewidth=0.8, alpha=0.6)
        panel.plot(values, [row] * len(values), "o", color=colour, markersize=4, alpha=0.85, markeredgewidth=0)
    panel.set_yticks(range(len(arms)), labels)
    panel.set_ylim(len(arms) - 0.4, -0.6)
    panel.grid(axis="y", visible=False)
    panel.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))


def _side_by_side(panel: Axes, table: pd.DataFrame, study: Study) -> None:
    means = table.groupby("arm")["value"].mean().sort_values(ascending=study.lower_is_better)
    for place, arm in enumerate(means.index, 1):
        values = table.loc[table["arm"] == arm, "deviation"].dropna()
        colour = study.colours[arm]
        if len(values):
            panel.plot([place, place], [values.min(), values.max()], color=colour, linewidth=0.6, alpha=0.6)
        panel.plot([place] * len(values), values, "o", color=colour, markersize=2.5, markeredgewidth=0)
    panel.set(xlabel="Arms, the best mean first", xlim=(0, len(means) + 1))
    panel.set_ylabel(style.wrapped(f"Seed's {style.METRIC_NAMES[study.plan.metric]} minus its arm's mean", 24))
    panel.grid(axis="x", visible=False)


def _message(study: Study, table: pd.DataFrame, spread: float) -> str:
    name = style.METRIC_NAMES[study.plan.metric]
    known = table[table["value"].notna()]
    if known.empty:
        return f"{style.capital(name)} by seed: no run has a number"
    by_arm = known.groupby("arm")["value"]
    apart = (by_arm.max() - by_arm.min()).max()
    means = by_arm.mean()
    text = f"Seeds of one arm differ by up to {apart:.2g} in {name}"
    return f"{text}; the arms' means span {means.max() - means.min():.2g}" if len(means) > 1 else text
