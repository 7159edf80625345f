"""Snakemake's executor for Slurm, with what a grid of runs needs besides.

It is `snakemake-executor-plugin-slurm` (submission, partitions, states) and adds:

- job names that a person recognises in ``squeue``: ``lora-1a2b3c4d.train_adapter.insurance``;
- jobs of a snakemake that died are taken over, not submitted a second time beside the first; one that would do other
  work than is wanted now (settings, code or inputs changed) is ended before its place is taken;
- one file for all that a cluster needs (``profiles/slurm/cluster.yaml``), checked against the cluster at the start;
- jobs look for models and data in local caches alone: compute nodes need no internet;
- states are asked for at the pace of ``seconds-between-status-checks``, and each failed attempt is told in one line.
"""

from __future__ import annotations

import difflib
import getpass
import hashlib
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from snakemake.io import is_flagged
from snakemake_executor_plugin_slurm import Executor as SlurmExecutor
from snakemake_executor_plugin_slurm import ExecutorSettings, common_settings
from snakemake_executor_plugin_slurm.utils import get_job_wildcards
from snakemake_interface_common.exceptions import WorkflowError
from snakemake_interface_executor_plugins.executors.base import SubmittedJobInfo

__all__ = ["Executor", "ExecutorSettings", "common_settings"]

# What each job was submitted to do, by its number: a hash that a later snakemake compares.
RECORDS = Path(".snakemake/finegrid-slurm")
KEYS = {"gpus", "partitions", "all_jobs", "gpu_jobs"}
WAITING_OR_RUNNING = {
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "COMPLETING",
    "SUSPENDED",
    "STOPPED",
    "RESIZING",
    "REQUEUED",
    "REQUEUE_HOLD",
    "REQUEUE_FED",
    "SPECIAL_EXIT",
    "SIGNALING",
    "STAGE_OUT",
}
JOB_ENVIRONMENT = "HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1"
SECONDS_FOR_AN_END = 120
SNAKEMAKE_MB = 250  # of memory in each job, beside the work: the snakemake that runs the rule there
NOISE = re.compile(
    r"SLURM run ID|Auto-selected partition|Cleaning up SLURM log"
    r"|has been submitted with SLURM jobid|'squeue' should work reliably|No wall time information"
)


class Known(NamedTuple):
    """A job that was there when snakemake started."""

    number: str
    state: str
    work: str | None


class Quiet:
    """A logger that keeps to itself what the plugin says of each job."""

    def __init__(self, logger):
        self._logger = logger

    def __getattr__(self, name: str):
        return getattr(self._logger, name)

    def info(self, message, *args, **kwargs) -> None:
        (self._logger.debug if NOISE.search(str(message)) else self._logger.info)(message, *args, **kwargs)

    def warning(self, message, *args, **kwargs) -> None:
        (self._logger.debug if NOISE.search(str(message)) else self._logger.warning)(message, *args, **kwargs)


