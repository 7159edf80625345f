"""Where every run of a study stands, found from its files and from Slurm's queue while the study runs.

Reads, and writes nothing:

- ``results/<study>/plan.json`` (or the study's file, where that is newer): which runs there are;
- ``results/<study>/training`` and ``metrics``: what is trained and evaluated;
- ``scratch/<study>/<run>/state.json`` and ``evaluation.json`` (:mod:`finegrid.training.state`), and ``history.csv``:
  what is going on, and what failed;
- ``logs/{train,evaluate}/<study>``, ``.snakemake/log`` and the logs of Slurm's jobs: why something failed that left no
  word of its own;
- ``squeue``, where there is one: what waits for its turn.

A look costs a few system calls a folder and one a run that goes on: folders and files are read again when their date
has changed. :mod:`finegrid.watch_table` draws what is found here.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from finegrid import layout
from finegrid.errors import UserError
from finegrid.pack_jobs import NEEDED
from finegrid.training.state import reason_in

SECONDS_WITHOUT_SIGN = 90.0  # a sign of life comes every 5 s; a shared disk may be slow
SECONDS_BETWEEN_QUEUES = 10.0
SECONDS_OF_A_GAP = 20.0  # between a run's training and its evaluation nothing runs for a moment
SECONDS_OF_HISTORY = 600.0  # a run that tells nothing else wrote its last row so recently
TAIL = 1 << 14  # bytes of a log's end that are searched for a reason
STATES = ("running", "evaluating", "failed", "done", "queued", "waiting")
STAGES = ("train", "evaluate")
SLURM_LOGS = ("logs/slurm", ".snakemake/slurm_logs")  # of our profile, of the executor by itself
RULES = ("rule_train_adapter", "rule_train_model", "rule_evaluate", "rule_train_pack", "rule_evaluate_pack")
SHELL_FAILED = re.compile(
    r"finegrid (train|evaluate)(?:-pack)? (\S+) ([a-z0-9_]+-[0-9a-f]{8}|[0-9a-f]{8}-\d+of\d+)(?=\s).*"
    r"(?:returned non-zero exit status (\d+)|died with <Signals\.(\w+))"
)


@dataclass(frozen=True)
class Planned:
    """A run as the plan knows it; base runs are evaluated only. ``seconds`` is the forecast of its training.

    ``arm`` is its arm's label, ``levels`` its tuned levels and seed.
    """

    run: str
    arm: str
    levels: str
    trains: bool
    steps: int | None = None
    seconds: float | None = None


@dataclass
class Row:
    """Where a run stands; what isn't known is None. ``seconds`` is how long the training took, ``changed`` when it
    ended (seconds since the epoch)."""

    planned: Planned
    state: str = "waiting"
    doing: str = ""
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    eval_loss: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    seconds: float | None = None
    node: str = ""
    note: str = ""
    reason: str = ""
    log: str = ""
    changed: float = 0.0
    since_start: float = 0.0

    @property
    def run(self) -> str:
        return self.planned.run


@dataclass
class Sight:
    """A study at one moment; ``ends`` is the expected end of its training, in seconds since the epoch."""

    study: str
    title: str
    rows: list[Row]
    trained: int
    evaluated: int
    ends: float | None = None
    at: float = field(default_factory=time.time)
    is_over: bool = False
    is_idle: bool = False

    def count(self, *states: str) -> int:
        """Return how many runs are in one of the states."""
        return sum(row.state in states for row in self.rows)

    @property
    def to_train(self) -> int:
        return sum(row.planned.trains for row in self.rows)


# ---------------------------------------------------------------- files


class Files:
    """Contents of files and folders, read again only when their dates have changed."""

    def __init__(self) -> None:
        self._folders: dict[Path, tuple[int, float, dict[str, float]]] = {}
        self._contents: dict[Path, tuple[tuple[int, int, int], Any]] = {}

    def names(self, folder: Path) -> dict[str, float]:
        """Return the names in a folder and when each was changed; empty if there is no such folder."""
        try:
            date = os.stat(folder).st_mtime_ns
        except OSError:
            return {}
        known = self._folders.get(folder)
        # A folder that changed just before it was listed may change again within the same tick of its date.
        if known is None or known[0] != date or known[1] - date / 1e9 < 1:
            found = {}
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    try:
                        found[entry.name] = entry.stat().st_mtime
                    except OSError:
                        continue
            known = self._folders[folder] = (date, time.time(), found)
        return known[2]

    def read(self, path: Path, parse: Callable[[Path], Any]) -> Any:
        """Return what ``parse`` makes of a file; None if there is none, or it can't be read."""
        try:
            stat = os.stat(path)
        except OSError:
            self._contents.pop(path, None)
            return None
        key = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        known = self._contents.get(path)
        if known is None or known[0] != key:
            try:
                content = parse(path)
            except (OSError, ValueError):
                content = None
            known = self._contents[path] = (key, content)
        return known[1]


