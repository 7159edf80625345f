"""Several trainings in one process that make their steps together: each has a thread of its own, one works at a time.

Every run keeps its own Trainer: optimiser, schedule, accumulation, clipping, data order, log, evaluations, checkpoints
and resuming are what they are for a run alone. Only where a trainer makes the forward and backward pass of a
micro-batch, it hands the batch in and its thread (a *lane*) sleeps; when every lane sleeps, the main thread makes one
pass over all batches (:mod:`finegrid.training.joint`) and wakes them one after the other. A lane that ends, or fails,
is missing from the next pass, and that is all.

What libraries keep once a process is each lane's own during its turn: the random states of Python, numpy and torch,
accelerate's ``GradientState``, and where stdout and stderr go.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import GradientState

from finegrid.files import printing_to

Together = Callable[[Sequence["Lane"]], None]


class Lane:
    """One training.

    Attributes:
        name: the run's id.
        error: what the work ended with; None if it ended well.
        batch: what was handed in and waits for the next pass.
        answer: what the pass gives back, None if it leaves the lane to make its step by itself; an exception is raised
            in the lane.
    """

    def __init__(self, name: str, work: Callable[[Lane], None], log: Path):
        self.name = name
        self.error: BaseException | None = None
        self.batch: Any = None
        self.answer: Any = None
        self._work = work
        self._log = log
        self._ended = False
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread: threading.Thread | None = None
        self._globals: _Globals | None = None
        self._seconds = 0.0
        self._since: float | None = None

    def hand_in(self, batch: Any) -> Any:
        """Sleep until the next pass has answered, and return the answer; to be called by the lane's own work."""
        self.batch, self.answer = batch, None
        self._back.release()
        self._turn.acquire()
        self.batch = None
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer

    def now(self) -> float:
        """Return a clock of this lane's own seconds: those of its turns, and its share of the passes."""
        return self._seconds + (0.0 if self._since is None else time.monotonic() - self._since)

    def drawing(self) -> contextlib.AbstractContextManager:
        """Return a context in which torch draws from this lane's random numbers, for its part of a pass."""
        return self._globals.drawing()

    @contextlib.contextmanager
    def undrawn_on_failure(self) -> Iterator[None]:
        """Forget what was drawn in a block that fails."""
        before = self._globals.cpu, self._globals.gpus
        try:
            yield
        except BaseException:
            self._globals.cpu, self._globals.gpus = before
            raise

    def add_seconds(self, seconds: float) -> None:
        """Count a share of a pass."""
        self._seconds += seconds

    def take_turn(self) -> bool:
        """Let the work go on until it hands a batch in (True) or ends (False); to be called by the main thread."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
            self._thread.start()
            self._globals = _Globals.of_this_process()
        with self._globals.in_force(), printing_to(self._log):
            self._since = time.monotonic()
            self._turn.release()
            self._back.acquire()
            self._seconds, self._since = self.now(), None
        return not self._ended

    def _run(self) -> None:
        self._turn.acquire()
        try:
            self._work(self)
        except BaseException as error:  # the main thread decides what a failure means for the others
            self.error = error
        self._ended = True
        self._back.release()


def run_together(lanes: Iterable[Lane], at_once: int, together: Together) -> None:
    """Run lanes to their ends, at most so many of them at once.

    Args:
        together: makes a pass for lanes that have all handed in a batch, and sets their answers.

    Raises:
        BaseException: what a lane ended with. An ``Exception`` ends the others, too; one that is none (``Stopped``) is
            for them to notice. No further lane is begun in either case.
    """
    waiting, running, error = deque(lanes), [], None
    while waiting or running:
        while waiting and len(running) < at_once:
            running.append(waiting.popleft())
        still = [lane for lane in running if lane.take_turn()]
        error = error or next((lane.error for lane in running if lane.error is not None), None)
        running = still
        if error is not None:
            waiting.clear()
        if isinstance(error, Exception):
            for lane in running:
                lane.answer = error
        elif running:
            together(running)
    if error is not None:
        raise error


@dataclass
class _Globals:
    """What libraries keep once a process."""

    python: Any
    numpy: Any
    cpu: torch.Tensor
    gpus: list[torch.Tensor]
    accumulation: dict[str, Any]

    @classmethod
    def of_this_process(cls) -> _Globals:
        cpu, gpus = _random_states()
        return cls(random.getstate(), np.random.get_state(), cpu, gpus, dict(GradientState._shared_state))

    def put_back(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        _set_random_states(self.cpu, self.gpus)
        GradientState._shared_state.clear()
        GradientState._shared_state.update(self.accumulation)

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """Let these be the process's while the block runs, and keep what it makes of them."""
        outside = self.of_this_process()
        self.put_back()
        try:
            yield
        finally:
            self.__dict__ |= self.of_this_process().__dict__
            outside.put_back()

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Let torch draw from these random states while the block runs."""
        outside = _random_states()
        _set_random_states(self.cpu, self.gpus)
        try:
            yield
        finally:
            self.cpu, self.gpus = _random_states()
            _set_random_states(*outside)


def _random_states() -> tuple[torch.Tensor, list[torch.Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _set_random_states(cpu: torch.Tensor, gpus: list[torch.Tensor]) -> None:
    torch.set_rng_state(cpu)
    if gpus:
        torch.cuda.set_rng_state_all(gpus)