class Executor(SlurmExecutor):
    """Submits jobs to Slurm under names of their own, and takes over those that are there already."""

    def __init__(self, workflow, logger):
        self._submitting = threading.local()
        self._names: dict[str, str] = {}  # names of active jobs, by number
        self._known: dict[str, list[Known]] = {}
        self._taken_over: set[str] = set()
        self._run_uuid = ""
        super().__init__(workflow, Quiet(logger))

    def __post_init__(self, test_mode: bool = False):
        super().__post_init__(test_mode)
        self._cluster = read_cluster(self.workflow.executor_settings.partition_config)
        self._check_gpus()
        os.environ.setdefault("SBATCH_OPEN_MODE", "append")  # a requeued job's log keeps what the first try said
        self._known = known_jobs()

    def _check_gpus(self) -> None:
        """A login node has no GPU to plan for: without a word on them, trainings would go to the CPU unheard.

        Raises:
            WorkflowError: nothing names a GPU, and a partition has some.
        """
        config, partitions = self.workflow.globals["config"], self._cluster["partitions"]
        with_gpus = [name for name, limits in partitions.items() if (limits or {}).get("max_gpu")]
        if with_gpus and self.workflow.globals["plan_of"](config["study"]).hardware.is_a_guess:
            raise WorkflowError(
                f"{self.workflow.executor_settings.partition_config}: partition '{with_gpus[0]}' has GPUs, but nothing "
                "says which to plan for; expected 'gpus: [a100-80gb]' (or what your cluster has) there, [] to train "
                "without"
            )

    def shutdown(self) -> None:
        for name, jobs in self._known.items():
            for each in jobs:
                if each.state in WAITING_OR_RUNNING:
                    self.logger.warning(
                        f"{name}: Slurm job {each.number} of an earlier snakemake is {each.state.lower()}, and nothing "
                        f"asked for it; `scancel {each.number}` ends it"
                    )
        self._known = {}
        super().shutdown()

    # ---------------------------------------------------------------- names

    @property
    def run_uuid(self) -> str:
        """The name that the plugin gives to a job, and asks for when it looks after its jobs."""
        name = getattr(self._submitting, "name", None)
        return name or ",".join(sorted(set(self._names.values()))) or self._run_uuid

    @run_uuid.setter
    def run_uuid(self, value: str) -> None:
        self._run_uuid = value

    # ---------------------------------------------------------------- submission

    def run_job(self, job) -> None:
        """Submit a job, or take over the one that an earlier snakemake submitted for the same work."""
        name = job_name(job)
        try:
            taken_over = self._settle(job, name)
        except Exception as error:  # this runs in a thread of its own, where an exception would go unheard
            self._report_job_error_threadsafe(SubmittedJobInfo(job), f"{name}: {error}")
            return
        if taken_over:
            return
        self._complete(job)
        self._submitting.name = name
        try:
            super().run_job(job)
        finally:
            self._submitting.name = None

    def _settle(self, job, name: str) -> bool:
        """Return whether a job of that name that does the same was taken over; others of the name are ended."""
        work = work_of(job)
        known = self._known.pop(name, [])
        same = [each for each in known if each.work == work and each.state in WAITING_OR_RUNNING | {"COMPLETED"}]
        kept = max(same, key=lambda each: int(each.number), default=None)
        others = [each.number for each in known if each is not kept and each.state in WAITING_OR_RUNNING]
        if others:
            self.logger.warning(
                f"{name}: ends Slurm job {', '.join(others)} of an earlier snakemake, which did other work"
            )
            end_jobs(others)
        if kept is None:
            return False
        self.logger.info(f"{name}: goes on as Slurm job {kept.number}, {kept.state.lower()} since an earlier snakemake")
        self._taken_over.add(kept.number)
        log = self._log_folder(job) / f"{kept.number}.log"
        self._report_job_submission_threadsafe(
            SubmittedJobInfo(job, external_jobid=kept.number, aux={"slurm_logfile": log})
        )
        return True

    def _log_folder(self, job) -> Path:
        return (
            self.slurm_logdir / (f"group_{job.name}" if job.is_group() else f"rule_{job.name}") / get_job_wildcards(job)
        )

    def _complete(self, job) -> None:
        """Give the job what the cluster's file says of all jobs and of those with a GPU."""
        wanted = dict(self._cluster["all_jobs"])
        if job.resources.get("gpu"):
            wanted |= self._cluster["gpu_jobs"]
        for key, value in wanted.items():
            if job.resources.get(key) is None:
                setattr(job.resources, key, value)
        if isinstance(job.resources.get("mem_mb"), int):
            job.resources.mem_mb += SNAKEMAKE_MB
        gpus, nodes = job.resources.get("gpu") or 0, job.resources.get("nodes") or 1
        if gpus > 1 and not (job.resources.get("cpus_per_task") or job.resources.get("cpus_per_gpu")):
            job.resources.cpus_per_task = job.threads * gpus  # a process each
        if nodes > 1:
            _over_nodes(job.resources, gpus, nodes)

    def get_account_arg(self, job) -> Iterator[str]:
        """Without an account the cluster's own default counts; the plugin would guess one."""
        return super().get_account_arg(job) if job.resources.get("slurm_account") else iter([""])

    def additional_general_args(self) -> str:
        """A job works in its batch step; the plugin would start a second snakemake in a step of its own."""
        return ""

    def format_job_exec(self, job) -> str:
        return f"{JOB_ENVIRONMENT} {super().format_job_exec(job)}"

    def report_job_submission(self, job_info: SubmittedJobInfo, register_job: bool = True):
        number = job_info.external_jobid
        if number is not None:
            self._names[number] = job_name(job_info.job)
            RECORDS.mkdir(parents=True, exist_ok=True)
            (RECORDS / number).write_text(work_of(job_info.job))
            if number not in self._taken_over:
                self.logger.info(f"{job_name(job_info.job)}: Slurm job {number}")
        super().report_job_submission(job_info, register_job=register_job)

    # ---------------------------------------------------------------- states

    @property
    def next_seconds_between_status_checks(self) -> int:
        return self.workflow.remote_execution_settings.seconds_between_status_checks

    @next_seconds_between_status_checks.setter
    def next_seconds_between_status_checks(self, value) -> None:
        """The plugin would ask less and less often, up to every 3 minutes."""

    def report_job_success(self, job_info: SubmittedJobInfo):
        self._forget(job_info)
        super().report_job_success(job_info)

    def report_job_error(self, job_info: SubmittedJobInfo, msg=None, **kwargs):
        number = job_info.external_jobid
        if number is not None:
            state = re.search(r"status is: '(\w+)'", msg or "")
            log = (job_info.aux or {}).get("slurm_logfile")
            self.logger.warning(
                f"{job_name(job_info.job)}: Slurm job {number} ended as {state[1] if state else 'failed'}, attempt "
                f"{job_info.job.attempt}; see {', '.join(map(str, [*job_info.job.log, short(log)]))}"
            )
        self._forget(job_info)
        super().report_job_error(job_info, msg=msg, **kwargs)

    def _forget(self, job_info: SubmittedJobInfo) -> None:
        if job_info.external_jobid is not None:
            self._names.pop(job_info.external_jobid, None)
            (RECORDS / job_info.external_jobid).unlink(missing_ok=True)


