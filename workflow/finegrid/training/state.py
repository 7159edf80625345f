"""How far a run is, told while it goes: a small JSON beside the run's checkpoints, which `finegrid watch` reads.

``scratch/<study>/<run>/state.json`` of a training, ``evaluation.json`` of an evaluation. Each is written whole when the
work starts, every five seconds as a sign of life, and when the work fails, with the reason in one line; it is removed
when the work is done. Its keys: ``run``; ``state`` (loading, training, evaluating, saving, failed); ``step``,
``steps``; ``loss`` of the last step and ``eval_loss``; ``tokens_per_second``; ``seconds_left`` of the training;
``line``, the last line of progress; ``started`` and ``updated`` (UTC); ``node``, ``pid``, and ``job`` of Slurm;
``reason``; ``log``. What isn't known is null.

The stages don't import this module: they call a function ``tell(**facts)`` that the command line gives them, so a
change here trains nothing anew.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finegrid.errors import UserError
from finegrid.files import write_json
from finegrid.training.stopping import Stop, Stopped

SECONDS_BETWEEN_WRITES = 5.0
SECONDS_BEFORE_THE_LIMIT = 60.0  # SIGTERM comes at a job's limit, or so long before it by `--signal`
LONGEST_REASON = 300
EMPTY = ("step", "steps", "loss", "eval_loss", "tokens_per_second", "seconds_left", "line", "reason")

OUT_OF_MEMORY = re.compile(
    r"out of memory(?!\?)|outofmemory|oom[-_ ]?kill|can't allocate memory|cannot allocate memory|not enough memory"
    r"|bad_alloc|\bMemoryError\b",
    re.IGNORECASE,
)
NOT_FINITE = (
    (re.compile(r"step (\d+): the loss of rows .* is (nan|-?inf)"), "{} in step {}"),
    (re.compile(r"step (\d+): the gradient's norm .* is (nan|-?inf)"), "{} in the gradient of step {}"),
    (re.compile(r"validation loss after step (\d+) is (nan|-?inf)"), "{} in the validation after step {}"),
)
DATA_FILE = re.compile(r"^\S*(?:\bdata/\S+|\.(?:arrow|jsonl|csv|tsv|parquet)(?:\.gz)?)(?::\d+)?: |^data_config\b")
DATA_MODULES = ("pyarrow", "datasets", "finegrid.training.collation", "finegrid.data")
SLURM_SAYS = (
    (re.compile(r"DUE TO TIME LIMIT"), "time-out"),
    (OUT_OF_MEMORY, "out of memory"),
    (re.compile(r"DUE TO PREEMPTION"), "preempted"),
    (re.compile(r"DUE TO NODE FAIL"), "its node failed"),
    (re.compile(r"\bCANCELLED AT\b"), "cancelled"),
)
RAISED = re.compile(r"^(?:[\w.]+\.)?([A-Z]\w*)(?:: (.*))?$")


@contextlib.contextmanager
def live_state(
    path: Path,
    run: str,
    log: Path | None,
    *,
    writes: bool = True,
    is_launcher: bool = False,
    stop: Stop | None = None,
) -> Iterator[Callable[..., None]]:
    """Keep a state file while the block runs; give it a function ``tell(**facts)``, see the module for the facts.

    A block that ends well removes the file, and its folder if nothing else is in it. An exception leaves the reason
    and goes on; so does a signal that ends the process. No trouble with the file ever ends the work.

    Args:
        writes: False for all but the first of several processes: nothing is written.
        is_launcher: the facts and the signs of life come from another process, which writes the same file.
        stop: who listens for signals; without it the block is ended by them at once.
    """
    if not writes:
        yield lambda **facts: None
        return
    keeper = _Keeper(path, run, log, is_launcher)
    with contextlib.nullcontext(stop) if stop is not None else Stop() as listening:
        listening.last_words.append(keeper.ended_by)
        keeper.start()
        try:
            yield keeper.tell
        except Stopped as error:
            keeper.ended_by(error.signal)
            raise
        except BaseException as error:
            keeper.end(reason_of(error))
            raise
        finally:
            listening.last_words.remove(keeper.ended_by)
        keeper.end(None)


class _Keeper:
    def __init__(self, path: Path, run: str, log: Path | None, is_launcher: bool):
        self.path = path
        self.is_launcher = is_launcher
        self.deadline: float | None = None
        self.facts: dict[str, Any] = {
            "run": run,
            "state": "loading",
            **dict.fromkeys(EMPTY),
            "started": _now(),
            "node": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
            "pid": os.getpid(),
            "job": os.environ.get("SLURM_JOB_ID"),
            "log": log.as_posix() if log else None,
        }
        self._written = 0.0
        self._lock = threading.RLock()  # SIGTERM may come in the middle of a write
        self._ended = threading.Event()

    def start(self) -> None:
        self._write()
        threading.Thread(target=self._beat, daemon=True).start()

    def tell(self, **facts: Any) -> None:
        """Take new facts; they are written with the next sign of life, a new state within a second."""
        with self._lock:
            changed = facts.get("state", self.facts["state"]) != self.facts["state"]
            self.facts |= {key: _plain(value) for key, value in facts.items()}
            if changed and time.monotonic() - self._written > 1:
                self._write()

    def end(self, reason: str | None) -> None:
        self._ended.set()
        with self._lock:
            if reason is None:
                self._remove()
            else:
                self._fail(reason)

    def _fail(self, reason: str) -> None:
        if self.is_launcher:  # the worker knew how far it was
            self.facts |= {key: value for key, value in read_state(self.path).items() if key in EMPTY}
        self.facts |= {"state": "failed", "reason": reason, "seconds_left": None}
        self._write()

    def _beat(self) -> None:
        self.deadline = _deadline(self.facts["job"])
        while not self._ended.wait(SECONDS_BETWEEN_WRITES):
            with self._lock:
                if not self._ended.is_set() and not self.is_launcher:
                    self._write()

    def ended_by(self, number: signal.Signals) -> None:
        """Write that a signal ended the run; one that came at the job's limit, or announced it, was its time-out."""
        now, limit = time.time(), self.deadline
        late = limit is not None and (number == signal.SIGUSR1 or now > limit - SECONDS_BEFORE_THE_LIMIT)
        interrupted = "interrupted" if number == signal.SIGINT else f"ended by {number.name}"
        self.end("time-out" if late else interrupted)

    def _write(self) -> None:
        self._written = time.monotonic()
        with contextlib.suppress(OSError):
            write_json(self.path, self.facts | {"updated": _now()})

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
            self.path.parent.rmdir()


