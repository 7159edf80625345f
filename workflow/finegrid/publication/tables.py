"""The study's tables for papers and for the eye: `arms.tex`, `settings.tex` (booktabs), `arms.md`, `arms.csv`.

Reads the plan, the comparison, the settings and the summaries of a study. Every text cell is escaped, so that arms
called `base (nf4)`, `lr_1e-4` or `100 %` compile; letters outside Latin need XeLaTeX or LuaLaTeX.
"""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd

from finegrid.analysis.compare import LOWER_IS_BETTER
from finegrid.files import write_text
from finegrid.publication.results import (
    METRIC_NAMES,
    NOTHING,
    PRINTED,
    Results,
    counted,
    decimal,
    load_results,
    setting_table,
)

_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "{": r"\{",
        "}": r"\}",
        "^": r"\textasciicircum{}",
        "~": r"\textasciitilde{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "\n": " ",
        "\N{MINUS SIGN}": r"$-$",
        "×": r"$\times$",
    }
    | {letter: f"\\{letter}" for letter in "$&#%_"}
)
_HEAD = (
    "% Written by `finegrid tables`; needs \\usepackage{booktabs}. Bold, intervals and verdicts: see the captions.\n"
)
_BATCH = "Effective batch = batch per device × GPUs × accumulation steps."

SIDE_BY_SIDE = 6  # arms that fit beside each other
PAGE = 40  # arms that a page holds
_CUT = "the base models, the baseline and those with the best means; the others are in arms.csv."
_ONE_SEED = (
    "Means with 95 % intervals over examples alone: with one seed they hold for these trained models, not for the "
    "methods."
)
_SEEDS = "Means with 95 % intervals over seeds and examples."
_READING = (
    "Bold: the best mean, and each arm that is not shown to differ "
    "from it nor to be worse than the baseline: by the verdict of the paired comparison, or where there is none by "
    "intervals that overlap."
)
_COST_CAPTION = (
    "What training cost, means over seeds: peak memory, time of training alone, tokens per second, trainable "
    "parameters; and the validation loss of the arm's own untrained base, then its own."
)


def write_tables(study_dir: Path, output: Path) -> None:
    """Write `arms.tex`, `arms.md`, `arms.csv` and `settings.tex` into `output`.

    Args:
        study_dir: `results/<study>/` with a finished comparison.
        output: folder of the tables; made if need be.

    Raises:
        UserError: the comparison is not there yet.
    """
    results = load_results(study_dir)
    write_text(output / "arms.tex", _HEAD + arms_latex(results))
    write_text(output / "arms.md", arms_markdown(results))
    write_text(output / "arms.csv", arms_csv(results).to_csv(index=False, lineterminator="\n", float_format="%.10g"))
    write_text(output / "settings.tex", _HEAD + settings_latex(results))


def escape(text: str) -> str:
    """Escape text for LaTeX. pandas' own escaping leaves `<`, `>` and `|`, which print as other signs in OT1."""
    return text.translate(_LATEX)


def arms_latex(results: Results) -> str:
    """Three tables: the comparison, every other metric, and what training cost."""
    study, arms = results.plan["study"], printed_arms(results)
    compared = [
        {"Arm": _first(results.label(arm)), "Seeds": _seeds(results, arm)}
        | {_header(results.metric): _latex_estimate(results, arm, results.metric)}
        | {"Difference": escape(_difference(results, arm)), "Verdict": _verdict(results, arm)}
        for arm in arms
    ]
    cut = f" {len(arms)} of {len(results.arms)} arms: {_CUT}" if len(arms) < len(results.arms) else ""
    tables = [_latex_table(compared, f"{_caption(results)} {_READING}{cut}", f"tab:{study}")]
    if others := [name for name in results.metrics if name != results.metric]:
        rows = [
            {"Arm": _first(results.label(arm))}
            | {_header(name): _latex_estimate(results, arm, name) for name in others}
            for arm in arms
        ]
        caption = f"All other metrics on the {results.comparison['split']} split, read as in the table before."
        tables.append(_latex_table(rows, caption, f"tab:{study}-metrics"))
    rows = [
        {"Arm": _first(results.label(arm))} | {name: escape(cell) for name, cell in _costs(results, arm).items()}
        for arm in results.trained
        if arm in arms
    ]
    if rows:
        tables.append(_latex_table(rows, _COST_CAPTION, f"tab:{study}-costs"))
    return "\n".join(tables)


