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
    schedules = _schedules(study, table)
    # Rates of one schedule differ in their last digits only: three digits make a panel.
    peaks = [float(f"{rows['learning_rate'].max():.3g}") for _, rows in schedules]
    distinct = sorted(set(peaks), reverse=True)
    panels = distinct if len(distinct) <= PANELS else [None]
    figure, axes = style.start(style.SINGLE, 0.5 + 1.15 * len(panels), len(panels), 1, sharex=True, squeeze=False)
    many = len(study.trained) > style.FEW
    handles = []
    for panel, peak in zip(axes[:, 0], panels, strict=True):
        for (arms, rows), own in zip(schedules, peaks, strict=True):
            if peak in (None, own):
                handles += _line(panel, rows, arms, own, study, many)
        if peak is None:
            panel.set_yscale("log")
        else:
            panel.set_ylim(0, peak * 1.08)
            panel.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    axes[-1, 0].set(xlabel="Optimiser step", xlim=(0, None))
    figure.supylabel("Learning rate", fontsize=style.POINTS)
    left_out = len(handles) - style.FEW
    style.legend(figure, handles[: style.FEW], f"and {left_out} more schedules" if left_out > 0 else None)
    style.message(figure, _message(table, distinct))
    return figure, table


def _table(study: Study) -> pd.DataFrame:
    history = style.histories(study, [arm.arm for arm in study.trained])
    ran = history[history["learning_rate"].notna()]
    table = ran.groupby(["arm", "step"], as_index=False)["learning_rate"].mean()
    order = {arm.arm: index for index, arm in enumerate(study.plan.arms)}
    table = table.sort_values(["arm", "step"], key=lambda column: column.map(order) if column.name == "arm" else column)
    table.insert(1, "label", table["arm"].map(study.label))
    return table.reset_index(drop=True)


def _schedules(study: Study, table: pd.DataFrame) -> list[tuple[list[str], pd.DataFrame]]:
    """Distinct schedules in the plan's order: the arms that ran each, and its rows."""
    shared: dict[tuple, tuple[list[str], pd.DataFrame]] = {}
    for arm in study.trained:
        rows = table[table["arm"] == arm.arm]
        key = tuple((int(step), f"{rate:.6g}") for step, rate in zip(rows["step"], rows["learning_rate"], strict=True))
        shared.setdefault(key, ([], rows))[0].append(arm.arm)
    return list(shared.values())


def _line(panel, rows: pd.DataFrame, arms: list[str], peak: float, study: Study, many: bool) -> list[Line2D]:
    """Draw one schedule and return its legend: a few arms that share it take turns along it, so that none hides
    another; of many arms the schedule is named, not the arm."""
    if many and len(arms) > 1:
        turns = [("0.25", f"{len(arms)} arms, peak {peak:g}")]
    else:
        turns = [(study.colours[arm], study.label(arm)) for arm in arms]
    handles = []
    for turn, (colour, label) in enumerate(turns):
        dashes = "-" if len(turns) == 1 else (-turn * DASH, (DASH, DASH * (len(turns) - 1)))
        options = {"color": colour, "linestyle": dashes, "linewidth": 1.4, "dash_capstyle": "butt"}
        panel.plot(rows["step"], rows["learning_rate"], **options)
        handles.append(Line2D([], [], color=colour, label=label))
    return handles


def _message(table: pd.DataFrame, peaks: list[float]) -> str:
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
    return f"The learning rate peaks {when} ({peak}) and {last}".replace("%", " %")
