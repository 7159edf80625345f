r"""`numbers.tex`: one LaTeX macro a number, so that a paper's text never holds a number typed by hand.

`\input{numbers.tex}` defines `\insuranceLoraRougeL`, `\insuranceLoraRougeLLow`, `\insuranceLoraDifference`,
`\insuranceSeeds` and so on; every name is study, arm, quantity. Reads the plan, the comparison and the training
summaries.
"""

from __future__ import annotations

import math
import re
import unicodedata
from pathlib import Path

from finegrid.errors import UserError
from finegrid.files import write_text
from finegrid.publication.results import Results, load_results
from finegrid.publication.tables import escape

_DIGITS = {
    **{"0": "Zero", "1": "One", "2": "Two", "3": "Three", "4": "Four"},
    **{"5": "Five", "6": "Six", "7": "Seven", "8": "Eight", "9": "Nine"},
}


def write_numbers(study_dir: Path, output: Path) -> None:
    """Write `numbers.tex` of a study to `output`.

    Raises:
        UserError: the comparison is not there yet, or two numbers would get the same macro name.
    """
    results = load_results(study_dir)
    lines = ["% Written by `finegrid tables`: one macro a number, named study, arm, quantity."]
    lines += [rf"\newcommand{{\{name}}}{{{value}}}" for name, value in numbers(results).items()]
    write_text(output, "\n".join(lines) + "\n")


def numbers(results: Results) -> dict[str, str]:
    """Return macro name -> LaTeX of every number: of the study first, then arm by arm in the plan's order.

    Raises:
        UserError: two different numbers would get the same name, such as arms `a-b` and `a b`.
    """
    study = macro_name(results.plan["study"])
    study = study[:1].lower() + study[1:]
    named: dict[str, str] = {}
    origin: dict[str, str] = {}
    problems = []
    places = [("the study", "", _study_numbers(results))]
    places += [(f"arm '{arm}'", macro_name(arm), _arm_numbers(results, arm)) for arm in results.arms.index]
    for place, part, values in places:
        for quantity, value in values.items():
            name = f"{study}{part}{quantity}"
            if name in named:
                problems.append(
                    f"numbers.tex: \\{name} would be {quantity} of {place} and of {origin[name]}; "
                    "expected names of arms that differ in letters or digits"
                )
            named[name], origin[name] = value, place
    if problems:
        raise UserError(*problems)
    return named


def macro_name(text: str) -> str:
    """Return the text as letters, each part with a capital: `lora-r16` is `LoraROneSix`, `1e-4` `OneEMinusFour`.

    Digits are spelled out, a point between digits is `Point`, accents are dropped; any other letter is named by its
    code point (`U` and the hexadecimal digits), so that different names stay different.
    """
    text = re.sub(r"(?<=\d)\.(?=\d)", " Point ", text)
    text = re.sub(r"(?<=\d[eE])-(?=\d)", " Minus ", text)
    text = re.sub(r"(?<![^\s=_:,(])-(?=\d)", " Minus ", text)
    text = "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    parts = re.findall(r"[A-Za-z]+|\d|[^\W\d_]", text)
    return "".join(_part(part) for part in parts)


def _part(part: str) -> str:
    if part in _DIGITS:
        return _DIGITS[part]
    if part.isascii():
        return part[0].upper() + part[1:]
    return "U" + "".join(_DIGITS.get(digit, digit) for digit in f"{ord(part):X}")


def _study_numbers(results: Results) -> dict[str, str]:
    trained = [run for run in results.plan["runs"] if run["train"]]
    runs = {run["run"] for run in trained}
    seconds = [results.training[run]["train_seconds"] for run in runs if run in results.training]
    values = {
        "Arms": _integer(len(results.trained)),
        "Runs": _integer(len(runs)),
        "Seeds": _integer(results.arms["seeds"].max()),
        "Examples": _integer(results.arms["examples"].max()),
        "Comparisons": _integer(results.comparison["statistics"]["family"]),
        "Resamples": _integer(results.comparison["statistics"]["resamples"]),
        "Baseline": escape(results.label(results.baseline)),
        "Margin": _general(results.comparison.get("margin")),
        "TrainHours": _decimal(sum(seconds) / 3600, 2) if seconds else None,
    }
    return {name: value for name, value in values.items() if value is not None}


