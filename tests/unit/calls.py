"""The work of a piece of code as a number that is the same on every machine: how many functions it calls."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def counted_calls() -> Iterator[list[int]]:
    """Give a list of one number that counts the calls of functions, Python's and C's, in this thread.

    Seconds hang on the machine and on who else uses it, and stand in `tests/benchmarks/README.md`; calls grow with what
    is done again for each run or row, which is what a slow answer comes from.
    """
    found = [0]

    def count(frame, event: str, argument) -> None:
        if event in {"call", "c_call"}:
            found[0] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        yield found
    finally:
        sys.setprofile(before)
