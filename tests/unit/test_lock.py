"""No run is trained by two processes at once, and none is kept from training by a dead one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from finegrid.training import lock as module
from finegrid.training.lock import RunLock, read_owner
from test_launch import Project, wait_for
from test_stopping import ROWS, SLOW, everything_learned, start_and_wait, to_all_processes

HOLD = """
import sys, time
from pathlib import Path
from finegrid.training.lock import RunLock
with RunLock(Path(sys.argv[1]), "run", lambda line: print(line, flush=True)):
    print("mine", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture(autouse=True)
def looks_often(monkeypatch):
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LOOKS", 0.05)


def hold(folder: Path, seconds: float = 60) -> subprocess.Popen:
    command = [sys.executable, "-c", HOLD, str(folder), str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "mine\n"
    return process


def take(folder: Path, seconds: float = 10) -> tuple[bool, list[str]]:
    """Take and leave the lock; return whether it was had in time, and what was said."""
    said: list[str] = []

    def work() -> None:
        with RunLock(folder, "run", said.append):
            pass

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive(), said


def owner_file(folder: Path) -> Path:
    return folder / ".locks/run.json"


def pretend(folder: Path, **facts) -> None:
    """Leave the owner file of a process of another machine."""
    owner_file(folder).parent.mkdir(parents=True, exist_ok=True)
    record = {
        "run": "run",
        "node": "elsewhere",
        "pid": 1,
        "process_started": 0.0,
        "job": None,
        "started": "2026-11-24T10:00:00+00:00",
        "token": "t",
    }
    owner_file(folder).write_text(json.dumps(record | facts))


def age(path: Path, seconds: float) -> None:
    date = time.time() - seconds
    os.utime(path, (date, date))


def test_the_second_waits_says_for_whom_and_has_it_next(tmp_path):
    process = hold(tmp_path, 2)
    had, said = take(tmp_path)
    assert had
    assert len(said) == 2, said
    assert f"process {process.pid} on {socket.gethostname()}, since " in said[0]
    assert f"`kill {process.pid}`" in said[0]
    assert process.wait() == 0
    assert list((tmp_path / ".locks").iterdir()) == []


def test_of_many_each_has_it_alone(tmp_path):
    code = """
import os, sys, time
from pathlib import Path
from finegrid.training import lock
lock.SECONDS_BETWEEN_LOOKS = 0.01
folder = Path(sys.argv[1])
for _ in range(10):
    with lock.RunLock(folder, "run", lambda line: None):
        (folder / "inside").mkdir()
        time.sleep(0.01)
        (folder / "inside").rmdir()
"""
    started = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(5)]
    assert [process.wait(60) for process in started] == [0] * 5


def test_a_killed_process_does_not_keep_it(tmp_path):
    process = hold(tmp_path)
    process.kill()
    wait_for(lambda: Path(f"/proc/{process.pid}/stat").read_text().split()[2] == "Z")  # not even buried
    had, said = take(tmp_path)
    assert had
    assert said == [said[0]]
    assert "its process is gone" in said[0]
    process.wait()


def test_a_number_that_another_process_has_by_now_does_not_keep_it(tmp_path):
    pretend(tmp_path, node=socket.gethostname(), pid=os.getpid(), process_started=1.0)
    assert take(tmp_path)[0]


def test_a_stopped_process_keeps_it(tmp_path):
    process = hold(tmp_path)
    process.send_signal(signal.SIGSTOP)
    age(owner_file(tmp_path), 3600)
    assert not take(tmp_path, 1)[0]
    process.kill()
    process.wait()


def test_a_process_of_another_machine_keeps_it_while_it_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no Slurm to ask
    pretend(tmp_path, job="7")
    age(owner_file(tmp_path), 3600)
    state = tmp_path / "run/state.json"
    state.parent.mkdir()
    state.touch()
    age(state, 100)
    had, said = take(tmp_path, 1)
    assert not had
    assert "process 1 on elsewhere (Slurm job 7), since 24 Nov" in said[0]
    assert "last sign of life 2 min ago" in said[0]
    assert "`scancel 7`" in said[0]
    age(state, 200)
    had, said = take(tmp_path)
    assert had
    assert "no sign of life for 3 min" in said[0]


@pytest.mark.parametrize(
    ("squeue", "had"),
    [
        ("echo RUNNING", False),
        ("echo COMPLETED", True),
        ("echo PENDING", True),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", True),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", False),
    ],
)
def test_a_job_keeps_it_as_long_as_it_runs(tmp_path, monkeypatch, squeue, had):
    # Answers that a test can't have from a Slurm at will; faults on a real one are in tests/slurm.
    command = tmp_path / "squeue"
    command.write_text(f"#!/bin/sh\n{squeue}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    pretend(tmp_path, job="7")
    age(owner_file(tmp_path), 60)
    assert take(tmp_path, 10 if had else 1)[0] == had


def test_a_job_that_was_put_back_into_the_queue_goes_on_on_another_node(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    pretend(tmp_path, job="7")
    assert not take(tmp_path, 1)[0]
    pretend(tmp_path, job="7")
    age(owner_file(tmp_path), 40)
    assert take(tmp_path)[0]


def test_where_the_file_system_has_no_locks_the_owner_file_does(tmp_path, monkeypatch):
    monkeypatch.setattr(RunLock, "_take_system_lock", lambda self: None)
    with RunLock(tmp_path, "run", print):
        assert read_owner(owner_file(tmp_path))["pid"] == os.getpid()
        assert not take(tmp_path, 1)[0]
    process = hold(tmp_path)
    process.kill()
    process.wait()
    assert take(tmp_path)[0]


# ---------------------------------------------------------------- real runs


@pytest.fixture(scope="module")
def projects(tiny_model_dir, tmp_path_factory) -> tuple[Project, Project]:
    folder = tmp_path_factory.mktemp("projects")
    saving = {"training_args.save_strategy": "steps", "training_args.save_steps": 10, "training_args.max_steps": 150}
    arms = {"one": SLOW | saving, "two": SLOW | saving | {"gpus": 2}}
    return tuple(Project(folder / name, tiny_model_dir, ROWS, arms) for name in ("calm", "stormy"))


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["one", "two"])
def test_of_two_commands_one_trains_and_the_other_finds_it_trained(projects, arm):
    project = projects[1]
    first = start_and_wait(project, arm, 5)
    to_all_processes(first, signal.SIGSTOP)  # it must not end before the second has come
    second = project.start(arm)
    said = second.stdout.readline() + second.stdout.readline()
    to_all_processes(first, signal.SIGCONT)
    outputs = project.finish(arm, first), said + project.finish(arm, second)
    assert "done: 150 steps" in outputs[0]
    assert f"already being trained by process {first.pid} on {socket.gethostname()}, since" in outputs[1]
    assert outputs[1].splitlines()[-1].endswith("the other process has trained it")
    assert "step " not in outputs[1]
    assert project.summary(arm)["resumed_from"] is None
    assert not list((project.folder / "scratch/study/.locks").iterdir())


@pytest.mark.slow
def test_after_a_kill_the_one_that_waits_goes_on_to_the_same_bits(projects):
    calm, stormy = projects
    arm = "one"
    first = start_and_wait(stormy, arm, 15)
    first.send_signal(signal.SIGSTOP)
    second = stormy.start(arm)
    second.stdout.readline()
    assert "already being trained" in second.stdout.readline()
    first.kill()
    first.communicate()
    output = stormy.finish(arm, second)
    assert "its process is gone" in output
    assert "going on from step " in output
    assert stormy.summary(arm)["resumed_from"] >= 10
    calm.train(arm)
    assert everything_learned(stormy, arm) == everything_learned(calm, arm)