def read_json(path: Path) -> dict[str, Any] | None:
    """Return a file's JSON object; None if it is something else."""
    content = json.loads(path.read_bytes())
    return content if isinstance(content, dict) else None


def read_tail(path: Path) -> str:
    """Return the end of a text file."""
    with path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
        return file.read().decode("utf-8", errors="replace")


def read_last_rows(path: Path) -> dict[str, float]:
    """Return the last value of each column of a run's history."""
    with path.open(encoding="utf-8") as file:
        columns = file.readline().rstrip("\n").split(",")
    last: dict[str, float] = {}
    for line in reversed(read_tail(path).splitlines()):
        values = line.split(",")
        if len(values) != len(columns) or values == columns:
            continue
        last = {name: float(value) for name, value in zip(columns, values, strict=True) if value} | last
        if {"loss", "eval_loss"} <= last.keys():
            break
    return last


# ---------------------------------------------------------------- Slurm


@dataclass(frozen=True)
class Job:
    """A job of the user's in Slurm's queue; ``text`` is its name and comment, ``why`` is what it waits for."""

    id: str
    state: str
    node: str
    why: str
    text: str


class Queue:
    """Slurm's queue, asked now and then in the background; empty where there is no Slurm."""

    FORMAT = "%i\t%T\t%N\t%r\t%j %k"

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self._asked: threading.Thread | None = None
        self._at = 0.0

    def ask(self, patience: float = 0.0) -> None:
        """Start to ask if the last answer is old; wait for the answer as long as ``patience``, in seconds."""
        due = time.monotonic() - self._at >= SECONDS_BETWEEN_QUEUES or not self._at
        if due and (self._asked is None or not self._asked.is_alive()):
            self._at = time.monotonic()
            self._asked = threading.Thread(target=self._ask, daemon=True)
            self._asked.start()
        if self._asked is not None and patience:
            self._asked.join(patience)

    def _ask(self) -> None:
        try:
            command = ["squeue", "--me", "--noheader", "--format", self.FORMAT]
            answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            self.jobs = []
            return
        fields = [line.split("\t") for line in answer.splitlines()]
        self.jobs = [Job(*(part.strip() for part in parts)) for parts in fields if len(parts) == 5]

    def job_of(self, study: str, names: Iterable[str], stage: str) -> Job | None:
        """Return the job of a run, or of its pack, of a stage (`train`, `evaluate`), from the name or comment that
        Snakemake gave it: ``<run>.<rule>.<study>`` or ``rule_<rule>_wildcards_<study>_<run>``."""
        for job in self.jobs:
            ours = any(
                f"_{study}_{name}" in job.text
                or f"_{name}_{study}" in job.text
                or (job.text.startswith(f"{name}.") and f".{study} " in f"{job.text} ")
                for name in names
            )
            if ours and bool(re.search(r"\.evaluate(?:_pack)?\.|rule_evaluate_", job.text)) == (stage == "evaluate"):
                return job
        return None

    def job(self, number: str | None) -> Job | None:
        """Return the job with this number."""
        return next((job for job in self.jobs if job.id == number), None) if number else None


# ---------------------------------------------------------------- the study


