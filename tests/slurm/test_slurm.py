"""A study of 12 runs on a real Slurm with 4 GPUs, from `snakemake --profile slurm` to the report."""

from __future__ import annotations

import math
import re
import time

import pytest

pytestmark = pytest.mark.slow

STUDY = """\
title: Which rank, at which learning rate?
hardware: {gpus: [a100-80gb]}
factors:
  rank: {key: peft_config.r, levels: [4, 8]}
  rate: {key: training_args.learning_rate, levels: [1.0e-3, 1.0e-2]}
seeds: [0, 1, 2]
compare: {baseline: {rank: 4, rate: 1.0e-3}, metric: rougeL, margin: 0.01}
"""
TOO_LITTLE = 300  # MiB, less than a Python process with torch


class Finished:
    """What the study left behind: its jobs as Slurm saw them last, and what was printed."""

    def __init__(self, project, starved: str):
        self.project = project
        self.starved = starved
        self.jobs = {job["id"]: job for job in project.jobs()}
        self.printed = project.printed()
        self.runs = [run for run in project.read("results/grid/plan.json")["runs"] if run["train"]]

    def trainings(self) -> list[dict[str, str]]:
        return [job for job in self.jobs.values() if ".train_adapter." in job["name"]]

    def retried(self) -> dict[str, str]:
        """The second attempt of the job that was given too little memory."""
        name = self.jobs[self.starved]["name"]
        return next(job for job in self.trainings() if job["name"] == name and job["id"] != self.starved)


@pytest.fixture(scope="module")
def finished(cluster_project) -> Finished:
    """The study, run once; one training is given too little memory while it waits."""
    cluster_project.write_study("grid", STUDY)
    controller = cluster_project.start("grid")
    slurm = cluster_project.slurm
    end = time.monotonic() + 180
    while time.monotonic() < end and controller.poll() is None:
        waiting = [job for job in cluster_project.jobs() if job["state"] == "PENDING" and ".train_" in job["name"]]
        if len(waiting) > 2:
            starved = waiting[-1]["id"]  # the last: it stays in the queue while we change it
            slurm.run("scontrol", "update", f"JobId={starved}", f"MinMemoryNode={TOO_LITTLE}")
            break
        time.sleep(0.1)
    else:
        raise AssertionError(f"no training waited for a GPU:\n{cluster_project.printed()}")
    cluster_project.finish(controller)
    return Finished(cluster_project, starved)


def test_the_study_went_from_raw_data_to_its_report(finished):
    results = finished.project.folder / "results/grid"
    assert (results / "report.html").is_file()
    assert len(finished.runs) == 12
    for run in finished.runs:
        assert (results / f"runs/{run['run']}/adapter/adapter_model.safetensors").is_file()
        assert finished.project.read(f"results/grid/training/{run['run']}.json")["steps"] == 4
        assert finished.project.read(f"results/grid/metrics/{run['run']}.json")["splits"]["test"]["examples"] == 8


def test_each_run_was_a_slurm_job_under_a_name_that_a_person_recognises(finished):
    names = [job["name"] for job in finished.trainings() if job["state"] == "COMPLETED"]
    assert sorted(names) == sorted(f"{run['run']}.train_adapter.grid" for run in finished.runs)


def test_each_job_had_a_gpu_of_its_own_and_four_ran_at_a_time(finished):
    trainings = {job["id"] for job in finished.trainings()}
    occupied = [job for job in finished.project.slurm.occupied() if job.job in finished.jobs and job.devices]
    assert trainings <= {job.job for job in occupied}
    assert all(len(job.devices) == 1 for job in occupied)
    at_a_time = []
    for moment in sorted(job.begin for job in occupied):
        there = [job for job in occupied if job.begin <= moment < job.end]
        assert len({device for job in there for device in job.devices}) == len(there), there
        at_a_time.append(len(there))
    assert max(at_a_time) == 4


def test_jobs_asked_for_what_the_plan_says(finished):
    for run in finished.runs:
        job = next(
            job for job in finished.trainings() if job["name"].startswith(run["run"]) and job["id"] != finished.starved
        )
        attempts = 1 if job["id"] != finished.retried()["id"] else 2
        assert job["partition"] == "gpu"
        assert job["TresPerJob"] == "gres:gpu:a100:1"
        assert minutes(job["TimeLimit"]) == attempts * math.ceil((run["seconds"] * 1.5 + 600) / 60)


def test_data_and_figures_held_no_gpu(finished):
    others = [job for job in finished.jobs.values() if not re.search(r"\.(train_\w+|evaluate)\.", job["name"])]
    assert all(job["partition"] == "cpu" and "gpu" not in job.get("TresPerJob", "") for job in others)
    local = ("compare", "figure", "study_tables", "study_report", "study_plan", "model", "import_data")
    assert not [job["name"] for job in others if job["name"].split(".")[1] in local]


def test_a_job_out_of_memory_was_tried_again_with_more(finished):
    first, second = finished.jobs[finished.starved], finished.retried()
    planned = next(job for job in finished.trainings() if job["id"] not in (first["id"], second["id"]))
    assert memory(first) == TOO_LITTLE
    assert first["state"] in ("FAILED", "OUT_OF_MEMORY")
    assert memory(second) == int(memory(planned) * 1.5)
    assert second["state"] == "COMPLETED"
    told = [line for line in finished.printed.splitlines() if f"Slurm job {finished.starved} ended as" in line]
    assert len(told) == 1
    run = first["name"].partition(".")[0]
    assert f"logs/train/grid/{run}.log" in told[0]
    slurm_log = re.search(r"logs/slurm/\S+\.log", told[0])[0]
    assert "memory limit" in (finished.project.folder / slurm_log).read_text()


def test_the_controller_says_no_more_than_what_happens(finished):
    lines = finished.printed.splitlines()
    assert "Traceback" not in finished.printed
    assert not [line for line in lines if re.search("Auto-selected|account|SLURM run ID|memory information", line)]
    assert len(lines) < 10 * len(finished.jobs)


def test_jobs_ask_no_hub(finished):
    script = finished.project.slurm.run("scontrol", "write", "batch_script", finished.retried()["id"], "-")
    assert "HF_HUB_OFFLINE=1" in script


def test_nothing_is_left_to_do_with_or_without_the_cluster(finished):
    for profile in ([], ["--profile", "slurm"]):
        done = finished.project.run("snakemake", *profile, "--config", "study=grid", "-n")
        assert "Nothing to be done" in done.stdout + done.stderr or jobs_of(done.stdout) == {"report"}, done.stdout


def jobs_of(text: str) -> set[str]:
    return {name for name, _ in re.findall(r"^(\w+) +(\d+)$", text, flags=re.MULTILINE)} - {"total"}


def minutes(limit: str) -> int:
    days, _, clock = limit.rpartition("-")
    hours, minutes, _ = clock.split(":")
    return (int(days or 0) * 24 + int(hours)) * 60 + int(minutes)


def memory(job: dict[str, str]) -> int:
    return int(re.search(r"mem=(\d+)M", job["TRES"])[1]) if "mem=" in job.get("TRES", "") else memory_asked(job)


def memory_asked(job: dict[str, str]) -> int:
    return int(job["MinMemoryNode"].rstrip("M"))
