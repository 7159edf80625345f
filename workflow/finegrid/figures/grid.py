"""Figure: the grid of a study before it trains: which arm has which levels, its runs, and what it will cost.

Reads `plan.json` alone. Each row is an arm, each column a factor; more arms than a page holds are summed up by level.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from finegrid.analysis.scores import Arm, Plan, load_plan
from finegrid.figures import design, style

ROWS = 60  # arms on a page
ROW, TIGHT_ROW, FEW_ROWS = 0.19, 0.146, 30  # inches; rows are tight when there are more than a few
LEFT, GAP = 0.3, 0.13  # inches: room for an arm's sign, and between columns
BASE = 0.04  # inches from a line's middle down to its letters' base
HEADING = 0.135  # inches of a heading's line
DOT, DOT_GAP, DOTS_MOST = 0.07, 0.06, 1.5  # inches: a run, between tuned levels, and all runs of an arm
BAR, BAR_LEAST, NUMBER = 3.4, 0.7, 0.5  # inches: the longest bar at most and at least, and the number behind it
NAME_LEAST = 0.35  # inches of a factor's column at least
NAMED = 24  # letters of an arm that the title may name
AS_IN_RECIPE = "–"
BASELINE = "0.93"
LIGHT, DARK = (0.87, 0.92, 0.97), (0.55, 0.70, 0.84)  # a factor's second and last level


@dataclass(frozen=True)
class Cost:
    """What the bars show: a column of the table, and its name with the unit."""

    column: str
    name: str
    unit: str


COSTS = (
    Cost("gpu_hours", "GPU hours", "GPU hours"),
    Cost("cpu_hours", "CPU hours", "CPU hours"),
    Cost("label_tokens", "Label tokens", "label tokens"),
    Cost("steps", "Optimiser steps", "optimiser steps"),
)


def draw(study_dir: Path, output: Path) -> None:
    """Draw from `results/<study>/plan.json` and write `output`.pdf, .png, .csv."""
    style.save(*plot(study_dir), output)


def plot(study_dir: Path) -> tuple[Figure, pd.DataFrame]:
    """Return the figure and its table, one row a trained arm: arm, label, baseline, factor.<name>, tuned_levels,
    seeds, runs, device, and of all its runs together gpu_hours, cpu_hours, label_tokens, steps (empty where the plan
    does not know them)."""
    path = study_dir / "plan.json"
    plan = load_plan(path)
    entries = [run for run in json.loads(path.read_text(encoding="utf-8"))["runs"] if run.get("train", True)]
    table = _table(plan, entries)
    cost = next((cost for cost in COSTS if len(table) and table[cost.column].notna().all()), None)
    by_level = len(table) > ROWS
    grid = _levels(plan, table, cost) if by_level else _arms(plan, table, entries, cost)
    figure = _draw(grid, cost)
    style.legend(figure, _signs(grid, plan, by_level), _left_out(grid, table, by_level))
    style.message(figure, _message(table, entries, cost))
    return figure, table


# ---------------------------------------------------------------- the table


def _factors(plan: Plan) -> list[str]:
    return list(dict.fromkeys(factor for arm in plan.arms for factor in arm.factors))


def _table(plan: Plan, entries: list[dict]) -> pd.DataFrame:
    factors, rows = _factors(plan), []
    for arm in plan.arms:
        runs = list({run["run"]: run for run in entries if run["arm"] == arm.arm}.values())
        if not runs:
            continue
        rows.append(
            {"arm": arm.arm, "label": style.printable(arm.label, arm.arm), "baseline": arm.arm == plan.baseline}
            | {f"factor.{factor}": arm.factors.get(factor) for factor in factors}
            | {
                "tuned_levels": len({tuple(run.get("tuned", {}).items()) for run in runs}),
                "seeds": len({run.get("seed") for run in runs}),
                "runs": len(runs),
                "device": ", ".join(dict.fromkeys(str(run.get("device") or "") for run in runs)),
            }
            | _costs(runs)
        )
    columns = ["arm", "label", "baseline", *(f"factor.{factor}" for factor in factors)]
    columns += ["tuned_levels", "seeds", "runs", "device", *(cost.column for cost in COSTS)]
    return pd.DataFrame(rows, columns=columns)


def _costs(runs: list[dict]) -> dict[str, float | None]:
    """Return the sums over an arm's runs; hours only of the kind of device that all of them have."""
    on_cpu = {run.get("device") == "cpu" for run in runs}
    seconds, hours = _sum(runs, "seconds"), _sum(runs, "gpu_hours")
    return {
        "gpu_hours": hours if on_cpu == {False} else None,
        "cpu_hours": seconds / 3600 if on_cpu == {True} and seconds is not None else None,
        "label_tokens": _sum(runs, "label_tokens"),
        "steps": _sum(runs, "steps"),
    }


