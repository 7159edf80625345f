"""A real Slurm of the tests' own on this machine: controller, node daemon, GPUs that are none, in one folder.

It shares nothing with another Slurm or munge that may run here: folders, sockets, key, ports and node name are its own,
and what talks to it finds it by ``SLURM_CONF``. The daemons are children of this process and end with it, also when it
is killed. Several of them can run side by side, one a test process.
"""

from __future__ import annotations

import contextlib
import ctypes
import getpass
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

GPUS = 4
GPU_MODEL = "a100"
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun")
# How long is waited for what comes soon on a free machine; a busy one takes many times as long.
SECONDS_TO_BE_UP = 180
SECONDS_TO_END = 60
SECONDS_TO_SETTLE = 5

# Memory is enforced by sampling each second, since control groups are not ours to use in a container; a job that takes
# more than it asked for is killed, as on a cluster. Finished jobs stay in `squeue` (MinJobAge), for there is no
# accounting data base. Each node is said to have CPUs for its GPUs' jobs and two more: a machine with two cores
# that is sent a dozen jobs at a time works on none of them well. Slurm's own patience with its daemons and with jobs
# that start is that of an idle machine; a job that it loses patience with is started twice.
SLURM_CONF = """\
ClusterName=finegrid
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/controller
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
TaskProlog={folder}/bin/begin
TaskEpilog={folder}/bin/end
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=500
SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=1
ReturnToService=2
SlurmdTimeout={node_timeout}
MinJobAge=3600
MessageTimeout=60
BatchStartTimeout=180
UnkillableStepTimeout=300
KillWait={kill_wait}
JobRequeue=1
MpiDefault=none
GresTypes=gpu
SlurmdParameters=config_overrides
{nodes}
PartitionName=cpu Nodes=ALL Default=YES MaxTime=1440 State=UP
PartitionName=gpu Nodes=ALL MaxTime=1440 State=UP
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} Boards=1 SocketsPerBoard=1 "
    "CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=64000 Gres=gpu:{model}:{gpus} State=UNKNOWN"
)


def why_not() -> str | None:
    """Return why Slurm can't be started here, or None."""
    missing = [name for name in PROGRAMS if program(name) is None]
    if missing:
        return f"{', '.join(missing)} not found: install Slurm and munge (Debian: slurm-wlm, munge)"
    if sys.platform != "linux":
        return "Slurm needs Linux"
    return None


def program(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]))


class Occupied(NamedTuple):
    """A job's time, in seconds since 1970, and the GPUs that its tasks saw, as `node:number`."""

    job: str
    begin: float
    end: float
    devices: frozenset[str]