class Watcher:
    """Looks at a study again and again.

    Args:
        study: its name, or its file's path.
        project: folder of the project.
        scratch: folder of the checkpoints, relative to the project.

    Raises:
        UserError: there is neither a plan nor a study of that name, or the study has mistakes.
    """

    def __init__(self, study: str, project: Path, scratch: Path = Path("scratch")):
        self.study = Path(study).stem if study.endswith((".yaml", ".yml")) else study
        self.file = Path(study) if study != self.study else layout.STUDIES / f"{study}.yaml"
        self.project = project
        self.results = project / layout.RESULTS / self.study
        self.scratch = project / scratch / self.study
        self.files = Files()
        self.queue = Queue()
        self.host = socket.gethostname()
        self._slurm_logs = [project / path for path in SLURM_LOGS]
        self._plan_dates: tuple[float, ...] = ()
        self._plan: tuple[str, list[Planned]] = ("", [])
        self._was_live = 0.0
        self._shell = ShellFailures(project, self.study)
        self._load_plan()

    def look(self) -> Sight:
        """Return where every run stands now."""
        self.queue.ask()
        self._load_plan()
        trained = self.files.names(self.results / "training")
        scored = self.files.names(self.results / "metrics")
        self._going = self.files.names(self.scratch)
        self._logs = {stage: self.files.names(self.project / "logs" / stage / self.study) for stage in STAGES}
        self._jobs = {path / rule: self.files.names(path / rule) for path in self._slurm_logs for rule in RULES}
        self._shell.look()
        title, planned = self._plan
        rows = [self._row(run, f"{run.run}.json", trained, scored) for run in planned]
        sight = Sight(
            self.study,
            title,
            rows,
            trained=sum(row.planned.trains and f"{row.run}.json" in trained for row in rows),
            evaluated=sum(f"{row.run}.json" in scored for row in rows),
        )
        sight.ends = _expected_end(sight)
        self._judge(sight)
        return sight

    # -------------------------------------------------------- the plan

    def _load_plan(self) -> None:
        plan, file = self.results / "plan.json", self.project / self.file
        dates = (_date(plan), _date(file))
        if dates == self._plan_dates:
            return
        if not any(dates):
            layout.study_file(self.file.as_posix() if self.file.parent != layout.STUDIES else self.study)
        try:
            # A plan that is older than its study may tell of other runs.
            self._plan = (
                _plan_of(plan) if dates[0] and dates[0] >= dates[1] else _plan_of_study(self.file, self.project)
            )
        except UserError:
            if not self._plan[1]:
                raise
        self._plan_dates = dates

    # -------------------------------------------------------- a run

    def _row(self, planned: Planned, name: str, trained: dict[str, float], scored: dict[str, float]) -> Row:
        row = Row(planned, steps=planned.steps)
        if planned.trains and self._is_going(row, "train"):
            return row
        if planned.trains and name in trained:
            self._add_result(row, self.results / "training" / name, trained[name])
        elif not planned.trains and name in scored:
            row.state, row.changed = "done", scored[name]
        if name not in scored and (row.state == "done" or not planned.trains):
            self._evaluation(row)
        elif row.state == "waiting":
            self._training(row)
        return row

    def _training(self, row: Row) -> None:
        """A run that is neither trained nor in training."""
        facts = self._facts(row.run, "state.json")
        if facts is not None:
            self._take(row, facts)
        job = self.queue.job_of(self.study, self._names(row.run, "train"), "train")
        if job is not None:
            _take_job(row, job)
        elif facts is not None:
            self._fail(row, "train", facts)
        elif self._has_history(row):
            row.state = "running"
        else:
            self._fail(row, "train", None)

    def _evaluation(self, row: Row) -> None:
        """A run that is to be evaluated, or a base model; a trained one stays `done` until its evaluation starts."""
        if self._is_going(row, "evaluate"):
            return
        job = self.queue.job_of(self.study, self._names(row.run, "evaluate"), "evaluate")
        if job is not None and (job.state != "PENDING" or not row.planned.trains):
            _take_job(row, job, "evaluating")
        elif job is None:
            self._fail(row, "evaluate", self._facts(row.run, "evaluation.json"))

    def _names(self, run: str, stage: str) -> list[str]:
        """Return what a run's jobs may be called: by itself, and by the pack that does its work."""
        needed = self.files.read(self.scratch / NEEDED, read_json) or {}
        return [run, *(pack for pack, runs in needed.get(stage, {}).items() if run in runs)]

    def _is_going(self, row: Row, stage: str) -> bool:
        """Fill the row of a run whose process gives signs of life; say whether there is one."""
        facts = self._facts(row.run, "state.json" if stage == "train" else "evaluation.json")
        if facts is None or facts.get("state") == "failed":
            return False
        silence = self._silence(facts)
        job = self.queue.job(facts.get("job"))
        if silence and (job is None or job.state == "PENDING"):
            return False
        if stage == "evaluate":
            row.step = row.steps = row.tokens_per_second = row.seconds = None
        self._take(row, facts)
        row.state, row.note = "running" if stage == "train" else "evaluating", silence or ""
        return True

    def _facts(self, run: str, name: str) -> dict[str, Any] | None:
        return self.files.read(self.scratch / run / name, read_json) if run in self._going else None

    def _take(self, row: Row, facts: dict[str, Any]) -> None:
        for key in ("step", "steps", "loss", "eval_loss", "tokens_per_second", "seconds_left"):
            if isinstance(facts.get(key), int | float):
                setattr(row, key, facts[key])
        row.doing = str(facts.get("state") or "")
        row.node = str(facts.get("node") or "").split(".")[0]
        age = time.time() - _epoch(facts.get("updated"))
        if row.seconds_left is not None:
            row.seconds_left = max(0.0, row.seconds_left - age)
        row.since_start = max(0.0, time.time() - _epoch(facts.get("started")))
        examples = re.search(r"(\d+)/(\d+)", str(facts.get("line") or ""))
        if examples and row.doing == "evaluating" and facts.get("steps") is None:
            row.step, row.steps = int(examples[1]), int(examples[2])
            row.seconds_left = row.tokens_per_second = None

    def _silence(self, facts: dict[str, Any]) -> str | None:
        """Return that a process gives no sign of life, or None."""
        updated = _epoch(facts.get("updated"))
        age = time.time() - updated
        if age > SECONDS_WITHOUT_SIGN:
            return f"no sign of life since {clock(updated)}"
        # 12 s: the same host name and another table of processes, as in a container, isn't a dead process.
        if age > 12 and facts.get("node") == self.host and _is_gone(facts.get("pid")):
            return f"no sign of life since {clock(updated)}; its process is gone"
        return None

    def _has_history(self, row: Row) -> bool:
        """Take the live history of a run that wrote no state."""
        path = self.scratch / row.run / "history.csv"
        if row.run not in self._going or time.time() - _date(path) > SECONDS_OF_HISTORY:
            return False
        last = self.files.read(path, read_last_rows) or {}
        row.step = int(last.get("step", 0))
        row.loss, row.eval_loss = last.get("loss"), last.get("eval_loss")
        return True

    def _add_result(self, row: Row, summary: Path, changed: float) -> None:
        row.state, row.changed = "done", changed
        result = self.files.read(summary, read_json) or {}
        history = self.files.read(self.results / "history" / f"{row.run}.csv", read_last_rows) or {}
        row.step = row.steps = result.get("steps")
        row.loss, row.eval_loss = history.get("loss"), result.get("final_eval_loss")
        row.tokens_per_second, row.seconds = result.get("tokens_per_second"), result.get("train_seconds")

    # -------------------------------------------------------- failures

    def _fail(self, row: Row, stage: str, facts: dict[str, Any] | None) -> None:
        """Mark a run as failed if its state, its log, Slurm's or Snakemake's tells so."""
        facts = facts or {}
        log = Path("logs", stage, self.study, f"{row.run}.log")
        reason = facts.get("reason") if facts.get("state") == "failed" else None
        if reason in (None, "", "ended by SIGTERM", "time-out"):  # Slurm knows who sent the signal
            reason = self._reason_of_slurm(row.run, stage) or reason
        said = [self._shell.reasons.get((stage, name)) for name in self._names(row.run, stage)]
        shell = next(filter(None, said), None)
        if not reason and facts:
            reason = self._silence(facts)
            reason = f"{reason.split(';')[0]}: {shell}" if reason and shell else reason
        if not reason and log.name in self._logs[stage]:
            reason = self.files.read(self.project / log, lambda path: reason_in(read_tail(path)))
        reason = reason or shell
        if reason:
            row.state, row.reason = "failed", reason
            row.log = str(facts.get("log") or (log if log.name in self._logs[stage] else ""))
            row.seconds_left = row.tokens_per_second = None

    def _reason_of_slurm(self, run: str, stage: str) -> str | None:
        """Return what Slurm wrote into the log of the run's last job."""
        wanted = [f"{self.study}_{name}" for name in self._names(run, stage)]
        wanted += [f"{name}_{self.study}" for name in self._names(run, stage)[1:]]
        folders = [
            rule / name for rule, names in self._jobs.items() if stage in rule.name for name in wanted if name in names
        ]
        logs = [path for folder in folders for path in folder.glob("*.log")]
        return self.files.read(max(logs, key=_date), lambda path: reason_in(read_tail(path))) if logs else None

    # -------------------------------------------------------- the whole

    def _judge(self, sight: Sight) -> None:
        """Say whether the study is over, or whether nothing goes on although something is left."""
        now = time.monotonic()
        if sight.count("running", "evaluating", "queued"):
            self._was_live = now
            return
        if _controller_at_work(self.project):
            return
        left = sum(row.planned.trains and row.state == "waiting" for row in sight.rows)
        all_evaluated = sight.evaluated + sight.count("failed") >= len(sight.rows)
        is_quiet = all_evaluated or not self._was_live or now - self._was_live > SECONDS_OF_A_GAP
        sight.is_over = not left and is_quiet
        sight.is_idle = is_quiet and not sight.is_over