def _sum(runs: list[dict], key: str) -> float | None:
    values = [run.get(key) for run in runs]
    return None if None in values else sum(values)


# ---------------------------------------------------------------- what is drawn


@dataclass(frozen=True)
class Cell:
    """A text with the colour behind it."""

    text: str
    shade: object = None
    pale: bool = False
    plain: bool = False  # never bold


@dataclass(frozen=True)
class Row:
    """A line of the grid; ``runs`` are the numbers of seeds, one for each tuned level."""

    cells: list[Cell]
    runs: list[int]
    cost: float | None
    colour: object = None
    baseline: bool = False
    rule: bool = False  # a line above: the first column changes


@dataclass(frozen=True)
class Grid:
    """What is drawn: names of the columns, and rows."""

    columns: list[str]
    rows: list[Row]
    left: float = LEFT
    tuned: bool = False  # some arms have several tuned levels
    dots: bool = True  # runs are drawn, not counted
    hidden: int = 0
    recipe: bool = False  # some cells are as in the recipe
    shaded: bool = False


def _arms(plan: Plan, table: pd.DataFrame, entries: list[dict], cost: Cost | None) -> Grid:
    factors, colours = _factors(plan), style.arm_colours(plan)
    arms = [arm for arm in plan.arms if arm.arm in set(table["arm"])]
    shades, names = _shades(plan, factors), _level_names(plan)
    # An arm whose label is made of its levels, or of those that differ from the baseline's, is known by its cells.
    named = not factors or any(_own_names(arm, plan) is None for arm in arms if arm.arm != plan.baseline)
    first_levels = [arm.factors.get(factors[0]) if factors else None for arm in arms]
    blocks = min((len(list(block)) for _, block in groupby(first_levels)), default=0) > 1
    rows: list[Row] = []
    for number, arm in enumerate(arms):
        cells = [] if not named else [Cell(style.printable(arm.label, arm.arm))]
        for factor in factors:
            level = arm.factors.get(factor)
            if level is None:
                cells.append(Cell(AS_IN_RECIPE, pale=True))
            else:
                text = style.printable(names.get((factor, level), level), level)
                cells.append(Cell(text, shades.get((factor, level))))
        runs = _runs_by_level([run for run in entries if run["arm"] == arm.arm])
        amount = None if cost is None else float(table.loc[table["arm"] == arm.arm, cost.column].iloc[0])
        rule = blocks and number > 0 and first_levels[number] != first_levels[number - 1]
        rows.append(Row(cells, runs, amount, colours[arm.arm], arm.arm == plan.baseline, rule))
    return Grid(
        columns=(["arm"] if named else []) + [factor.replace("_", " ") for factor in factors],
        rows=rows,
        tuned=any(len(row.runs) > 1 for row in rows),
        dots=max((_dots_width(row.runs) for row in rows), default=0) <= DOTS_MOST,
        recipe=any(cell.pale for row in rows for cell in row.cells),
        shaded=any(cell.shade is not None for row in rows for cell in row.cells),
    )


