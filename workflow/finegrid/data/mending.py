"""First pass of cleaning: mend the texts of a split, in several processes, and keep a little of each row.

The file is cut into pieces of about a mebibyte at line ends; each piece is one task, however many processes there
are, so that their number changes no result. A row whose texts need no mending goes through byte by byte. What is kept
are columns (:class:`Rows`): about a hundred bytes a row, so that files larger than memory can be cleaned.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from finegrid.data.leakage import Pairs, taught_turns
from finegrid.data.processes import in_order, workers
from finegrid.data.rows import Message, digest, normalise, to_line
from finegrid.data.texts import TEXT_STEPS

PIECE_BYTES = 1 << 20
EXAMPLES = 3
EXAMPLE_CHARS = 60

Example = dict[str, str]


# Digests have 16 bytes; as one column they are compared and sorted as they are.
DIGEST = np.dtype("S16")
_SIDES = ("", "prompt", "answer")
_COLUMNS = np.dtype(
    [
        ("messages", DIGEST),
        ("prompt_chars", np.int32),
        ("answer_chars", np.int32),
        ("empty", np.int8),
        ("turns", np.int32),
        ("id_bytes", np.int32),
        ("length", np.int64),
    ]
)


class Row(NamedTuple):
    """One row as leaks see it (see :mod:`finegrid.data.leakage`)."""

    id: str
    turns: Pairs


class Rows:
    """What is kept in memory of the rows of a split, by row number.

    Attributes:
        messages: digest of all messages, normalised, shape (n,).
        prompt_chars: characters of all messages but the last answer.
        answer_chars: characters of the last answer.
        turns: digests of question and answer of each taught turn of all rows, shape (turns, 2).
        step: the number of the step that rejected a row in :attr:`steps`; 0: none did.
    """

    def __init__(self, columns: np.ndarray, ids: bytes, turns: bytes):
        self._columns, self._ids, self._turns = columns, ids, turns
        self.messages = columns["messages"]
        self.prompt_chars, self.answer_chars = columns["prompt_chars"], columns["answer_chars"]
        self.turns = np.frombuffer(turns, DIGEST).reshape(-1, 2)
        self._id_stops, self._turn_stops = columns["id_bytes"].cumsum(dtype=np.int64), columns["turns"].cumsum()
        self._stops = columns["length"].cumsum()
        self.step = np.zeros(len(columns), dtype=np.int8)
        self.steps: list[str | None] = [None]
        self._reasons: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._columns)

    def id(self, number: int) -> str:
        """Return a row's id."""
        stop = self._id_stops[number]
        return self._ids[stop - self._columns["id_bytes"][number] : stop].decode()

    def row(self, number: int) -> Row:
        """Return a row's id and turns."""
        stop = int(self._turn_stops[number])
        places = range((stop - int(self._columns["turns"][number])) * 32, stop * 32, 32)
        turns = tuple((self._turns[i : i + 16], self._turns[i + 16 : i + 32]) for i in places)
        return Row(self.id(number), turns)

    def turn_of(self, turns: np.ndarray) -> np.ndarray:
        """Return the numbers of the rows that turns belong to."""
        return self._turn_stops.searchsorted(turns, side="right")

    def last_turns(self) -> np.ndarray:
        """Return the digests of each row's last question and answer, shape (n, 2)."""
        return self.turns[self._turn_stops - 1]

    def empty(self) -> Iterator[tuple[int, str]]:
        """Yield the rows with an empty text and the side it is on: ``prompt`` or ``answer``."""
        for number in np.flatnonzero(self._columns["empty"]):
            yield int(number), _SIDES[self._columns["empty"][number]]

    def alive(self) -> np.ndarray:
        """Return the numbers of the rows that no step rejected, in order."""
        return np.flatnonzero(self.step == 0)

    def reject(self, number: int, step: str, reason: str) -> None:
        """Reject a row, unless an earlier step did."""
        if not self.step[number]:
            self.step[number] = self._number_of(step)
            self._reasons[number] = reason

    def reject_all(self, numbers: np.ndarray, step: str) -> None:
        """Reject rows that are alive, for a reason that is the step's name."""
        self.step[numbers] = self._number_of(step)

    def step_of(self, number: int) -> str | None:
        """Return the name of the step that rejected a row."""
        return self.steps[self.step[number]]

    def reason(self, number: int) -> str | None:
        """Return the reason in the rejects file."""
        return self._reasons.get(number, self.step_of(number))

    def step_counts(self) -> Counter:
        """Return how many rows each step rejected; None: the rows that are left."""
        counts = np.bincount(self.step, minlength=len(self.steps)).tolist()
        return Counter(dict(zip(self.steps, counts, strict=True)))

    def text(self, file: BinaryIO, number: int) -> str:
        """Return a row's text for comparing, from the mended file: all but the system message, one a line."""
        length = int(self._columns["length"][number])
        file.seek(int(self._stops[number]) - length)
        messages = json.loads(file.read(length))["messages"]
        return _compared(messages, (message["content"] for message in messages))

    def _number_of(self, step: str) -> int:
        if step not in self.steps:
            self.steps.append(step)
        return self.steps.index(step)


@dataclass
class Mended:
    """What mending found: the rows, rows changed by step, examples of each step."""

    rows: Rows
    changed: Counter = field(default_factory=Counter)
    examples: dict[str, list[Example]] = field(default_factory=dict)


@dataclass
class _Piece:
    """What is known of the rows of one piece: columns, ids and turn digests one behind the other, keys of bands."""

    columns: np.ndarray
    ids: bytes
    turns: bytes
    keys: np.ndarray | None
    changed: Counter
    examples: dict[str, list[Example]]


