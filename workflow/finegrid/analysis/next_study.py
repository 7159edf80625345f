"""The study to run next: a study file with what advice can change in it, each change accepted or left to the user.

Works on the file's own mapping, so that whatever else stands there stays: recipe, data, factors, labels. Comments do
not survive; the heading says what was changed and why.
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from finegrid.errors import UserError
from finegrid.files import write_text

RATE = "training_args.learning_rate"
WHY = {
    "slow": "learning was slow",
    "swings": "losses swung",
    "diverged": "runs diverged",
    "edge": "the best level lay on the edge of its range",
    "overfitting": "validation rose while training fell",
    "unfinished": "validation was still falling at the end",
    "spikes": "gradients spiked, unclipped",
    "truncation": "rows were cut",
    "seeds": "too few seeds to tell the arms apart",
}


@dataclass(frozen=True)
class Change:
    """A change of one key: the same `value` for all arms, or a value (or levels) for each of some arms."""

    key: str
    value: Any
    by_arm: dict[str, Any] = field(default_factory=dict)
    case: str = ""


@dataclass(frozen=True)
class Rates:
    """An arm's learning rate, and those it tried with their validation loss (NaN where one diverged)."""

    arm: str
    factors: dict[str, str]
    chosen: float
    tried: dict[float, float]


def next_name(study: str) -> str:
    """Return `<study>_next`, then `_next2`, `_next3`, …"""
    match = re.fullmatch(r"(.+)_next(\d*)", study)
    return f"{match[1]}_next{int(match[2] or 1) + 1}" if match else f"{study}_next"


def write_next(
    study_file: Path,
    mapping: Mapping[str, Any],
    output: Path,
    changes: list[Change],
    rates: list[Rates],
    accepts: Callable[[Path], None],
) -> tuple[list[str], list[str]]:
    """Write the study file with every change that it can take; return what was changed and what was not, and why.

    Args:
        mapping: what the study file holds.
        accepts: raises :class:`UserError` for a file that is no study.
    """
    made, left = [], []
    for change in changes:
        tried = copy.deepcopy(dict(mapping))
        try:
            told = _apply(tried, change, rates)
            write_text(output, _text(tried, [], [], study_file, output))
            accepts(output)
        except UserError as error:
            left.append(f"{change.key} ({WHY[change.case]}): {error.problems[0]}")
            continue
        mapping = tried
        made.append(f"{told}: {WHY[change.case]}")
    write_text(output, _text(mapping, made, left, study_file, output))
    return made, left


def _text(mapping: dict, made: list[str], left: list[str], study_file: Path, output: Path) -> str:
    lines = [f"The study after {study_file.as_posix()}, written by `finegrid advice`.", ""]
    lines += [f"  finegrid plan {output.as_posix()}"]
    name = next_name(study_file.stem)
    lines += [f"  cp {output.as_posix()} config/studies/{name}.yaml && snakemake --config study={name}", ""]
    lines += ["Changed:", *(f"  - {line}" for line in made)] if made else ["Nothing is changed."]
    lines += ["Left to you:", *(f"  - {line}" for line in left)] if left else []
    heading = "".join(f"# {line}".rstrip() + "\n" for line in lines)
    return (
        heading
        + "\n"
        + yaml.safe_dump(mapping, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)
    )


# ------------------------------------------------------------------------------------------------------- changes


def _apply(study: dict, change: Change, rates: list[Rates]) -> str:
    """Change the mapping of a study; return the change in words."""
    if change.key == "seeds":
        study["seeds"] = change.value
        return f"seeds {change.value}"
    if change.key.startswith("tune."):
        return _extend(study, change.key.removeprefix("tune."), change.by_arm, rates)
    if change.key == RATE:
        return _search(study, change.by_arm, rates)
    _refuse_factor(study, change.key)
    if change.key == "early_stopping":
        _set(study, "training_args.load_best_model_at_end", True)
        _set(study, "early_stopping", change.value)
        return f"early stopping with a patience of {change.value['patience']} evaluations, the best weights kept"
    _set(study, change.key, change.value)
    return f"{change.key} {change.value:g}"


def _set(study: dict, key: str, value: Any) -> None:
    """Set a dotted key in `settings`, however it was written there."""
    settings = study["settings"] = study.get("settings") or {}
    settings.pop(key, None)
    *sections, last = key.split(".")
    for section in sections:
        if not isinstance(settings.get(section), dict):
            settings[section] = {}
        settings = settings[section]
    settings[last] = value


def _refuse_factor(study: dict, key: str) -> None:
    """A key that a factor sets is what the study asks about: another value is another question."""
    for section in ("factors", "tune"):
        for name, factor in (study.get(section) or {}).items():
            if key in _keys(factor):
                raise UserError(f"{section}.{name}: sets it; add a level to that factor")