def _arm_numbers(results: Results, arm: str) -> dict[str, str]:
    row = results.arms.loc[arm]
    values = {"Seeds": _integer(row["seeds"]), "Examples": _integer(row["examples"])}
    for metric in results.metrics:
        for end in ("", "_low", "_high"):
            values[macro_name(f"{metric}{end}")] = _decimal(row[f"{metric}{end}"], 3)
    for name in ("corpus_bleu", "corpus_chrf"):
        values |= {macro_name(f"{name}{end}"): _decimal(row.get(f"{name}{end}"), 1) for end in ("", "_low", "_high")}
    values |= _differences(results, arm)
    if arm in results.trained:
        values |= _costs(results, arm)
    return {name: value for name, value in values.items() if value is not None}


def _differences(results: Results, arm: str) -> dict[str, str | None]:
    """Of the primary metric under `Difference…`, of any other as `<Metric>Difference…`."""
    values = {}
    for metric in results.metrics:
        row = results.difference(arm, metric)
        if row is None:
            continue
        name = "Difference" if metric == results.metric else f"{macro_name(metric)}Difference"
        values[name] = _decimal(row["difference"], 3)
        values |= {f"{name}{end}": _decimal(row[end.lower()], 3) for end in ("Low", "High")}
        values[f"{name}P"] = _p_value(row["p_adjusted"])
        values[f"{name}Verdict"] = row["verdict"]
        values[f"{name}Detectable"] = _decimal(row["smallest_detectable_difference"], 3)
        values[f"{name}DetectableAdjusted"] = _decimal(row.get("smallest_detectable_adjusted"), 3)
    return values


def _costs(results: Results, arm: str) -> dict[str, str | None]:
    row = results.arms.loc[arm]
    runs = results.selected_runs(arm)
    planned = results.planned(runs[0])
    summary = results.training.get(runs[0], {})
    values = {
        "PeakMemoryGib": _decimal(row["peak_memory_mb"] / 1024, 1),
        "TrainSeconds": _decimal(row["train_seconds"], 0),
        "TrainMinutes": _decimal(row["train_seconds"] / 60, 1),
        "TokensPerSecond": _decimal(row["tokens_per_second"], 0),
        "TrainableParameters": _integer(row["trainable_parameters"]),
        "TotalParameters": _integer(summary.get("total_parameters")),
        "ValidationLoss": _decimal(row["validation_loss"], 3),
        "BaseValidationLoss": _decimal(row["base_validation_loss"], 3),
        "Steps": _integer(planned.get("steps")),
        "Epochs": _general(planned.get("epochs")),
        "LabelTokens": _integer(planned.get("label_tokens")),
        "EffectiveBatch": _integer(planned.get("effective_batch_size")),
    }
    return values | {f"Best{macro_name(factor)}": escape(level) for factor, level in planned["tuned"].items()}


def _decimal(value: float | None, digits: int) -> str | None:
    """Digits with a minus that is one in text too; nothing for a number that is not there."""
    if value is None or not math.isfinite(value):
        return None
    text = f"{value:.{digits}f}"
    text = text.removeprefix("-") if float(text) == 0 else text
    return rf"\ensuremath{{{text}}}" if text.startswith("-") else text


def _integer(value: float | None) -> str | None:
    """Thousands set apart by a thin space."""
    if value is None or not math.isfinite(value):
        return None
    return f"{round(value):,}".replace(",", r"\,")


def _general(value: float | None) -> str | None:
    return None if value is None else f"{value:g}"


def _p_value(value: float) -> str | None:
    if math.isfinite(value) and value < 0.001:
        return r"\ensuremath{<0.001}"
    return _decimal(value, 3)
