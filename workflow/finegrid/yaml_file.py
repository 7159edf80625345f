"""Read a user's YAML file: duplicate keys are an error, and each key's line is kept for the messages.

YAML 1.1 turns ``no`` into false, ``010`` into 8 and ``1:30`` into 90. Here, as in YAML 1.2, they are the text, 10 and
the text: ``save_strategy: no`` means what it says. ``2e-5`` stays a text in both and is read as a number where a
number is expected (:mod:`finegrid.values`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from finegrid.errors import UserError

_BASE = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_BASE):
    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 - PyYAML's own way of declaring them


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9][0-9_]*", list("-+0123456789")),
    ("float", r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf)|\.(?:nan|NaN)", None),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first or list("-+0123456789.")
    )


def read_yaml(path: Path, place: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Return a file's mapping and the line of each dotted key and list item (``exclude[0]``), starting at 1.

    Raises:
        UserError: the file is missing, is no UTF-8, is no YAML, is no mapping, or has a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{place}: no such file; expected a YAML file there") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: byte {error.start} is no UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{place}: can't be read ({error.strerror}); expected a YAML file there") from None
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "somewhere"
        what = "; ".join(part for part in (error.context, error.problem) if part)
        raise UserError(f"{place}: {where}: broken YAML ({what}); expected 'key: value' with even indents") from None
    except yaml.YAMLError as error:
        raise UserError(f"{place}: broken YAML ({' '.join(str(error).split())})") from None
    if node is None:
        raise UserError(f"{place}: the file is empty; expected 'key: value' lines")
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{place}: line {node.start_mark.line + 1}: expected 'key: value' lines at the top")
    reader = _Reader()
    data = reader.value(node, "")
    if reader.problems:
        raise UserError(*(f"{place}: {problem}" for problem in reader.problems))
    return data, reader.lines


class _Reader:
    """Turns nodes into plain values, noting lines and problems on the way."""

    def __init__(self) -> None:
        self.lines: dict[str, int] = {}
        self.problems: list[str] = []

    def value(self, node: yaml.Node, key: str) -> Any:
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, key)
        if isinstance(node, yaml.SequenceNode):
            return self._sequence(node, key)
        return self._scalar(node, key)

    def _sequence(self, node: yaml.SequenceNode, key: str) -> list[Any]:
        items = []
        for number, item in enumerate(node.value):
            self.lines[f"{key}[{number}]"] = item.start_mark.line + 1
            items.append(self.value(item, f"{key}[{number}]"))
        return items

    def _mapping(self, node: yaml.MappingNode, prefix: str) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag.endswith(":merge"):
                for part in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                    merged = {**self.value(part, prefix), **merged}
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(f"line {line}: a list or mapping as a key; expected a name")
                continue
            name = key_node.value
            dotted = f"{prefix}.{name}" if prefix else name
            if name in own:
                self.problems.append(f"{dotted}: given twice, on lines {self.lines[dotted]} and {line}; keep one")
            self.lines[dotted] = line
            own[name] = self.value(value_node, dotted)
        return {**merged, **own}

    def _scalar(self, node: yaml.ScalarNode, key: str) -> Any:
        kind, text = node.tag.rpartition(":")[2], node.value
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "int":
            return int(text.replace("_", ""))
        if kind == "float":
            return float(
                text.replace("_", "").replace(".inf", "inf").replace(".Inf", "inf").lower().replace(".nan", "nan")
            )
        if kind != "str":
            self.problems.append(
                f"{key}: the YAML tag '{node.tag}' (line {node.start_mark.line + 1}); expected plain values"
            )
        return text
