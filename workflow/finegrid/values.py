"""Check a value of a user's file against the description of its key, and say what is wrong in the user's words.

A description is what :mod:`finegrid.library_keys` makes: types, choices, bounds (``gt``, ``ge``, ``lt``, ``le``) and
the keys of a nested mapping (``fields``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finegrid.errors import UserError, nearest

UNSET = object()  # a null for a key that takes none: as if it were not there
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
TYPE_NAMES = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "null": "null",
    "list": "a list",
    "list[int]": "a list of whole numbers",
    "list[str]": "a list of texts",
    "dict": "a mapping",
}
MANY = 16  # choices that a message lists
BOUNDS = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}


@dataclass
class Findings:
    """What was found in one file: problems that stop, notes that tell, and where each key stands."""

    place: str
    lines: Mapping[str, int] = field(default_factory=dict)
    prefix: str = ""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    bad: set[str] = field(default_factory=set)

    def problem(self, key: str, text: str) -> None:
        """Add a problem with a dotted key; later checks leave the key alone."""
        self.bad.add(key)
        self.problems.append(self._sentence(key, text))

    def note(self, key: str, text: str) -> None:
        """Add a note about a dotted key."""
        self.notes.append(self._sentence(key, text))

    def fine(self, *keys: str) -> bool:
        """Return whether none of the keys, of their sections and of what is inside them has a problem."""
        return not any(
            key == bad or key.startswith(f"{bad}.") or bad.startswith(f"{key}.") for key in keys for bad in self.bad
        )

    def stop(self) -> None:
        """Raise all problems at once, if there are any.

        Raises:
            UserError: with every problem found.
        """
        if self.problems:
            raise UserError(*dict.fromkeys(self.problems))

    def _sentence(self, key: str, text: str) -> str:
        full = f"{self.prefix}{key}"
        line = self.lines.get(full)
        return f"{self.place}: {full}: {text}" + (f" (line {line})" if line else "")


def check_mapping(described: Mapping[str, Any], values: Any, key: str, findings: Findings) -> dict[str, Any]:
    """Return the good ones of a mapping's values, as their keys want them; what is wrong goes into the findings."""
    if not isinstance(values, Mapping):
        findings.problem(key, f"{show(values)} found; expected a mapping with keys such as {_some(described)}")
        return {}
    good = {}
    for name, value in values.items():
        dotted = f"{key}.{name}" if key else str(name)
        if name not in described:
            hint = nearest(str(name), described) or f"; expected one of {_some(described, 12)}"
            findings.problem(dotted, f"'{name}' is no setting{f' of {key}' if key else ''}{hint}")
            continue
        checked = check_value(described[name], value, dotted, findings)
        if checked is not UNSET:
            good[name] = checked
    return good


def check_value(described: Mapping[str, Any], value: Any, key: str, findings: Findings) -> Any:
    """Return the value as its key wants it, or :data:`UNSET` if there is none or it is wrong."""
    kinds = described["types"]
    if value is None:
        return None if {"null", "any"} & set(kinds) else UNSET
    if isinstance(value, Mapping) and "dict" in kinds:
        fields = described.get("fields")
        return check_mapping(fields, value, key, findings) if fields else dict(value)
    read = _read(described, value)
    if read is UNSET:
        findings.problem(key, f"{show(value)} found; expected {expected(described, value)}")
        return UNSET
    for bound, name in BOUNDS.items():
        if bound in described and is_number(read) and not _within(bound, read, described[bound]):
            findings.problem(key, f"{show(value)} found; expected {name} {described[bound]}")
            return UNSET
    return read


def is_number(value: Any) -> bool:
    """Return whether a value is an int or a float; true and false are neither."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def show(value: Any) -> str:
    """Return a value as the user would write it, shortened."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the text '{value if len(value) <= 60 else value[:57] + '...'}'"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list):
        return f"the list {value if len(str(value)) <= 60 else str(value)[:57] + '...'}"
    return str(value)


def expected(described: Mapping[str, Any], found: Any = None) -> str:
    """Return in words what a key takes: ``a number``, ``one of 'no', 'steps', 'epoch'; did you mean 'steps'?``."""
    choices = described.get("choices", [])
    if isinstance(found, (list, tuple)):
        found = next((item for item in found if isinstance(item, str) and item not in choices), None)
    if isinstance(found, str):
        by_lower = {choice.lower(): choice for choice in choices}
        found = by_lower.get(found.lower(), found)
    hint = nearest(found, choices) if isinstance(found, str) else ""
    if len(choices) > MANY:
        similar = [choice for choice in choices if isinstance(found, str) and found in choice]
        choices, hint = (similar[:MANY], "") if similar else (choices[:MANY], hint)
    words = [TYPE_NAMES[kind] for kind in described["types"] if kind not in ("null", "any")]
    if choices:
        listed = ", ".join(f"'{choice}'" for choice in choices)
        words = [word for word in words if word != "a text"]
        more = ", …" if len(choices) < len(described["choices"]) else ""
        words.append(f"one of {listed}{more}" if len(choices) > 1 or more else listed)
    return (" or ".join(words) or "a value") + hint


def _read(described: Mapping[str, Any], value: Any) -> Any:
    kinds, choices = described["types"], described.get("choices")
    if "any" in kinds:
        return value
    if isinstance(value, bool):
        if "bool" in kinds:
            return value
        return "no" if value is False and "no" in (choices or ()) else UNSET  # YAML 1.1 reads `no` as false
    if isinstance(value, int):
        return value if {"int", "float"} & set(kinds) else UNSET
    if isinstance(value, float):
        return _read_float(kinds, value)
    if isinstance(value, str):
        return _read_text(kinds, choices, value)
    if isinstance(value, (list, tuple)):
        return _read_list(kinds, choices, list(value))
    return UNSET


def _read_float(kinds: list[str], value: float) -> Any:
    if not math.isfinite(value):
        return UNSET
    if "float" in kinds:
        return value
    return int(value) if "int" in kinds and value.is_integer() else UNSET


def _read_text(kinds: list[str], choices: list[str] | None, value: str) -> Any:
    if "str" in kinds and (choices is None or any(_is_choice(choice, value) for choice in choices)):
        return value
    if not NUMBER.fullmatch(value):
        return UNSET
    # YAML reads 2e-5 and 1e3 as texts; a quoted '3000' for a whole number is a mistake more likely than a wish.
    if "float" in kinds or ("int" in kinds and "e" in value.lower()):
        return _read_float(kinds, float(value))
    return UNSET


def _read_list(kinds: list[str], choices: list[str] | None, value: list) -> Any:
    if "list" in kinds:
        return value
    if "list[int]" in kinds and all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        return value
    if "list[str]" in kinds and all(isinstance(item, str) and (not choices or item in choices) for item in value):
        return value
    return UNSET


def _is_choice(choice: str, value: str) -> bool:
    """Return whether a value is a choice; ``pissa_niter_[number of iters]`` stands for any number."""
    if "[" not in choice:
        return value == choice
    return re.fullmatch(re.sub(r"\\\[.*?\\\]", r"\\d+", re.escape(choice)), value) is not None


def _within(bound: str, value: float, limit: float) -> bool:
    return {"gt": value > limit, "ge": value >= limit, "lt": value < limit, "le": value <= limit}[bound]


def _some(names: Mapping[str, Any], count: int = 3) -> str:
    listed = list(names)
    return ", ".join(f"'{name}'" for name in listed[:count]) + (", …" if len(listed) > count else "")