def _levels(plan: Plan, table: pd.DataFrame, cost: Cost | None) -> Grid:
    """Return the grid summed up: a row for each level of each factor, with the arms that have it."""
    baseline = next(arm for arm in plan.arms if arm.arm == plan.baseline)
    names = _level_names(plan)
    rows: list[Row] = []
    for factor in _factors(plan):
        column = table[f"factor.{factor}"]
        for number, level in enumerate(dict.fromkeys(column)):
            having = table[column.isna() if pd.isna(level) else column == level]
            text = "as in the recipe" if pd.isna(level) else style.printable(names.get((factor, level), level), level)
            name = factor.replace("_", " ") if number == 0 else ""
            cells = [Cell(name, plain=True), Cell(text), Cell(f"{len(having):,}", plain=True)]
            amount = None if cost is None else float(having[cost.column].sum())
            is_baseline = baseline.factors.get(factor) == (None if pd.isna(level) else level)
            rows.append(Row(cells, [int(having["runs"].sum())], amount, None, is_baseline, bool(rows) and number == 0))
    shown = rows[:ROWS]
    return Grid(["factor", "level", "arms"], shown, left=0.06, dots=False, hidden=len(rows) - len(shown))


def _own_names(arm: Arm, plan: Plan) -> dict[str, str] | None:
    """Return what an arm's label calls its levels, or those that differ from the baseline's; None if it names none."""
    baseline = next(each for each in plan.arms if each.arm == plan.baseline)
    return design.level_names(arm.label, arm.factors, baseline.factors)


def _level_names(plan: Plan) -> dict[tuple[str, str], str]:
    """Return what levels are called in print, by factor and level, as far as the arms' labels tell."""
    names: dict[tuple[str, str], str] = {}
    for arm in plan.arms:
        for factor, name in (_own_names(arm, plan) or {}).items():
            names.setdefault((factor, arm.factors[factor]), name)
    return names


def _shades(plan: Plan, factors: list[str]) -> dict[tuple[str, str], tuple[float, ...]]:
    """Return (factor, level) -> shade: none for the baseline's level, darker the later a level comes in its factor."""
    baseline = next(arm for arm in plan.arms if arm.arm == plan.baseline)
    shades = {}
    for factor in factors:
        levels = dict.fromkeys(arm.factors[factor] for arm in plan.arms if factor in arm.factors)
        others = [level for level in levels if level != baseline.factors.get(factor)]
        for number, level in enumerate(others):
            share = number / max(len(others) - 1, 1)
            shades[factor, level] = tuple(a + (b - a) * share for a, b in zip(LIGHT, DARK, strict=True))
    return shades


def _runs_by_level(runs: list[dict]) -> list[int]:
    counts: dict[tuple, set] = {}
    for run in runs:
        counts.setdefault(tuple(run.get("tuned", {}).items()), set()).add(run["run"])
    return [len(found) for found in counts.values()]


# ---------------------------------------------------------------- drawing


def _draw(grid: Grid, cost: Cost | None) -> Figure:
    step = ROW if len(grid.rows) <= FEW_ROWS else TIGHT_ROW
    figure, axes = style.start(style.DOUBLE, 1)
    measure = partial(_width, figure, {})
    across = style.DOUBLE - 0.1  # the layout leaves a margin
    dots = max((_dots_width(row.runs) for row in grid.rows), default=0)
    runs = max(measure("runs"), dots if grid.dots else measure("00 × 00")) + GAP
    widths = _column_widths(grid, measure, across - grid.left - runs - (BAR_LEAST + NUMBER if cost else 0))
    edges = [grid.left + sum(widths[:number]) for number in range(len(widths) + 1)]
    bar = min(BAR, across - edges[-1] - runs - NUMBER)
    right = edges[-1] + runs + (bar + NUMBER if cost else 0)
    names = [*grid.columns, "runs", *([cost.name] if cost else [])]
    headings = [_break(name, width - GAP, measure) for name, width in zip(names, [*widths, 9, 9], strict=False)]
    head = max(map(len, headings)) * HEADING + 0.08
    figure.set_figheight(head + step * len(grid.rows) + 0.12)
    axes.set(xlim=(0, across), ylim=(len(grid.rows) * step + 0.02, -head), xticks=[], yticks=[])
    axes.axis("off")
    text = partial(axes.text, fontsize=style.POINTS, va="baseline")
    for edge, lines in zip([*edges, edges[-1] + runs], headings, strict=False):
        for number, line in enumerate(reversed(lines)):
            text(edge, -0.06 - number * HEADING, line, color="0.35")
    axes.plot([0, right], [0, 0], color="0.35", linewidth=0.8, solid_capstyle="butt")
    shown = [_cut_column(grid, number, width - GAP, measure) for number, width in enumerate(widths)]
    most = max((row.cost or 0 for row in grid.rows), default=0) or 1
    for number, row in enumerate(grid.rows):
        top = number * step
        middle = top + step / 2
        _background(axes, row, top, step, edges, right)
        _sign(axes, row, middle)
        for edge, cell, column in zip(edges, row.cells, shown, strict=False):
            options = {"color": "0.6" if cell.pale else "0", "fontweight": "bold" if _bold(row, cell) else "normal"}
            text(edge, middle + BASE, column[cell.text], **options)
        if grid.dots:
            _dots(axes, edges[-1], middle, row.runs)
        else:
            text(edges[-1], middle + BASE, _count(row.runs))
        if cost:
            start = edges[-1] + runs
            width = bar * (row.cost or 0) / most
            colour = row.colour or "0.55"
            axes.add_patch(Rectangle((start, top + 0.18 * step), width, 0.64 * step, color=colour, linewidth=0))
            text(start + width + 0.05, middle + BASE, _amount(row.cost))
    return figure


