"""Figure: the primary metric by arm, with intervals and seeds, and each arm's difference to the baseline."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from finegrid.figures import style
from finegrid.figures.style import Study

ROWS = 42  # more arms than fit on a page: the best are shown
NUMBER = 0.36  # inches: width of a number on an axis
LETTER = 0.056  # inches: width of a letter
LETTERS = 26  # of an arm's label in one line
PAGE = 8.6  # inches: what a page holds of rows
SEED = {"marker": "o", "markersize": 2.8, "markerfacecolor": "white", "markeredgecolor": "0.15", "markeredgewidth": 0.6}
SEED["linestyle"] = "none"


def draw(study_dir: Path, output: Path) -> None:
    """Draw from `results/<study>/` and write `output`.pdf, .png, .csv."""
    style.save(*plot(study_dir), output)


def plot(study_dir: Path) -> tuple[Figure, pd.DataFrame]:
    """Return the figure and its table: a row an arm with its estimate (mean, low, high), its difference to the
    baseline (difference, difference_low, difference_high, p_adjusted, verdict), and a row a seed (seed, mean)."""
    study = style.load_study(study_dir)
    arms, left_out = _shown(study)
    table = _table(study, arms)
    title = style.wrapped(f"Difference to {study.label(study.plan.baseline)}", 32)
    labels, height = _labels(study, arms)
    height += 0.6 + style.LINE * (title.count("\n") + 1)
    figure, (left, right) = style.start(style.DOUBLE, max(height, 1.4), 1, 2, sharey=True, width_ratios=(1, 1))
    for row, arm in enumerate(arms):
        _estimate(left, table[table["arm"] == arm], row, study)
        _difference(right, table[(table["arm"] == arm) & table["seed"].isna()].iloc[0], row, study)
    left.set_yticks(range(len(arms)), labels)
    left.set(ylim=(len(arms) - 0.4, -0.6), xlabel=style.metric_name(study), title="Estimate")
    left.grid(axis="y", visible=False)
    right.set_title(title)
    _difference_axis(right, table, arms, study)
    style.legend(figure, _handles(study, table), left_out)
    style.message(figure, _message(study))
    figure.draw_without_rendering()  # labels and verdicts leave the panels what width they leave
    for panel in (left, right):
        width = panel.get_position().width * figure.get_figwidth()
        panel.xaxis.set_major_locator(MaxNLocator(max(2, int(width / NUMBER)), steps=[1, 2, 5, 10]))
        panel.set_xlabel(style.wrapped(panel.get_xlabel(), int(width / LETTER)))
    return figure, table


def _labels(study: Study, arms: list[str]) -> tuple[list[str], float]:
    """The arms' labels and the height of all rows in inches: rows are equally high, as the label with the most lines
    needs it; where a page could not hold that, long labels are cut."""
    labels = [style.wrapped(study.label(arm), LETTERS) for arm in arms]
    height = len(arms) * (0.20 + 0.13 * max(label.count("\n") for label in labels))
    if height > PAGE:
        labels = [style.cut(study.label(arm), LETTERS + 8) for arm in arms]
        height = len(arms) * 0.20
    return labels, height


def _shown(study: Study) -> tuple[list[str], str | None]:
    """All arms in the plan's order, or the best of very many with the baseline and the base models."""
    arms = [arm.arm for arm in study.plan.arms]
    if len(arms) <= ROWS:
        return arms, None
    fixed = {study.plan.baseline} | {arm.arm for arm in study.untrained}
    values = study.arms[study.plan.metric] * (1 if study.plan.metric == "loss" else -1)
    best = set(values.drop(list(fixed)).sort_values().index[: max(0, ROWS - len(fixed))])
    kept = [arm for arm in arms if arm in best or arm in fixed][:ROWS]
    return kept, f"{len(kept)} of {len(arms)} arms: the best, the baseline, the base models"