def _keys(factor: Mapping) -> set[str]:
    """The dotted keys that the levels of a factor set."""
    if "key" in factor:
        return {factor["key"]}
    return {key for bundle in factor.values() for key in _flat(bundle or {})}


def _flat(mapping: Mapping, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        nested = isinstance(value, Mapping) and value
        flat |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


# ------------------------------------------------------------------------------------------------ learning rates


def _search(study: dict, wanted: dict[str, list[float]], rates: list[Rates]) -> str:
    """Search learning rates inside each arm; every arm gets as many, so that none looks better for having more."""
    for section in ("tune", "factors"):
        for name, factor in (study.get(section) or {}).items():
            if factor.get("key") == RATE:
                beyond = {
                    arm: _outermost(levels, next(r for r in rates if r.arm == arm)) for arm, levels in wanted.items()
                }
                return _extend(study, name, beyond, rates, section)
    for factor in (study.get("factors") or {}).values():
        for bundle in factor.values():
            if isinstance(bundle, dict):
                _drop(bundle, RATE.split("."))
    lists = {
        each.arm: wanted.get(each.arm) or [_short(each.chosen * times) for times in (1 / 3, 1, 3)] for each in rates
    }
    common = Counter(tuple(levels) for levels in lists.values()).most_common(1)[0][0]
    entry: dict[str, Any] = {"key": RATE, "levels": list(common)}
    others = [
        {"arms": dict(each.factors), "levels": lists[each.arm]} for each in rates if tuple(lists[each.arm]) != common
    ]
    if others:
        entry["in_arms"] = others
    study["tune"] = {**(study.get("tune") or {}), "learning_rate": entry}
    return "the learning rate is searched in each arm: " + "; ".join(
        f"{arm} {', '.join(f'{level:g}' for level in levels)}" for arm, levels in lists.items()
    )


def _outermost(levels: list[float], rates: Rates) -> float:
    """Of the rates to try, the first beyond what was tried."""
    new = [level for level in levels if level not in rates.tried]
    return min(new, key=lambda level: abs(math.log(level / rates.chosen)))


def _drop(bundle: dict, path: list[str]) -> None:
    """Take a key out of a bundle, written nested or dotted."""
    bundle.pop(".".join(path), None)
    inner = bundle.get(path[0])
    if len(path) > 1 and isinstance(inner, dict):
        _drop(inner, path[1:])
        if not inner:
            del bundle[path[0]]


def _extend(study: dict, name: str, beyond: dict[str, float], rates: list[Rates], section: str = "tune") -> str:
    """Add levels to a factor's lists. Of a tuned factor each list stays as long as the others: one without a new end
    gets the middle between its best level and the better of its neighbours."""
    factor = (study.get(section) or {}).get(name)
    if not factor or "key" not in factor:
        raise UserError(f"{section}.{name}: has no list of levels to add to")
    lists = [factor, *factor.get("in_arms", [])]
    added: list[list[float]] = [[] for _ in lists]
    members: list[list[Rates]] = [[] for _ in lists]
    for each in rates:
        fitting = [place for place, entry in enumerate(lists) if place and _fits(entry["arms"], each.factors)]
        place = fitting[-1] if fitting else 0
        members[place].append(each)
        if each.arm in beyond and beyond[each.arm] not in added[place]:
            added[place].append(beyond[each.arm])
    longest = max(map(len, added))
    told = []
    for entry, new, arms in zip(lists, added, members, strict=True):
        if not arms and entry is not factor:
            continue
        if factor["key"] == RATE and section == "tune" and arms:
            while len(new) < longest and (middle := _middle(arms[0], new)):
                new.append(middle)
        _add(entry, new)
        if new:
            told.append(f"{', '.join(f'{level:g}' for level in new)} for {', '.join(each.arm for each in arms)}")
    return f"{section}.{name} gets more levels: " + "; ".join(told)


def _fits(wanted: Mapping, factors: Mapping[str, str]) -> bool:
    return all(factors.get(name) == str(level) for name, level in wanted.items())


def _middle(arm: Rates, known: list[float]) -> float | None:
    """The geometric middle between the best rate and its better neighbour."""
    tried = sorted(arm.tried)
    place = tried.index(arm.chosen) if arm.chosen in tried else -1
    near = [tried[at] for at in (place - 1, place + 1) if 0 <= at < len(tried)] if place >= 0 else []
    near.sort(key=lambda rate: arm.tried[rate] if math.isfinite(arm.tried[rate]) else math.inf)
    for other in near:
        middle = _short(math.sqrt(other * arm.chosen))
        if middle not in known and middle not in tried:
            return middle
    return None


def _add(entry: dict, new: list[float]) -> None:
    levels = entry.get("levels")
    if isinstance(levels, dict):
        levels |= {f"{level:g}": level for level in new}
    else:
        entry["levels"] = sorted([*levels, *new], key=float)


def _short(value: float) -> float:
    return float(f"{value:.2g}")