def read_state(path: Path) -> dict[str, Any]:
    """Return the content of a state file; empty if there is none, or none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _deadline(job: str | None) -> float | None:
    """Return when Slurm will end this job, in seconds since the epoch; None if it won't, or can't be asked."""
    if job is None:
        return None
    told = os.environ.get("SLURM_JOB_END_TIME")  # of newer versions
    if told and told.isdigit():
        return float(told)
    try:
        command = ["squeue", "--noheader", "--jobs", job, "--format", "%L"]
        text = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    left = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text.strip())
    if not left:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in left.groups())
    return time.time() + ((days * 24 + hours) * 60 + minutes) * 60 + seconds


# ---------------------------------------------------------------- reasons


def reason_of(error: BaseException) -> str:
    """Return in one line why a run failed: ``out of memory``, ``NaN in step 12``, ``bad data: …`` or the error."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, UserError):
        more = len(error.problems) - 1
        return _of_problem(error.problems[0]) + (f" (and {more} more)" if more else "")
    name, text = type(error).__name__, str(error)
    if _is_out_of_memory(error, f"{name}: {text}"):
        return "out of memory"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _one_line(f"disk full: {error.filename or error.strerror}")
    if isinstance(error, IndexError) and text == "index out of range in self":  # torch's words for an embedding
        return "bad data: a token id beyond the model's vocabulary"
    if _raised_in(error).startswith(DATA_MODULES):
        return _one_line(f"bad data: {name}: {text}")
    if name == "ProcessFailed":
        return _of_problem(text)
    return _one_line(f"{name}: {text}")


def reason_in(log: str) -> str | None:
    """Return why a run failed, from the end of its log or of Slurm's; None if it doesn't tell."""
    for pattern, reason in SLURM_SAYS:
        if pattern.search(log):
            return reason
    lines = log.splitlines()
    errors = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    traces = [number for number, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    if errors and errors[-1] > max(traces, default=-1):
        return _of_problem(lines[errors[-1]].removeprefix("error: "))
    if traces:
        for line in lines[traces[-1] + 1 :]:
            raised = RAISED.match(line)
            if raised:
                return _of_problem(f"{raised[1]}: {raised[2] or ''}".removesuffix(": "))
    return None


def _is_out_of_memory(error: BaseException, text: str) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    is_ours = bool(names & {"MemoryError", "OutOfMemoryError"})
    return is_ours or getattr(error, "errno", None) == errno.ENOMEM or bool(OUT_OF_MEMORY.search(text))


def _raised_in(error: BaseException) -> str:
    """Return the module that the exception was raised in."""
    trace, module = error.__traceback__, ""
    while trace is not None:
        module = trace.tb_frame.f_globals.get("__name__", "")
        trace = trace.tb_next
    return module


def _of_problem(problem: str) -> str:
    for pattern, words in NOT_FINITE:
        found = pattern.search(problem)
        if found:
            return words.format("NaN" if found[2] == "nan" else "infinity", found[1])
    if OUT_OF_MEMORY.search(problem):
        return "out of memory"
    return _one_line(f"bad data: {problem}" if DATA_FILE.match(problem) else problem)


def _one_line(text: str) -> str:
    line = " ".join(next((line for line in text.splitlines() if line.strip()), "").split())
    return line if len(line) <= LONGEST_REASON else line[: LONGEST_REASON - 1] + "…"
