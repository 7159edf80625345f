"""Several processes that train one run together: `finegrid train` starts itself again under torchrun, once a GPU.

The launcher is torchrun's agent (``python -m torch.distributed.run --standalone``) on one node. It reads the run's
settings and nothing else; its workers are the same command with torchrun's ``RANK`` and ``WORLD_SIZE`` in their
environment. What the first worker says is passed on to the launcher, and so is what a worker died of, through a folder
of the launcher's own: a user hears each thing once, whichever process met it first.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finegrid.errors import UserError
from finegrid.files import write_json, write_text
from finegrid.training.stopping import SIGNALS, Stop, Stopped

if TYPE_CHECKING:
    from finegrid.settings import RunSettings

FOLDER = "FINEGRID_LAUNCH"
SECONDS_BETWEEN_LOOKS = 0.2
# What a worker ends with that was asked to: the signal, as it is or as a shell tells it; or torchrun kills it after.
ASKED_TO_END = {code for number in (*SIGNALS, signal.SIGQUIT, signal.SIGKILL) for code in (-number, 128 + number)}


class ProcessFailed(Exception):
    """A worker ended before its work was done; the message says which and of what."""


def is_needed(settings: RunSettings) -> bool:
    """Return whether a run needs torchrun: several GPUs, or DeepSpeed (which expects it for one process too)."""
    return settings.gpus > 1 or bool(settings.training_args.get("deepspeed"))


def check_gpus(settings: RunSettings, visible: int) -> None:
    """Check that the machine shows as many GPUs as the recipe asks for; without any, the processes train on the CPU.

    Raises:
        UserError: names both numbers.
    """
    if visible and settings.gpus > visible and not settings.training_args.get("use_cpu"):
        raise UserError(
            f"gpus: the recipe asks for {settings.gpus}, but this machine shows {visible}; expected no more than it "
            "shows (a job of a cluster sees those it was given, and CUDA_VISIBLE_DEVICES hides others)"
        )


def start(settings: RunSettings, command: Sequence[str], say: Callable[[str], None], stop: Stop) -> None:
    """Run ``finegrid <command>`` in ``settings.gpus`` processes; return when all of them ended well.

    Args:
        say: gets each line of progress of the first process.
        stop: a signal that asks the launcher to end is passed on to the workers, which save and end together.

    Raises:
        UserError: what a worker raised; or the machine has too few GPUs.
        ProcessFailed: a worker crashed, or was killed.
        Stopped: the launcher was asked to end, and its workers have ended.
    """
    import torch

    visible = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    check_gpus(settings, visible)
    on_cpu = bool(settings.training_args.get("use_cpu")) or not visible
    if on_cpu and settings.gpus > 1:
        say(f"{settings.gpus} processes on the CPU")
    with tempfile.TemporaryDirectory(prefix="finegrid-") as folder, _environment(settings, folder, on_cpu):
        stop.pass_on = functools.partial(_pass_on, Path(folder), settings.gpus)
        with _following(Path(folder), say):
            failures = _torchrun(settings.gpus, command)
        stop.pass_on = None
        if stop.asked and set(failures.values()) <= ASKED_TO_END:
            raise Stopped(stop.asked)
        if failures:
            _raise_what_happened(Path(folder), failures, settings.gpus)


def _pass_on(folder: Path, processes: int, number: signal.Signals) -> None:
    """Send a signal to the workers; torchrun itself would kill them after a while, whatever they are doing."""
    workers = [int(path.read_text()) for path in folder.glob("pid-*")]
    if len(workers) < processes:
        from torch.distributed.elastic.multiprocessing.api import SignalException

        raise SignalException(f"{number.name} while the processes start", number)  # torchrun ends those that it knows
    for worker in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, number)


def _torchrun(processes: int, command: Sequence[str]) -> dict[int, int]:
    """Return the exit codes of failed processes by rank; a signal's number is negative."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # The address by number: the name of a machine need not be known to itself. The port is any free one.
    options = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(processes)]
    options += ["--signals-to-handle", "SIGQUIT"]  # the others are passed on by this process
    arguments = run.parse_args([*options, "-m", "finegrid.cli"])
    arguments.training_script_args = list(command)  # torchrun would take `--log` for an option of its own
    try:
        run.run(arguments)
    except ChildFailedError as error:
        return {rank: failure.exitcode for rank, failure in error.failures.items()}
    except SignalException as error:
        return {0: -error.sigval}
    return {}


@contextlib.contextmanager
def _environment(settings: RunSettings, folder: str, on_cpu: bool) -> Iterator[None]:
    before = dict(os.environ)
    os.environ[FOLDER] = folder
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // settings.gpus)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else each try of IPv6 before IPv4 is a warning
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _following(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Pass on the lines that the first worker writes, while the block runs."""
    lines = folder / "lines"
    lines.touch()
    ended = threading.Event()

    def follow() -> None:
        with lines.open(encoding="utf-8") as file:
            last = False
            while not last:
                last = ended.wait(SECONDS_BETWEEN_LOOKS)
                for line in file.read().splitlines():
                    say(line)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _raise_what_happened(folder: Path, failures: dict[int, int], processes: int) -> None:
    """Raise what the workers left behind: a mistake of the user's before a crash, the first of its kind."""
    reports = sorted(folder.glob("failed-*.json"), key=lambda path: path.stat().st_mtime_ns)
    found = [json.loads(path.read_text(encoding="utf-8")) for path in reports]
    for report in found:
        if report["problems"]:
            raise UserError(*report["problems"])
    for report in found:
        raise ProcessFailed(f"process {report['rank'] + 1} of {processes}: {report['error']}")
    # torchrun ends the others when one has failed.
    rank, code = min(failures.items(), key=lambda failure: failure[1] == -signal.SIGTERM)
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    hint = "; out of memory?" if code == -signal.SIGKILL else ""
    raise ProcessFailed(f"process {rank + 1} of {processes} {how}{hint}")


# ---------------------------------------------------------------- in a worker


@dataclass(frozen=True)
class Worker:
    """This process, as torchrun started it; ``folder`` is None where torchrun was called by hand."""

    rank: int
    folder: Path | None

    def say(self, line: str) -> None:
        """Pass a line of progress on to the launcher; the first process speaks for all."""
        if self.rank:
            return
        if self.folder is None:
            print(line, flush=True)
            return
        with (self.folder / "lines").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def fail(self, error: Exception) -> None:
        """Leave word of what ended this process."""
        problems = error.problems if isinstance(error, UserError) else []
        if self.folder is not None:
            report = {"rank": self.rank, "problems": problems, "error": f"{type(error).__name__}: {error}"}
            write_json(self.folder / f"failed-{self.rank}.json", report)
        elif not self.rank:
            print(error, file=sys.stderr, flush=True)


def this_worker() -> Worker | None:
    """Return this process's place among the workers, or None if torchrun didn't start it.

    A worker dies with its launcher, so that none trains on, and writes, beside the run that takes its place.
    """
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
        return None
    folder = os.environ.get(FOLDER)
    if folder and sys.platform == "linux":
        import ctypes

        parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)
    if folder:
        write_text(Path(folder) / f"pid-{os.environ['RANK']}", str(os.getpid()))
    return Worker(int(os.environ["RANK"]), Path(folder) if folder else None)


def leave() -> None:
    """End the processes' connection; to be called by each when nothing is left to do together."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
