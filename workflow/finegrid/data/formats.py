"""Formats of training data: recognise one by its columns, and turn a row of it into messages.

| format | looks like |
|---|---|
| ``conversations`` (ChatGLM) | ``{"conversations": [{"role": "user", "content": "…"}, …]}`` |
| ``messages`` (OpenAI) | ``{"messages": [{"role": "user", "content": "…", "weight": 0}, …]}`` |
| ``sharegpt`` | ``{"conversations": [{"from": "human", "value": "…"}, …], "system": "…"}`` |
| ``alpaca`` | ``{"instruction": "…", "input": "…", "output": "…", "history": [["…", "…"]], "system": "…"}`` |
| ``prompt_completion`` | ``{"prompt": "…", "completion": "…"}``, each a text or a list of messages |
| ``columns`` | any table; ``data_config.columns`` names its columns. ``question`` and ``answer`` need no naming |

Roles become ``system``, ``user``, ``assistant``. Tool calls and observations are refused, for a model trained on half
of a tool conversation learns to invent the other half. What is no part of the messages is kept as ``meta``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from finegrid.data.rows import Message, Row
from finegrid.errors import nearest

DEFAULT_COLUMNS = {"prompt": "question", "answer": "answer"}

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
}
_TOOL_ROLES = {"tool", "tools", "function", "function_call", "tool_call", "tool_response", "observation"}
# The columns of which a row's messages are made; the others are meta.
_USED = {
    "conversations": {"conversations"},
    "messages": {"messages"},
    "sharegpt": {"conversations", "system"},
    "alpaca": {"instruction", "input", "output", "history", "system"},
    "prompt_completion": {"prompt", "completion", "system"},
}


class RowProblem(Exception):
    """Why a row can't be read: ``what was found; what was expected``, without file and line."""


class MissingColumn(RowProblem):
    """A column that the format needs is not there: said of a file's first row, it holds for the whole file."""


@dataclass(frozen=True)
class Format:
    """How the rows of one file are read.

    Attributes:
        name: a name of ``data_config.format``, not ``auto``.
        columns: of the format ``columns``: ``prompt``, ``answer``; of any format: ``system`` and ``id``.
    """

    name: str
    columns: Mapping[str, str] = field(default_factory=dict)

    def describe(self) -> str:
        """Return the format as the report tells it: ``columns (prompt: question, answer: answer)``."""
        named = ", ".join(f"{part}: {column}" for part, column in self.columns.items())
        return f"{self.name} ({named})" if named else self.name


def recognise(row: Row, wanted: str = "auto", columns: Mapping[str, str] | None = None) -> Format:
    """Return the format of a file from its first row, or the one that the settings name.

    Args:
        row: the first row that could be read.
        wanted: ``data_config.format``.
        columns: ``data_config.columns``.

    Raises:
        RowProblem: no format fits the row's columns, or the settings contradict one another.
    """
    columns = dict(columns or {})
    mapped = "prompt" in columns or "answer" in columns
    if mapped and wanted not in ("auto", "columns"):
        raise RowProblem(
            f"data_config.columns names the prompt or the answer and data_config.format is '{wanted}'; "
            "expected one of the two (`format: columns`, or no `columns.prompt` and `columns.answer`)"
        )
    if mapped or wanted == "columns":
        return Format("columns", DEFAULT_COLUMNS | columns)
    if wanted != "auto":
        return Format(wanted, columns)
    name = _by_columns(row)
    if name is None:
        raise MissingColumn(
            f"columns {_quoted(row)} are no known format; expected 'conversations', 'messages', 'instruction' and "
            "'output', 'prompt' and 'completion', or 'question' and 'answer'; any others are named by "
            "data_config.columns, for example {prompt: " + _example(row) + "}"
        )
    return Format(name, DEFAULT_COLUMNS | columns if name == "columns" else columns)


