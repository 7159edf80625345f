"""The snakemake processes that work on a study, and what one that was killed left behind.

Each writes who it is into ``.snakemake/finegrid/controllers/`` when it starts its first job, and removes that at its
end; one that was killed can't. From these files a second snakemake says who holds the folder, and ``finegrid orphans``
(``make orphans``) finds what a dead one left: processes of this machine, and jobs of Slurm.
"""

from __future__ import annotations

import atexit
import contextlib
import getpass
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finegrid.files import write_json

FOLDER = Path(".snakemake/finegrid/controllers")
LOCKS = Path(".snakemake/locks")
LOOKS_ONLY = ("-n", "--dry-run", "--dryrun", "--unlock")
SECONDS_FOR_AN_END = 60.0  # a training that is asked to end saves a checkpoint first
SECONDS_OF_A_CLOCK = 2.0
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE"}


# ---------------------------------------------------------------- controllers


def begin(study: str) -> None:
    """Write down that this process works on a study; to be called when it has snakemake's lock."""
    import psutil

    for path, record in _records():
        if _is_here(record) and not _is_alive(record):
            path.unlink(missing_ok=True)
    path = FOLDER / f"{socket.gethostname()}-{os.getpid()}.json"
    record = {
        "study": study,
        "node": socket.gethostname(),
        "pid": os.getpid(),
        "process_started": psutil.Process().create_time(),
        "user": getpass.getuser(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    write_json(path, record)
    atexit.register(_end, path, os.getpid())


def _end(path: Path, pid: int) -> None:
    if os.getpid() == pid:
        path.unlink(missing_ok=True)


def others(study: str) -> list[dict[str, Any]]:
    """Return the controllers of a study that began and did not come to their end, dead or alive."""
    return [record for _, record in _records() if record["study"] == study and record["pid"] != os.getpid()]


def tell_of_others(study: str, arguments: list[str]) -> None:
    """Say who works on a study, or died over it, where snakemake's lock will not let this process do so too."""
    if set(arguments) & set(LOOKS_ONLY) or not LOCKS.is_dir() or not any(LOCKS.iterdir()):
        return
    for record in others(study):
        if not _is_here(record):
            what = f"holds study {study}. Look after it there; `make orphans STUDY={study}` there frees the study"
        elif _is_alive(record):
            what = (
                f"works on study {study}. Wait for its end (`finegrid watch {study}`), or end it with "
                f"`kill -INT {record['pid']}`. Do not unlock"
            )
        else:
            what = (
                f"was killed while it worked on study {study}. `make orphans STUDY={study}` shows which of its jobs "
                "still run, keeps or ends them, and then unlocks"
            )
        print(f"locked: {describe(record)}, {what}.", file=sys.stderr)


def describe(record: dict[str, Any]) -> str:
    """Return who a controller is: user, process, machine, since when and by which command."""
    since = datetime.fromisoformat(record["started"]).astimezone().strftime("%d %b %H:%M:%S")
    return (
        f"the snakemake of {record['user']}, process {record['pid']} on {record['node']} since {since} "
        f"(`{record['command']}`)"
    )


def _records() -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(FOLDER.glob("*.json")):
        with contextlib.suppress(OSError, ValueError):
            yield path, json.loads(path.read_text(encoding="utf-8"))


def _is_here(record: dict[str, Any]) -> bool:
    return record["node"] == socket.gethostname()


def _is_alive(record: dict[str, Any]) -> bool:
    import psutil

    try:
        process = psutil.Process(record["pid"])
        same = abs(process.create_time() - record["process_started"]) < SECONDS_OF_A_CLOCK
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# ---------------------------------------------------------------- what they left


@dataclass(frozen=True)
class Orphan:
    """A process of this machine, or a job of Slurm, that nothing waits for.

    Attributes:
        name: its command, or the job's name.
        pid: of the process; None for a job.
        job: number in Slurm; None for a process.
        state: of the job, in Slurm's words.
    """

    name: str
    pid: int | None = None
    job: str | None = None
    state: str = "RUNNING"

    def __str__(self) -> str:
        place = f"Slurm job {self.job}, {self.state.lower()}" if self.job else f"process {self.pid}"
        return f"{place}: {self.name}"


def orphans(study: str) -> list[Orphan]:
    """Return what runs for a study of this folder without a snakemake that waits for it."""
    return [*_processes(study), *_jobs(study)]


def _processes(study: str) -> list[Orphan]:
    """Return the stages that a snakemake of this folder started and that outlive it, the topmost process of each."""
    import psutil

    here, found = Path.cwd().resolve(), {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            command, environment = process.cmdline(), process.environ()
            wanted = environment.get("FINEGRID_STUDY") == study and "SLURM_JOB_ID" not in environment
            if wanted and Path(process.cwd()).resolve() == here and _stage(command):
                parents = process.parents()
                if not any(_is_snakemake(parent) for parent in parents):
                    found[process.pid] = (shlex.join(["finegrid", *_stage(command)]), {each.pid for each in parents})
    return [Orphan(name, pid=pid) for pid, (name, parents) in sorted(found.items()) if not parents & found.keys()]


def _stage(command: list[str]) -> list[str]:
    """Return the arguments of a `finegrid …` command line without those of the log; empty if it is another."""
    names = [Path(part).name for part in command[:4]]
    for place, name in enumerate(names):
        if name == "finegrid" or command[place] == "finegrid.cli":
            arguments = command[place + 1 :]
            return arguments[: arguments.index("--log")] if "--log" in arguments else arguments
    return []


def _is_snakemake(process: Any) -> bool:
    import psutil

    with contextlib.suppress(psutil.Error):
        return any(Path(part).name == "snakemake" for part in process.cmdline()[:4])
    return False


def _jobs(study: str) -> list[Orphan]:
    here, found = Path.cwd().resolve(), []
    command = ["squeue", "--noheader", f"--user={getpass.getuser()}", "--format=%i|%T|%j|%Z"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
    for line in lines:
        number, state, name, folder = line.split("|", 3)
        # A job's name ends with its study; those of data and models are of any.
        of_another = name.count(".") > 1 and not name.endswith(f".{study}")
        if Path(folder).resolve() == here and state not in ENDED and not of_another:
            found.append(Orphan(name, job=number, state=state))
    return found


def end(found: list[Orphan], say: Callable[[str], None]) -> None:
    """End processes and jobs and wait until they have; trainings save a checkpoint before."""
    import psutil

    jobs = [each.job for each in found if each.job]
    if jobs:
        subprocess.run(["scancel", *jobs], check=False)
    processes = []
    for each in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            if each.pid:
                process = psutil.Process(each.pid)
                children = process.children(recursive=True)
                process.send_signal(signal.SIGTERM)
                process.send_signal(signal.SIGCONT)
                processes += [process, *children]
    _, left = psutil.wait_procs(processes, SECONDS_FOR_AN_END)
    for process in left:
        say(f"process {process.pid} does not end: killed")
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, 10)
    limit = time.monotonic() + SECONDS_FOR_AN_END
    while jobs and _queued(jobs) and time.monotonic() < limit:
        time.sleep(1)


def _queued(jobs: list[str]) -> list[str]:
    """Return those of some jobs that have not ended."""
    command = ["squeue", "--noheader", "--format=%i|%T", f"--jobs={','.join(jobs)}"]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout.splitlines()
    return [line.split("|")[0] for line in lines if line.split("|")[1] not in ENDED]


def wait_for_stages(found: list[Orphan], say: Callable[[str], None]) -> None:
    """Wait for the processes that a new snakemake would start beside themselves: all but trainings, which wait."""
    import psutil

    for each in found:
        if each.pid and not each.name.startswith(("finegrid train ", "finegrid train-pack ")):
            say(f"waiting for the end of {each}")
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(each.pid).wait()


def unlock(study: str) -> bool:
    """Remove snakemake's lock and what is written of dead controllers; return whether that went well."""
    command = [sys.executable, "-m", "snakemake", "--unlock", "--config", f"study={study}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout + done.stderr, file=sys.stderr)
        return False
    for path, record in _records():
        if _is_here(record) and not _is_alive(record):
            path.unlink(missing_ok=True)
    return True


def alive() -> list[dict[str, Any]]:
    """Return the controllers of this folder that live, or that are on another machine and might.

    Those of other studies too: unlocking takes the locks of all.
    """
    return [record for _, record in _records() if not _is_here(record) or _is_alive(record)]
