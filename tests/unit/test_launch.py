"""Several processes train one run: started by `finegrid train` itself, on the CPU, with the tiny model."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from finegrid import layout
from finegrid.errors import UserError
from finegrid.settings import RunSettings
from finegrid.study import Study, load_study
from finegrid.training import launch
from finegrid.training.train import train
from finegrid.training.trainer import is_complete
from peft import PeftModel
from safetensors import safe_open
from token_rows import plain_loss, random_rows, write_tokens
from transformers import AutoModelForCausalLM

ROWS = random_rows(22)  # not a multiple of the 8 rows of a step: the epoch's last window is a partial one
VALIDATION = random_rows(7, seed=1, split="validation")
SHARED = {
    "model": {"model_name_or_path": "data/models/tiny"},
    "settings": {
        "data_config": {"train_file": "train.jsonl", "val_file": "validation.jsonl", "test_file": "test.jsonl"},
        "training_args": {
            "use_cpu": True,
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "warmup_steps": 1,
            "max_grad_norm": 0.5,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "save_strategy": "steps",
            "save_steps": 3,
        },
    },
}
LORA = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.0}


class Project:
    """A project folder with the tiny model, one token set and a study of one arm a level."""

    def __init__(self, folder: Path, model: Path, rows: list[dict], arms: dict[str, dict]):
        self.folder = folder
        study = {**SHARED, "factors": {"arm": arms}}
        (folder / "data/models").mkdir(parents=True)
        (folder / "data/models/tiny").symlink_to(model)
        (folder / "study.yaml").write_text(yaml.safe_dump(study))
        for name in ("train", "validation", "test"):
            (folder / f"{name}.jsonl").touch()
        (folder / "config").mkdir()
        (folder / "config/deepspeed").symlink_to(Path(__file__).parents[2] / "config/deepspeed")
        self.study: Study = load_study(Path("study.yaml"), folder)
        tokens = folder / layout.tokens_folder(self.study.runs[0])
        write_tokens(tokens, train=rows, validation=VALIDATION, test=VALIDATION)
        (tokens / "report.json").write_text('{"clean": {"import": {"files": {}}}}')
        (folder / "data/models/tiny.json").write_text("{}")

    def run_of(self, arm: str) -> str:
        return next(each.runs[0] for each in self.study.arms if each.name == arm)

    def start(self, arm: str) -> subprocess.Popen:
        run = self.run_of(arm)
        command = [sys.executable, "-m", "finegrid.cli", "train", "study.yaml", run, "--log", f"logs/{run}.log"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            command, cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def train(self, arm: str, status: int = 0) -> str:
        """Train an arm's run as a user would and return what the terminal showed."""
        return self.finish(arm, self.start(arm), status)

    def finish(self, arm: str, process: subprocess.Popen, status: int = 0) -> str:
        output = process.communicate(timeout=900)[0]
        assert process.returncode == status, output + self.log(arm)[-5000:]
        return output

    def train_here(self, arm: str) -> list[dict[str, float | None]]:
        """Train an arm's run in this process and return its history."""
        run = self.study.run(self.run_of(arm))
        train(
            run.settings,
            tokens=self.folder / layout.tokens_folder(run),
            model=self.folder / "data/models/tiny",
            output=self.folder / layout.weights_folder("study", run),
            history=self.folder / f"results/study/history/{run.id}.csv",
            summary=self.folder / f"results/study/training/{run.id}.json",
            checkpoints=self.folder / "scratch/here" / run.id,
        )
        return self.history(arm)

    def log(self, arm: str) -> str:
        path = self.folder / f"logs/{self.run_of(arm)}.log"
        return path.read_text() if path.exists() else ""

    def history(self, arm: str) -> list[dict[str, float | None]]:
        with (self.folder / f"results/study/history/{self.run_of(arm)}.csv").open() as file:
            return [
                {key: float(value) if value else None for key, value in row.items()} for row in csv.DictReader(file)
            ]

    def summary(self, arm: str) -> dict:
        return json.loads((self.folder / f"results/study/training/{self.run_of(arm)}.json").read_text())

    def checkpoints(self, arm: str) -> list[str]:
        """Names of the run's checkpoints that were written to their end."""
        folders = (self.folder / "scratch/study" / self.run_of(arm)).glob("checkpoint-*")
        return [path.name for path in folders if is_complete(path, processes=2)]

    def workers(self, arm: str) -> list[int]:
        """Return the processes of this machine that train the arm's run and were started by torchrun."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                mine = self.run_of(arm).encode() in (path / "cmdline").read_bytes()
                if mine and b"\0RANK=" in b"\0" + (path / "environ").read_bytes():
                    found.append(int(path.name))
        return found

    def weights(self, arm: str) -> Path:
        return self.folder / layout.weights_folder("study", self.study.run(self.run_of(arm)))


def wait_for(condition, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def assert_same_curve(found: list[dict], expected: list[dict], tolerance: float) -> None:
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for column in ("loss", "grad_norm", "eval_loss", "learning_rate", "label_tokens", "tokens"):
        pairs = [(a[column], b[column]) for a, b in zip(found, expected, strict=True) if b[column] is not None]
        assert [a for a, _ in pairs] == pytest.approx([b for _, b in pairs], rel=tolerance), column


def assert_plain_libraries_load_it(project: Project, arm: str) -> None:
    """What was saved has, in plain transformers and peft, the validation loss of the summary."""
    settings = project.study.run(project.run_of(arm)).settings
    folder = project.weights(arm)
    assert not [path for path in folder.iterdir() if path.suffix in (".bin", ".pt")]
    if settings.peft_config is None:
        model = AutoModelForCausalLM.from_pretrained(folder)
    else:
        base = AutoModelForCausalLM.from_pretrained(project.folder / "data/models/tiny")
        model = PeftModel.from_pretrained(base, folder)
    total, count = plain_loss(model.eval(), VALIDATION)
    assert project.summary(arm)["final_eval_loss"] == pytest.approx(total / count, rel=1e-5)


def saved_tensors(project: Project, arm: str) -> set[str]:
    (file,) = project.weights(arm).glob("*.safetensors")
    with safe_open(file, "pt") as tensors:
        return set(tensors.keys())


ACCUMULATED = {"training_args.gradient_accumulation_steps": 2}
LONG = {"training_args.max_steps": 40, "training_args.save_steps": 10, "training_args.eval_steps": 20}


def deepspeed(name: str) -> dict:
    return {"training_args.deepspeed": f"config/deepspeed/{name}.json"}


@pytest.fixture(scope="module")
def project(tiny_model_dir, tmp_path_factory) -> Project:
    arms = {
        "full": ACCUMULATED,
        "lora": ACCUMULATED | {"peft_config": LORA},
        "long": ACCUMULATED | LONG | {"peft_config": LORA},
        "two full": {"gpus": 2},
        "two lora": {"gpus": 2, "peft_config": LORA},
        "four lora": {"gpus": 4, "training_args.per_device_train_batch_size": 2, "peft_config": LORA},
        "fsdp full": {"gpus": 2, "training_args.fsdp": True},
        "fsdp lora": {"gpus": 2, "peft_config": LORA, "training_args.fsdp": True},
        "two long": {"gpus": 2, "peft_config": LORA, **LONG},
        "zero2": {"gpus": 2, **deepspeed("zero2")},
        "zero3": {"gpus": 2, **deepspeed("zero3")},
        "zero3 long": {"gpus": 2, "peft_config": LORA, **LONG, **deepspeed("zero3")},
        "offload": ACCUMULATED | {"peft_config": LORA, **deepspeed("zero3_offload")},
    }
    return Project(tmp_path_factory.mktemp("project"), tiny_model_dir, ROWS, arms)


@pytest.mark.slow
def test_two_processes_train_like_one_and_side_by_side_with_others(project):
    started = {arm: project.start(arm) for arm in ("two full", "two lora")}
    for arm, process in started.items():
        output = project.finish(arm, process)
        alone = arm.removeprefix("two ")
        assert_same_curve(project.history(arm), project.train_here(alone), tolerance=1e-5)
        assert project.summary(arm)["effective_batch_size"] == 8
        assert_plain_libraries_load_it(project, arm)
        lines = output.splitlines()
        assert len(lines) == len(set(lines)), output  # each thing is said once
        assert lines[0].endswith("started")
        assert "done: 6 steps" in lines[-1]
        run = project.run_of(arm)
        for name in (f"settings/{run}.json", f"provenance/{run}.json"):
            assert (project.folder / "results/study" / name).exists()
        assert not (project.folder / "scratch/study" / run).exists()


@pytest.mark.slow
def test_four_processes_train_like_one(project):
    project.train("four lora")
    assert_same_curve(project.history("four lora"), project.train_here("lora"), tolerance=1e-4)
    assert project.summary("four lora")["effective_batch_size"] == 8
    assert_plain_libraries_load_it(project, "four lora")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_fsdp_trains_like_the_plain_run(project, method):
    arm = f"fsdp {method}"
    project.train(arm)
    assert_same_curve(project.history(arm), project.train_here(method), tolerance=1e-4)
    assert_plain_libraries_load_it(project, arm)
    assert saved_tensors(project, arm) == saved_tensors(project, method)
    for key in ("trainable_parameters", "total_parameters", "effective_batch_size", "label_tokens"):
        assert project.summary(arm)[key] == project.summary(method)[key], key


@pytest.mark.slow
@pytest.mark.parametrize(("arm", "plain"), [("zero2", "full"), ("zero3", "full"), ("offload", "lora")])
def test_deepspeed_trains_like_the_plain_run(project, arm, plain):
    project.train(arm)
    # DeepSpeed adds 1e-6 to the norm by which it clips: the curves differ in the fifth digit.
    assert_same_curve(project.history(arm), project.train_here(plain), tolerance=2e-4)
    assert_plain_libraries_load_it(project, arm)
    assert saved_tensors(project, arm) == saved_tensors(project, plain)
    for key in ("trainable_parameters", "total_parameters", "effective_batch_size", "label_tokens"):
        assert project.summary(arm)[key] == project.summary(plain)[key], key


@pytest.mark.slow
def test_a_terminated_launcher_ends_its_workers_and_the_run_goes_on_from_its_checkpoint(project):
    arm = "zero3 long"
    process = project.start(arm)
    wait_for(lambda: project.checkpoints(arm) or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    project.finish(arm, process, status=-signal.SIGTERM)
    assert project.workers(arm) == []
    assert not project.weights(arm).exists()
    output = project.train(arm)
    resumed = project.summary(arm)["resumed_from"]
    assert 10 <= resumed < 40
    assert f"going on from step {resumed}" in output
    assert_same_curve(project.history(arm), project.train_here("long"), tolerance=1e-3)
    assert_plain_libraries_load_it(project, arm)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the parent's death is a signal on Linux alone")
def test_workers_die_with_a_killed_launcher(project):
    arm = "two long"
    process = project.start(arm)
    wait_for(lambda: project.checkpoints(arm) or process.poll() is not None)
    assert len(project.workers(arm)) == 2
    process.kill()
    process.communicate()
    wait_for(lambda: not project.workers(arm))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
def test_a_killed_worker_ends_the_run_with_a_word_on_it(project):
    arm = "two long"
    process = project.start(arm)
    wait_for(lambda: len(project.workers(arm)) == 2 or process.poll() is not None)
    os.kill(project.workers(arm)[1], signal.SIGKILL)
    output = project.finish(arm, process, status=2)
    assert "of 2 was ended by SIGKILL; out of memory?" in output
    assert project.workers(arm) == []


@pytest.mark.slow
def test_a_mistake_that_one_process_meets_is_told_once(tiny_model_dir, tmp_path):
    rows = [{**row, "input_ids": list(row["input_ids"])} for row in ROWS]
    for token in range(len(rows[5]["input_ids"])):
        rows[5]["input_ids"][token] = 30000
    poisoned = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    poisoned.get_input_embeddings().weight.data[30000] = math.nan
    poisoned.config.tie_word_embeddings = False
    poisoned.lm_head.weight = torch.nn.Parameter(torch.zeros_like(poisoned.lm_head.weight))
    poisoned.save_pretrained(tmp_path / "poisoned")
    project = Project(tmp_path / "project", tmp_path / "poisoned", rows, {"two": {"gpus": 2, "peft_config": LORA}})
    output = project.train("two", status=1)
    assert output.count("the loss of rows train-") == 1, output
    assert "train-5" in output
    assert "Traceback" not in output
    assert not (project.folder / "results").exists()


def test_more_gpus_than_the_machine_shows_are_refused_with_both_numbers():
    with pytest.raises(UserError, match=r"asks for 4, but this machine shows 2"):
        launch.check_gpus(4, visible=2)
    launch.check_gpus(4, visible=4)
    launch.check_gpus(4, visible=0)  # on the CPU
    launch.check_gpus(4, visible=2, use_cpu=True)


def test_fewer_nodes_than_asked_for_are_refused_with_both_numbers(monkeypatch):
    for name in ("SLURM_JOB_NUM_NODES", "SLURM_NNODES"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"asks for 2, but this is no job of Slurm"):
        launch.check_nodes(2)
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    with pytest.raises(UserError, match=r"asks for 2, but this job has 1"):
        launch.check_nodes(2)
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    launch.check_nodes(2)


def test_only_several_processes_deepspeed_and_fsdp_need_a_launcher():
    def needs(**keys) -> bool:
        return launch.is_needed(RunSettings(model={"model_name_or_path": "m"}, **keys))

    assert not needs()
    assert needs(gpus=2)
    assert needs(nodes=2)
    assert needs(training_args={"fsdp": True})
    assert needs(training_args={"deepspeed": "config/deepspeed/zero2.json"})
