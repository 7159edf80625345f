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
    figure, axes = style.start(style.DOUBLE, 2.9, 1, 2, sharex=True, sharey=True)
    named, more = style.named_arms(study, lambda arm: final.get(arm, math.inf))
    for panel, split in zip(axes, ("training", "validation"), strict=True):
        for arm in study.trained:
            _curve(panel, table[(table["split"] == split) & (table["arm"] == arm.arm)], study, arm.arm in named)
        panel.set(title=f"{split.capitalize()} loss", xlabel="Optimiser step")
    axes[0].set_ylabel("Loss (nats per label token)")
    bases = _base_levels(study)
    for arm, level in bases.items():
        axes[1].axhline(level, color=study.colours[arm], linestyle="--", linewidth=1, zorder=1.5)
    shown = pd.concat([table["loss"], pd.Series(bases.values(), dtype=float)])
    shown = shown[shown.map(math.isfinite)]
    if len(shown) and shown.max() > LOG_RANGE * max(shown.min(), 1e-9):
        axes[0].set_yscale("log")
    axes[0].set_xlim(left=0)
    handles = [Line2D([], [], color=study.colours[arm], label=study.label(arm)) for arm in named]
    handles += [
        Line2D([], [], color=study.colours[arm], linestyle="--", linewidth=1, label=f"{study.label(arm)}, untrained")
        for arm in bases
    ]
    if table.groupby("arm")["seed"].nunique().max() > 1:
        handles.append(Line2D([], [], color="0.4", linewidth=0.5, label="thin: each seed"))
    style.legend(figure, handles, more)
    style.message(figure, _message(study, final))
    return figure, table


def _table(study: Study) -> pd.DataFrame:
    history = style.histories(study, [arm.arm for arm in study.trained])
    # A row without either loss is an event of another kind; a diverged training row has a loss that is no number,
    # which CSV reads as missing: the row ends the curve.
    parts = []
    for split, column in (("training", "loss"), ("validation", "eval_loss")):
        part = history[history[column].notna()]
        parts.append(part[["arm", "run", "seed", "step"]].assign(split=split, loss=part[column]))
    table = pd.concat(parts, ignore_index=True)
    table.insert(1, "label", table["arm"].map(study.label))
    return table[["arm", "label", "run", "seed", "split", "step", "loss"]]


def _curve(panel, rows: pd.DataFrame, study: Study, named: bool) -> None:
    """Thin lines of the seeds, and their mean where all seeds were measured."""
    if rows.empty:
        return
    colour = study.colours[rows["arm"].iloc[0]]
    seeds = rows["run"].nunique()
    if seeds > 1:
        for _, run in rows.groupby("run", sort=False):
            panel.plot(run["step"], run["loss"], color=colour, linewidth=0.4, alpha=0.6)
    mean = rows.groupby("step")["loss"].agg(["mean", "size"])
    mean = mean[mean["size"] == seeds]["mean"]
    sparse = rows["split"].iloc[0] == "validation"
    panel.plot(
        mean.index,
        mean,
        color=colour,
        linewidth=1.4 if named else 0.7,
        marker="o" if sparse and named else None,
        markersize=2.5,
        zorder=3 if named else 2,
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
    validation = table[table["split"] == "validation"]
    last = validation.sort_values("step").groupby(["arm", "run"])["loss"].last()
    return last.groupby("arm").mean().to_dict()


def _message(study: Study, final: dict[str, float]) -> str:
    ends = {arm: value for arm, value in final.items() if math.isfinite(value)}
    if not ends:
        return "Training loss by step; no validation loss was measured"
    best = min(ends, key=ends.get)
    bases = {arm.arm: study.arms.loc[arm.arm, "base_validation_loss"] for arm in study.trained}
    known = [arm for arm in ends if pd.notna(bases[arm])]
    if not known:
        return f"Validation loss ends lowest with {study.label(best)}: {ends[best]:.3f}"
    above = [arm for arm in known if ends[arm] >= bases[arm]]
    start = f", from {bases[best]:.2f}" if pd.notna(bases[best]) else ""
    lowest = f"{study.label(best)} ends lowest, at {ends[best]:.2f}{start}"
    if not above:
        every = "every arm" if len(known) > 1 else "the arm"
        return f"Validation loss falls below the base model's in {every}; {lowest}"
    if len(above) == len(known):
        return f"Validation loss does not fall below the base model's in any arm; {lowest}"
    names = ", ".join(study.label(arm) for arm in above) if len(above) <= 3 else f"{len(above)} of {len(known)} arms"
    return f"Validation loss does not fall below the base model's in {names}; {lowest}"
