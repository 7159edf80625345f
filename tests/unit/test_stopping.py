"""A training that is asked to end saves where it is, ends by the signal, and goes on later to the same bits."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from finegrid.settings import RunSettings
from finegrid.training.state import read_state
from finegrid.training.stopping import Stop, Stopped
from finegrid.training.train import train
from test_launch import Project, deepspeed, wait_for
from token_rows import random_rows, write_tokens

ROWS = random_rows(22)
VALIDATION = random_rows(7, seed=1, split="validation")
LORA = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.1}
OF_A_CLOCK = ("seconds", "memory_mb", "train_seconds", "tokens_per_second", "peak_memory_mb", "resumed_from")


# ---------------------------------------------------------------- at each moment, in this process


class Patience(Stop):
    """Is asked to end when the training looks for the n-th time."""

    def __init__(self, looks: int):
        self.looks = looks
        super().__init__()

    @property
    def asked(self) -> signal.Signals | None:
        self.looks -= 1
        return signal.SIGTERM if self.looks < 0 else None

    @asked.setter
    def asked(self, number) -> None:
        pass


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens"), train=ROWS, validation=VALIDATION)


def run(settings: RunSettings, tokens: Path, model: Path, folder: Path, stop: Stop | None = None) -> dict:
    return train(
        settings,
        tokens=tokens,
        model=model,
        output=folder / "adapter",
        history=folder / "history.csv",
        summary=folder / "summary.json",
        checkpoints=folder / "scratch" / "run",
        stop=stop,
    )


def learned(history: Path, summary: Path, adapter: Path) -> tuple:
    """What a run wrote, without what a clock or the machine's memory decides."""
    with history.open() as file:
        rows = [{key: value for key, value in row.items() if key not in OF_A_CLOCK} for row in csv.DictReader(file)]
    facts = {key: value for key, value in json.loads(summary.read_text()).items() if key not in OF_A_CLOCK}
    return rows, facts, {path.name: path.read_bytes() for path in sorted(adapter.iterdir())}


BY_STEPS = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3}
BY_EPOCHS = {"eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch"}
BEST = BY_STEPS | {"load_best_model_at_end": True, "save_total_limit": 1}


@pytest.mark.parametrize(
    ("arguments", "early_stopping"),
    [
        ({"eval_strategy": "no", "save_strategy": "no", "logging_steps": 4}, None),
        (BY_STEPS, None),
        (BY_EPOCHS, None),
        (BY_EPOCHS | {"max_steps": 5}, None),
        (BEST | {"learning_rate": 0.3}, {"patience": 1, "threshold": 0.0}),
    ],
    ids=["no evaluation", "by steps", "by epochs", "ends within an epoch", "best and early stop"],
)
def test_a_run_stopped_again_and_again_learns_what_an_undisturbed_one_does(
    tokens, tiny_model_dir, tmp_path, arguments, early_stopping
):
    defaults = {
        "use_cpu": True,
        "max_steps": 7,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
    }
    settings = RunSettings(
        model={"model_name_or_path": "data/models/tiny"},
        peft_config=LORA,
        early_stopping=early_stopping,
        training_args=defaults | arguments,
    )
    folders = tmp_path / "calm", tmp_path / "stormy"
    run(settings, tokens, tiny_model_dir, folders[0])
    for attempt in itertools.count():
        assert attempt < 40, "it doesn't get on"
        # Every other attempt may do more, or an evaluation that needs more looks would be begun again for ever.
        with contextlib.suppress(Stopped):
            run(settings, tokens, tiny_model_dir, folders[1], Patience(2 + attempt % 9))
            break
    assert attempt > 1
    calm, stormy = (learned(folder / "history.csv", folder / "summary.json", folder / "adapter") for folder in folders)
    assert stormy == calm
    assert not (folders[1] / "scratch/run").exists()


# ---------------------------------------------------------------- real signals


SLOW = {  # nothing is saved but what a signal asks for
    "training_args.max_steps": 60,
    "training_args.save_strategy": "no",
    "training_args.eval_steps": 20,
    "peft_config": LORA,
}


