"""Leaks: rows of train that hold what is asked or answered in validation or test.

Texts are compared normalised (NFKC, lower-cased, white space folded), as 16-byte digests. What counts of a held-out
row is its last answer, which is what a run is scored on, and its question: all that comes before it but the system
message. Of a train row every answer that carries loss counts, with its own question.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from finegrid.data.rows import Message, digest

KINDS = ("question", "answer")
HELD_OUT = ("test", "validation")  # in the order in which a leak is named
NOTHING = bytes(16)  # the digest of a text without characters: it is no leak to have none

Pairs = tuple[tuple[bytes, bytes], ...]


class Compared(Protocol):
    """A row as leaks see it: the digests of question and answer of each taught turn, the last turn last."""

    id: str
    turns: Pairs


def taught_turns(messages: Sequence[Message], texts: Sequence[str]) -> Pairs:
    """Return the (question, answer) digests of every answer that carries loss, and of the last one in any case.

    Args:
        messages: of one row.
        texts: their contents, normalised.
    """
    turns, before = [], ""
    for number, (message, text) in enumerate(zip(messages, texts, strict=True)):
        if message["role"] == "system":
            continue
        if message["role"] == "assistant" and (message.get("loss", True) or number == len(messages) - 1):
            turns.append((_digest(before), _digest(text)))
        before = f"{before}\n{text}" if before else text
    return tuple(turns)


@dataclass(frozen=True)
class Leak:
    """A text of a train row that is held out: its kind, the split and the row it is in, the digest."""

    kind: str
    split: str
    id: str
    text: bytes

    def reason(self) -> str:
        """Return the reason for the rejects file."""
        return f"leak: {self.kind} in {self.split} ({self.id})"


class HeldOut:
    """The questions and answers of validation and test."""

    def __init__(self, rows: dict[str, Iterable[Compared]]):
        self._ids: dict[str, dict[str, dict[bytes, str]]] = {kind: {} for kind in KINDS}
        for split in HELD_OUT:
            for part, kind in enumerate(KINDS):
                texts = self._ids[kind].setdefault(split, {})
                for row in rows.get(split, ()):
                    if row.turns[-1][part] != NOTHING:
                        texts.setdefault(row.turns[-1][part], row.id)

    def texts(self, kind: str) -> np.ndarray:
        """Return the digests of all held-out questions or answers."""
        found = b"".join(text for split in HELD_OUT for text in self._ids[kind][split])
        return np.frombuffer(found, "S16")

    def leaks(self, row: Compared) -> list[Leak]:
        """Return what a train row leaks: at most one of each kind and split, questions and test first."""
        found = []
        for part, kind in enumerate(KINDS):
            for split in HELD_OUT:
                texts = self._ids[kind][split]
                text = next((turn[part] for turn in row.turns if turn[part] in texts), None)
                if text is not None:
                    found.append(Leak(kind, split, texts[text], text))
        return found

    def overlap(self, validation: Iterable[Compared]) -> dict[str, dict[str, int]]:
        """Return kind -> ``validation_rows`` whose text is in test, and how many ``distinct`` texts: only counted."""
        texts = {kind: [row.turns[-1][part] for row in validation] for part, kind in enumerate(KINDS)}
        common = {kind: [text for text in texts[kind] if text in self._ids[kind]["test"]] for kind in KINDS}
        return {kind: {"validation_rows": len(found), "distinct": len(set(found))} for kind, found in common.items()}


def count_leaks(leaks: Iterable[Sequence[Leak]]) -> dict[str, dict[str, dict[str, int]]]:
    """Return kind -> held-out split -> ``train_rows`` that leak and ``distinct`` held-out texts that are leaked."""
    rows = {kind: dict.fromkeys(HELD_OUT, 0) for kind in KINDS}
    texts = {kind: {split: set() for split in HELD_OUT} for kind in KINDS}
    for found in leaks:
        for leak in found:
            rows[leak.kind][leak.split] += 1
            texts[leak.kind][leak.split].add(leak.text)
    return {
        kind: {split: {"train_rows": rows[kind][split], "distinct": len(texts[kind][split])} for split in HELD_OUT}
        for kind in KINDS
    }


def _digest(text: str) -> bytes:
    return digest(text) if text.strip() else NOTHING
