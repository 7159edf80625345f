"""Jobs that die on a real Slurm: after each fault the run goes on where it was, to the same bits as undisturbed."""

from __future__ import annotations

import csv
import itertools
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from finegrid import layout
from finegrid.study import load_study
from login_node import RECIPE, Project

pytestmark = pytest.mark.slow

STUDY = """\
title: Does a storm change anything?
hardware: {gpus: [a100-80gb]}
factors:
  rank: {key: peft_config.r, levels: [4]}
seeds: [0, 1, 2, 3]
compare: {baseline: {rank: 4}, metric: rougeL, margin: 0.01}
"""
STEPS = 80
LONGER = (
    RECIPE.replace("max_steps: 4", f"max_steps: {STEPS}")
    .replace("eval_steps: 2", "eval_steps: 40")
    .replace("save_steps: 2", "save_steps: 10")
)


@pytest.fixture(scope="module")
def calm(cluster_project) -> dict[str, tuple]:
    """The runs of the study as they are when nothing happens, by id, trained in this process without Slurm."""
    from finegrid.training.train import train

    cluster_project.write_study("calm", STUDY, LONGER)
    folder = cluster_project.folder
    study = load_study(folder / "config/studies/calm.yaml", folder)
    tokens = layout.tokens_folder(study.runs[0])
    done = cluster_project.run("snakemake", "--config", "study=calm", "--", f"{tokens}/train.arrow")
    assert done.returncode == 0, done.stdout + done.stderr
    for run in study.runs:
        train(
            run.settings,
            tokens=folder / tokens,
            model=folder / "data/models/tiny",
            output=folder / layout.weights_folder("calm", run),
            history=folder / f"results/calm/history/{run.id}.csv",
            summary=folder / f"results/calm/training/{run.id}.json",
            checkpoints=folder / "scratch/calm" / run.id,
        )
    return {run.id: learned(cluster_project, "calm", run.id) for run in study.runs}


class Storm(NamedTuple):
    """The run of each fault, and the number of each run's first job."""

    killed: str
    requeued: str
    timed_out: str
    taken_over: str
    first: dict[str, str]


@pytest.fixture(scope="module")
def storm(cluster_project, calm) -> Storm:
    """Four runs at once, each past its first checkpoint: their controller is killed, and each has a fault of its own.

    The runs are held meanwhile (SIGSTOP), so that none ends before its fault comes.
    """
    project, slurm = cluster_project, cluster_project.slurm
    project.write_study("storm", STUDY, LONGER)
    names = runs(project, "storm")
    controller = project.start("storm", "--", *targets(project, "storm"))
    hold_after_checkpoint(project, "storm", names)
    controller.send_signal(signal.SIGKILL)
    controller.wait()
    storm = Storm(*names, first={run_of(job): job["id"] for job in training_jobs(project, "storm")})

    to_training(project, storm.first[storm.killed], signal.SIGKILL)
    requeued = storm.first[storm.requeued]
    slurm.run("scontrol", "requeue", requeued)
    wait_until(lambda: state(project, requeued) == "PENDING")
    slurm.start_again(requeued)

    assert project.run("snakemake", "--unlock", "--config", "study=storm").returncode == 0
    controller = project.start("storm", "--", *targets(project, "storm"))
    for run in (storm.timed_out, storm.taken_over):
        wait_until(lambda run=run: f"goes on as Slurm job {storm.first[run]}" in project.printed())
    to_training(project, storm.first[storm.taken_over], signal.SIGCONT)
    slurm.run("scontrol", "update", f"JobId={storm.first[storm.timed_out]}", "EndTime=now+1")
    project.finish(controller)
    return storm


def test_a_killed_run_goes_on_to_the_same_bits(cluster_project, calm, storm):
    run = storm.killed
    assert resumed_from(cluster_project, run) >= 10
    assert learned(cluster_project, "storm", run) == calm[run]
    assert [job["state"] for job in jobs_of_run(cluster_project, run)] == ["FAILED", "COMPLETED"]


