"""What to try next: advice from the curves and the comparison of a study, each with its evidence, and the next study.

Reads `plan.json`, `comparison/comparison.json`, `history/*.csv`, `settings/*.json` and `data/*.json` of a study; writes
`comparison/advice.json` and, beside it, a study file with what of the advice a study file can say. Curves are read by
:mod:`finegrid.analysis.curves`, which documents their thresholds; the advice speaks of the runs that stand for each
arm, since what a rejected level shows has been dealt with. Further cases:

===============  =====================================================================================================
`edge`           the best tuned level of a number is the smallest or largest that was tried
`truncation`     a length limit cuts 2 % of the training rows, or 1 % of their tokens
`seeds`          fewer than three seeds, and arms that are not distinguishable
===============  =====================================================================================================

A sign counts for an arm when at least half of its seeds show it; one run that diverged is enough.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from finegrid.analysis.curves import Sign, read_curve, signs
from finegrid.analysis.next_study import Change, Rates, next_name, write_next
from finegrid.analysis.scores import finite
from finegrid.errors import UserError
from finegrid.files import write_json

TRUNCATED_ROWS, TRUNCATED_TOKENS = 0.02, 0.01
WANTED_SEEDS = 3
RATE = "training_args.learning_rate"
DEFAULT_RATE = 5e-5  # transformers' own, where a recipe names none
SEVERITY = {"diverged": "error", "plateau": "note", "spikes": "note", "seeds": "note"}


@dataclass(frozen=True)
class Advice:
    """One piece of advice: what was seen (`message`), what to do (`mend`), and the numbers it rests on.

    `evidence` rows have run, step, what, value and threshold; `change` is what the next study does about it.
    """

    case: str
    severity: str
    arm: str | None
    place: str
    message: str
    mend: str
    evidence: list[dict] = field(default_factory=list)
    change: dict | None = None


@dataclass(frozen=True)
class _Arm:
    """A trained arm: its chosen runs, their settings, and the learning rates it tried with their validation loss."""

    arm: str
    factors: dict[str, str]
    runs: list[str]
    settings: dict
    levels: list[dict]
    tuned: dict[str, str]
    rate: float
    rates: dict[float, float]


def advise(study_dir: Path) -> list[Advice]:
    """Return the advice of a finished study, arm by arm, worst first.

    Raises:
        UserError: the comparison or a history is not there yet.
    """
    plan, comparison = _json(study_dir / "plan.json"), _json(study_dir / "comparison/comparison.json")
    found: list[Advice] = []
    for arm in _arms(study_dir, plan, comparison):
        shown = {run: signs(read_curve(run, _history(study_dir, run))) for run in arm.runs}
        found += _of_arm(arm, shown)
        found += _edges(arm)
    found += _truncation(study_dir, plan)
    found += _seeds(study_dir, plan, comparison)
    order = ("error", "warning", "note")
    return sorted(found, key=lambda advice: order.index(advice.severity))


def write_advice(
    study_dir: Path, study_file: Path, mapping: Mapping[str, Any], accepts: Callable[[Path], None]
) -> dict:
    """Write `advice.json` and the next study's file into `comparison/`; return what the first one holds.

    Args:
        study_file: the study that ran; the next one is made of it.
        mapping: what that file holds.
        accepts: raises :class:`UserError` where a file is no study that can run; such changes are left to the user.
    """
    found = advise(study_dir)
    plan, comparison = _json(study_dir / "plan.json"), _json(study_dir / "comparison/comparison.json")
    arms = _arms(study_dir, plan, comparison)
    output = study_dir / "comparison" / "next_study.yaml"
    rates = [Rates(arm.arm, arm.factors, arm.rate, arm.rates) for arm in arms]
    changes = _changes(found)
    made, left = write_next(study_file, mapping, output, changes, rates, accepts)
    result = {
        "study": plan["study"],
        "advice": [finite(asdict(advice)) for advice in found],
        "next_study": output.as_posix(),
        "next_name": next_name(plan["study"]),
        "changes": made,
        "left_to_you": left,
    }
    write_json(study_dir / "comparison" / "advice.json", result)
    return result


# ------------------------------------------------------------------------------------------------------ reading


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not there yet; expected what an earlier stage writes: run `snakemake`") from None


def _history(study_dir: Path, run: str) -> pd.DataFrame:
    path = study_dir / "history" / f"{run}.csv"
    if not path.exists():
        raise UserError(f"{path}: not there yet; expected the history that a training writes: run `snakemake`")
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    # An empty field is no value; `nan` is a loss that is no number, and must not look like one that is not there.
    told = table.apply(lambda column: pd.to_numeric(column.replace("", None), errors="coerce"))
    for name in ("loss", "eval_loss"):
        told.loc[table[name].str.lower().isin(["nan", "inf", "-inf"]), name] = math.inf
    return told


def _arms(study_dir: Path, plan: dict, comparison: dict) -> list[_Arm]:
    trained = {run["arm"] for run in plan["runs"] if run["train"]}
    arms = []
    for entry in plan["arms"]:
        if entry["arm"] not in trained:
            continue
        selected = comparison["selected"][entry["arm"]]
        settings = _json(study_dir / "settings" / f"{selected['runs'][0]}.json")
        rates = {
            _rate(study_dir, level["runs"][0]): math.nan if level["validation"] is None else level["validation"]
            for level in selected["levels"]
        }
        runs, factors = selected["runs"], dict(entry.get("factors") or {})
        rate = _rate(study_dir, runs[0])
        arms.append(_Arm(entry["arm"], factors, runs, settings, selected["levels"], selected["tuned"], rate, rates))
    return arms


def _rate(study_dir: Path, run: str) -> float:
    arguments = _json(study_dir / "settings" / f"{run}.json")["training_args"]
    return float(arguments.get("learning_rate") or DEFAULT_RATE)


# ------------------------------------------------------------------------------------------------- advice of arms


def _of_arm(arm: _Arm, shown: dict[str, list[Sign]]) -> list[Advice]:
    by_case: dict[str, list[Sign]] = {}
    for run in arm.runs:
        for sign in shown[run]:
            by_case.setdefault(sign.case, []).append(sign)
    found = []
    for case, of_case in by_case.items():
        if 2 * len(of_case) < len(arm.runs) and case != "diverged":
            continue
        seeds = f" (so in {len(of_case)} of {len(arm.runs)} seeds)" if len(arm.runs) > 1 else ""
        place, mend, change = _mend(case, arm)
        evidence = [number for sign in of_case for number in sign.evidence]
        severity = SEVERITY.get(case, "warning")
        message = f"{of_case[0].message}{seeds}"
        found.append(Advice(case, severity, arm.arm, f"arm {arm.arm}: {place}", message, mend, evidence, change))
    return found


def _mend(case: str, arm: _Arm) -> tuple[str, str, dict | None]:
    """Return the setting that a case is about, what to do, and the change of the next study."""
    rate = arm.rate
    below, above = ([r for r in arm.rates if (r < rate) == side and r != rate] for side in (True, False))
    # Of several rates, the best on the edge of them gets a level beyond it already (`edge`).
    searched = len(arm.rates) > 1
    if case == "slow":
        if above:
            return _steps_key(arm), "higher learning rates were tried and did worse: train for more steps", _longer(arm)
        return (
            RATE,
            f"raise the learning rate: try {_number(3 * rate)} and {_number(10 * rate)}",
            None if searched else _rates(rate, 1, 3, 10),
        )
    if case in ("diverged", "swings"):
        if below and case == "swings":
            mend = (
                "lower rates were tried and did worse: warm up longer (training_args.warmup_steps), or a larger batch"
            )
            return "training_args.warmup_steps", mend, None
        other = " or warm up longer (training_args.warmup_steps)" if case == "swings" else ""
        mend = f"lower the learning rate{other}: try {_number(rate / 3)} and {_number(rate / 10)}"
        return RATE, mend, None if searched and case == "swings" else _rates(rate, 0.1, 1 / 3, 1)
    if case == "overfitting":
        change = {"key": "early_stopping", "from": arm.settings.get("early_stopping"), "to": {"patience": 2}}
        mend = "stop earlier: early_stopping with load_best_model_at_end, or fewer epochs"
        return _steps_key(arm), mend, None if arm.settings.get("early_stopping") else change
    if case == "plateau":
        return (
            _steps_key(arm),
            "fewer steps would do as well; what more data or another rank can add, more steps can't",
            None,
        )
    if case == "unfinished":
        return _steps_key(arm), "train for more steps", _longer(arm)
    clipping = arm.settings["training_args"].get("max_grad_norm", 1.0)  # transformers' default
    if not clipping:
        change = {"key": "training_args.max_grad_norm", "from": clipping, "to": 1.0}
        return "training_args.max_grad_norm", "clip gradients: max_grad_norm: 1.0", change
    mend = f"they are clipped at {clipping:g}; if the loss suffers, lower the learning rate or look at that step's rows"
    return "training_args.max_grad_norm", mend, None


def _rates(rate: float, *times: float) -> dict:
    return {"key": RATE, "from": rate, "to": [float(_number(rate * factor)) for factor in times]}


def _steps_key(arm: _Arm) -> str:
    by_steps = (arm.settings["training_args"].get("max_steps") or 0) > 0
    return f"training_args.{'max_steps' if by_steps else 'num_train_epochs'}"


def _longer(arm: _Arm) -> dict | None:
    key = _steps_key(arm)
    now = arm.settings["training_args"].get(key.split(".")[1])
    return None if now is None else {"key": key, "from": now, "to": 2 * now}


def _edges(arm: _Arm) -> list[Advice]:
    """The best of several numbers at an end of what was tried."""
    found = []
    for factor, level in arm.tuned.items():
        losses = {}
        for tried in arm.levels:
            value = _value(tried["tuned"].get(factor))
            if value is not None and tried["validation"] is not None:
                losses.setdefault(value, tried["validation"])
        best = _value(level)
        if len(losses) < 2 or best not in (min(losses), max(losses)):
            continue
        ordered = sorted(losses)
        side, neighbour = ("largest", ordered[-2]) if best == ordered[-1] else ("smallest", ordered[1])
        if best <= 0 or neighbour <= 0:
            continue
        beyond = float(_number(best * best / neighbour))
        numbers = ", ".join(f"{value:g}: {losses[value]:.3f}" for value in ordered)
        evidence = [
            {
                "run": arm.runs[0],
                "step": None,
                "what": f"validation at {value:g}",
                "value": losses[value],
                "threshold": None,
            }
            for value in ordered
        ]
        message = (
            f"the best {factor.replace('_', ' ')}, {best:g}, is the {side} that was tried (validation loss {numbers})"
        )
        change = {"key": f"tune.{factor}", "from": ordered, "to": beyond}
        place = f"arm {arm.arm}: tune.{factor}"
        found.append(Advice("edge", "warning", arm.arm, place, message, f"add the level {beyond:g}", evidence, change))
    return found


# ------------------------------------------------------------------------------------------------ advice of studies


def _truncation(study_dir: Path, plan: dict) -> list[Advice]:
    found = []
    for tokens in dict.fromkeys(run["tokens"] for run in plan["runs"] if run["train"]):
        path = study_dir / "data" / f"{tokens}.json"
        if not path.exists():
            continue
        report = _json(path)
        split = report["splits"]["train"]
        arms = list(dict.fromkeys(run["arm"] for run in plan["runs"] if run["train"] and run["tokens"] == tokens))
        for side, key in (("answer", "max_output_length"), ("prompt", "max_input_length")):
            found += _cut(tokens, split, side, key, report["limits"][key], arms, len(plan["arms"]))
    return found


def _cut(tokens: str, split: dict, side: str, key: str, limit: int, arms: list[str], count: int) -> list[Advice]:
    rows = split["rows"] or 1
    share = split[f"truncated_{side}s"] / rows
    lengths = split[f"{side}_lengths"]
    lost = _lost(lengths, limit)
    if share < TRUNCATED_ROWS and lost < TRUNCATED_TOKENS:
        return []
    enough = 32 * math.ceil(lengths["quantiles"]["99"] / 32)
    message = (
        f"{key} {limit} cuts {split[f'truncated_{side}s']:,} of {rows:,} training rows ({share:.1%}) and {lost:.1%} of "
        f"their {side} tokens"
    )
    longest = lengths["quantiles"]["max"]
    mend = (
        f"raise {key} to {enough}, which 99 % of the {side}s fit (the longest has {longest:g}), or leave long rows out"
    )
    evidence = [
        {"run": tokens, "step": None, "what": "share of rows cut", "value": share, "threshold": TRUNCATED_ROWS},
        {"run": tokens, "step": None, "what": "share of tokens lost", "value": lost, "threshold": TRUNCATED_TOKENS},
    ]
    change = {"key": key, "from": limit, "to": enough} if enough > limit else None
    return [Advice("truncation", "warning", arms[0] if len(arms) == 1 else None, key, message, mend, evidence, change)]


def _lost(lengths: dict, limit: int) -> float:
    """Share of tokens above the limit, from the histogram of lengths before truncation (bins taken at their middle)."""
    edges, counts = np.asarray(lengths["edges"], float), np.asarray(lengths["counts"], float)
    middles = (edges[:-1] + edges[1:] - 1) / 2
    total = (counts * middles).sum()
    return float((counts * np.clip(middles - limit, 0, None)).sum() / total) if total else 0.0


def _seeds(study_dir: Path, plan: dict, comparison: dict) -> list[Advice]:
    seeds = sorted({run["seed"] for run in plan["runs"] if run["seed"] is not None})
    if not seeds or len(seeds) >= WANTED_SEEDS:
        return []
    path = study_dir / "comparison" / "comparisons.tsv"
    table = pd.read_csv(path, sep="\t", dtype={"arm": str, "baseline": str})
    rows = table[(table["metric"] == comparison["metric"]) & (table["family"] == "arms")]
    open_ = rows[rows["verdict"] == "not distinguishable"]
    if not len(open_) and len(seeds) > 1:
        return []
    wanted = (
        seeds + [seed for seed in range(WANTED_SEEDS + max(seeds)) if seed not in seeds][: WANTED_SEEDS - len(seeds)]
    )
    smallest = rows["smallest_detectable_difference"].max()
    message = (
        f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}, and {len(open_)} of {len(rows)} arms can't be told from "
        f"{comparison['baseline']}; differences below {smallest:.2g} in {comparison['metric']} would not be seen"
    )
    evidence = [
        {
            "run": row["arm"],
            "step": None,
            "what": "smallest detectable difference",
            "value": row["smallest_detectable_difference"],
            "threshold": comparison["margin"],
        }
        for row in open_.to_dict("records")
    ]
    change = {"key": "seeds", "from": seeds, "to": wanted}
    return [Advice("seeds", "note", None, "seeds", message, f"add seeds: {wanted}", evidence, change)]


# --------------------------------------------------------------------------------------------------- next study


def _changes(found: Iterable[Advice]) -> list[Change]:
    """What the next study can do about the advice, each key once: lists of arms for rates, the largest number else."""
    changes: dict[str, Change] = {}
    for advice in found:
        if advice.change is None:
            continue
        key, value = advice.change["key"], advice.change["to"]
        known = changes.get(key)
        if key == RATE or key.startswith("tune."):
            by_arm = {**(known.by_arm if known else {}), advice.arm: value}
            changes[key] = Change(key, None, by_arm, advice.case)
        elif known is None or (isinstance(value, int | float) and value > known.value):
            changes[key] = Change(key, value, {}, advice.case)
    return list(changes.values())


def _value(text: str | None) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def _number(value: float) -> str:
    return f"{value:.2g}"


def print_advice(result: dict) -> None:
    """Print the advice as a person reads it: what was seen, on which numbers, and what to do."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    if not result["advice"]:
        console.print("The curves and the comparison give no cause for advice.")
    colours = {"error": "red", "warning": "yellow", "note": "cyan"}
    for advice in result["advice"]:
        console.print(Text(f"{advice['severity']}: ", style=f"bold {colours[advice['severity']]}"), end="")
        console.print(Text(advice["place"], style="bold"))
        console.print(Text(f"  {advice['message']}"))
        runs = list(
            dict.fromkeys(
                f"{n['run']}" + (f" at step {n['step']}" if n["step"] is not None else "") for n in advice["evidence"]
            )
        )
        if runs:
            more = f" and {len(runs) - 3} more" if len(runs) > 3 else ""
            console.print(Text(f"  seen in {', '.join(runs[:3])}{more}", style="dim"))
        console.print(Text(f"  → {advice['mend']}", style="green"))
    console.print()
    console.print(f"The next study, {result['next_study']}:", style="bold")
    for line in result["changes"] or ["changes nothing"]:
        console.print(Text(f"  {line}"))
    for line in result["left_to_you"]:
        console.print(Text(f"  left to you: {line}"))
    name = result["next_name"]
    console.print(f"See what it costs: finegrid plan {result['next_study']}", soft_wrap=True)
    console.print(
        f"Run it: cp {result['next_study']} config/studies/{name}.yaml && snakemake --config study={name}",
        soft_wrap=True,
    )
