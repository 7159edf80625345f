"""First pass of cleaning: mend the texts of a split, in several processes, and keep a small entry of each row.

The file is cut into pieces of about a mebibyte at line ends; each piece is one task, however many processes there
are, so that their number changes no result. A row whose texts need no mending goes through byte by byte.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from finegrid.data.leakage import Pairs, taught_turns
from finegrid.data.processes import in_order, workers
from finegrid.data.rows import Message, digest, normalise, to_line
from finegrid.data.texts import TEXT_STEPS

PIECE_BYTES = 1 << 20
EXAMPLES = 3
EXAMPLE_CHARS = 60

Example = dict[str, str]


@dataclass(slots=True)
class Entry:
    """What is kept in memory of a row.

    Attributes:
        id: its id.
        messages: digest of all its messages, normalised.
        turns: digests of question and answer of each taught turn (see :mod:`finegrid.data.leakage`).
        prompt_chars: characters of all messages but the last answer.
        answer_chars: characters of the last answer.
        empty: which side has an empty text: ``prompt``, ``answer`` or none.
        sketch: its MinHash, if one was asked for.
        begin: where its line begins in the mended file, in bytes.
        length: bytes of the line.
        step: the step that rejected it.
        reason: the reason in the rejects file.
    """

    id: str
    messages: bytes
    turns: Pairs
    prompt_chars: int
    answer_chars: int
    empty: str
    sketch: Any
    begin: int
    length: int
    step: str | None = None
    reason: str | None = None

    def reject(self, step: str, reason: str) -> None:
        """Reject the row, unless an earlier step did."""
        if self.step is None:
            self.step, self.reason = step, reason


@dataclass
class Mended:
    """What mending a split found: its rows in order, rows changed by step, examples of each step."""

    entries: list[Entry] = field(default_factory=list)
    changed: Counter = field(default_factory=Counter)
    examples: dict[str, list[Example]] = field(default_factory=dict)


def mend_split(
    source: Path,
    target: Path,
    steps: Sequence[str],
    sketch: bool,
    num_proc: int,
    progress: Callable[[int], None],
) -> Mended:
    """Write the mended rows of one split and return what is known of them.

    Args:
        source: imported rows.
        target: mended rows, as many and in the same order.
        steps: names in :data:`finegrid.data.texts.TEXT_STEPS`.
        sketch: make MinHash sketches, for near-duplicates.
        num_proc: processes.
        progress: told the number of rows that are done.
    """
    mended, begin = Mended(), 0
    work = partial(_mend_piece, source, tuple(steps), sketch)
    with target.open("wb") as file, workers(num_proc) as pool:
        for lines, part in in_order(pool, work, _pieces(source), ahead=2 * num_proc):
            file.write(lines)
            for entry in part.entries:
                entry.begin, begin = begin, begin + entry.length
            mended.entries += part.entries
            mended.changed += part.changed
            for step, found in part.examples.items():
                mended.examples[step] = [*mended.examples.get(step, []), *found][:EXAMPLES]
            progress(len(mended.entries))
    return mended


def text_of(file: BinaryIO, entry: Entry) -> str:
    """Return the text of a row for comparing: all its messages but the system message, one a line."""
    file.seek(entry.begin)
    messages = json.loads(file.read(entry.length))["messages"]
    return _compared(messages, (message["content"] for message in messages))


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


def _mend_piece(source: Path, steps: Sequence[str], sketch: bool, span: tuple[int, int]) -> tuple[bytes, Mended]:
    with source.open("rb") as file:
        file.seek(span[0])
        lines = file.read(span[1] - span[0]).splitlines(keepends=True)
    mended, written = Mended(), []
    for line in lines:
        row = json.loads(line)
        changed = mend(row["messages"], steps)
        for step, (before, after) in changed.items():
            mended.changed[step] += 1
            examples = mended.examples.setdefault(step, [])
            if len(examples) < EXAMPLES:
                examples.append({"id": row["id"]} | _difference(before, after))
        written.append(to_line(row) if changed else line)
        mended.entries.append(_entry(row, len(written[-1]), sketch))
    return b"".join(written), mended


def _entry(row: dict[str, Any], length: int, sketch: bool) -> Entry:
    messages = row["messages"]
    *prompt, answer = messages
    texts = [normalise(message["content"]) for message in messages]
    return Entry(
        id=row["id"],
        messages=_messages_digest(messages, texts),
        turns=taught_turns(messages, texts),
        prompt_chars=sum(len(message["content"]) for message in prompt),
        answer_chars=len(answer["content"]),
        empty=_empty_side(messages),
        sketch=_sketch(messages, texts) if sketch else None,
        begin=0,
        length=length,
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


def _sketch(messages: Sequence[Message], normalised: Sequence[str]) -> Any:
    from finegrid.data.duplicates import shingles_of_normalised, signature

    return signature(shingles_of_normalised(_compared(messages, normalised)))


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