def test_a_requeued_run_goes_on_in_the_same_job(cluster_project, calm, storm):
    run = storm.requeued
    assert resumed_from(cluster_project, run) >= 10
    assert learned(cluster_project, "storm", run) == calm[run]
    (job,) = jobs_of_run(cluster_project, run)
    assert (job["state"], job["Restarts"]) == ("COMPLETED", "1")


def test_a_run_whose_time_is_over_goes_on_with_more_of_it(cluster_project, calm, storm):
    run = storm.timed_out
    assert resumed_from(cluster_project, run) >= 10
    assert learned(cluster_project, "storm", run) == calm[run]
    first, second = jobs_of_run(cluster_project, run)
    assert (first["state"], second["state"]) == ("TIMEOUT", "COMPLETED")
    assert f"Slurm job {first['id']} ended as TIMEOUT" in cluster_project.printed()
    assert second["TimeLimit"] > jobs_of_run(cluster_project, storm.taken_over)[0]["TimeLimit"]


def test_a_job_of_a_dead_controller_is_taken_over(cluster_project, calm, storm):
    run = storm.taken_over
    assert resumed_from(cluster_project, run) is None  # it never stopped
    assert learned(cluster_project, "storm", run) == calm[run]
    (job,) = jobs_of_run(cluster_project, run)
    assert job["id"] == storm.first[run]
    assert f"goes on as Slurm job {job['id']}" in cluster_project.printed()


def test_no_run_was_trained_twice_at_once(cluster_project, storm):
    occupied = {job.job: job for job in cluster_project.slurm.occupied()}
    for run in storm[:4]:
        times = sorted((occupied[job["id"]] for job in jobs_of_run(cluster_project, run)), key=lambda job: job.begin)
        for before, after in itertools.pairwise(times):
            assert before.end <= after.begin


def test_runs_of_nodes_that_died_go_on_when_they_are_back(cluster_project, calm):
    project = cluster_project
    project.write_study("outage", STUDY.replace("[0, 1, 2, 3]", "[0, 1]"), LONGER)
    names = runs(project, "outage")
    controller = project.start("outage", "--", *targets(project, "outage"))
    hold_after_checkpoint(project, "outage", names)
    for node in project.slurm.nodes:
        project.slurm.kill_node(node)
    jobs = training_jobs(project, "outage")
    for job in jobs:
        wait_until(lambda job=job: state(project, job["id"]) == "PENDING")
    for node in project.slurm.nodes:
        project.slurm.revive_node(node)
    project.slurm.start_again(*(job["id"] for job in jobs))
    project.finish(controller)
    for run in names:
        assert project.read(f"results/outage/training/{run}.json")["resumed_from"] >= 10
        assert learned(project, "outage", run) == calm[run]
    assert [job["Restarts"] for job in training_jobs(project, "outage")] == ["1", "1"]


def test_a_job_that_would_do_other_work_is_ended_before_its_place_is_taken(cluster_project, calm):
    project = cluster_project
    project.write_study("edited", STUDY.replace("[0, 1, 2, 3]", "[0]"), LONGER)
    (run,) = runs(project, "edited")
    wanted = targets(project, "edited")
    controller = project.start("edited", "--", *wanted)
    hold_after_checkpoint(project, "edited", [run])
    controller.send_signal(signal.SIGKILL)
    controller.wait()
    (old,) = training_jobs(project, "edited")
    code = project.folder / "workflow/finegrid/training/train.py"
    text = code.read_text()
    code.write_text(text + "\nCHANGED = 1\n")
    try:
        assert project.run("snakemake", "--unlock", "--config", "study=edited").returncode == 0
        printed = project.finish(project.start("edited", "--", *wanted))
    finally:
        code.write_text(text)
    assert f"ends Slurm job {old['id']} of an earlier snakemake, which did other work" in printed
    jobs = training_jobs(project, "edited")
    assert [job["state"] for job in jobs] == ["CANCELLED", "COMPLETED"]
    assert learned(project, "edited", run) == calm[run]


# ---------------------------------------------------------------- helpers


def runs(project, study: str) -> list[str]:
    return [run.id for run in load_study(project.folder / f"config/studies/{study}.yaml", project.folder).runs]


