"""Figure: what quality costs: the primary metric against trainable parameters, peak memory and training time, by arm.

The line joins the Pareto front: the arms than which no other has a better mean at no more cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from finegrid.figures import style
from finegrid.figures.style import Study

MANY = 40  # arms whose intervals can be told apart
LEAST = 0.01  # of the metric that the axis spans
WIDE = 20  # costs further apart than this factor get a logarithmic axis


@dataclass(frozen=True)
class Cost:
    """A column of the table, the name of its axis, and what its front is called in the message."""

    column: str
    name: str
    word: str


COSTS = (
    Cost("trainable_millions", "Trainable parameters (millions)", "trainable parameters"),
    Cost("peak_memory_gib", "Peak memory (GiB)", "memory"),
    Cost("train_minutes", "Training time (minutes)", "time"),
)


def draw(study_dir: Path, output: Path) -> None:
    """Draw from `results/<study>/` and write `output`.pdf, .png, .csv."""
    style.save(*plot(study_dir), output)


def plot(study_dir: Path) -> tuple[Figure, pd.DataFrame]:
    """Return the figure and its table: arm, label, metric, mean, low, high, trainable_millions, peak_memory_gib,
    train_minutes, and for each of these whether the arm is on its Pareto front. Base models cost no training: their
    costs are empty."""
    study = style.load_study(study_dir)
    table = _table(study)
    sign = 1 if study.lower_is_better else -1
    quality = table.set_index("arm")["mean"]
    memory = table.set_index("arm")["peak_memory_gib"].dropna()
    named, more = style.named_arms(study, lambda arm: sign * quality[arm], memory.idxmin() if len(memory) else None)
    marks = dict(zip(named, style.MARKERS, strict=False))
    figure, axes = style.start(style.DOUBLE, 2.3, 1, len(COSTS), sharey=True)
    for panel, cost in zip(axes, COSTS, strict=True):
        for arm in study.trained:
            row = table[table["arm"] == arm.arm].iloc[0]
            mark = marks.get(arm.arm)
            interval = mark is not None or len(study.trained) <= MANY
            _point(panel, row, cost.column, study.colours[arm.arm], mark, interval)
        for arm in study.untrained:
            panel.axhline(quality[arm.arm], color=study.colours[arm.arm], linestyle="--", linewidth=1, zorder=1.5)
        _axis(panel, table[cost.column].dropna(), cost)
        _front_line(panel, table[table[f"front_{cost.column}"]], cost.column)
    axes[0].set_ylabel(style.metric_name(study))
    low, high = axes[0].get_ylim()
    if high - low < LEAST:  # all the same, such as 0
        axes[0].set_ylim((low + high - LEAST) / 2, (low + high + LEAST) / 2)
    style.legend(figure, _handles(study, marks), more)
    style.message(figure, _message(study, table))
    return figure, table


def _axis(panel: Axes, values: pd.Series, cost: Cost) -> None:
    """Costs are amounts: the axis starts at none, so that twice as far is twice as much; or it is logarithmic."""
    panel.set_xlabel(cost.name)
    if len(values) and values.min() > 0 and values.max() > WIDE * values.min():
        panel.set_xscale("log")
        panel.set_xlim(values.min() / 1.6, values.max() * 1.6)
        panel.xaxis.set_major_locator(LogLocator(numticks=5))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
    else:
        panel.set_xlim(0, (values.max() or 1) * 1.1 if len(values) else 1)


def _front_line(panel: Axes, front: pd.DataFrame, column: str) -> None:
    """The front as steps: between two of its arms the dearer one's quality is not to be had."""
    front = front.sort_values(column)
    if len(front):
        ends = [*front[column], panel.get_xlim()[1]]
        panel.step(
            ends, [*front["mean"], front["mean"].iloc[-1]], where="post", color="0.35", linewidth=0.9, zorder=1.8
        )