# ---------------------------------------------------------------- jobs


def job_name(job) -> str:
    """Return a job's name in Slurm: run, rule and study, with a dot between them."""
    values = {} if job.is_group() else dict(job.wildcards.items())
    study = values.pop("study", None)
    parts = [*values.values(), job.name, *([study] if study else [])]
    return re.sub(r"[^\w.+-]", "_", ".".join(parts))


def _over_nodes(resources, gpus: int, nodes: int) -> None:
    """Ask for tasks and GPUs node by node; the plugin's ``--gpus`` is a sum, which Slurm might deal out unevenly."""
    if gpus:
        model = resources.get("gpu_model")
        resources.gres = ":".join(["gpu", *([model] if model else []), str(gpus)])
        resources.gpu, resources.gpu_model = 0, None
        resources.tasks_per_gpu = 0  # none is said: a task a node is Slurm's default
    else:
        resources.tasks = nodes


def work_of(job) -> str:
    """Return a hash of what a job does: command, parameters (they hold settings and code), and dates of its inputs."""
    parts: list[Any] = []
    for each in job.jobs if job.is_group() else [job]:
        dates = [(str(path), _date(path)) for path in each.input if not is_flagged(path, "ancient")]
        parts.append((each.rule.name, each.shellcmd, sorted(map(str, each.output)), repr(each.params), dates))
    return hashlib.sha256(repr(sorted(parts, key=repr)).encode()).hexdigest()[:16]


def _date(path) -> int | None:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return None


def known_jobs() -> dict[str, list[Known]]:
    """Return the user's jobs that were submitted from this folder, by name; the finished that Slurm remembers too."""
    command = ["squeue", "--noheader", "--states=all", f"--user={getpass.getuser()}", "--format=%i|%T|%j|%Z"]
    here, found = Path.cwd().resolve(), {}
    for line in run(command).splitlines():
        number, state, name, folder = line.split("|", 3)
        if number.isdigit() and Path(folder).resolve() == here:
            record = RECORDS / number
            work = record.read_text() if record.exists() else None
            found.setdefault(name, []).append(Known(number, state, work))
    return found


def end_jobs(numbers: list[str]) -> None:
    """Cancel jobs and wait until they have ended, so that nothing writes beside those that come after."""
    run(["scancel", *numbers])
    end = time.monotonic() + SECONDS_FOR_AN_END
    states = ["?"]
    while any(state in WAITING_OR_RUNNING for state in states) or states == ["?"]:
        if time.monotonic() > end:
            raise WorkflowError(f"Slurm job {', '.join(numbers)} of an earlier snakemake does not end")
        states = run(["squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={','.join(numbers)}"]).split()
        time.sleep(0.5)


def run(command: list[str]) -> str:
    """Return what a command of Slurm prints.

    Raises:
        WorkflowError: it failed, with its words.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise WorkflowError(f"{command[0]}: {error}; is this a login node of the cluster?") from error
    if done.returncode:
        raise WorkflowError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def short(path: Path | None) -> str:
    if path is None:
        return "its log"
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


# ---------------------------------------------------------------- the cluster's file


def read_cluster(path: Path | None) -> dict[str, dict]:
    """Return what the cluster's file says of all jobs and of GPU jobs.

    Raises:
        WorkflowError: a key that means nothing, or a partition that the cluster doesn't have.
    """
    if path is None:
        return {"partitions": {}, "all_jobs": {}, "gpu_jobs": {}}
    content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    for key in content:
        if key not in KEYS:
            raise WorkflowError(
                f"{path}: '{key}' is no key of this file{nearest(key, KEYS)}; expected {', '.join(KEYS)}"
            )
    there = {name.strip() for name in run(["sinfo", "--noheader", "--format=%R"]).split()}
    for name, limits in (content.get("partitions") or {}).items():
        elsewhere = isinstance(limits, dict) and {"cluster", "clusters", "slurm_cluster"} & set(limits)
        if name not in there and not elsewhere:
            names = ", ".join(sorted(there))
            raise WorkflowError(f"{path}: no partition '{name}'{nearest(name, there)}; the cluster has {names}")
    return {key: dict(content.get(key) or {}) for key in ("partitions", "all_jobs", "gpu_jobs")}


def nearest(word: str, known) -> str:
    close = difflib.get_close_matches(str(word), [str(each) for each in known], n=1)
    return f", did you mean '{close[0]}'?" if close else ""