def targets(project, study: str) -> list[str]:
    return [f"results/{study}/training/{run}.json" for run in runs(project, study)]


def learned(project, study: str, run: str) -> tuple:
    """Return all that a run came to: the adapter's bytes, losses and gradients of each step, answers and metrics."""
    adapter = (project.folder / f"results/{study}/runs/{run}/adapter/adapter_model.safetensors").read_bytes()
    with (project.folder / f"results/{study}/history/{run}.csv").open() as file:
        rows = [
            tuple(row[key] for key in ("step", "loss", "learning_rate", "grad_norm", "eval_loss", "label_tokens"))
            for row in csv.DictReader(file)
        ]
    summary = project.read(f"results/{study}/training/{run}.json")
    losses = tuple(summary[key] for key in ("steps", "train_loss", "base_eval_loss", "final_eval_loss", "tokens"))
    return adapter, rows, losses, *scored(project, study, run)


def scored(project, study: str, run: str) -> tuple[str, dict]:
    """Return the predictions and metrics of a run's weights, evaluated here: a Slurm job each would take long."""
    from finegrid.evaluation.evaluate import evaluate

    folder = project.folder
    the_run = load_study(folder / f"config/studies/{study}.yaml", folder).run(run)
    predictions, metrics = (folder / f"scored/{study}/{run}.{kind}" for kind in ("jsonl", "json"))
    report = evaluate(
        the_run.settings,
        run,
        tokens=folder / layout.tokens_folder(the_run),
        clean=folder / layout.clean_folder(the_run),
        model=folder / "data/models/tiny",
        adapter=folder / layout.weights_folder(study, the_run),
        predictions=predictions,
        metrics=metrics,
    )
    assert report["splits"]["test"]["examples"] == 8
    return predictions.read_text(), {key: report[key] for key in ("data", "signatures", "splits")}


def resumed_from(project, run: str) -> int | None:
    return project.read(f"results/storm/training/{run}.json")["resumed_from"]


def training_jobs(project, study: str) -> list[dict[str, str]]:
    jobs = [job for job in project.jobs() if job["name"].endswith(f".train_adapter.{study}")]
    return sorted(jobs, key=lambda job: int(job["id"]))


def jobs_of_run(project, run: str) -> list[dict[str, str]]:
    return [job for job in training_jobs(project, "storm") if job["name"].startswith(f"{run}.")]


def run_of(job: dict[str, str]) -> str:
    return job["name"].partition(".")[0]


def state(project: Project, job: str) -> str:
    return next(each["state"] for each in project.jobs() if each["id"] == job)


def hold_after_checkpoint(project: Project, study: str, names: list[str]) -> None:
    """Stop the training of each run when it begins its second checkpoint: the first is complete then.

    Its process is looked for before, at the first checkpoint, which takes a while: a run has many steps to go then.
    """
    waiting, processes = set(names), {}

    def all_held() -> bool:
        for run in sorted(waiting):
            found = [path.name for path in (project.folder / f"scratch/{study}/{run}").glob("checkpoint-*")]
            whole = len([name for name in found if re.fullmatch(r"checkpoint-\d+", name)])
            if whole > 0 and run not in processes:
                (job,) = [job["id"] for job in training_jobs(project, study) if run_of(job) == run]
                processes[run] = process_that_trains(project, job)
            elif whole > 1:
                os.kill(processes[run], signal.SIGSTOP)
                waiting.discard(run)
        return not waiting

    wait_until(all_held, seconds_between=0.02)


def wait_until(there: Callable[[], bool], seconds: float = 900, seconds_between: float = 0.1) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(seconds_between)


def to_training(project: Project, job: str, number: signal.Signals) -> None:
    """Send a signal to the process that trains in a job."""
    os.kill(process_that_trains(project, job), number)


def process_that_trains(project: Project, job: str) -> int:
    wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_CONF={project.slurm.folder}/slurm.conf".encode()}
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            variables = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if wanted <= set(variables) and b"train" in words and any(word.endswith(b"/finegrid") for word in words):
            found.append(int(process.name))
    assert len(found) == 1, found
    return found[0]