def convert(row: Row, form: Format, system_prompt: str | None = None) -> tuple[list[Message], Any, dict[str, Any]]:
    """Return a row's messages, its own id (None if it has none) and its other columns.

    Args:
        row: a row of the file, column -> value.
        form: the file's format.
        system_prompt: system message for a row that has none.

    Raises:
        RowProblem: a column is missing, a content is no text, or the roles are out of order.
    """
    messages = _READERS[form.name](row, form.columns)
    used = _USED.get(form.name, set()) | set(form.columns.values())
    system = row.get(form.columns.get("system", "system")) if "system" in used or "system" in form.columns else None
    if system is not None and not isinstance(system, str):
        raise RowProblem(f"the system message is {_kind(system)}; expected text")
    if messages[0]["role"] != "system" and (system or system_prompt):
        messages.insert(0, {"role": "system", "content": system or system_prompt})
    _check_order(messages)
    id_column = form.columns.get("id", "id")
    if "id" in form.columns and _present(row, id_column, " (data_config.columns.id)") in (None, ""):
        raise RowProblem(f"column '{id_column}' (data_config.columns.id) is empty; expected an id")
    meta = {key: value for key, value in row.items() if key not in used and key != id_column}
    return messages, _read_id(row.get(id_column)), meta


# ---------------------------------------------------------------- one reader a format


def _read_conversations(row: Row, _: Mapping[str, str]) -> list[Message]:
    return _messages(_list(row, "conversations"), "conversations")


def _read_messages(row: Row, _: Mapping[str, str]) -> list[Message]:
    return _messages(_list(row, "messages"), "messages")


def _read_sharegpt(row: Row, _: Mapping[str, str]) -> list[Message]:
    return _messages(_list(row, "conversations"), "conversations", "from", "value", _SHAREGPT_ROLES)


def _read_alpaca(row: Row, _: Mapping[str, str]) -> list[Message]:
    messages = []
    history = _parsed(row.get("history"), list) or []
    if not isinstance(history, list):
        raise RowProblem(f"history is {_kind(history)}; expected a list of [question, answer] pairs")
    for number, turn in enumerate(history, 1):
        if not isinstance(turn, list) or len(turn) != 2:
            raise RowProblem(f"history, turn {number} is {_kind(turn)}; expected a pair [question, answer]")
        messages += [_message("user", turn[0], f"history, turn {number}"), _message("assistant", turn[1], "history")]
    instruction, given = _text(row, "instruction"), row.get("input") or ""
    if not isinstance(given, str):
        raise RowProblem(f"input is {_kind(given)}; expected text")
    question = f"{instruction}\n{given}" if given and instruction else instruction or given
    return [*messages, _message("user", question), _message("assistant", _text(row, "output"))]


def _read_prompt_completion(row: Row, _: Mapping[str, str]) -> list[Message]:
    messages = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        value = _parsed(_present(row, column))
        messages += _messages(value, column) if isinstance(value, list) else [_message(role, value, column)]
    return messages


def _read_columns(row: Row, columns: Mapping[str, str]) -> list[Message]:
    prompt, answer = (_text(row, columns[part], f" (data_config.columns.{part})") for part in ("prompt", "answer"))
    return [_message("user", prompt), _message("assistant", answer)]


_READERS = {
    "conversations": _read_conversations,
    "messages": _read_messages,
    "sharegpt": _read_sharegpt,
    "alpaca": _read_alpaca,
    "prompt_completion": _read_prompt_completion,
    "columns": _read_columns,
}


# ---------------------------------------------------------------- messages


def _messages(
    values: list, column: str, role_key: str = "role", content_key: str = "content", roles: Mapping[str, str] = _ROLES
) -> list[Message]:
    messages = []
    for number, value in enumerate(values, 1):
        place = f"{column}, message {number}"
        if not isinstance(value, dict):
            raise RowProblem(f"{place} is {_kind(value)}; expected an object with '{role_key}' and '{content_key}'")
        for key in (role_key, content_key):
            if key not in value:
                raise RowProblem(f"{place} has no '{key}'{_hint(key, value)}; found {_quoted(value)}")
        role = _role(value[role_key], roles, place)
        if value.get("tool_calls") or value.get("function_call"):
            raise RowProblem(f"{place} calls a tool; tool calls are not supported: take such rows out")
        message = _message(role, _joined(value[content_key]), place)
        loss = _loss(value, place)
        if loss and role != "assistant":
            raise RowProblem(f"{place} asks for loss on a {role} message; expected it on assistant messages only")
        if loss is not None and role == "assistant":
            message["loss"] = loss
        messages.append(message)
    if not messages:
        raise RowProblem(f"{column} is an empty list; expected messages")
    return messages


def _role(value: Any, roles: Mapping[str, str], place: str) -> str:
    name = value if isinstance(value, str) else ""
    if name in roles:
        return roles[name]
    if name in _TOOL_ROLES:
        raise RowProblem(f"{place} has the role '{value}'; tool conversations are not supported: take such rows out")
    known = ", ".join(f"'{role}'" for role in roles)
    raise RowProblem(f"{place} has the role {_shown(value)}; expected one of {known}")


