"""A snakemake that was killed, and a second one beside a living one: who holds the study, and how it goes on."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import RECIPE, Checkout, copy_project, write_tiny_study
from finegrid.study import load_study

pytestmark = pytest.mark.slow
STUDY = """\
title: Does it go on?
recipe: config/recipes/tiny.yaml
factors:
  rank: {key: peft_config.r, levels: [4]}
seeds: [0, 1]
compare: {baseline: {rank: 4}, metric: rougeL, margin: 0.01}
"""
LONGER = (
    RECIPE.replace("max_steps: 4", "max_steps: 150")
    .replace("eval_steps: 2", "eval_steps: 50")
    .replace("save_steps: 2", "save_steps: 10")
)


class Orphaned(Checkout):
    """A project whose snakemake can be killed."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.environment = os.environ | {
            "PYTHONPATH": str(folder / "workflow"),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }
        self.environment.pop("FINEGRID_STUDY", None)
        self.runs = [run.id for run in load_study(Path("config/studies/tiny.yaml"), folder).runs]
        self.targets = [f"results/tiny/training/{run}.json" for run in self.runs]

    def start(self) -> subprocess.Popen:
        command = ["snakemake", "--config", f"study={self.study}", "--cores", "2", "--", *self.targets]
        with (self.folder / "printed").open("w") as printed:  # a pipe would be held by what outlives it
            return subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.environment,
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def printed(self) -> str:
        return (self.folder / "printed").read_text()

    def finegrid(self, *arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "finegrid.cli", *arguments]
        return subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    def step(self, run: str) -> int:
        with contextlib.suppress(OSError, IndexError, ValueError):
            return int((self.folder / f"scratch/tiny/{run}/history.csv").read_text().splitlines()[-1].split(",")[0])
        return 0

    def summary(self, run: str) -> dict:
        return json.loads((self.folder / f"results/tiny/training/{run}.json").read_text())

    def learned(self, run: str) -> tuple:
        with (self.folder / f"results/tiny/history/{run}.csv").open() as file:
            rows = [{k: v for k, v in row.items() if k not in ("seconds", "memory_mb")} for row in csv.DictReader(file)]
        return rows, (self.folder / f"results/tiny/runs/{run}/adapter/adapter_model.safetensors").read_bytes()

    def hold(self, controller: subprocess.Popen) -> list[psutil.Process]:
        """Stop each training when it has made five steps, so that none ends before what is to happen to it."""
        held: dict[str, psutil.Process] = {}

        def all_held() -> bool:
            for run in self.runs:
                if run not in held and self.step(run) >= 5:
                    (held[run],) = [process for process in self.trainings() if run in process.cmdline()]
                    held[run].suspend()
            return len(held) == len(self.runs) or controller.poll() is not None

        wait_for(all_held)
        return list(held.values())

    def commit(self) -> str:
        """Make a commit, as if code or settings had changed; return its hash."""
        who = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        git = ["git", "-C", str(self.folder)]
        subprocess.run([*git, "init", "-q"], check=True)
        subprocess.run([*git, *who, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
        return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()

    def trainings(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.cwd() == str(self.folder) and "train" in process.cmdline()[:4]:
                    found.append(process)
        return found


@pytest.fixture(scope="module")
def prepared(project, tiny_model_dir, insuranceqa_dir, tmp_path_factory) -> Orphaned:
    """A project whose data are ready and whose runs were trained with nothing happening to them."""
    folder = tmp_path_factory.mktemp("calm") / "project"
    copy_project(project, tiny_model_dir, folder)
    write_tiny_study(folder, insuranceqa_dir, STUDY, LONGER)
    calm = Orphaned(folder)
    calm.snakemake("--", *calm.targets)
    return calm


@pytest.fixture
def stormy(prepared, tmp_path) -> Iterator[Orphaned]:
    folder = tmp_path / "project"
    shutil.copytree(prepared.folder, folder, symlinks=True)
    shutil.rmtree(folder / "results")
    project = Orphaned(folder)
    yield project
    for process in project.trainings():
        process.kill()


def wait_for(condition, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.parametrize("choice", ["--adopt", "--end"])
def test_what_a_killed_snakemake_left_is_shown_kept_or_ended_and_goes_on_to_the_same_bits(prepared, stormy, choice):
    before = stormy.commit()
    controller = stormy.start()
    held = stormy.hold(controller)
    after = stormy.commit()

    # While it lives.
    second = stormy.snakemake("--", *stormy.targets, check=False)
    assert second.returncode != 0
    who = f"process {controller.pid} on {socket.gethostname()} since "
    assert who in second.stderr
    assert "works on study tiny" in second.stderr
    assert second.stderr.index(who) < second.stderr.index("Directory cannot be locked")
    refused = stormy.finegrid("orphans", "tiny", choice)
    assert refused.returncode == 1
    assert "is alive" in refused.stderr

    controller.kill()
    controller.wait(60)
    second = stormy.snakemake("--", *stormy.targets, check=False)
    assert second.returncode != 0
    assert who in second.stderr
    assert "was killed while it worked on study tiny. `make orphans STUDY=tiny`" in second.stderr
    shown = stormy.finegrid("orphans", "tiny")
    assert "nobody to ask" in shown.stderr
    for run in stormy.runs:
        assert f"finegrid train tiny {run}" in shown.stdout
    done = stormy.finegrid("orphans", "tiny", choice)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Unlocked." in done.stdout
    if choice == "--end":
        assert not stormy.trainings()

    controller = stormy.start()
    if choice == "--adopt":
        logs = [stormy.folder / f"logs/train/tiny/{run}.log" for run in stormy.runs]
        wait_for(lambda: all(log.exists() and "already being trained by" in log.read_text() for log in logs))
        for process in held:
            process.resume()
    assert controller.wait(900) == 0, stormy.printed()
    for run in stormy.runs:
        resumed = stormy.summary(run)["resumed_from"]
        assert resumed is None if choice == "--adopt" else resumed >= 5
        assert stormy.learned(run) == prepared.learned(run)
        # The code that ran is that of the commit at which the training began.
        provenance = json.loads((stormy.folder / f"results/tiny/provenance/{run}.json").read_text())
        assert provenance["commit"] == (before if choice == "--adopt" else after)
    wait_for(lambda: not stormy.trainings())  # a training gives its lock back before its process has ended
    assert stormy.finegrid("orphans", "tiny").stdout.startswith("Nothing runs for study tiny")
    assert stormy.snakemake("--", *stormy.targets).returncode == 0


def test_ctrl_c_saves_checkpoints_and_leaves_no_lock(prepared, stormy):
    controller = stormy.start()
    held = stormy.hold(controller)
    os.killpg(controller.pid, signal.SIGINT)
    for process in held:
        process.resume()
    assert controller.wait(600) != 0
    wait_for(lambda: not stormy.trainings())
    assert "Traceback" not in stormy.printed()
    output = stormy.snakemake("--", *stormy.targets).stderr
    assert "locked" not in output
    for run in stormy.runs:
        assert stormy.summary(run)["resumed_from"] >= 5
        assert stormy.learned(run) == prepared.learned(run)