def _background(axes: Axes, row: Row, top: float, step: float, edges: list[float], right: float) -> None:
    if row.baseline:
        axes.add_patch(Rectangle((0, top), right, step, color=BASELINE, linewidth=0, zorder=0.5))
    for edge, following, cell in zip(edges, edges[1:], row.cells, strict=False):
        if cell.shade is not None:
            place = (edge - GAP / 2, top + 0.01)
            size = (following - edge - 0.02, step - 0.02)
            axes.add_patch(Rectangle(place, *size, color=cell.shade, linewidth=0, zorder=0.6))
    if row.rule:
        axes.plot([0, right], [top, top], color="0.7", linewidth=0.5, solid_capstyle="butt", zorder=0.7)


def _sign(axes: Axes, row: Row, middle: float) -> None:
    if row.colour is not None:
        marker, size = ("*", 8) if row.baseline else ("s", 5)
        axes.plot(LEFT / 2 - 0.03, middle, marker, color=row.colour, markersize=size, markeredgewidth=0, clip_on=False)


def _dots(axes: Axes, left: float, middle: float, runs: list[int]) -> None:
    places, place = [], left + DOT / 2
    for seeds in runs:
        places += [place + DOT * number for number in range(seeds)]
        place += DOT * seeds + DOT_GAP
    axes.plot(places, [middle] * len(places), "o", color="0.3", markersize=2.6, markeredgewidth=0, clip_on=False)


def _dots_width(runs: list[int]) -> float:
    return DOT * sum(runs) + DOT_GAP * (len(runs) - 1)


def _count(runs: list[int]) -> str:
    if len(runs) > 1 and len(set(runs)) == 1:
        return f"{len(runs)} × {runs[0]}"
    return f"{sum(runs):,}"


def _column_widths(grid: Grid, measure, room: float) -> list[float]:
    """Return the widths of the factors' columns, with the gap behind each: as wide as their texts, if there is room;
    else the widest give way."""
    widths = []
    for number, name in enumerate(grid.columns):
        texts = [measure(row.cells[number].text, _bold(row, row.cells[number])) for row in grid.rows]
        widths.append(max([*texts, *(measure(word) for word in name.split()), NAME_LEAST]) + GAP)
    while sum(widths) > room and max(widths) > NAME_LEAST + GAP:
        widest = max(widths)
        second = max([width for width in widths if width < widest] or [0])
        count = widths.count(widest)
        cut = max(widest - (sum(widths) - room) / count, second, NAME_LEAST + GAP)
        widths = [cut if width == widest else width for width in widths]
    return widths


def _width(figure: Figure, known: dict, text: str, bold: bool = False) -> float:
    """Return the inches that a text takes in print."""
    if (text, bold) not in known:
        weight = "bold" if bold else "normal"
        drawn = figure.text(0, 0, text, fontsize=style.POINTS, fontweight=weight)
        known[text, bold] = drawn.get_window_extent().width / figure.dpi
        drawn.remove()
    return known[text, bold]


def _bold(row: Row, cell: Cell) -> bool:
    return row.baseline and not cell.plain


