"""`finegrid watch` beside a real Slurm: what waits, what runs, what was cancelled, what came back to the queue."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from cluster import Slurm, why_not
from finegrid.files import write_json
from finegrid.training.state import read_state
from finegrid.watch import Watcher

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
JOB = """
import sys, time
from pathlib import Path
from finegrid.training.state import live_state

run = sys.argv[1]
with live_state(Path("scratch/grid", run, "state.json"), run, Path("logs/train/grid", run + ".log")) as tell:
    tell(state="training", step=3, steps=9)
    time.sleep(3000)
"""


def run_name(number: int) -> str:
    return f"lora-{number:08x}"


def states(watcher: Watcher) -> list[str]:
    watcher.queue._at = 0.0
    watcher.queue.ask(patience=30)
    return [row.state for row in watcher.look().rows]


def wait_for(watcher: Watcher, expected: list[str]) -> None:
    found, end = [], time.monotonic() + 300
    while found != expected:
        assert time.monotonic() < end, f"{found} instead of {expected}"
        time.sleep(0.5)
        found = states(watcher)


def test_jobs_are_told_as_slurm_moves_them(tmp_path, monkeypatch):
    plan = {"study": "grid", "title": "", "arms": [], "runs": []}
    plan["runs"] = [{"run": run_name(n), "arm": "lora", "seed": n, "train": True, "steps": 9} for n in range(6)]
    write_json(tmp_path / "results/grid/plan.json", plan)
    (tmp_path / "job.py").write_text(JOB)
    with Slurm() as slurm:
        for name in ("SLURM_CONF", "PATH"):
            monkeypatch.setenv(name, slurm.environment[name])
        watcher = Watcher("grid", tmp_path)
        assert states(watcher) == ["waiting"] * 6
        jobs = [submit(slurm, tmp_path, run_name(number)) for number in range(6)]
        wait_for(watcher, ["running"] * 4 + ["queued"] * 2)
        wait_for_steps(tmp_path, 4)
        row = watcher.look().rows[0]
        assert (row.doing, row.node) == ("training", slurm.nodes[0])
        # One is cancelled, one is put back into the queue: the two that waited take their places.
        slurm.run("scancel", jobs[0])
        slurm.run("scontrol", "requeue", jobs[1])
        wait_for(watcher, ["failed", "queued", "running", "running", "running", "running"])
        rows = watcher.look().rows
        assert (rows[0].reason, rows[0].log) == ("cancelled", f"logs/train/grid/{run_name(0)}.log")
        assert (rows[1].step, rows[1].reason) == (3, "")


def submit(slurm: Slurm, project: Path, run: str) -> str:
    """Submit a job as our executor does: its name and its log's folder tell study and run."""
    log = project / f"logs/slurm/rule_train_adapter/grid_{run}/%j.log"
    log.parent.mkdir(parents=True)
    options = ["--parsable", f"--job-name={run}.train_adapter.grid"]
    options += ["--partition=gpu", "--gpus=1", "--mem=200", "--time=10", f"--output={log}", f"--chdir={project}"]
    return slurm.run("sbatch", *options, f"--wrap=exec {sys.executable} job.py {run}").strip()


def wait_for_steps(project: Path, count: int) -> None:
    """Wait for the second sign of life of each run: it tells of the step."""
    end = time.monotonic() + 300
    while [read_state(path)["step"] for path in project.glob("scratch/grid/*/state.json")] != [3] * count:
        assert time.monotonic() < end
        time.sleep(0.2)
