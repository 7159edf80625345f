"""No run is trained by two processes at once: a lock of its scratch folder, which a dead holder does not keep.

A controller that was killed leaves its jobs running, and the next one starts them again; a job may be put back into the
queue while its old node still works; a user may type the command twice. The second process waits, says who holds the
run and how to end that, and goes on from the checkpoint, or finds the run trained.

Two things make the lock, in ``scratch/<study>/.locks/``: an owner file that only one process can create, which says
who it is; and, where the file system has it, an operating system's lock, which ends with its process. The holder of an
owner file is dead when

- it was on this machine and its process is gone;
- it was in a Slurm job that no longer runs;
- nobody can tell, and for three minutes it gave no sign of life (``state.json``, see :mod:`finegrid.training.state`),
  by the file server's own clock, since those of two machines differ.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from finegrid.times import duration

SECONDS_WITHOUT_A_SIGN = 180.0
SECONDS_OF_A_JOB_BEFORE = 30.0  # the same job, put back into the queue: its processes have ended by then
SECONDS_BETWEEN_LOOKS = 2.0
SECONDS_BETWEEN_WORDS = 600.0
SECONDS_OF_A_CLOCK = 2.0  # a process's start is known by the machine's clock, which is set now and then
RUNNING = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "CONFIGURING", "STAGE_OUT", "SIGNALING", "RESIZING"}


class RunLock:
    """The lock of one run, as a context; entering it waits until no other process holds it.

    Args:
        folder: the study's scratch folder.
        run: the run's id.
        say: gets a line when somebody else holds the lock, every ten minutes, and when it is free.

    Attributes:
        waited: whether another process held it.
    """

    def __init__(self, folder: Path, run: str, say: Callable[[str], None]):
        self.run = run
        self.say = say
        self.waited = False
        self._owner = folder / ".locks" / f"{run}.json"
        self._state = folder / run / "state.json"
        self._token = uuid.uuid4().hex
        self._lock = FileLock(self._owner.with_suffix(".lock"), timeout=0, thread_local=False, fallback_to_soft=False)
        self._spoken: float | None = None

    def __enter__(self) -> RunLock:
        self._owner.parent.mkdir(parents=True, exist_ok=True)
        while not self._take():
            time.sleep(SECONDS_BETWEEN_LOOKS)
        if self.waited:
            self.say("the other process has ended")
        return self

    def __exit__(self, *error) -> None:
        if read_owner(self._owner).get("token") == self._token:
            self._owner.unlink(missing_ok=True)
        if self._lock.is_locked:
            Path(self._lock.lock_file).unlink(missing_ok=True)  # while it is held: who waits for it looks again
            self._lock.release(force=True)

    def _take(self) -> bool:
        free = self._take_system_lock()
        owner = read_owner(self._owner)
        if owner:
            reason = self._why_dead(owner)
            if reason:
                self.say(f"taking over from {describe(owner)}: {reason}")
                self._put_away(owner, free)
            else:
                self._speak(owner)
        elif self._owner.exists() and self._silence(self._owner) > SECONDS_WITHOUT_A_SIGN:
            self._owner.unlink(missing_ok=True)  # never written to its end
        if free is not False and self._create():
            return True
        self._lock.release(force=True)
        return False

    def _take_system_lock(self) -> bool | None:
        """Return whether the operating system gave its lock; None if it has none for this file system."""
        try:
            self._lock.acquire()
        except Timeout:
            return False
        except (OSError, NotImplementedError):
            return None
        return True

    def _create(self) -> bool:
        """Create the owner file; False if another process was faster."""
        record = json.dumps(self._record()) + "\n"
        mine = self._owner.with_suffix(f".{self._token}")
        mine.write_text(record)
        try:
            os.link(mine, self._owner)  # whole or not at all, and by one process alone, on network file systems too
        except FileExistsError:
            return False
        except OSError:  # no hard links here
            try:
                with self._owner.open("x") as file:
                    file.write(record)
            except FileExistsError:
                return False
        finally:
            mine.unlink(missing_ok=True)
        return True

    def _record(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "node": socket.gethostname(),
            "pid": os.getpid(),
            "process_started": psutil.Process().create_time(),
            "job": os.environ.get("SLURM_JOB_ID"),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "token": self._token,
        }

    def _why_dead(self, owner: dict[str, Any]) -> str | None:
        """Return how it is known that an owner is dead; None if it lives, or might."""
        if owner["node"] == socket.gethostname():
            return None if is_alive(owner["pid"], owner["process_started"]) else "its process is gone"
        silence = self._silence(self._owner, self._state)
        if owner["job"] and owner["job"] == os.environ.get("SLURM_JOB_ID"):
            return "this job was put back into the queue" if silence > SECONDS_OF_A_JOB_BEFORE else None
        runs = job_runs(owner["job"]) if owner["job"] else None
        if runs is not None:
            return None if runs else f"Slurm job {owner['job']} has ended"
        return f"no sign of life for {duration(silence)}" if silence > SECONDS_WITHOUT_A_SIGN else None

    def _silence(self, *signs: Path) -> float:
        """Return the seconds since the last of some files was written, by the clock of the file server."""
        probe = self._owner.with_suffix(f".{self._token}")
        probe.touch()
        try:
            now = probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)
        return min((now - path.stat().st_mtime for path in signs if path.exists()), default=0.0)

    def _put_away(self, owner: dict[str, Any], free: bool | None) -> None:
        """Remove a dead owner's file, by one process alone; and the lock that a file server still keeps for it."""
        away = self._owner.with_suffix(f".{self._token}")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self._owner, away)
            if read_owner(away).get("token") != owner["token"]:  # another was faster, and lives
                with contextlib.suppress(FileExistsError):
                    os.link(away, self._owner)
            elif free is False and owner["node"] != socket.gethostname():
                Path(self._lock.lock_file).unlink(missing_ok=True)
        away.unlink(missing_ok=True)

    def _speak(self, owner: dict[str, Any]) -> None:
        now = time.monotonic()
        self.waited = True
        if self._spoken is not None and now - self._spoken < SECONDS_BETWEEN_WORDS:
            return
        self._spoken = now
        end = f"scancel {owner['job']}" if owner["job"] else f"kill {owner['pid']}"
        place = "" if owner["job"] or owner["node"] == socket.gethostname() else f" on {owner['node']}"
        silence = duration(self._silence(self._owner, self._state))
        self.say(
            f"already being trained by {describe(owner)}, last sign of life {silence} ago; waiting until "
            f"that ends. To end it: `{end}`{place}, and this one goes on from its checkpoint"
        )


def read_owner(path: Path) -> dict[str, Any]:
    """Return an owner file's content; empty if there is none, or none that is whole."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    needed = {"node", "pid", "process_started", "job", "started", "token"}
    return content if isinstance(content, dict) and needed <= content.keys() else {}


def describe(owner: dict[str, Any]) -> str:
    """Return who a process is: ``process 12 on node1 (Slurm job 3), since 24 Nov 12:03:04``."""
    since = datetime.fromisoformat(owner["started"]).astimezone().strftime("%d %b %H:%M:%S")
    job = f" (Slurm job {owner['job']})" if owner["job"] else ""
    return f"process {owner['pid']} on {owner['node']}{job}, since {since}"


def is_alive(pid: int, started: float) -> bool:
    """Return whether a process of this machine is still the one that was started at that time (of the epoch)."""
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started) < SECONDS_OF_A_CLOCK
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def job_runs(job: str) -> bool | None:
    """Return whether a Slurm job's processes may be running; None if Slurm can't be asked."""
    command = ["squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    if done.returncode:
        return False if re.search(r"invalid job id", done.stderr, re.IGNORECASE) else None
    return bool(RUNNING & set(done.stdout.split()))