@pytest.fixture(scope="module")
def projects(tiny_model_dir, tmp_path_factory) -> tuple[Project, Project]:
    """Two projects with the same runs: nothing happens to those of the first."""
    arms = {
        "one": SLOW,
        "loaders": SLOW | {"training_args.dataloader_num_workers": 2, "training_args.warmup_steps": 2},
        "two": SLOW | {"gpus": 2},
        "zero2": SLOW | {"gpus": 2, **deepspeed("zero2")},
    }
    folder = tmp_path_factory.mktemp("projects")
    return tuple(Project(folder / name, tiny_model_dir, ROWS, arms) for name in ("calm", "stormy"))


def step_of(project: Project, arm: str) -> int:
    path = project.folder / "scratch/study" / project.run_of(arm) / "history.csv"
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(path.read_text().splitlines()[-1].split(",")[0])
    return 0


def everything_learned(project: Project, arm: str) -> tuple:
    results, name = project.folder / "results/study", project.run_of(arm)
    return learned(results / f"history/{name}.csv", results / f"training/{name}.json", project.weights(arm))


def start_and_wait(project: Project, arm: str, step: int) -> subprocess.Popen:
    process = project.start(arm)
    wait_for(lambda: step_of(project, arm) >= step or process.poll() is not None)
    return process


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arm", "number", "reason"),
    [
        ("one", signal.SIGTERM, "ended by SIGTERM"),
        ("loaders", signal.SIGINT, "interrupted"),
        ("two", signal.SIGUSR1, "ended by SIGUSR1"),
        ("zero2", signal.SIGTERM, "ended by SIGTERM"),
    ],
)
def test_a_signal_ends_a_run_with_a_checkpoint_and_the_same_command_goes_on_to_the_same_bits(
    projects, arm, number, reason
):
    calm, stormy = projects
    process = start_and_wait(stormy, arm, 8)
    to_all_processes(process, number)
    output = stormy.finish(arm, process, status=-number)
    assert f"stopped by {number.name} after step " in output
    assert "Traceback" not in output + stormy.log(arm)
    scratch = stormy.folder / "scratch/study" / stormy.run_of(arm)
    state = read_state(scratch / "state.json")
    assert (state["state"], state["reason"]) == ("failed", reason)
    assert not (stormy.folder / "results").exists() or not stormy.weights(arm).exists()
    (checkpoint,) = scratch.glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert 8 <= step < 60

    assert f"going on from step {step}" in stormy.train(arm)
    calm.train(arm)
    assert stormy.summary(arm)["resumed_from"] == step
    assert everything_learned(stormy, arm) == everything_learned(calm, arm)


def to_all_processes(process: subprocess.Popen, number: int) -> None:
    """Send a signal as a batch system does: to each process of the job, in no order."""
    children = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            children.setdefault(int(path.read_text().rpartition(")")[2].split()[1]), []).append(int(path.parent.name))
    found = [process.pid]
    for parent in found:
        found += children.get(parent, [])
    for each in reversed(found):
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, number)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
def test_a_signal_to_one_worker_ends_all_with_a_checkpoint(projects):
    arm, project = "two", projects[1]
    process = start_and_wait(project, arm, 8)
    os.kill(project.workers(arm)[1], signal.SIGTERM)
    output = project.finish(arm, process, status=2)
    assert "was ended by SIGTERM" in output
    assert len(project.checkpoints(arm)) == 1
    assert project.workers(arm) == []


@pytest.mark.parametrize(("grace", "signals", "status"), [("1", 1, 128 + signal.SIGTERM), ("60", 2, -signal.SIGTERM)])
def test_a_step_that_does_not_end_is_not_waited_for_for_ever(tmp_path, grace, signals, status):
    code = f"""
import time
from pathlib import Path
from finegrid.training.state import live_state
from finegrid.training.stopping import Stop
with Stop() as stop, live_state(Path({str(tmp_path)!r}, "run", "state.json"), "run-1", None, stop=stop) as tell:
    with stop.waits():
        print("up", flush=True)
        for _ in range(600):
            time.sleep(0.1)
"""
    environment = os.environ | {"FINEGRID_GRACE_SECONDS": grace}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    process.terminate()
    for _ in range(signals - 1):
        for _ in range(4):  # the same request, passed on by several: all within the two seconds that count as one
            time.sleep(0.05)
            process.terminate()
        assert process.poll() is None
        wait_for(lambda: process.terminate() or process.poll() is not None)  # asked again and again
    assert process.wait(60) == status
    state = read_state(tmp_path / "run/state.json")
    assert (state["state"], state["reason"]) == ("failed", "ended by SIGTERM")