def mend_split(
    source: Path,
    target: Path,
    steps: Sequence[str],
    keys: Any,
    num_proc: int,
    progress: Callable[[int], None],
) -> Mended:
    """Write the mended rows of one split and return what is known of them.

    Args:
        source: imported rows.
        target: mended rows, as many and in the same order.
        steps: names in :data:`finegrid.data.texts.TEXT_STEPS`.
        keys: :class:`finegrid.data.duplicates.BandKeys` to add those of each row to, for near-duplicates, or None.
        num_proc: processes.
        progress: told the number of rows that are done.
    """
    changed, examples, columns, done = Counter(), {}, [], 0
    ids, turns = bytearray(), bytearray()
    work = partial(_mend_piece, source, tuple(steps), keys and keys.threshold)
    with target.open("wb") as file, workers(num_proc) as pool:
        for lines, piece in in_order(pool, work, _pieces(source), ahead=2 * num_proc):
            file.write(lines)
            columns.append(piece.columns)
            ids += piece.ids
            turns += piece.turns
            if keys:
                keys.add(piece.keys)
            changed += piece.changed
            for step, found in piece.examples.items():
                examples[step] = [*examples.get(step, []), *found][:EXAMPLES]
            done += len(piece.columns)
            progress(done)
    joined = np.concatenate([np.zeros(0, _COLUMNS), *columns])
    return Mended(Rows(joined, bytes(ids), bytes(turns)), changed, examples)


def mend(messages: list[Message], steps: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Mend the texts of messages in place; return step -> (before, after) of the first text that it changed."""
    changed: dict[str, tuple[str, str]] = {}
    for message in messages:
        text = message["content"]
        for step in steps:
            after = TEXT_STEPS[step](text)
            if after != text:
                changed.setdefault(step, (text, after))
                text = after
        message["content"] = text
    return changed


# ---------------------------------------------------------------- one piece


def _mend_piece(
    source: Path, steps: Sequence[str], threshold: float | None, span: tuple[int, int]
) -> tuple[bytes, _Piece]:
    with source.open("rb") as file:
        file.seek(span[0])
        lines = file.read(span[1] - span[0]).splitlines(keepends=True)
    changed, examples, written, columns, compared = Counter(), {}, [], [], []
    ids, turns = bytearray(), bytearray()
    for line in lines:
        row = json.loads(line)
        differences = mend(row["messages"], steps)
        for step, (before, after) in differences.items():
            changed[step] += 1
            found = examples.setdefault(step, [])
            if len(found) < EXAMPLES:
                found.append({"id": row["id"]} | _difference(before, after))
        written.append(to_line(row) if differences else line)
        messages = row["messages"]
        texts = [normalise(message["content"]) for message in messages]
        pairs, name = taught_turns(messages, texts), row["id"].encode()
        columns.append(_columns(messages, texts, len(pairs), len(name), len(written[-1])))
        ids += name
        turns += b"".join(digest for pair in pairs for digest in pair)
        if threshold:
            compared.append(_compared(messages, texts))
    keys = _band_keys(compared, threshold) if threshold else None
    table = np.array(columns, _COLUMNS)
    return b"".join(written), _Piece(table, bytes(ids), bytes(turns), keys, changed, examples)


def _columns(
    messages: Sequence[Message], texts: Sequence[str], turns: int, id_bytes: int, length: int
) -> tuple[bytes | int, ...]:
    """Return a row of :data:`_COLUMNS`."""
    *prompt, answer = messages
    return (
        _messages_digest(messages, texts),
        sum(len(message["content"]) for message in prompt),
        len(answer["content"]),
        _SIDES.index(_empty_side(messages)),
        turns,
        id_bytes,
        length,
    )


def _messages_digest(messages: Sequence[Message], texts: Sequence[str]) -> bytes:
    parts = [
        f"{message['role']}\1{message.get('loss', '')}\1{text}" for message, text in zip(messages, texts, strict=True)
    ]
    return digest("\0".join(parts))


def _empty_side(messages: Sequence[Message]) -> str:
    sides = {"user": "prompt", "assistant": "answer"}
    empty = (message["role"] for message in messages if not message["content"].strip())
    return next((sides[role] for role in empty if role in sides), "")


def _band_keys(normalised: Sequence[str], threshold: float) -> np.ndarray:
    from finegrid.data.duplicates import band_keys, shingles_of_normalised

    return band_keys(map(shingles_of_normalised, normalised), threshold)


def _compared(messages: Sequence[Message], texts: Iterable[str]) -> str:
    """Join the texts of messages as a row is compared: all but the system message's, one a line."""
    return "\n".join(text for message, text in zip(messages, texts, strict=True) if message["role"] != "system")


def _difference(before: str, after: str) -> Example:
    """Return both texts around the first place where they differ."""
    pairs = zip(before, after, strict=False)
    place = next((number for number, (old, new) in enumerate(pairs) if old != new), min(len(before), len(after)))
    begin = max(0, place - EXAMPLE_CHARS // 3)
    return {name: text[begin : begin + EXAMPLE_CHARS] for name, text in (("before", before), ("after", after))}


# ---------------------------------------------------------------- processes


def _pieces(path: Path) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) of pieces that end at a line's end."""
    size, begin = path.stat().st_size, 0
    with path.open("rb") as file:
        while begin < size:
            file.seek(begin + PIECE_BYTES)
            file.readline()
            end = min(file.tell(), size)
            yield begin, end
            begin = end