class ShellFailures:
    """Commands that failed, from the newest log of Snakemake; only what was added to it is read."""

    def __init__(self, project: Path, study: str):
        self.folder = project / ".snakemake/log"
        self.study = study
        self.reasons: dict[tuple[str, str], str] = {}
        self._log: Path | None = None
        self._read = 0

    def look(self) -> None:
        """Read what is new."""
        logs = sorted(self.folder.glob("*.snakemake.log"))[-1:] if self.folder.is_dir() else []
        if logs[:1] != [self._log]:
            self._log, self._read, self.reasons = (logs[0] if logs else None), 0, {}
        if self._log is None:
            return
        try:
            with self._log.open("rb") as file:
                file.seek(self._read)
                new = file.read()
        except OSError:
            return
        whole = new[: new.rfind(b"\n") + 1]
        self._read += len(whole)
        for stage, study, run, status, name in SHELL_FAILED.findall(whole.decode("utf-8", errors="replace")):
            if Path(study).stem == self.study:
                self.reasons[stage, run] = _of_status(int(status or 0), name)


def _of_status(status: int, name: str) -> str:
    if status == 127:
        return "the command `finegrid` was not found"
    if name == "SIGKILL" or status == 137:
        return "killed (SIGKILL); out of memory?"
    return f"ended by {name}" if name else f"ended with status {status}"


