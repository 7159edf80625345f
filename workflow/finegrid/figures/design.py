"""What a study's design lets a figure show: its factors, their levels, and the arms that differ in one factor alone.

Works on the arms of `plan.json`, without numpy, since the Snakefile asks it which figures a study has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

RECIPE = "as in the recipe"  # the level of an arm that leaves a factor out


def varying(arms: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the factors in which arms differ, in the order of their first mention.

    Args:
        arms: the levels of each trained arm, factor -> level.
    """
    names = dict.fromkeys(factor for arm in arms for factor in arm)
    return [factor for factor in names if len({arm.get(factor) for arm in arms}) > 1]


def contrasts(arms: Mapping[str, Mapping[str, str]], baseline: str) -> dict[str, dict[str, list[tuple[str, str]]]]:
    """Return factor -> level -> pairs `(arm, reference arm)` that differ in this factor alone.

    The reference has the baseline's level; one-at-a-time studies have one pair a level, crossed ones one for each
    combination of the other factors.

    Args:
        arms: name -> levels of each trained arm.
        baseline: name of the arm that all others are compared with.
    """
    factors = varying(list(arms.values()))
    place = {tuple(levels.get(factor) for factor in factors): name for name, levels in arms.items()}
    reference = arms.get(baseline) or next(iter(arms.values()), {})
    found: dict[str, dict[str, list[tuple[str, str]]]] = {}
    for levels, name in place.items():
        for number, factor in enumerate(factors):
            if levels[number] == reference.get(factor):
                continue
            other = (*levels[:number], reference.get(factor), *levels[number + 1 :])
            if other in place:
                level = levels[number] if levels[number] is not None else RECIPE
                found.setdefault(factor, {}).setdefault(level, []).append((name, place[other]))
    return found


def crossed(arms: Sequence[Mapping[str, str]]) -> bool:
    """Whether two factors alone vary, and more of their combinations were trained than one at a time would."""
    factors = varying(arms)
    if len(factors) != 2:
        return False
    first, second = ({arm.get(factor) for arm in arms} for factor in factors)
    cells = {tuple(arm.get(factor) for factor in factors) for arm in arms}
    return len(cells) > len(first) + len(second) - 1


def numeric(arms: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the factors with three numbers or more as levels: those that can be an axis."""
    found = []
    for factor in varying(arms):
        levels = {arm.get(factor) for arm in arms} - {None}
        if len(levels) >= 3 and all(number(level) is not None for level in levels):
            found.append(factor)
    return found


def number(text: str | None) -> float | None:
    """Return a level's name as a number, None where it is none."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def words(name: str) -> str:
    """Return a factor's name as it is printed: `learning_rate` is `learning rate`."""
    return name.replace("_", " ")


def level_names(arm: str, factors: Mapping[str, str], baseline: Mapping[str, str]) -> dict[str, str] | None:
    """Return what an arm's levels are called in print, factor -> name; None where its label isn't made of them.

    Args:
        arm: the arm's label: the names of all its levels, or of those alone that differ from the baseline's.
        factors: its levels.
        baseline: the baseline's levels.
    """
    own = [factor for factor, level in factors.items() if level != baseline.get(factor)]
    for named in (list(factors), own):
        parts = [arm] if len(named) == 1 else arm.split(", ")
        if named and len(parts) == len(named):
            # "learning rate 0.001" under the heading "learning rate" says it twice.
            return {factor: part.removeprefix(f"{words(factor)} ") for factor, part in zip(named, parts, strict=True)}
    return None if factors else {}