def _handles(study: Study, marks: dict[str, str]) -> list[Line2D]:
    handles = [
        Line2D([], [], color=study.colours[arm], marker=mark, linewidth=1, markersize=4, label=study.label(arm))
        for arm, mark in marks.items()
    ]
    for arm in study.untrained:
        line = {"color": study.colours[arm.arm], "linestyle": "--", "linewidth": 1}
        handles.append(Line2D([], [], label=f"{study.label(arm.arm)}, untrained", **line))
    return [
        *handles,
        Line2D([], [], color="0.35", linewidth=0.9, drawstyle="steps-post", label="Pareto front of the means"),
    ]


def _table(study: Study) -> pd.DataFrame:
    metric = study.plan.metric
    arms = study.arms.loc[[arm.arm for arm in study.plan.arms]]
    table = pd.DataFrame(
        {
            "arm": arms.index,
            "label": [study.label(arm) for arm in arms.index],
            "metric": metric,
            "mean": arms[metric].to_numpy(float),
            "low": arms[f"{metric}_low"].to_numpy(float),
            "high": arms[f"{metric}_high"].to_numpy(float),
            "peak_memory_gib": arms["peak_memory_mb"].to_numpy(float) / 1024,
            "train_minutes": arms["train_seconds"].to_numpy(float) / 60,
            "trainable_millions": arms["trainable_parameters"].to_numpy(float) / 1e6,
        }
    )
    for cost in COSTS:
        table[f"front_{cost.column}"] = _front(table["mean"] * (-1 if study.lower_is_better else 1), table[cost.column])
    return table


def _front(gains: pd.Series, costs: pd.Series) -> pd.Series:
    """Whether no other arm gains more at no more cost, nor as much at less."""
    order = pd.DataFrame({"gain": gains, "cost": costs}).dropna().sort_values(["cost", "gain"], ascending=[True, False])
    best = order["gain"].cummax().shift(fill_value=-float("inf"))
    return (order["gain"] > best).reindex(gains.index, fill_value=False)


def _point(panel, arm: pd.Series, column: str, colour, marker: str | None, interval: bool) -> None:
    """Mean and interval at the arm's cost; arms that the legend does not name are drawn small and pale, and of very
    many the mean alone."""
    if pd.isna(arm[column]):
        return
    alpha, size, width = (1, 5, 1) if marker else (0.5, 2.5, 0.5)
    order = 3 if marker else 2
    if interval:
        ends = [arm["low"], arm["high"]]
        panel.plot([arm[column]] * 2, ends, color=colour, linewidth=width, alpha=alpha, zorder=order)
    options = {"color": colour, "markersize": size, "alpha": alpha, "zorder": order + 0.5, "markeredgecolor": "white"}
    panel.plot(arm[column], arm["mean"], marker or "o", markeredgewidth=0.4 if marker else 0, **options)


def _message(study: Study, table: pd.DataFrame) -> str:
    name = style.METRIC_NAMES[study.plan.metric]
    known = table[table["peak_memory_gib"].notna() & table["train_minutes"].notna() & table["mean"].notna()]
    if known.empty:
        return f"{style.capital(name)} by arm; no costs were recorded"
    best = known.loc[known["mean"].idxmin() if study.lower_is_better else known["mean"].idxmax()]
    costs = f"{best['peak_memory_gib']:.2g} GiB, {best['train_minutes']:.2g} minutes"
    text = f"{best['label']} has the {'lowest' if study.lower_is_better else 'highest'} mean {name} ({costs} a run)"
    if len(known) == 1:
        return text
    alone = [cost.word for cost in COSTS if table.loc[table[f"front_{cost.column}"], "arm"].tolist() == [best["arm"]]]
    if len(alone) == len(COSTS):
        return f"{text} and is the cheapest in each way"
    less = known[(known["peak_memory_gib"] < best["peak_memory_gib"]) & (known["arm"] != best["arm"])]
    if less.empty:
        return f"{text} and needs the least memory"
    # The best mean alone would make a winner of what the comparison does not set apart.
    equal = [arm for arm in less["arm"] if not study.apart(arm, best["arm"])]
    names = [study.label(arm) for arm in equal or less["arm"]]
    which = style.few(names, f"{len(names)} arms")
    one = len(names) == 1
    text = f"{text}; {which} need{'s' if one else ''} less memory"
    return f"{text} and {'is' if one else 'are'} not shown to be worse" if equal else text