def _message(role: str, content: Any, place: str | None = None) -> Message:
    if not isinstance(content, str):
        raise RowProblem(f"{place or role}: the content is {_kind(content)}; expected text")
    return {"role": role, "content": content}


def _joined(content: Any) -> Any:
    """Return the text of a content that comes in parts (``[{"type": "text", "text": …}]``), others as they are."""
    if not isinstance(content, list) or not content:
        return content
    parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
    return "".join(parts) if all(isinstance(part, str) for part in parts) else content


def _loss(value: Mapping[str, Any], place: str) -> bool | None:
    """Return the ``loss`` flag of a message (ours: bool) or its ``weight`` (OpenAI's: 0 or 1), None without either."""
    key = "loss" if value.get("loss") is not None else "weight"
    flag = value.get(key)
    if flag is None:
        return None
    if isinstance(flag, bool) or (key == "weight" and flag in (0, 1)):
        return bool(flag)
    expected = "true or false" if key == "loss" else "0 or 1"
    raise RowProblem(f"{place} has {key}: {_shown(flag)}; expected {expected}")


def _check_order(messages: list[Message]) -> None:
    start = 1 if messages[0]["role"] == "system" else 0
    turns = messages[start:]
    for number, message in enumerate(turns, start + 1):
        expected = "user" if (number - start) % 2 else "assistant"
        if message["role"] != expected:
            raise RowProblem(
                f"message {number} is from '{message['role']}'; expected '{expected}' "
                "(an optional system message, then user and assistant in turn)"
            )
    if not turns or turns[-1]["role"] != "assistant":
        raise RowProblem(f"the last message is from '{messages[-1]['role']}'; expected an answer from 'assistant'")


# ---------------------------------------------------------------- columns


def _by_columns(row: Row) -> str | None:
    messages, conversations = _parsed(row.get("messages")), _parsed(row.get("conversations"))
    if isinstance(messages, list):
        return "messages"
    if isinstance(conversations, list):
        first = conversations[0] if conversations else None
        return "sharegpt" if isinstance(first, dict) and "from" in first else "conversations"
    for name, needed in (
        ("alpaca", {"instruction", "output"}),
        ("prompt_completion", {"prompt", "completion"}),
        ("columns", set(DEFAULT_COLUMNS.values())),
    ):
        if needed <= row.keys():
            return name
    return None


def _present(row: Row, column: str, named: str = "") -> Any:
    if column not in row:
        raise MissingColumn(f"no column '{column}'{named}{_hint(column, row)}; found {_quoted(row)}")
    return row[column]


def _text(row: Row, column: str, named: str = "") -> str:
    value = _present(row, column, named)
    if not isinstance(value, str):
        raise RowProblem(f"column '{column}' is {_kind(value)}; expected text")
    return value


def _list(row: Row, column: str) -> list:
    value = _parsed(_present(row, column))
    if not isinstance(value, list):
        raise RowProblem(f"column '{column}' is {_kind(value)}; expected a list of messages")
    return value


def _parsed(value: Any, of: type = dict) -> Any:
    """Return a list that a table holds as JSON text (a csv cell has no other way), other values as they are."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            parsed = json.loads(value)
        except ValueError:
            return value
        return parsed if isinstance(parsed, list) and all(isinstance(item, of) for item in parsed) else value
    return value


def _read_id(value: Any) -> str | None:
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise RowProblem(f"the id is {_kind(value)}; expected text or a whole number")
    return str(value)


def _hint(column: str, row: Iterable[str]) -> str:
    return nearest(column, [key for key in row if isinstance(key, str)])


def _quoted(row: Iterable[Any], limit: int = 8) -> str:
    names = [f"'{str(name)[:40]}'" for name in row]
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "") or "none"


def _example(row: Row) -> str:
    names = [*map(str, row), "…", "…"]
    return f"{names[0][:40]}, answer: {names[1][:40]}"


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {
        bool: "true or false",
        str: "a text",
        dict: "an object",
        list: "a list",
        int: "a number",
        float: "a number",
    }
    for kind, name in kinds.items():
        if isinstance(value, kind):
            return f"{name} ({_shown(value)})"
    return f"{type(value).__name__} ({_shown(value)})"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "…"
