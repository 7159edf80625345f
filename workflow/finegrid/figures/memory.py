"""Figure: the memory that the plan predicted for each run against what its training took."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from finegrid.errors import UserError
from finegrid.figures import style
from finegrid.figures.style import Study

NEAR = 0.1  # within this share of the prediction is near
ROWS = 14  # arms that get a line of the right panel
MOST = 40  # arms in the figure of what was measured alone
LETTERS = 22  # of an arm's label
MIB, GIB = 2**20, 2**30


def draw(study_dir: Path, output: Path) -> None:
    """Draw from `results/<study>/` and write `output`.pdf, .png, .csv."""
    style.save(*plot(study_dir), output)


def plot(study_dir: Path) -> tuple[Figure, pd.DataFrame]:
    """Return the figure and its table, one row a trained run: arm, label, run, device, predicted_gib (of what was
    measured), measured_gib, ratio (measured / predicted)."""
    study = style.load_study(study_dir)
    table = _table(study)
    known = table[table["ratio"].notna()]
    if known.empty:
        return _measured_alone(study, table), table
    named, more = style.named_arms(study, lambda arm: _far(known, arm))
    marks = dict(zip(named, style.MARKERS, strict=False))
    figure, (left, right) = style.start(style.DOUBLE, 2.5, 1, 2, width_ratios=(1, 1))
    _scatter(left, table, marks, study)
    arms = [arm.arm for arm in study.trained if (table["arm"] == arm.arm).any()]
    if len(arms) <= ROWS:
        _points(right, known, "ratio", arms, study)
    else:
        ends = min([1 - 2 * NEAR, *known["ratio"]]), max([1 + 2 * NEAR, *known["ratio"]])
        right.hist(known["ratio"], bins=40, range=ends, histtype="stepfilled", color="0.45")
        right.set_ylabel("Runs")
    right.axvspan(1 - NEAR, 1 + NEAR, color="0.9", linewidth=0, zorder=0)
    right.axvline(1, color="0.2", linewidth=0.8, zorder=1)
    right.set_xlabel("Measured / predicted")
    right.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    handles = [
        Line2D([], [], color=study.colours[arm], marker=mark, linestyle="none", markersize=4, label=study.label(arm))
        for arm, mark in marks.items()
    ]
    handles.append(Patch(facecolor="0.9", label=f"within {NEAR:.0%} of the prediction".replace("%", " %")))
    style.legend(figure, handles, more)
    style.message(figure, _message(table, known))
    return figure, table


def _measured_alone(study: Study, table: pd.DataFrame) -> Figure:
    """What training took, where the plan could predict nothing: of a model whose shape it does not know."""
    arms = list(dict.fromkeys(table["arm"]))[:MOST]
    figure, panel = style.start(style.SINGLE, 0.5 + 0.17 * max(len(arms), 3))
    _points(panel, table, "measured_gib", arms, study)
    panel.set_xlim(0, max(table["measured_gib"].max(), 0.1) * 1.08)
    panel.set_xlabel("Measured peak memory (GiB)")
    left_out = table["arm"].nunique() - len(arms)
    style.legend(figure, [], f"and {left_out} more arms: see the table" if left_out else None)
    style.message(figure, _message(table, table[table["ratio"].notna()]))
    return figure


def _table(study: Study) -> pd.DataFrame:
    entries = json.loads((study.folder / "plan.json").read_text(encoding="utf-8"))["runs"]
    rows = []
    for entry in entries:
        path = study.folder / "training" / f"{entry['run']}.json"
        if not entry.get("train", True):
            continue
        if not path.exists():
            raise UserError(f"{path}: no such file; expected the summary of a trained run")
        summary = json.loads(path.read_text(encoding="utf-8"))
        predicted, peak = _predicted(entry.get("memory"), summary), summary.get("peak_memory_mb")
        row = {"arm": entry["arm"], "label": study.label(entry["arm"]), "run": entry["run"]}
        row |= {"device": summary.get("device"), "predicted_gib": predicted}
        rows.append(row | {"measured_gib": None if peak is None else peak * MIB / GIB})
    table = pd.DataFrame(rows, columns=["arm", "label", "run", "device", "predicted_gib", "measured_gib"])
    table = table.astype({"predicted_gib": float, "measured_gib": float})
    table["ratio"] = table["measured_gib"] / table["predicted_gib"]
    return table


def _predicted(memory: dict | None, summary: dict) -> float | None:
    """What the plan predicted of what was measured, in GiB: of a GPU torch reports what it allocated, without the CUDA
    context and the gaps between blocks; of the CPU the whole process."""
    if not memory:
        return None
    on_gpu = str(summary.get("device", "")).startswith("cuda")
    return (memory["total"] - (memory["runtime"] if on_gpu else 0)) / GIB


def _far(known: pd.DataFrame, arm: str) -> float:
    ratios = known.loc[known["arm"] == arm, "ratio"]
    return -abs(ratios - 1).max() if len(ratios) else 0.0


def _scatter(panel: Axes, table: pd.DataFrame, marks: dict[str, str], study: Study) -> None:
    most = max(table[["predicted_gib", "measured_gib"]].max().max(), 0.1) * 1.08
    panel.fill_between([0, most], [0, most * (1 - NEAR)], [0, most * (1 + NEAR)], color="0.9", linewidth=0, zorder=0)
    panel.plot([0, most], [0, most], color="0.2", linewidth=0.8, zorder=1)
    for arm, rows in table.groupby("arm", sort=False):
        mark = marks.get(arm)
        options = {"color": study.colours[arm], "linestyle": "none", "markeredgecolor": "white"}
        options |= (
            {"markersize": 5, "markeredgewidth": 0.4}
            if mark
            else {"markersize": 2.5, "markeredgewidth": 0, "alpha": 0.6}
        )
        panel.plot(rows["predicted_gib"], rows["measured_gib"], mark or "o", **options)
    panel.set(xlim=(0, most), ylim=(0, most), xlabel="Predicted peak memory (GiB)", ylabel="Measured peak memory (GiB)")
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))


def _points(panel: Axes, table: pd.DataFrame, column: str, arms: list[str], study: Study) -> None:
    """A row an arm, a point a run."""
    for row, arm in enumerate(arms):
        values = table.loc[table["arm"] == arm, column]
        options = {"color": study.colours[arm], "markersize": 4, "alpha": 0.85, "markeredgewidth": 0}
        panel.plot(values, [row] * len(values), "o", **options)
    panel.set_yticks(range(len(arms)), [style.cut(study.label(arm), LETTERS) for arm in arms])
    panel.set_ylim(len(arms) - 0.4, -0.6)
    panel.grid(axis="y", visible=False)


def _message(table: pd.DataFrame, known: pd.DataFrame) -> str:
    if known.empty:
        missing = "predicted" if table["predicted_gib"].isna().all() else "measured"
        return f"Peak memory by run: none was {missing}"
    low, high = known["ratio"].min(), known["ratio"].max()
    runs = f"{len(known):,} runs" if len(known) > 1 else "The run"
    took = f"{low:.0%}" if f"{low:.0%}" == f"{high:.0%}" else f"{low:.0%} to {high:.0%}"
    text = f"{runs} took {took} of the memory that was predicted"
    over = known.loc[known["ratio"] > 1 + NEAR]
    if over.empty or len(known) == 1:
        return text.replace("%", " %")
    return f"{text}; {len(over):,} took over {1 + NEAR:.0%}".replace("%", " %")
