"""A login node of the tests' Slurm: a copy of the project in which a user types `snakemake --profile slurm`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from cluster import Slurm

RECIPE = """\
model: {model_name_or_path: data/models/tiny}
data_config:
  train_file: data/raw/tiny/train.jsonl
  val_file: data/raw/tiny/validation.jsonl
  test_file: data/raw/tiny/test.jsonl
  format: columns
  columns: {prompt: question, answer: answer, id: id}
max_input_length: 64
max_output_length: 96
training_args:
  max_steps: 4
  learning_rate: 1.0e-2
  per_device_train_batch_size: 4
  logging_steps: 1
  eval_strategy: steps
  eval_steps: 2
  save_strategy: steps
  save_steps: 2
peft_config: {peft_type: LORA, r: 8, lora_alpha: 16, target_modules: all-linear}
generation_config: {max_new_tokens: 8}
evaluation: {batch_size: 8}
"""
# As a user edits it.
CLUSTER = """\
gpus: [a100-80gb]
partitions:
  cpu: {max_runtime: 1d}
  gpu: {max_runtime: 1d, max_gpu: 4}
all_jobs: {}
gpu_jobs: {gpu_model: a100}
"""


class Project:
    """A project folder on the login node of a cluster."""

    def __init__(self, folder: Path, slurm: Slurm):
        self.folder = folder
        self.slurm = slurm
        self.controllers: list[subprocess.Popen] = []
        self.environment = slurm.environment | {
            "PYTHONPATH": str(folder / "workflow"),
            "PATH": f"{slurm.folder}/bin{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }
        self.environment.pop("HF_HUB_OFFLINE", None)  # the profile sees to it that jobs ask no hub

    def start(
        self, study: str, *arguments: str, config: tuple[str, ...] = (), output: str = "snakemake.out"
    ) -> subprocess.Popen:
        """Start `snakemake --profile slurm`; what it prints is appended to a file of the project."""
        command = ["snakemake", "--profile", "slurm", "--config", f"study={study}", *config]
        with (self.folder / output).open("ab") as file:
            controller = subprocess.Popen(
                [*command, *arguments], cwd=self.folder, env=self.environment, stdout=file, stderr=subprocess.STDOUT
            )
        self.controllers.append(controller)
        return controller

    def finish(self, controller: subprocess.Popen, seconds: float = 1800) -> str:
        """Wait until a controller has ended well; return what all of them printed so far."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            controller.wait(seconds)
        printed = self.printed()
        assert controller.returncode == 0, printed
        return printed

    def printed(self) -> str:
        return (self.folder / "snakemake.out").read_text(errors="replace")

    def run(self, *command: str) -> subprocess.CompletedProcess:
        """Run a command in the project, whatever its status."""
        return subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
        )

    def jobs(self) -> list[dict[str, str]]:
        """Return Slurm's jobs of this project."""
        return [job for job in self.slurm.jobs() if job.get("WorkDir") == str(self.folder)]

    def read(self, path: str):
        return json.loads((self.folder / path).read_text())

    def write_study(self, name: str, study: str, recipe: str = RECIPE) -> None:
        (self.folder / f"config/recipes/{name}.yaml").write_text(recipe)
        (self.folder / f"config/studies/{name}.yaml").write_text(f"recipe: config/recipes/{name}.yaml\n{study}")

    def stop(self) -> None:
        for controller in self.controllers:
            if controller.poll() is None:
                controller.send_signal(signal.SIGKILL)
                controller.wait()
        for job in self.jobs():
            with contextlib.suppress(RuntimeError):
                self.slurm.run("scancel", job["id"])