def _cut_column(grid: Grid, number: int, width: float, measure) -> dict[str, str]:
    """Return each of a column's texts as it fits; levels that would look alike are cut in their middle."""
    bold = {row.cells[number].text: False for row in grid.rows}
    bold |= {row.cells[number].text: True for row in grid.rows if _bold(row, row.cells[number])}
    cut = {text: _cut(text, width, measure, thick) for text, thick in bold.items()}
    if len(set(cut.values())) < len(cut):
        cut = {text: _cut(text, width, measure, thick, middle=True) for text, thick in bold.items()}
    return cut


def _cut(text: str, width: float, measure, bold: bool = False, middle: bool = False) -> str:
    if measure(text, bold) <= width + 0.01:
        return text
    for letters in range(len(text) - 1, -1, -1):
        tail = letters // 2 if middle else 0
        shorter = f"{text[: letters - tail].rstrip()}…{text[len(text) - tail :].lstrip()}"
        if measure(shorter, bold) <= width:
            return shorter
    return "…"


def _break(name: str, width: float, measure) -> list[str]:
    """Return a heading on as many lines as it needs; words that are too long are cut."""
    lines: list[str] = []
    for word in name.split():
        if lines and measure(f"{lines[-1]} {word}") <= width:
            lines[-1] = f"{lines[-1]} {word}"
        else:
            lines.append(word)
    return [_cut(line, width, measure) for line in lines]


def _amount(value: float | None) -> str:
    if value is None:
        return ""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if letter == 'k' else size):.3g}{letter}"
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"


# ---------------------------------------------------------------- words


def _signs(grid: Grid, plan: Plan, by_level: bool) -> list:
    handles = []
    if by_level:
        handles.append(Patch(color=BASELINE, label="the baseline's level"))
    else:
        handles.append(
            Line2D([], [], color="0.3", marker="*", markersize=7, linestyle="none", label="baseline of the comparison")
        )
        if grid.shaded:
            handles.append(Patch(color=LIGHT, label="other than the baseline"))
        handles.append(_runs_sign(grid))
        if grid.recipe:
            handles.append(Line2D([], [], linestyle="none", label=f"{AS_IN_RECIPE} as in the recipe"))
    return handles


def _runs_sign(grid: Grid) -> Line2D:
    if not grid.dots:
        return Line2D([], [], linestyle="none", label="runs: tuned levels × seeds" if grid.tuned else "runs: seeds")
    text = "a run; a group has the seeds of one tuned level" if grid.tuned else "a run (one seed)"
    return Line2D([], [], color="0.3", marker="o", markersize=2.6, linestyle="none", label=text)


def _left_out(grid: Grid, table: pd.DataFrame, by_level: bool) -> str | None:
    if not by_level:
        return None
    text = f"{len(table):,} arms are too many to list: summed up by level, each arm stands in the table"
    return text if not grid.hidden else f"{text}; {grid.hidden:,} levels are not shown"


def _message(table: pd.DataFrame, entries: list[dict], cost: Cost | None) -> str:
    runs = len({run["run"] for run in entries})
    text = f"{_many(len(table), 'arm')}, {_many(runs, 'run')}"
    if cost is None or table.empty:
        return f"{text}; what they cost is not known yet"
    total = _spell(_total(entries, cost))
    text = f"{text}, about {total} {cost.unit.removesuffix('s') if total == '1' else cost.unit}"
    dearest = table.loc[table[cost.column].idxmax()]
    cheapest = table.loc[table[cost.column].idxmin()]
    ratio = dearest[cost.column] / cheapest[cost.column] if cheapest[cost.column] else 1
    if len(table) == 1:
        return text
    if ratio <= 1.05:
        return f"{text}, the same for each arm"
    if max(style.cells(dearest["label"]), style.cells(cheapest["label"])) > NAMED:
        return f"{text}; the dearest arm costs {ratio:.2g} times the cheapest"
    return f"{text}; {dearest['label']} costs most, {ratio:.2g} times {cheapest['label']}"


def _total(entries: list[dict], cost: Cost) -> float:
    """Return the sum over the study's runs: one that stands for several arms costs once."""
    once = {run["run"]: run for run in entries}.values()
    if cost.column == "cpu_hours":
        return sum(run["seconds"] for run in once) / 3600
    return sum(run[cost.column] for run in once)


def _many(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def _spell(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
