"""Figure: what quality costs: the primary metric against peak memory and against training time, by arm."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from finegrid.figures import style
from finegrid.figures.style import Study

PANELS = (("peak_memory_gib", "Peak memory (GiB)"), ("train_minutes", "Training time (minutes)"))


def draw(study_dir: Path, output: Path) -> None:
    """Draw from `results/<study>/` and write `output`.pdf, .png, .csv."""
    style.save(*plot(study_dir), output)


def plot(study_dir: Path) -> tuple[Figure, pd.DataFrame]:
    """Return the figure and its table: arm, label, metric, mean, low, high, peak_memory_gib, train_minutes,
    trainable_parameters. Base models cost no training: their costs are empty."""
    study = style.load_study(study_dir)
    table = _table(study)
    sign = 1 if study.plan.metric == "loss" else -1
    quality = table.set_index("arm")["mean"]
    memory = table.set_index("arm")["peak_memory_gib"].dropna()
    least = memory.idxmin() if len(memory) else None
    named, more = style.named_arms(study, lambda arm: sign * quality[arm], least)
    marks = dict(zip(named, style.MARKERS, strict=False))
    figure, axes = style.start(style.DOUBLE, 2.4, 1, 2, sharey=True)
    for panel, (column, name) in zip(axes, PANELS, strict=True):
        for arm in study.trained:
            row = table[table["arm"] == arm.arm].iloc[0]
            _point(panel, row, column, study.colours[arm.arm], marks.get(arm.arm))
        for arm in study.untrained:
            panel.axhline(quality[arm.arm], color=study.colours[arm.arm], linestyle="--", linewidth=1, zorder=1.5)
        # Costs are amounts: the axis starts at none, so that twice as far is twice as much.
        panel.set_xlim(0, (table[column].max() or 1) * 1.1 if table[column].notna().any() else 1)
        panel.set_xlabel(name)
    axes[0].set_ylabel(style.metric_name(study))
    handles = [
        Line2D([], [], color=study.colours[a], marker=marks[a], linewidth=1, markersize=4, label=study.label(a))
        for a in named
    ]
    handles += [
        Line2D(
            [],
            [],
            color=study.colours[arm.arm],
            linestyle="--",
            linewidth=1,
            label=f"{study.label(arm.arm)}, untrained",
        )
        for arm in study.untrained
    ]
    style.legend(figure, handles, more)
    style.message(figure, _message(study, table))
    return figure, table


def _table(study: Study) -> pd.DataFrame:
    metric = study.plan.metric
    arms = study.arms.loc[[arm.arm for arm in study.plan.arms]]
    return pd.DataFrame(
        {
            "arm": arms.index,
            "label": [study.label(arm) for arm in arms.index],
            "metric": metric,
            "mean": arms[metric].to_numpy(float),
            "low": arms[f"{metric}_low"].to_numpy(float),
            "high": arms[f"{metric}_high"].to_numpy(float),
            "peak_memory_gib": arms["peak_memory_mb"].to_numpy(float) / 1024,
            "train_minutes": arms["train_seconds"].to_numpy(float) / 60,
            "trainable_parameters": arms["trainable_parameters"].to_numpy(float),
        }
    )


def _point(panel, arm: pd.Series, column: str, colour, marker: str | None) -> None:
    """Mean and interval at the arm's cost; arms that the legend does not name are drawn small and pale."""
    if pd.isna(arm[column]):
        return
    alpha, size, width = (1, 5, 1) if marker else (0.5, 2.5, 0.5)
    order = 3 if marker else 2
    panel.plot([arm[column]] * 2, [arm["low"], arm["high"]], color=colour, linewidth=width, alpha=alpha, zorder=order)
    options = {"color": colour, "markersize": size, "alpha": alpha, "zorder": order + 0.5, "markeredgecolor": "white"}
    panel.plot(arm[column], arm["mean"], marker or "o", markeredgewidth=0.4 if marker else 0, **options)


def _message(study: Study, table: pd.DataFrame) -> str:
    name = style.METRIC_NAMES[study.plan.metric]
    known = table[table["peak_memory_gib"].notna() & table["train_minutes"].notna() & table["mean"].notna()]
    if known.empty:
        return f"{name[0].upper()}{name[1:]} by arm; no costs were recorded"
    lower = study.plan.metric == "loss"
    best = known.loc[known["mean"].idxmin() if lower else known["mean"].idxmax()]
    memory, minutes = f"{best['peak_memory_gib']:.2g} GiB", f"{best['train_minutes']:.2g} minutes"
    text = f"{best['label']} has the {'lowest' if lower else 'highest'} mean {name} ({memory}, {minutes} a run)"
    least = known.loc[known["peak_memory_gib"].idxmin()]
    if len(known) == 1:
        return text
    if least["arm"] == best["arm"]:
        return f"{text} and needs the least memory"
    return f"{text}; {least['label']} needs the least memory ({least['peak_memory_gib']:.2g} GiB)"
