"""Files are written whole or not at all: under a temporary name beside, then renamed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a path to write to; what was written there takes the place of ``path`` when the block ends well.

    After an error the file that was there before is still there, and nothing else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.{os.getpid()}.half")
    try:
        yield half
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8."""
    with whole(path) as half:
        half.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write plain data as indented JSON.

    Raises:
        ValueError: a number is not finite, for which JSON has no word.
    """
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def printing_to(log: Path) -> Iterator[None]:
    """Send what the process prints, compiled libraries too, to a run's own log while the block runs."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(number) for number in (1, 2)]
    try:
        with log.open("a", buffering=1) as file:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, before in zip((1, 2), kept, strict=True):
            os.dup2(before, number)
            os.close(before)