class Slurm:
    """A running Slurm; `with Slurm() as slurm:` ends it with all its jobs and removes its folder.

    Args:
        nodes: node daemons, all on this machine; the four GPUs are divided among them.
        kill_wait: seconds between SIGTERM and SIGKILL when a job's time is over or it is cancelled; Slurm's default.
        node_timeout: seconds until a node that doesn't answer counts as down by itself.
    """

    def __init__(self, nodes: int = 1, kill_wait: int = 30, node_timeout: int = 300):
        self.folder = Path(tempfile.mkdtemp(prefix="finegrid-slurm-"))  # short: it holds sockets
        self.folder.chmod(0o711)  # munged wants its socket to be within everybody's reach
        self.nodes = [f"node{number + 1}" for number in range(nodes)]
        self.environment = os.environ | {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": f"{self.folder}/bin{os.pathsep}{os.environ['PATH']}",
        }
        self.daemons: dict[str, subprocess.Popen] = {}
        self._write_configuration(kill_wait, node_timeout)

    def __enter__(self) -> Slurm:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def _write_configuration(self, kill_wait: int, node_timeout: int) -> None:
        folder, host = self.folder, socket.gethostname().partition(".")[0]
        ports = free_ports(1 + len(self.nodes))
        each = GPUS // len(self.nodes)
        lines, gpus = [], ["AutoDetect=off"]
        for index, name in enumerate(self.nodes):
            self._spool(name).mkdir()
            lines.append(
                NODE.format(name=name, host=host, port=ports[1 + index], cpus=each + 2, model=GPU_MODEL, gpus=each)
            )
            files = f"{folder}/gpu[{index * each}-{index * each + each - 1}]"
            gpus.append(f"NodeName={name} Name=gpu Type={GPU_MODEL} File={files}")
        for number in range(GPUS):
            (folder / f"gpu{number}").symlink_to("/dev/null")  # any character device will do
        (folder / "controller").mkdir()
        (folder / "slurm.conf").write_text(
            SLURM_CONF.format(
                folder=folder,
                host=host,
                controller_port=ports[0],
                user=getpass.getuser(),
                kill_wait=kill_wait,
                node_timeout=node_timeout,
                nodes="\n".join(lines),
            )
        )
        (folder / "gres.conf").write_text("\n".join(gpus) + "\n")
        (folder / "bin").mkdir()
        for word in ("begin", "end"):
            told = f"$SLURM_JOB_ID {word} $(date +%s.%N) $SLURMD_NODENAME ${{CUDA_VISIBLE_DEVICES:--}}"
            self._write_script(word, f'echo "{told}" >> {folder}/tasks')
        # Snakemake's job step calls srun without the variables SLURM_*: its srun must find the file without them.
        self._write_script("srun", f'SLURM_CONF={folder}/slurm.conf exec {program("srun")} "$@"')
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)

    def _write_script(self, name: str, line: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)

    # ---------------------------------------------------------------- start and stop

    def start(self) -> None:
        """Start the daemons; returns when all nodes wait for jobs.

        Raises:
            RuntimeError: that didn't happen; with the ends of the daemons' logs.
        """
        folder = self.folder
        munged = ["munged", "--foreground", "--num-threads=1", f"--key-file={folder}/munge.key"]
        munged += [f"--{name}={folder}/munge.{name.partition('-')[0]}" for name in ("socket", "pid-file", "seed-file")]
        self._spawn("munged", [*munged, f"--log-file={folder}/munged.log"])
        self._wait_until((folder / "munge.socket").exists, "munged")
        self._spawn("slurmctld", ["slurmctld", "-D", "-c"])
        for name in self.nodes:
            self.start_node(name)
        self._wait_until(lambda: self.node_states() == dict.fromkeys(self.nodes, "idle"), "Slurm")

    def start_node(self, name: str) -> None:
        """Start a node's daemon."""
        self._spawn(name, ["slurmd", "-D", "-N", name], self._spool(name))

    def kill_node(self, name: str) -> None:
        """Let a node die as by a power cut: its daemon and everything that its jobs started."""
        daemon = self.daemons.pop(name)
        daemon.kill()
        daemon.wait()
        for process in Path("/proc").glob("[0-9]*"):  # what would tell the controller how the jobs ended
            with contextlib.suppress(OSError):
                stepd = (process / "comm").read_text() == "slurmstepd\n"
                if stepd and (process / "cwd").readlink() == self._spool(name):
                    os.kill(int(process.name), signal.SIGKILL)
        self._kill_processes(name)
        # What the controller does by itself when SlurmdTimeout is over.
        self.run("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=no answer")

    def revive_node(self, name: str) -> None:
        """Bring a dead node back."""
        self.start_node(name)

        def is_back() -> bool:
            state = self.node_states().get(name)
            if state == "down":
                with contextlib.suppress(RuntimeError):  # it may have registered meanwhile, which is enough
                    self.run("scontrol", "update", f"NodeName={name}", "State=RESUME")
            return state == "idle"

        self._wait_until(is_back, f"node {name}")

    def start_again(self, *jobs: str) -> None:
        """Let requeued jobs start soon; Slurm would wait two minutes, and needs some seconds.

        Else its words to the node to end the job's first try come late and end the second.
        """
        time.sleep(SECONDS_TO_SETTLE)
        for job in jobs:
            self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def stop(self) -> None:
        """End jobs and daemons, and remove the folder."""
        if "slurmctld" in self.daemons:
            subprocess.run(["scancel", "--user", getpass.getuser()], env=self.environment, check=False, timeout=60)
            self._end_of_jobs()
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self.daemons.clear()
        self._kill_processes()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _spool(self, node: str) -> Path:
        return self.folder / f"spool-{node}"

    def _spawn(self, name: str, command: list[str], folder: Path | None = None) -> None:
        with (self.folder / f"{name}.out").open("ab") as output:
            self.daemons[name] = subprocess.Popen(
                [program(command[0]), *command[1:]],
                env=self.environment,
                cwd=folder or self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=_die_with_parent,
            )

    def _wait_until(self, there, what: str) -> None:
        end = time.monotonic() + SECONDS_TO_BE_UP
        while not there():
            dead = [name for name, daemon in self.daemons.items() if daemon.poll() is not None]
            if dead or time.monotonic() > end:
                logs = "\n".join(self.end_of(path) for path in sorted(self.folder.glob("*.[lo]*[gt]")))
                raise RuntimeError(f"{what} did not start{f' ({dead[0]} ended)' if dead else ''}:\n{logs}")
            time.sleep(0.1)

    def end_of(self, path: Path, lines: int = 20) -> str:
        return "\n".join([f"--- {path.name}", *path.read_text(errors="replace").splitlines()[-lines:]])

    def _end_of_jobs(self) -> None:
        end = time.monotonic() + SECONDS_TO_END
        while time.monotonic() < end and any(job["state"] in ("RUNNING", "COMPLETING") for job in self.jobs()):
            time.sleep(0.2)

    def _kill_processes(self, node: str | None = None) -> None:
        """Kill what this Slurm's jobs (those of one node) left running: it has our SLURM_CONF in its environment."""
        ours = f"SLURM_CONF={self.environment['SLURM_CONF']}".encode()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                variables = (process / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            of_a_job = any(variable.startswith(b"SLURM_JOB_ID=") for variable in variables)
            on_node = node is None or f"SLURMD_NODENAME={node}".encode() in variables
            if ours in variables and of_a_job and on_node and int(process.name) != os.getpid():
                try:
                    os.kill(int(process.name), signal.SIGKILL)
                except ProcessLookupError:
                    continue

    # ---------------------------------------------------------------- what users type

    def run(self, *command: str) -> str:
        """Run a command of Slurm and return what it printed."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, timeout=180)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr or done.stdout}")
        return done.stdout

    def node_states(self) -> dict[str, str]:
        try:
            rows = self.run("sinfo", "--noheader", "--Node", "--format=%N %T", "--partition=cpu").split("\n")
        except RuntimeError:
            return {}
        return dict(row.split() for row in rows if row)

    def jobs(self) -> list[dict[str, str]]:
        """Return all jobs, finished ones too: number, name, comment, state, partition, and what `scontrol` shows."""
        return [
            _job(line) for line in self.run("scontrol", "--oneliner", "show", "job").splitlines() if "JobId=" in line
        ]

    def occupied(self) -> list[Occupied]:
        """Return when each job ran that a task of it began, by Slurm's own prologs and epilogs of tasks."""
        found: dict[str, Occupied] = {}
        for line in (self.folder / "tasks").read_text().splitlines():
            number, _, when, node, shown = line.split()
            devices = frozenset(f"{node}:{device}" for device in shown.split(",") if device != "-")
            before = found.get(number, Occupied(number, float(when), float(when), devices))
            found[number] = before._replace(end=float(when), devices=before.devices | devices)
        return list(found.values())


def _job(line: str) -> dict[str, str]:
    shown = dict(re.findall(r"(?:^| )(\w[\w:/]*)=(.*?)(?= \w[\w:/]*=|$)", line))
    shown = {key: value.strip() for key, value in shown.items()}
    return shown | {
        "id": shown["JobId"],
        "name": shown["JobName"],
        "state": shown["JobState"],
        "partition": shown["Partition"],
        "comment": shown.get("Comment", ""),
    }


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _die_with_parent() -> None:
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
