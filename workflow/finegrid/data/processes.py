"""Work on the pieces of a file in several processes, in order, with few pieces in memory at a time."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any


@contextlib.contextmanager
def workers(num_proc: int) -> Iterator[ProcessPoolExecutor | None]:
    """Give a pool of processes for :func:`in_order`; None for one process, which is this one."""
    # What has been imported so far stays: the garbage collector need not go through it again and again (a tenth of
    # the time of tokenising), nor, in a forked process, make a copy of its memory by doing so.
    gc.freeze()
    try:
        if num_proc == 1:
            yield None
            return
        # A forked process starts at once; elsewhere a fresh interpreter must import what it needs.
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
        with ProcessPoolExecutor(num_proc, mp_context=context, initializer=_end_with_parent) as pool:
            yield pool
    finally:
        gc.unfreeze()


def in_order(
    pool: ProcessPoolExecutor | None, function: Callable[[Any], Any], items: Iterable, ahead: int
) -> Iterator[Any]:
    """Yield ``function(item)`` in the items' order, with no more than ``ahead`` items read before their turn."""
    if pool is None:
        yield from map(function, items)
        return
    waiting: deque = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _end_with_parent() -> None:
    """End this worker when its parent is killed: a worker that waits for tasks would not notice, and stay for ever."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