def _take_job(row: Row, job: Job, going: str = "running") -> None:
    if job.state == "PENDING":
        row.state, row.doing, row.note = "queued", "", job.why if job.why != "None" else ""
        row.seconds_left = row.tokens_per_second = None
    else:
        row.state, row.doing = going, "starting" if job.state == "RUNNING" else job.state.lower()
    row.node = job.node if "(" not in job.node else ""


def _expected_end(sight: Sight) -> float | None:
    """Return when training will be over if as many runs go on side by side as now; None if none goes on.

    A run that hasn't started takes what the plan forecasts, corrected by how the others kept to theirs; without a
    forecast, as long as the others on average.
    """
    running = [row for row in sight.rows if row.state == "running" and row.seconds_left is not None]
    if not running:
        return None
    known = [(row.planned.seconds, row.seconds) for row in sight.rows if row.state == "done" and row.seconds]
    known += [(row.planned.seconds, row.since_start + row.seconds_left) for row in running]
    forecast = [(planned, took) for planned, took in known if planned]
    ratio = sum(took for _, took in forecast) / sum(planned for planned, _ in forecast) if forecast else None
    mean = sum(took for _, took in known) / len(known)
    waiting = [row for row in sight.rows if row.planned.trains and row.state in ("waiting", "queued")]
    rest = [row.planned.seconds * ratio if ratio and row.planned.seconds else mean for row in waiting]
    left = [row.seconds_left for row in running]
    going = max(len(running), sum(row.state == "running" for row in sight.rows))
    return sight.at + max(max(left), (sum(left) + sum(rest)) / going)