def printed_arms(results: Results) -> list[str]:
    """Arms in the LaTeX tables: all where a page holds them, else the base models, the baseline and the best ones."""
    arms = list(results.arms.index)
    if len(arms) <= PAGE:
        return arms
    fixed = [arm for arm in arms if arm not in results.trained or arm == results.baseline]
    means = results.arms[results.metric].drop(fixed)
    order = means.sort_values(ascending=results.metric in LOWER_IS_BETTER, na_position="last").index
    kept = {*fixed, *order[: PAGE - len(fixed)]}
    return [arm for arm in arms if arm in kept]


def arms_markdown(results: Results) -> str:
    """The twin of `arms.tex` for README and issues."""
    rows = []
    for arm in results.arms.index:
        row = {"arm": results.label(arm), "seeds": _seeds(results, arm)}
        row |= {METRIC_NAMES[name]: _markdown_estimate(results, arm, name) for name in results.metrics}
        row |= {"difference": _difference(results, arm), "verdict": _verdict(results, arm)}
        rows.append(row | _costs(results, arm))
    head = [f"| {' | '.join(_markdown(name) for name in rows[0])} |", f"|{' --- |' * len(rows[0])}"]
    body = [f"| {' | '.join(_markdown(cell) for cell in row.values())} |" for row in rows]
    caption = f"{_caption(results)} {_READING} {_COST_CAPTION}"
    return "\n".join([*head, *body, "", _markdown(caption), ""])


def arms_csv(results: Results) -> pd.DataFrame:
    """`arms.tsv` with the difference to the baseline in the primary metric beside it, in full precision."""
    columns = ["difference", "low", "high", "p", "p_adjusted", "verdict", "smallest_detectable_difference"]
    compared = results.comparisons[results.comparisons["metric"] == results.metric].set_index("arm")[columns]
    named = {"low": "difference_low", "high": "difference_high"}
    return results.arms.join(compared.rename(columns=named))


def settings_latex(results: Results) -> str:
    """Two tables: the settings that differ between the arms, and those that all share."""
    differing, common = setting_table(results)
    study, parts = results.plan["study"], []
    if differing:
        caption = f"Settings that differ between the arms. {_BATCH}"
        parts.append(_latex_table(_setting_rows(results, differing), caption, f"tab:{study}-settings"))
    if shared := {name: value for name, value in common.items() if name in PRINTED}:
        rows = [{"Setting": _first(name), "All arms": escape(value)} for name, value in shared.items()]
        parts.append(_latex_table(rows, f"Settings that all arms share. {_BATCH}", f"tab:{study}-common"))
    return "\n".join(parts)


def _setting_rows(results: Results, differing: dict[str, dict[str, str]]) -> list[dict[str, str]]:
    """One row a setting where that is the shorter side, as with few arms, else one row an arm."""
    labels = {arm: escape(results.label(arm)) for arm in results.trained}
    printed = printed_arms(results)
    if len(differing) > len(labels) and len(labels) <= SIDE_BY_SIDE and len(set(labels.values())) == len(labels):
        return [
            {"Setting": _first(name)} | {labels[arm]: escape(values[arm]) for arm in labels}
            for name, values in differing.items()
        ]
    return [
        {"Arm": f"{{{labels[arm]}}}"} | {escape(name): escape(values[arm]) for name, values in differing.items()}
        for arm in labels
        if arm in printed
    ]


