"""A process that is asked to end: a training saves a checkpoint at the end of its step first.

SIGTERM (a time-out, `scancel`, preemption, `kill`), SIGUSR1 (what batch systems send some time before a limit), SIGINT
(Ctrl-C) and SIGHUP (a lost terminal) are requests. While something said that it will look (:meth:`Stop.waits`), a
request is only noted; at any other time it ends the process at once. In the end the process always dies of the signal
that came, so whoever sent it, and whoever waits for it, sees that.

The same signal again ends the process at once, and so do ``FINEGRID_GRACE_SECONDS`` (25 by default: Slurm kills after
30) without a step that ends; SIGUSR1 sets no such limit, since a SIGTERM follows it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

GRACE_SECONDS = 25.0
SAME_REQUEST_SECONDS = 2.0  # a batch system and a parent process may both pass one on
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP") if hasattr(signal, name))
WITHOUT_HURRY = tuple(getattr(signal, name) for name in ("SIGUSR1",) if hasattr(signal, name))


class Stopped(BaseException):
    """The process was asked to end and has done what it wanted to do before; not an error, as KeyboardInterrupt."""

    def __init__(self, number: int):
        self.signal = signal.Signals(number)
        super().__init__(f"ended by {self.signal.name}")


class Stop:
    """Requests to end. As a context it listens, and ends the process when :class:`Stopped` leaves it.

    Attributes:
        asked: the first signal that came, or None.
        pass_on: for a process whose children do the work: gets each signal in place of all else.
        last_words: each is called before the process ends at once.
    """

    def __init__(self):
        self.asked: signal.Signals | None = None
        self.pass_on: Callable[[signal.Signals], None] | None = None
        self.last_words: list[Callable[[signal.Signals], None]] = []
        self._came: dict[int, float] = {}
        self._waits = 0  # how many, for a process may train several runs
        self._before: dict[int, object] = {}
        self._pid = os.getpid()
        self._hurry: threading.Timer | None = None

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before = signal.getsignal(number)
                if before in (signal.SIG_DFL, signal.default_int_handler):  # else somebody else's, or `nohup`
                    self._before[number] = before
                    signal.signal(number, self._handle)
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.no_hurry()
        for number, before in self._before.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, before)
        if isinstance(error, Stopped):
            end_by(error.signal)

    @contextlib.contextmanager
    def waits(self) -> Iterator[None]:
        """While the block runs, a request is noted in ``asked``: the block looks there and raises Stopped."""
        self._waits += 1
        try:
            yield
        finally:
            self._waits -= 1

    def no_hurry(self) -> None:
        """Let the process take its time from here on: the step has ended and its checkpoint is being written."""
        if self._hurry is not None:
            self._hurry.cancel()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a copy of the process, such as a loader of data
            end_by(number)
            return
        number = signal.Signals(number)
        now = time.monotonic()
        again = now - self._came.setdefault(number, now) > SAME_REQUEST_SECONDS
        if self.pass_on is not None:
            self.asked = self.asked or number
            self.pass_on(number)
        elif number == signal.SIGINT and not self._waits:
            signal.default_int_handler(number, frame)
        elif not self._waits or (again and number not in WITHOUT_HURRY):
            self._say_last_words(number)
            end_by(number)
        else:
            self.asked = self.asked or number
            if self._hurry is None and number not in WITHOUT_HURRY:
                self._hurry = threading.Timer(grace_seconds(), self._give_up, [number])
                self._hurry.daemon = True
                self._hurry.start()

    def _say_last_words(self, number: signal.Signals) -> None:
        for say in self.last_words:
            say(number)

    def _give_up(self, number: signal.Signals) -> None:
        print(
            f"asked to end by {number.name}: no step ended within {grace_seconds():.0f} s, so no checkpoint was saved",
            file=sys.stderr,
            flush=True,
        )
        self._say_last_words(number)
        os._exit(128 + number)  # only the main thread could set the signal's own action


def grace_seconds() -> float:
    """Return how long after a request a training may go on without the end of a step, in seconds."""
    try:
        return float(os.environ["FINEGRID_GRACE_SECONDS"])
    except (KeyError, ValueError):
        return GRACE_SECONDS


def end_by(number: int) -> None:
    """End this process by a signal, as if nothing had caught it."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # closed, or the signal came within a write
            stream.flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Hold signals back from this thread, and from a process that it starts until that calls ignore_signals."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def ignore_signals(initialise: Callable[[int], None] | None, worker: int) -> None:
    """Start a process that loads data: requests to end go to every process of a job, and it is needed to the last step.

    It ends by itself when the training's process does.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if initialise is not None:
        initialise(worker)
