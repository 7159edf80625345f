"""Several processes that train one run together: `finegrid train` starts itself again under torchrun, once a GPU.

The launcher is torchrun's agent (``python -m torch.distributed.run``). On one node it is `finegrid train` itself; on
several it runs ``srun`` in its Slurm job, which starts this module as an agent on each node, and the agents meet at a
rendezvous (c10d) on the job's first node. It reads the run's settings and nothing else; its workers are the same
command with torchrun's ``RANK`` and ``WORLD_SIZE`` in their environment. What the first worker says is passed on to the
launcher, and so is what a worker died of, through a folder of the launcher's own (on several nodes one that all of them
see): a user hears each thing once, whichever process met it first.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

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
    """Return whether a run needs torchrun: several processes, or DeepSpeed or FSDP (which expect it for one too)."""
    return settings.processes > 1 or any(settings.training_args.get(key) for key in ("deepspeed", "fsdp"))


def check_gpus(gpus: int, visible: int, use_cpu: bool = False) -> None:
    """Check that the machine shows as many GPUs as the recipe asks for; without any, the processes train on the CPU.

    Raises:
        UserError: names both numbers.
    """
    if visible and gpus > visible and not use_cpu:
        raise UserError(
            f"gpus: the recipe asks for {gpus}, but this machine shows {visible}; expected no more than it "
            "shows (a job of a cluster sees those it was given, and CUDA_VISIBLE_DEVICES hides others)"
        )


def check_nodes(nodes: int) -> None:
    """Check that this is a Slurm job with as many nodes as the recipe asks for.

    Raises:
        UserError: names both numbers.
    """
    given = os.environ.get("SLURM_JOB_NUM_NODES") or os.environ.get("SLURM_NNODES")
    if given is None:
        raise UserError(
            f"nodes: the recipe asks for {nodes}, but this is no job of Slurm, whose srun starts the processes; "
            "expected `snakemake --profile slurm`, or `sbatch --nodes`"
        )
    if int(given) != nodes:
        raise UserError(
            f"nodes: the recipe asks for {nodes}, but this job has {given}; expected as many (`sbatch --nodes={nodes}`)"
        )


def start(settings: RunSettings, command: Sequence[str], say: Callable[[str], None], stop: Stop, shared: Path) -> None:
    """Run ``finegrid <command>`` in ``settings.processes`` processes; return when all of them ended well.

    Args:
        say: gets each line of progress of the first process.
        stop: a signal that asks the launcher to end is passed on to the workers, which save and end together.
        shared: folder that all nodes see.

    Raises:
        UserError: what a worker raised; or the job has too few nodes, or a machine too few GPUs.
        ProcessFailed: a worker crashed, or was killed.
        Stopped: the launcher was asked to end, and its workers have ended.
    """
    use_cpu, several = bool(settings.training_args.get("use_cpu")), settings.nodes > 1
    if several:
        check_nodes(settings.nodes)
        shared.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".launch-", dir=shared if several else None) as folder:
        folder = Path(folder).resolve()
        with _following(folder, say):
            if several:
                failures = _on_nodes(settings, folder, command, stop)
            else:
                failures = _on_this_node(settings.gpus, use_cpu, folder, command, say, stop)
        stop.pass_on = None
        if stop.asked and set(failures.values()) <= ASKED_TO_END:
            raise Stopped(stop.asked)
        if failures:
            _raise_what_happened(folder, failures, settings.processes)


def _on_this_node(
    gpus: int,
    use_cpu: bool,
    folder: Path,
    command: Sequence[str],
    say: Callable[[str], None],
    stop: Stop,
    meeting: Sequence[str] = (),
) -> dict[int, int]:
    """Run the workers of this node; return the exit codes of those that failed, by rank.

    Args:
        meeting: torchrun's options on where the nodes meet; nothing for one node.
    """
    import torch

    visible = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    check_gpus(gpus, visible, use_cpu)
    on_cpu = use_cpu or not visible
    if on_cpu and gpus > 1:
        say(f"{gpus} processes on the CPU")
    with _environment(gpus, folder, on_cpu):
        stop.pass_on = functools.partial(_pass_on, folder, gpus)
        return _torchrun(gpus, command, meeting)


def _pass_on(folder: Path, processes: int, number: signal.Signals) -> None:
    """Send a signal to this node's workers; torchrun itself would kill them after a while, whatever they are doing."""
    workers = [int(path.read_text()) for path in folder.glob(f"pid-{_node()}-*")]
    if len(workers) < processes:
        from torch.distributed.elastic.multiprocessing.api import SignalException

        raise SignalException(f"{number.name} while the processes start", number)  # torchrun ends those that it knows
    for worker in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, number)


def _torchrun(processes: int, command: Sequence[str], meeting: Sequence[str] = ()) -> dict[int, int]:
    """Return the exit codes of failed processes by rank; a signal's number is negative."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # The address by number: the name of a machine need not be known to itself. The port is any free one.
    options = [*(meeting or ("--standalone", "--local-addr", "127.0.0.1")), "--nproc-per-node", str(processes)]
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
def _environment(processes: int, folder: Path, on_cpu: bool) -> Iterator[None]:
    before = dict(os.environ)
    os.environ[FOLDER] = str(folder)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else each try of IPv6 before IPv4 is a warning
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _beside(work: Callable[[], None], ended: threading.Event) -> Iterator[None]:
    """Let a thread work while the block runs, until the event says that the block has ended."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


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

    with _beside(follow, ended):
        yield


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