def _costs(results: Results, arm: str) -> dict[str, str]:
    row = results.arms.loc[arm]
    return {
        "Memory (GiB)": decimal(row["peak_memory_mb"] / 1024, 1),
        "Time (min)": decimal(row["train_seconds"] / 60, 1),
        "Tokens/s": decimal(row["tokens_per_second"], 0),
        "Trainable (M)": decimal(row["trainable_parameters"] / 1e6, 2),
        "Base loss": decimal(row["base_validation_loss"]),
        "Final loss": decimal(row["validation_loss"]),
    }


def _caption(results: Results) -> str:
    metric, split = METRIC_NAMES[results.metric], results.comparison["split"]
    examples = counted(int(results.arms["examples"].max()), f"{split} example")
    seeds = counted(int(results.arms["seeds"].max()), "seed")
    verdict = f"Holm's adjustment for {counted(results.comparison['statistics']['family'], 'comparison')}"
    margin = results.comparison.get("margin")
    if margin is not None:
        verdict += f", equivalent within {margin:g}"
    over = _SEEDS if results.arms["seeds"].max() > 1 else _ONE_SEED
    return (
        f"{results.plan['title']} {metric} on {examples}, {seeds}; paired difference to "
        f"{results.label(results.baseline)} with its own 95 % interval, and the verdict after {verdict}. {over}"
    )


def _header(metric: str) -> str:
    arrow = r"$\downarrow$" if metric in LOWER_IS_BETTER else r"$\uparrow$"
    return f"{escape(METRIC_NAMES[metric])} {arrow}"


def _first(text: str) -> str:
    """A first cell in braces: a `[` after the end of a row would be taken as a length."""
    return f"{{{escape(text)}}}"


def _latex_estimate(results: Results, arm: str, metric: str) -> str:
    """`$0.188^{+0.017}_{-0.019}$`: the mean and the way to both ends of its interval."""
    mean, low, high = _estimate(results, arm, metric)
    if not math.isfinite(mean):
        return NOTHING
    text = rf"\mathbf{{{mean:.3f}}}" if arm in results.leaders[metric] else f"{mean:.3f}"
    return f"${text}^{{+{high - mean:.3f}}}_{{-{mean - low:.3f}}}$" if math.isfinite(low) else f"${text}$"


def _markdown_estimate(results: Results, arm: str, metric: str) -> str:
    mean, low, high = _estimate(results, arm, metric)
    text = f"**{decimal(mean)}**" if arm in results.leaders[metric] else decimal(mean)
    return f"{text} [{decimal(low)}, {decimal(high)}]" if math.isfinite(low) else text


def _estimate(results: Results, arm: str, metric: str) -> tuple[float, float, float]:
    row = results.arms.loc[arm]
    return row[metric], row[f"{metric}_low"], row[f"{metric}_high"]


def _difference(results: Results, arm: str) -> str:
    row = results.difference(arm, results.metric)
    if row is None or not math.isfinite(row["difference"]):
        return NOTHING
    return f"{decimal(row['difference'], sign=True)} [{decimal(row['low'])}, {decimal(row['high'])}]"


def _seeds(results: Results, arm: str) -> str:
    return str(results.arms.loc[arm, "seeds"] or NOTHING)


def _verdict(results: Results, arm: str) -> str:
    row = results.difference(arm, results.metric)
    if row is None:
        return "baseline"
    return row["verdict"] if math.isfinite(row["difference"]) else "diverged"


def _latex_table(rows: list[dict[str, str]], caption: str, label: str) -> str:
    """A booktabs table; cells and column names are LaTeX already. Text columns left, numbers right."""
    left = {"Arm", "Verdict", "Setting", "All arms"}
    cells = pd.DataFrame(rows)
    styled = cells.style.hide(axis="index")
    return styled.to_latex(
        column_format="".join("l" if name in left else "r" for name in cells.columns),
        hrules=True,
        position="htbp",
        position_float="centering",
        environment="table*",  # over both columns of a two-column paper, a plain table elsewhere
        caption=escape(caption),
        label=label,
    ).replace(
        r"\begin{tabular}",
        "\\vskip 4pt\n\\small\n\\setlength{\\tabcolsep}{4pt}\n\\renewcommand{\\arraystretch}{1.25}\n\\begin{tabular}",
    )


def _markdown(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
