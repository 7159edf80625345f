"""Jobs of Slurm that a killed snakemake left: shown, ended with a checkpoint, and gone on with, on a real Slurm."""

from __future__ import annotations

import signal
import subprocess

import pytest
from test_faults import LONGER, STUDY, runs, targets, to_training, training_jobs, wait_until

pytestmark = pytest.mark.slow


def test_jobs_of_a_dead_controller_are_shown_ended_and_gone_on_with(cluster_project):
    project = cluster_project
    # Checkpoints are only those that the signal asks for.
    recipe = LONGER.replace("max_steps: 80", "max_steps: 200").replace("save_strategy: steps", "save_strategy: 'no'")
    project.write_study("orphaned", STUDY.replace("[0, 1, 2, 3]", "[0]"), recipe)
    (run,) = runs(project, "orphaned")
    controller = project.start("orphaned", "--", *targets(project, "orphaned"))
    history = project.folder / f"scratch/orphaned/{run}/history.csv"
    wait_until(lambda: history.exists() and len(history.read_text().splitlines()) > 20)
    (job,) = training_jobs(project, "orphaned")
    to_training(project, job["id"], signal.SIGSTOP)  # until it is ended: it must not come to its end before
    controller.send_signal(signal.SIGKILL)
    controller.wait()

    # What a `snakemake` on the login node would start waits for the job: no run is trained twice at once.
    command = ["finegrid", "train", "orphaned", run]
    local = subprocess.Popen(
        command,
        cwd=project.folder,
        env=project.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        told = local.stdout.readline()
        assert "already being trained by process" in told, told
        assert f"(Slurm job {job['id']})" in told
        assert f"`scancel {job['id']}`" in told
    finally:
        local.kill()
        local.communicate()

    shown = project.run("finegrid", "orphans", "orphaned")
    assert shown.returncode == 1  # nobody to ask
    assert f"Slurm job {job['id']}, running: {run}.train_adapter.orphaned" in shown.stdout
    ended = project.run("finegrid", "orphans", "orphaned", "--end")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (job,) = training_jobs(project, "orphaned")
    assert job["state"] == "CANCELLED"
    assert len(list(history.parent.glob("checkpoint-*"))) == 1

    project.finish(project.start("orphaned", "--", *targets(project, "orphaned")))
    assert 19 <= project.read(f"results/orphaned/training/{run}.json")["resumed_from"] < 200
