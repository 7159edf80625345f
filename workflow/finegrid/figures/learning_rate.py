"""Figure: the learning rate as it ran, by arm; arms with equal schedules share one line, dash by dash."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from finegrid.figures import style
from finegrid.figures.style import Study

PANELS = 4  # distinct peaks that get a panel each; more share a logarithmic axis
DASH = 4.0  # in line widths: length of one arm's dash where several share a line


def draw(study_dir: Path, output: Path) -> None:
    """Draw from `results/<study>/` and write `output`.pdf, .png, .csv."""
    style.save(*plot(study_dir), output)


def plot(study_dir: Path) -> tuple[Figure, pd.DataFrame]:
    """Return the figure and its table: arm, label, step, learning_rate (mean over seeds)."""
    study = style.load_study(study_dir)
    table = _table(study)
    # Rates of one schedule differ in their last digits only: three digits make a panel.
    peaks = table.groupby("arm")["learning_rate"].max().map(lambda rate: float(f"{rate:.3g}"))
    distinct = sorted(peaks.unique(), reverse=True)
    panels = distinct if len(distinct) <= PANELS else [None]
    width = style.SINGLE
    figure, axes = style.start(width, 1.3 + 1.05 * len(panels), len(panels), 1, sharex=True, squeeze=False)
    named, more = style.named_arms(study, lambda arm: -peaks.get(arm, 0.0))
    for panel, peak in zip(axes[:, 0], panels, strict=True):
        arms = [arm.arm for arm in study.trained if peak is None or peaks[arm.arm] == peak]
        _schedules(panel, table, arms, study)
        if peak is None:
            panel.set_yscale("log")
        else:
            panel.set_ylim(0, peak * 1.08)
            panel.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    axes[-1, 0].set_xlabel("Optimiser step")
    axes[-1, 0].set_xlim(left=0)
    figure.supylabel("Learning rate", fontsize=style.POINTS)
    style.legend(figure, [Line2D([], [], color=study.colours[a], label=study.label(a)) for a in named], more)
    style.message(figure, _message(study, table, distinct))
    return figure, table


def _table(study: Study) -> pd.DataFrame:
    history = style.histories(study, [arm.arm for arm in study.trained])
    ran = history[history["learning_rate"].notna()]
    table = ran.groupby(["arm", "step"], as_index=False)["learning_rate"].mean()
    order = {arm.arm: index for index, arm in enumerate(study.plan.arms)}
    table = table.sort_values(["arm", "step"], key=lambda column: column.map(order) if column.name == "arm" else column)
    table.insert(1, "label", table["arm"].map(study.label))
    return table.reset_index(drop=True)


def _schedules(panel, table: pd.DataFrame, arms: list[str], study: Study) -> None:
    """One line a schedule; arms that share it take turns along it, so that none hides another."""
    shared: dict[tuple, list[str]] = {}
    for arm in arms:
        rows = table[table["arm"] == arm]
        key = tuple((int(step), f"{rate:.6g}") for step, rate in zip(rows["step"], rows["learning_rate"], strict=True))
        shared.setdefault(key, []).append(arm)
    for group in shared.values():
        rows = table[table["arm"] == group[0]]
        for turn, arm in enumerate(group):
            dashes = "-" if len(group) == 1 else (-turn * DASH, (DASH, DASH * (len(group) - 1)))
            panel.plot(
                rows["step"],
                rows["learning_rate"],
                color=study.colours[arm],
                linestyle=dashes,
                linewidth=1.4,
                dash_capstyle="butt",
            )


def _message(study: Study, table: pd.DataFrame, peaks: list[float]) -> str:
    by_arm = table.sort_values("step").groupby("arm")
    warm = {int(rows.loc[rows["learning_rate"].idxmax(), "step"]) for _, rows in by_arm}
    end = max(rows["learning_rate"].iloc[-1] / rows["learning_rate"].max() for _, rows in by_arm)
    peak = f"{peaks[0]:.3g}" if len(peaks) == 1 else f"{peaks[-1]:.3g} to {peaks[0]:.3g}, by arm"
    when = f"at step {warm.pop()}" if len(warm) == 1 else f"at steps {min(warm)} to {max(warm)}"
    if end > 0.99:
        return f"The learning rate stays at its peak ({peak})"
    last = (
        "ends at 0" if end < 0.005 else f"ends at {end:.0%} of it" if len(by_arm) == 1 else f"ends at {end:.0%} or less"
    )
    return f"The learning rate peaks {when} ({peak}) and {last}"
