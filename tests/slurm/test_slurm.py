"""A study of 12 runs on a real Slurm with 4 GPUs, from `snakemake --profile slurm` to the report."""

from __future__ import annotations

import csv
import math
import re
import time

import pytest
from cluster import GPUS
from finegrid.study import load_study
from login_node import RECIPE
from snakemake_executor_plugin_finegrid_slurm import SNAKEMAKE_MB

pytestmark = pytest.mark.slow

STUDY = """\
title: Which rank, at which learning rate?
factors:
  rank: {key: peft_config.r, levels: [4, 8]}
  rate: {key: training_args.learning_rate, levels: [1.0e-3, 1.0e-2]}
seeds: [0, 1, 2]
compare: {baseline: {rank: 4, rate: 1.0e-3}, metric: rougeL, margin: 0.01}
"""
# One run of that study, trained by two processes on each of two nodes.
SPREAD = """\
title: Do two nodes train alike?
factors:
  rank: {key: peft_config.r, levels: [8]}
  rate: {key: training_args.learning_rate, levels: [1.0e-2]}
seeds: [0]
compare: {baseline: {rank: 8, rate: 1.0e-2}, metric: rougeL, margin: 0.01}
"""
# Of that study the runs of one arm, and one more.
PACKED = """\
title: Do packs train alike?
factors:
  rank: {key: peft_config.r, levels: [4]}
  rate: {key: training_args.learning_rate, levels: [1.0e-3]}
seeds: [0, 1, 2, 3]
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
    end = time.monotonic() + 600
    while time.monotonic() < end and controller.poll() is None:
        trainings = [job for job in cluster_project.jobs() if ".train_" in job["name"]]
        waiting = [job for job in trainings if job["state"] == "PENDING"]
        # All GPUs are taken, and others come before the last: it stays in the queue while we change it.
        if [job["state"] for job in trainings].count("RUNNING") == GPUS and len(waiting) > 2:
            starved = max((job["id"] for job in waiting), key=int)
            slurm.run("scontrol", "update", f"JobId={starved}", f"MinMemoryNode={TOO_LITTLE}")
            break
        time.sleep(0.1)
    else:
        raise AssertionError(f"no training waited for a GPU:\n{cluster_project.printed()}")
    cluster_project.finish(controller)
    finished = Finished(cluster_project, starved)
    for told in re.findall(r"Slurm job \d+ ended as .*", finished.printed):
        print(told)  # pytest shows it where a test fails
        for log in re.findall(r"logs/\S+\.log", told):
            path = cluster_project.folder / log
            print(path.read_text()[-3000:] if path.is_file() else f"no {log}")
    return finished


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
    assert max(at_a_time) == GPUS


def test_jobs_asked_for_what_the_plan_says(finished):
    for run in finished.runs:
        job = next(
            job for job in finished.trainings() if job["name"].startswith(run["run"]) and job["id"] != finished.starved
        )
        attempts = 1 if job["id"] != finished.retried()["id"] else 2
        assert job["partition"] == "gpu"
        assert job["TresPerJob"] == "gres:gpu:a100:1"
        assert minutes(job["TimeLimit"]) == attempts * math.ceil((run["seconds"] * 1.5 + 600) / 60)


def test_data_figures_and_evaluations_of_a_small_model_held_no_gpu(finished):
    others = [job for job in finished.jobs.values() if ".train_adapter." not in job["name"]]
    assert all(job["partition"] == "cpu" and "gpu" not in job.get("TresPerJob", "") for job in others)
    assert {job["name"].split(".")[1] for job in others} == {"clean", "tokenise", "evaluate"}
    evaluations = [job for job in others if ".evaluate." in job["name"]]
    # An attempt that failed on this machine is followed by another: the first says what was asked for.
    first = {job["name"]: job for job in sorted(evaluations, key=lambda job: -int(job["id"]))}
    assert len(first) == 13
    # Ten, and half as much again as the plan says.
    assert {minutes(job["TimeLimit"]) for job in first.values()} == {11}


def test_a_job_out_of_memory_was_tried_again_with_more(finished):
    first, second = finished.jobs[finished.starved], finished.retried()
    planned = next(job for job in finished.trainings() if job["id"] not in (first["id"], second["id"]))
    assert memory(first) == TOO_LITTLE
    assert first["state"] in ("FAILED", "OUT_OF_MEMORY")
    assert memory(second) - SNAKEMAKE_MB == int((memory(planned) - SNAKEMAKE_MB) * 1.5)
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


def test_a_cluster_whose_gpus_nobody_named_is_no_cpu_cluster(finished):
    project = finished.project
    file = project.folder / "profiles/slurm/cluster.yaml"
    named = file.read_text()
    try:
        file.write_text(named.replace("gpus: [a100-80gb]\n", ""))
        done = project.run("snakemake", "--profile", "slurm", "--config", "study=grid", "--forcerun", "evaluate")
    finally:
        file.write_text(named)
    assert done.returncode != 0
    assert "profiles/slurm/cluster.yaml: partition 'gpu' has GPUs, but nothing says which" in done.stdout + done.stderr
    assert len(project.jobs()) == len(finished.jobs)


def test_a_pack_is_one_job_with_one_gpu_and_trains_what_the_runs_train_alone(finished):
    project = finished.project
    project.write_study("packed", PACKED)
    runs = [run.id for run in load_study(project.folder / "config/studies/packed.yaml", project.folder).runs]
    wanted = [f"results/packed/metrics/{run}.json" for run in runs]
    before = {job["id"] for job in project.jobs()}
    project.finish(project.start("packed", "--", *wanted, config=("pack=auto",)))
    jobs = {job["name"].split(".", 1)[1]: job for job in project.jobs() if job["id"] not in before}
    assert jobs.keys() == {"train_pack.packed", "evaluate_pack.packed"}
    assert (jobs["train_pack.packed"]["partition"], jobs["evaluate_pack.packed"]["partition"]) == ("gpu", "cpu")
    assert jobs["train_pack.packed"]["TresPerJob"] == "gres:gpu:a100:1"
    for run in runs:
        weights = f"runs/{run}/adapter/adapter_model.safetensors"
        alone, packed = (project.folder / "results" / study / weights for study in ("grid", "packed"))
        assert alone.exists() == (run in {each["run"] for each in finished.runs})
        assert not alone.exists() or packed.read_bytes() == alone.read_bytes()
        assert project.read(f"results/packed/metrics/{run}.json")["splits"]["test"]["examples"] == 8
        assert project.read(f"results/packed/provenance/{run}.json")["command"].startswith("finegrid train packed")
    for pack in ("off", "auto"):
        for profile in ([], ["--profile", "slurm"]):
            done = project.run("snakemake", *profile, "--config", "study=packed", f"pack={pack}", "-n", "--", *wanted)
            assert "Nothing to be done" in done.stdout + done.stderr


def test_two_nodes_train_like_one(finished):
    project = finished.project
    recipe = RECIPE.replace("train_batch_size: 4", "train_batch_size: 1") + "gpus: 2\nnodes: 2\n"
    project.write_study("spread", SPREAD, recipe)
    (run,) = load_study(project.folder / "config/studies/spread.yaml", project.folder).runs
    project.finish(project.start("spread", "--", f"results/spread/training/{run.id}.json"))
    (job,) = [job for job in project.jobs() if job["name"] == f"{run.id}.train_adapter.spread"]
    assert (job["state"], job["NumNodes"], job["NumCPUs"]) == ("COMPLETED", "2", "4")
    assert job["TresPerNode"] == "gres:gpu:a100:2"
    begun = [each for each in project.slurm.occupied() if each.job == job["id"]]
    assert {device for each in begun for device in each.devices} == {"node1:0", "node1:1", "node2:0", "node2:1"}
    summary = project.read(f"results/spread/training/{run.id}.json")
    assert summary["effective_batch_size"] == 4
    study = load_study(project.folder / "config/studies/grid.yaml", project.folder)
    settings = {each.id: each.settings for each in study.runs if each.seed == 0}
    (alone,) = [
        each
        for each, its in settings.items()
        if its.peft_config["r"] == 8 and its.training_args["learning_rate"] == 0.01
    ]
    assert curve(project, "spread", run.id) == pytest.approx(curve(project, "grid", alone), rel=1e-4)
    lines = [line for line in project.printed().splitlines() if f"train {run.id}" in line]
    assert len(lines) == len(set(lines))


def test_a_job_with_fewer_nodes_than_the_recipe_says_so(finished):
    project = finished.project
    (run,) = load_study(project.folder / "config/studies/spread.yaml", project.folder).runs
    script = f"finegrid train spread {run.id}"
    done = project.run("srun", "--nodes=1", "--ntasks=1", "--mem=500", "bash", "-c", script)
    assert done.returncode == 1
    assert "nodes: the recipe asks for 2, but this job has 1" in done.stderr


def curve(project, study: str, run: str) -> list[float]:
    with (project.folder / f"results/{study}/history/{run}.csv").open() as file:
        return [float(row["loss"] or row["eval_loss"]) for row in csv.DictReader(file)]


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