def _table(study: Study, arms: list[str]) -> pd.DataFrame:
    metric = study.plan.metric
    compared = study.comparisons[study.comparisons["metric"] == metric].set_index("arm")
    seeds = style.seed_values(study, arms)
    rows = []
    for arm in arms:
        estimate = study.arms.loc[arm]
        row = {"arm": arm, "label": study.label(arm), "metric": metric, "seed": None, "mean": estimate[metric]}
        row |= {"low": estimate[f"{metric}_low"], "high": estimate[f"{metric}_high"]}
        if arm in compared.index:
            found = compared.loc[arm]
            row |= {"difference": found["difference"], "difference_low": found["low"], "difference_high": found["high"]}
            row |= {"p_adjusted": found["p_adjusted"], "verdict": found["verdict"]}
        rows.append(row)
        for seed, value in zip(*(seeds.loc[seeds["arm"] == arm, name] for name in ("seed", "value")), strict=True):
            rows.append({"arm": arm, "label": row["label"], "metric": metric, "seed": seed, "mean": value})
    columns = ["arm", "label", "metric", "seed", "mean", "low", "high"]
    columns += ["difference", "difference_low", "difference_high", "p_adjusted", "verdict"]
    table = pd.DataFrame(rows, columns=columns)
    return table.astype({"seed": "Int64"} | dict.fromkeys(columns[4:-1], float))


def _estimate(panel, rows: pd.DataFrame, row: int, study: Study) -> None:
    arm, seeds = rows[rows["seed"].isna()].iloc[0], rows[rows["seed"].notna()]
    colour = study.colours[arm["arm"]]
    panel.plot([arm["low"], arm["high"]], [row, row], color=colour, linewidth=1.6, solid_capstyle="butt")
    panel.plot(arm["mean"], row, "o", color=colour, markersize=4.5)
    if len(seeds) > 1:  # one seed is the mean itself
        panel.plot(seeds["mean"], [row + 0.27] * len(seeds), **SEED)


def _difference(panel, arm: pd.Series, row: int, study: Study) -> None:
    if pd.isna(arm["difference"]):
        return
    colour = study.colours[arm["arm"]]
    panel.plot(
        [arm["difference_low"], arm["difference_high"]], [row, row], color=colour, linewidth=1.6, solid_capstyle="butt"
    )
    panel.plot(arm["difference"], row, "o", color=colour, markersize=4.5)


def _difference_axis(panel, table: pd.DataFrame, arms: list[str], study: Study) -> None:
    panel.axvline(0, color="0.2", linewidth=0.8, zorder=1)
    if study.plan.margin:
        panel.axvspan(-study.plan.margin, study.plan.margin, color="0.9", linewidth=0, zorder=0)
    panel.grid(axis="y", visible=False)
    panel.tick_params(axis="y", left=False, length=0)
    # Verdicts stand where a second axis has its labels: beside the panel, so that no interval runs into them.
    beside = panel.secondary_yaxis("right")
    rows = table[table["seed"].isna()].set_index("arm")
    beside.set_yticks(range(len(arms)), [style.verdict(rows.loc[arm], study) for arm in arms])
    beside.tick_params(length=0)
    beside.spines["right"].set_visible(False)
    better = "lower is better" if study.plan.metric == "loss" else "higher is better"
    panel.set_xlabel(f"Difference in {style.METRIC_NAMES[study.plan.metric]} ({better})")


def _handles(study: Study, table: pd.DataFrame) -> list:
    handles = [Line2D([], [], color="0.3", marker="o", markersize=4.5, label=f"mean, {style.interval(study)}")]
    if table[table["seed"].notna()].groupby("arm").size().gt(1).any():
        handles.append(Line2D([], [], label="each seed", **SEED))
    if study.plan.margin:
        handles.append(Patch(facecolor="0.9", label=f"margin ±{study.plan.margin:g}"))
    return handles + style.adjusted(table["p_adjusted"])


def _message(study: Study) -> str:
    rows = study.comparisons[study.comparisons["metric"] == study.plan.metric].set_index("arm")
    trained = [arm.arm for arm in study.trained if arm.arm in rows.index]
    name, baseline = style.METRIC_NAMES[study.plan.metric], study.label(study.plan.baseline)
    if not trained:
        return f"{style.capital(name)} by arm: no trained arm to compare with {baseline}"
    words = {"better": "better than", "worse": "worse than", "equivalent": "equivalent to"}
    words["not distinguishable"] = "not distinguishable from"
    phrases = []
    for verdict, phrase in words.items():
        names = [study.label(arm) for arm in trained if rows.loc[arm, "verdict"] == verdict]
        if names:
            listed = f"{len(names)} arms" if len(names) > 3 else style.listed(names)
            to = baseline if not phrases else "it"
            phrases.append(f"{listed} {'is' if len(names) == 1 else 'are'} {phrase} {to}")
    return f"In {name}, {'; '.join(phrases)}"
