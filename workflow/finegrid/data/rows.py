"""What import and cleaning share: the splits, comparing texts, deterministic draws, and writing all or nothing.

A row is ``{"id", "messages": [{"role", "content", "loss"?}], "source", "meta"}``, one JSON object a line.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from finegrid.errors import UserError

SPLITS = ("train", "validation", "test")
SHOWN_PROBLEMS = 20
PROGRESS_SECONDS = 5.0

Message = dict[str, Any]
Row = dict[str, Any]
Progress = Callable[[str], None]

_ENCODER = json.JSONEncoder(ensure_ascii=False, default=str, allow_nan=False)
_SURROGATES = re.compile("[\ud800-\udfff]")


def quiet(_: str) -> None:
    """Progress that prints nothing."""


def every_few_seconds(progress: Progress) -> Progress:
    """Return a progress function that passes on at most one message in :data:`PROGRESS_SECONDS`."""
    last = time.monotonic()

    def tell(text: str) -> None:
        nonlocal last
        if time.monotonic() - last >= PROGRESS_SECONDS:
            last = time.monotonic()
            progress(text)

    return tell


class Problems:
    """Problems of the user's files, collected so that all are shown at once; the first 20 are kept, all counted."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.count = 0

    def add(self, problem: str) -> None:
        """Keep a problem, or only count it when enough are kept."""
        self.count += 1
        if len(self.shown) < SHOWN_PROBLEMS:
            self.shown.append(problem)

    def stop(self) -> None:
        """Raise what was collected, if anything was.

        Raises:
            UserError: with the first problems and the number of the others.
        """
        if self.count > len(self.shown):
            raise UserError(*self.shown, f"… and {self.count - len(self.shown):,} more problems of these files")
        if self.shown:
            raise UserError(*self.shown)


# ---------------------------------------------------------------- comparing texts


def normalise(text: str) -> str:
    """Return a text as it is compared: Unicode NFKC, lower-cased, white space folded to single spaces."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.lower().split())


def digest(text: str) -> bytes:
    """Return 16 bytes that stand for a text (BLAKE2b: no two texts of a data set share them by chance)."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def last_question(messages: list[Message]) -> str:
    """Return what the last answer answers, normalised: all messages before it but the system message."""
    return "\n".join(normalise(message["content"]) for message in messages[:-1] if message["role"] != "system")


# ---------------------------------------------------------------- deterministic draws


def draw_order(seed: int, purpose: str, name: str) -> bytes:
    """Return the place of a name in a draw: sorted by it, the first n are a random sample of n.

    The order depends on seed, purpose and the names alone, not on where a row stands, and a larger sample contains
    every smaller one.
    """
    return hashlib.blake2b(f"{seed}\0{purpose}\0{name}".encode("utf-8", "surrogatepass"), digest_size=16).digest()


# ---------------------------------------------------------------- reading and writing


def to_line(value: Any) -> bytes:
    """Return a value as one line of UTF-8 JSON; what JSON has no type for (dates, bytes) becomes text, NaN null."""
    try:
        text = _ENCODER.encode(value)
    except ValueError:
        text = _ENCODER.encode(_without_nan(value))
    return text.encode("utf-8") + b"\n"


def has_surrogates(text: str) -> bool:
    """Return whether a text has halves of surrogate pairs, which no UTF-8 file can hold."""
    return not text.isascii() and _SURROGATES.search(text) is not None


def read_lines(path: Path) -> Iterator[Row]:
    """Yield the rows of a JSON lines file that this package wrote."""
    with path.open("rb") as file:
        for line in file:
            yield json.loads(line)


@contextlib.contextmanager
def partial_folder(output: Path) -> Iterator[Path]:
    """Give a fresh folder inside ``output`` to write into; it is gone at the end, whatever happens."""
    fresh = not output.exists()
    partial = output / ".partial"
    shutil.rmtree(partial, ignore_errors=True)  # what a killed run left
    partial.mkdir(parents=True)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if fresh:
            with contextlib.suppress(OSError):
                output.rmdir()  # only if nothing came of it


def publish(partial: Path, output: Path, names: Iterable[str]) -> None:
    """Move finished files from the partial folder into ``output``; the report, last of them, says that all are there.

    Args:
        partial: folder with the finished files.
        output: where they go.
        names: the files, the report last.
    """
    *files, report = names
    (output / report).unlink(missing_ok=True)
    for name in [*files, report]:
        (partial / name).replace(output / name)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
