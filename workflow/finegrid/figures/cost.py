"""Figure: what quality costs: the primary metric against peak memory and against training time, by arm."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from finegrid.figures import style
from finegrid.figures.style import Study

MARKERS = "osD^vP*X"  # a second sign beside the colour
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
    named, more = style.named_arms(study, lambda arm: sign * quality[arm])
    figure, axes = style.start(style.DOUBLE, 2.9, 1, 2, sharey=True)
    for panel, (column, name) in zip(axes, PANELS, strict=True):
        for index, arm in enumerate(study.trained):
            _point(panel, table[table["arm"] == arm.arm].iloc[0], column, study, MARKERS[index % len(MARKERS)])
        for arm in study.untrained:
            panel.axhline(quality[arm.arm], color=study.colours[arm.arm], linestyle="--", linewidth=1, zorder=1.5)
        # Costs are amounts: the axis starts at none, so that twice as far is twice as much.
        panel.set_xlim(0, (table[column].max() or 1) * 1.1 if table[column].notna().any() else 1)
        panel.set_xlabel(name)
    axes[0].set_ylabel(style.metric_name(study))
    marks = {arm.arm: MARKERS[index % len(MARKERS)] for index, arm in enumerate(study.trained)}
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


def _point(panel, arm: pd.Series, column: str, study: Study, marker: str) -> None:
    if pd.isna(arm[column]):
        return
    colour, few = study.colours[arm["arm"]], len(study.trained) <= style.FEW
    panel.plot(
        [arm[column]] * 2, [arm["low"], arm["high"]], color=colour, linewidth=1 if few else 0.5, solid_capstyle="butt"
    )
    panel.plot(
        arm[column],
        arm["mean"],
        marker,
        color=colour,
        markersize=5 if few else 4,
        markeredgecolor="white",
        markeredgewidth=0.4,
    )


def _message(study: Study, table: pd.DataFrame) -> str:
    known = table[table["peak_memory_gib"].notna() & table["train_minutes"].notna() & table["mean"].notna()]
    if known.empty:
        return f"{study.plan.metric} by arm; no costs were recorded"
    best = known.loc[known["mean"].idxmin() if study.plan.metric == "loss" else known["mean"].idxmax()]
    text = (
        f"{best['label']} has the best mean {study.plan.metric}, "
        f"with {best['peak_memory_gib']:.1f} GiB and {best['train_minutes']:.1f} minutes a run"
    )
    cheapest = known.loc[known["peak_memory_gib"].idxmin()]
    if cheapest["arm"] == best["arm"]:
        return f"{text}, the least memory of all" if len(known) > 1 else text
    return f"{text}; {cheapest['label']} needs the least memory, {cheapest['peak_memory_gib']:.1f} GiB"
