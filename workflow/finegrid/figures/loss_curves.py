"""Figure: training and validation loss against the step, by arm, with every seed and the base model's level."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from finegrid.figures import style
from finegrid.figures.style import Study

LOG_RANGE = 10  # losses that differ by more than this factor get a logarithmic axis


def draw(study_dir: Path, output: Path) -> None:
    """Draw from `results/<study>/` and write `output`.pdf, .png, .csv."""
    style.save(*plot(study_dir), output)


def plot(study_dir: Path) -> tuple[Figure, pd.DataFrame]:
    """Return the figure and its table: arm, label, run, seed, split, step, loss (nats per label token)."""
    study = style.load_study(study_dir)
    table = _table(study)
    final = _final(table)
    figure, axes = style.start(style.DOUBLE, 2.4, 1, 2, sharex=True, sharey=True)
    named, more = style.named_arms(study, lambda arm: final.get(arm, math.inf))
    marks = dict(zip(named, style.MARKERS, strict=False))
    for panel, split in zip(axes, ("training", "validation"), strict=True):
        for arm in study.trained:
            rows = table[(table["split"] == split) & (table["arm"] == arm.arm)]
            _curve(panel, rows, study.colours[arm.arm], marks.get(arm.arm), seeds=more is None)
        panel.set(title=f"{split.capitalize()} loss", xlabel="Optimiser step")
    axes[0].set_ylabel("Loss (nats per label token)")
    bases = _base_levels(study)
    for arm, level in bases.items():
        axes[1].axhline(level, color=study.colours[arm], linestyle="--", linewidth=1, zorder=1.5)
    shown = pd.concat([table["loss"], pd.Series(bases.values(), dtype=float)])
    shown = shown[shown.map(math.isfinite)]
    if len(shown) and shown.max() > LOG_RANGE * max(shown.min(), 1e-9):
        axes[0].set_yscale("log")
    axes[0].set_xlim(left=-0.02 * table["step"].max())  # room for the markers at step 0
    handles = [
        Line2D([], [], color=study.colours[arm], marker=mark, markersize=3, label=study.label(arm))
        for arm, mark in marks.items()
    ]
    handles += [
        Line2D([], [], color=study.colours[arm], linestyle="--", linewidth=1, label=f"{study.label(arm)}, untrained")
        for arm in bases
    ]
    if more is None and table.groupby("arm")["run"].nunique().max() > 1:
        handles.append(Line2D([], [], color="0.4", linewidth=0.5, label="each seed"))
    if table["loss"].isna().any():
        handles.append(Line2D([], [], color="0.4", marker="x", markersize=4, linestyle="none", label="diverged"))
    style.legend(figure, handles, more)
    style.message(figure, _message(study, final))
    return figure, table


def _table(study: Study) -> pd.DataFrame:
    history = style.histories(study, [arm.arm for arm in study.trained])
    # A training row has a learning rate. Where its loss is missing, the loss was no number: the run diverged.
    chosen = {"training": history["learning_rate"].notna() & history["eval_loss"].isna()}
    chosen["validation"] = history["eval_loss"].notna()
    parts = []
    for (split, rows), column in zip(chosen.items(), ("loss", "eval_loss"), strict=True):
        part = history[rows]
        parts.append(part[["arm", "run", "seed", "step"]].assign(split=split, loss=part[column]))
    table = pd.concat(parts, ignore_index=True).replace([math.inf, -math.inf], math.nan)
    table.insert(1, "label", table["arm"].map(study.label))
    return table[["arm", "label", "run", "seed", "split", "step", "loss"]]


def _curve(panel, rows: pd.DataFrame, colour, marker: str | None, seeds: bool) -> None:
    """Thin lines of the seeds, and their mean where all seeds were measured; × where a run diverged."""
    runs = [run.sort_values("step") for _, run in rows.groupby("run", sort=False)]
    for run in runs:
        if seeds and len(runs) > 1:
            panel.plot(run["step"], run["loss"], color=colour, linewidth=0.4, alpha=0.6)
        if run["loss"].isna().any() and run["loss"].notna().any():
            last = run[run["loss"].notna()].iloc[-1]
            panel.plot(last["step"], last["loss"], "x", color=colour, markersize=5, zorder=4)
    mean = rows[rows["loss"].notna()].groupby("step")["loss"].agg(["mean", "size"])
    mean = mean[mean["size"] == len(runs)]["mean"]
    sparse = len(rows) and rows["split"].iloc[0] == "validation"
    panel.plot(
        mean.index,
        mean,
        color=colour,
        linewidth=1.4 if marker else 0.5,
        alpha=1 if marker else 0.5,
        marker=marker if sparse else None,
        markersize=3,
        markeredgecolor="white",
        markeredgewidth=0.3,
        zorder=3 if marker else 2,
    )


def _base_levels(study: Study) -> dict[str, float]:
    """Validation loss of the untrained models that trained arms started from."""
    wanted = {arm.base for arm in study.trained}
    levels = {}
    for arm in study.untrained:
        level = study.arms.loc[arm.arm, "validation_loss"]
        if arm.base in wanted and pd.notna(level):
            levels[arm.arm] = float(level)
    return levels


def _final(table: pd.DataFrame) -> dict[str, float]:
    """Mean over seeds of each arm's last validation loss."""
    validation = table[(table["split"] == "validation") & (table["step"] > 0)]
    last = validation.sort_values("step").groupby(["arm", "run"])["loss"].last()
    return last.groupby("arm").mean().to_dict()


def _message(study: Study, final: dict[str, float]) -> str:
    ends = {arm: value for arm, value in final.items() if math.isfinite(value)}
    if not ends:
        return "Training loss by step; validation loss was not measured while training"
    best = min(ends, key=ends.get)
    bases = {arm.arm: study.arms.loc[arm.arm, "base_validation_loss"] for arm in study.trained}
    known = [arm for arm in ends if pd.notna(bases[arm])]
    if not known:
        return f"Validation loss ends lowest with {study.label(best)}: {ends[best]:.3f}"
    above = [arm for arm in known if ends[arm] >= bases[arm]]
    start = f"; its base model has {bases[best]:.2f}" if pd.notna(bases[best]) else ""
    lowest = f"{study.label(best)} ends lowest at {ends[best]:.2f}{start}"
    if not above:
        every = "every arm" if len(known) > 1 else "the arm"
        return f"Validation loss falls below the base model's in {every}; {lowest}"
    if len(above) == len(known):
        return f"Validation loss does not fall below the base model's in any arm; {lowest}"
    names = ", ".join(study.label(arm) for arm in above) if len(above) <= 3 else f"{len(above)} of {len(known)} arms"
    return f"Validation loss does not fall below the base model's with {names}; {lowest}"