def _is_gone(process: Any) -> bool:
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except (TypeError, ValueError, OSError):
        pass
    return False


def _controller_at_work(project: Path) -> bool:
    """Return whether a snakemake works on the project on this machine; False where that can't be seen."""
    folder = str(project.resolve())
    try:
        processes = [entry for entry in os.listdir("/proc") if entry.isdigit()]
    except OSError:
        return False
    for process in processes:
        try:
            with open(f"/proc/{process}/cmdline", "rb") as file:
                words = file.read(4096).split(b"\0")[:3]
            is_snakemake = any(os.path.basename(word) == b"snakemake" for word in words)
            if is_snakemake and os.readlink(f"/proc/{process}/cwd") == folder:
                return True
        except OSError:
            continue
    return False


# ---------------------------------------------------------------- plan and time


def project_settings(project: Path) -> dict[str, Any]:
    """Return config/config.yaml; empty if there is none."""
    import yaml

    try:
        return yaml.safe_load((project / "config/config.yaml").read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _plan_of(path: Path) -> tuple[str, list[Planned]]:
    plan = read_json(path) or {}
    labels = {arm["arm"]: arm.get("label") or arm["arm"] for arm in plan.get("arms", [])}
    return plan.get("title") or "", _planned(
        (
            entry["run"],
            labels.get(entry["arm"], entry["arm"]),
            entry.get("tuned") or {},
            entry.get("seed"),
            {"trains": bool(entry["train"]), "steps": entry.get("steps"), "seconds": entry.get("seconds")},
        )
        for entry in plan.get("runs", [])
    )


def _plan_of_study(path: Path, project: Path) -> tuple[str, list[Planned]]:
    from finegrid.study import load_study

    study = load_study(path, project)
    labels = {arm.name: arm.label for arm in study.base_arms + study.arms}
    return study.title, _planned(
        (run.id, labels.get(arm, arm), dict(run.tuned), run.seed, {"trains": run.method != "base"})
        for run in study.all_runs
        for arm in run.arms
    )


def _planned(entries: Iterable[tuple[str, str, dict[str, str], int | None, dict[str, Any]]]) -> list[Planned]:
    """Return each run once, with a label that tells it from the others."""
    entries = list(entries)
    factors = {name for _, _, tuned, _, _ in entries for name in tuned}
    labels: dict[str, list[str]] = {}
    facts = {}
    for run, label, tuned, seed, rest in entries:
        labels.setdefault(run, []).append(label)
        facts[run] = (tuned, seed, rest)
    planned = []
    for run, (tuned, seed, rest) in facts.items():
        parts = [level if len(factors) == 1 else f"{name}={level}" for name, level in tuned.items()]
        parts += [f"seed {seed}"] if seed is not None else []
        planned.append(Planned(run, ", ".join(dict.fromkeys(labels[run])), " · ".join(parts), **rest))
    return planned


def _date(path: Path) -> float:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return 0.0


def _epoch(text: Any) -> float:
    try:
        return datetime.fromisoformat(text).timestamp()
    except (TypeError, ValueError):
        return 0.0


def clock(moment: float) -> str:
    """Return a moment (seconds since the epoch) as a local time, with the day if it isn't today's."""
    local, today = datetime.fromtimestamp(moment), datetime.now()
    return f"{local:%H:%M:%S}" if local.date() == today.date() else f"{local:%d %b %H:%M}"
