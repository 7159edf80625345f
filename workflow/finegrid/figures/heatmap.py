"""Figure: the primary metric over two crossed factors, a cell an arm, with the verdict against the baseline in it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from finegrid.figures import design, style
from finegrid.figures.style import Study

SIGNS = {"better": "▲", "worse": "▼", "equivalent": "="}
CELL, CELL_WITH_TEXT = 0.13, (0.62, 0.26)  # inches: a cell without text; width and height of one with it
WIDTH, HEIGHT = 5.2, 7.5  # inches: room for the cells
LETTERS = 24  # of a level's name
LABELS = 30  # levels that are named on an axis


def draw(study_dir: Path, output: Path) -> None:
    """Draw from `results/<study>/` and write `output`.pdf, .png, .csv."""
    style.save(*plot(study_dir), output)


def plot(study_dir: Path) -> tuple[Figure, pd.DataFrame]:
    """Return the figure and its table, one row a trained arm: arm, the levels of both factors, mean, low, high,
    verdict."""
    study = style.load_study(study_dir)
    rows, columns = _factors(study)
    table = _table(study, rows, columns)
    down, across = _levels(table[rows], study, rows), _levels(table[columns], study, columns)
    texts = len(across) * CELL_WITH_TEXT[0] <= WIDTH and len(down) * CELL_WITH_TEXT[1] <= HEIGHT
    width, height = CELL_WITH_TEXT if texts else (min(CELL, WIDTH / len(across)), min(CELL, HEIGHT / len(down)))
    names = [style.cut(study.level(columns, level), LETTERS) for level in across]
    upright = max(map(style.cells, names)) * 0.07 > width
    room = 0.075 * max(map(style.cells, names)) if upright else 0.2
    small = len(across) * width < style.SINGLE - 1.7
    figure, panel = style.start(
        style.SINGLE if small else style.DOUBLE, 0.45 + room + style.LINE + max(len(down) * height, 0.3)
    )
    grid = table.pivot(index=rows, columns=columns, values="mean").reindex(index=down, columns=across).to_numpy(float)
    best = "viridis_r" if study.lower_is_better else "viridis"
    drawn = panel.imshow(np.ma.masked_invalid(grid), cmap=best, aspect="auto")
    if texts:
        panel.set_title(style.metric_name(study), loc="left")
    else:
        bar = figure.colorbar(drawn, ax=panel, pad=0.02, aspect=30)
        bar.set_label(style.metric_name(study))
        bar.outline.set_visible(False)
    _axis(panel.xaxis, across, names, columns, 90 if upright else 0)
    _axis(panel.yaxis, down, [style.cut(study.level(rows, level), LETTERS) for level in down], rows, 0)
    panel.grid(visible=False)
    panel.set_facecolor("0.93")
    for row in table.to_dict("records"):
        _cell(panel, row, down.index(row[rows]), across.index(row[columns]), study, drawn if texts else None)
    style.legend(figure, _handles(study, table, len(down) * len(across)))
    style.message(figure, _message(study, table, rows, columns))
    return figure, table


def _factors(study: Study) -> tuple[str, str]:
    """The factor of the rows and that of the columns: numbers, or else the factor with more levels, run across."""
    arms = [arm.factors for arm in study.trained]
    first, second = design.varying(arms)[:2]
    numbers = design.numeric(arms)
    if first in numbers and second not in numbers:
        return second, first
    return first, second


def _table(study: Study, rows: str, columns: str) -> pd.DataFrame:
    metric = study.plan.metric
    verdicts = study.comparisons[study.comparisons["metric"] == metric].set_index("arm")["verdict"]
    records = [
        {"arm": arm.arm, rows: arm.factors.get(rows, design.RECIPE), columns: arm.factors.get(columns, design.RECIPE)}
        | {
            name: study.arms.loc[arm.arm, f"{metric}{end}"]
            for name, end in (("mean", ""), ("low", "_low"), ("high", "_high"))
        }
        | {"verdict": verdicts.get(arm.arm, "")}
        for arm in study.trained
    ]
    return pd.DataFrame(records).astype(dict.fromkeys(("mean", "low", "high"), float))


def _levels(column: pd.Series, study: Study, factor: str) -> list[str]:
    """Numbers by size, other levels in the study's order."""
    levels = list(dict.fromkeys(column))
    if all(design.number(level) is not None for level in levels):
        levels.sort(key=design.number)
    return levels


def _axis(axis, levels: list[str], names: list[str], factor: str, rotation: float) -> None:
    every = math.ceil(len(levels) / LABELS)
    axis.set_ticks(range(0, len(levels), every), names[::every], rotation=rotation)
    axis.set_tick_params(length=0)
    axis.set_label_text(design.words(factor)[0].upper() + design.words(factor)[1:])


def _cell(panel: Axes, row: dict, down: int, across: int, study: Study, drawn) -> None:
    if row["arm"] == study.plan.baseline:
        frame = {"fill": False, "edgecolor": "black", "linewidth": 1.6, "zorder": 3}
        panel.add_patch(Rectangle((across - 0.5, down - 0.5), 1, 1, clip_on=False, **frame))
    if drawn is None:
        return
    if not math.isfinite(row["mean"]):
        panel.text(across, down, "diverged", ha="center", va="center", color="0.3", fontsize=style.POINTS - 1)
        return
    shade = drawn.cmap(drawn.norm(row["mean"]))[:3]
    light = 0.299 * shade[0] + 0.587 * shade[1] + 0.114 * shade[2] > 0.5
    sign = SIGNS.get(row["verdict"], "")
    text = f"{row['mean']:.3f}" + (f" {sign}" if sign else "")
    panel.text(across, down, text, ha="center", va="center", color="black" if light else "white", fontsize=style.POINTS)


def _handles(study: Study, table: pd.DataFrame, places: int) -> list:
    handles = [Patch(facecolor="none", edgecolor="black", linewidth=1.4, label="baseline")]
    there = set(table["verdict"])
    handles += [
        Line2D(
            [], [], color="0.1", marker=f"${sign}$", linestyle="none", markersize=5, markeredgewidth=0, label=verdict
        )
        for verdict, sign in SIGNS.items()
        if verdict in there
    ]
    if len(table) < places or table["mean"].isna().any():
        handles.append(Patch(facecolor="0.93", label="no arm" if len(table) < places else "no number"))
    return handles


def _message(study: Study, table: pd.DataFrame, rows: str, columns: str) -> str:
    name = style.METRIC_NAMES[study.plan.metric]
    known = table[table["mean"].notna()]
    if known.empty:
        return f"{style.capital(name)} by {design.words(rows)} and {design.words(columns)}: no arm has a number"
    best = known.loc[known["mean"].idxmin() if study.lower_is_better else known["mean"].idxmax()]
    levels = ", ".join(_words(study, factor, best[factor]) for factor in (rows, columns))
    text = f"{'Lowest' if study.lower_is_better else 'Highest'} mean {name}: {levels} ({best['mean']:.3f})"
    if best["arm"] == study.plan.baseline:
        return f"{text}, the baseline itself"
    return f"{text}, {_against(best['verdict'])} the baseline"


def _words(study: Study, factor: str, level: str) -> str:
    """A number says nothing without its factor."""
    name = study.level(factor, None if level == design.RECIPE else level)
    return f"{design.words(factor)} {name}" if design.number(name) is not None else name


def _against(verdict: str) -> str:
    return {"better": "better than", "worse": "worse than", "equivalent": "equivalent to"}.get(
        verdict, "not distinguishable from"
    )