# ---------------------------------------------------------------- several nodes


def _on_nodes(settings: RunSettings, folder: Path, command: Sequence[str], stop: Stop) -> dict[int, int]:
    """Start an agent on each node of this Slurm job; return the exit codes of failed workers by rank.

    Slurm itself tells every process of the job when its time is over; any other request is passed on through the
    folder, since srun would take a signal as an order to kill.
    """
    first = _hosts(os.environ["SLURM_JOB_NODELIST"])[0]
    task = {
        "gpus": settings.gpus,
        "nodes": settings.nodes,
        "use_cpu": bool(settings.training_args.get("use_cpu")),
        "endpoint": f"{_address(first)}:{_free_port()}",
        "first": first,
        "id": f"{os.environ['SLURM_JOB_ID']}-{os.environ.get('SLURM_RESTART_COUNT', 0)}",
        "command": list(command),
    }
    write_json(folder / "task.json", task)
    stop.pass_on = lambda number: write_text(folder / "asked", number.name)
    srun = ["srun", f"--nodes={settings.nodes}", f"--ntasks={settings.nodes}", "--ntasks-per-node=1", "--overlap"]
    srun += ["--kill-on-bad-exit=1", "--cpu-bind=none", "--mpi=none", "--input=none"]
    if os.environ.get("SLURM_CPUS_PER_TASK"):  # newer versions of srun don't look for it
        srun.append(f"--cpus-per-task={os.environ['SLURM_CPUS_PER_TASK']}")
    srun += [sys.executable, "-m", "finegrid.training.launch", str(folder)]
    status = subprocess.Popen(srun, preexec_fn=_die_with_parent).wait()
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("failures-*.json"))]
    failures = {int(rank): code for part in found for rank, code in part.items()}
    return failures or ({0: status} if status else {})


def agent(folder: Path) -> int:
    """Run the workers of one of several nodes, as srun starts it there; return the exit status."""
    task = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    meeting = ["--nnodes", str(task["nodes"]), "--rdzv-backend", "c10d", "--rdzv-endpoint", task["endpoint"]]
    meeting += ["--rdzv-id", task["id"], "--rdzv-conf", f"is_host={int(_node() == task['first'])}"]
    meeting += ["--local-addr", _address(_node())]
    with Stop() as stop, _listening(folder / "asked", stop):
        try:
            failures = _on_this_node(
                task["gpus"], task["use_cpu"], folder, task["command"], lambda line: None, stop, meeting
            )
        except UserError as error:
            report = {"rank": 0, "problems": [f"{_node()}: {problem}" for problem in error.problems], "error": ""}
            write_json(folder / f"failed-{_node()}.json", report)
            failures = {0: 1}
        except Exception:  # the nodes' meeting breaks up when one has left it
            if not stop.asked:
                raise
            failures = {0: -stop.asked}
        stop.pass_on = None
    write_json(folder / f"failures-{_node()}.json", failures)
    return int(bool(failures) and not stop.asked)  # srun kills the others when one fails


@contextlib.contextmanager
def _listening(file: Path, stop: Stop) -> Iterator[None]:
    """Pass a request that the launcher left in the file on to this process, unless Slurm has."""
    ended = threading.Event()

    def listen() -> None:
        while not ended.wait(SECONDS_BETWEEN_LOOKS):
            if file.exists():
                if not stop.asked:
                    os.kill(os.getpid(), getattr(signal, file.read_text(encoding="utf-8")))
                return

    with _beside(listen, ended):
        yield


def _node() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _hosts(nodelist: str) -> list[str]:
    return _scontrol("show", "hostnames", nodelist).split()


def _address(node: str) -> str:
    """Return the address by which Slurm itself reaches a node: its name need not be known to the others."""
    found = re.search(r"\bNodeAddr=(\S+)", _scontrol("show", "node", node))
    return found[1] if found else node


def _scontrol(*words: str) -> str:
    done = subprocess.run(["scontrol", *words], capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        raise ProcessFailed(f"scontrol {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def _free_port() -> int:
    """Return a port that nobody listens on, on the job's first node: a job's script runs there."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _die_with_parent() -> None:
    if sys.platform == "linux":
        import ctypes

        parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGTERM)


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
        write_text(Path(folder) / f"pid-{_node()}-{os.environ['RANK']}", str(os.getpid()))
    return Worker(int(os.environ["RANK"]), Path(folder) if folder else None)


def leave(status: int) -> NoReturn:
    """End one of several processes, when nothing is left to do in it.

    At once, without taking apart what the libraries have: now and then a thread of the connection was still at work
    there, and a run whose results were all written was ended by SIGABRT (seen on the CPU, over gloo).
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    raise SystemExit(agent(Path(sys.argv[1])))
