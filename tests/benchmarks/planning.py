"""What large studies cost before anything runs: to resolve, to plan, and to dry-run with snakemake.

python tests/benchmarks/planning.py

Each figure is the fastest of a few repeats; CPU seconds are user and system time, and say more than wall time on a
machine that others use too. The dry runs are of copies of this project in a temporary folder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml
from finegrid import fingerprint
from finegrid.study import load_study

PROJECT = Path(__file__).resolve().parents[2]
COPIED = ("Snakefile", "config", "workflow", "profiles", "envs")
DRY_RUNS = (1_500, 5_000)  # runs; each is two jobs
PLANNED = 1_000
REPEATS = 3
STUDY = {
    "recipe": "config/recipes/large.yaml",
    "factors": {
        "rank": {"key": "peft_config.r", "levels": []},
        "alpha": {"key": "peft_config.lora_alpha", "levels": [8, 16, 32, 64, 128]},
    },
    "tune": {"rate": {"key": "training_args.learning_rate", "levels": [1.0e-5, 1.0e-4, 2.0e-4, 1.0e-3]}},
    "seeds": [0, 1, 2, 3, 4],
}
RUNS_A_RANK = 100
RECIPE = {
    "model": {"model_name_or_path": "data/models/large"},
    "data_config": {f"{split}_file": f"data/raw/large/{split}.jsonl" for split in ("train", "val", "test")},
    "peft_config": {"r": 8},
    "training_args": {"max_steps": 100},
}
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
ROW = {"prompt": "What does this policy cover?", "completion": "Fire, water and theft, up to the sum insured."}


@dataclass(frozen=True)
class Cost:
    """What a command took: seconds, and the most memory that it had at once, in bytes."""

    wall: float
    cpu: float
    memory: int
    output: str

    def __str__(self) -> str:
        return f"{self.wall:5.1f} s wall  {self.cpu:5.1f} s CPU  {self.memory / 2**20:5,.0f} MiB"


def lay_out(folder: Path, runs: int) -> None:
    """Write the files of a project whose study `large` has so many runs, the package and the rules left out."""
    ranks = list(range(1, runs // RUNS_A_RANK + 1))
    study = STUDY | {"factors": STUDY["factors"] | {"rank": {"key": "peft_config.r", "levels": ranks}}}
    files = {
        "config/studies/large.yaml": yaml.safe_dump(study),
        STUDY["recipe"]: yaml.safe_dump(RECIPE),
        "data/models/large/config.json": json.dumps(MODEL),
        **{path: (json.dumps(ROW) + "\n") * 10 for path in RECIPE["data_config"].values()},
    }
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")


def copy_project(folder: Path, runs: int) -> None:
    """Copy this project, with `large` as its one study."""
    for name in COPIED:
        source = PROJECT / name
        if source.is_dir():
            shutil.copytree(source, folder / name)
        else:
            shutil.copy(source, folder / name)
    for path in (folder / "config/studies").glob("*.yaml"):
        path.unlink()
    lay_out(folder, runs)


def cost(folder: Path, *arguments: str) -> Cost:
    """Return what a Python module's command line costs, run in a folder; the fastest of some repeats."""
    return min((_cost(folder, arguments) for _ in range(REPEATS)), key=lambda cost: cost.cpu)


def _cost(folder: Path, arguments: tuple[str, ...]) -> Cost:
    environment = os.environ | {"PYTHONPATH": str(folder / "workflow"), "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        command = [sys.executable, "-m", *arguments]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        output.seek(0)
        text = output.read()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{text[-2000:]}")
    return Cost(wall, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, text)


def cpu(work: Callable[[], object], repeats: int = 5) -> float:
    """Return the fewest CPU seconds that a call took."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


def fingerprint_known() -> None:
    """Fingerprint as a new process does that finds the cache file."""
    fingerprint._known_sources.cache_clear()
    fingerprint.code_fingerprint("finegrid.cli")


def main() -> None:
    """Print one line a figure."""
    fingerprint_known()
    print(f"fingerprint of the package, warm: {cpu(fingerprint_known) * 1000:.0f} ms CPU", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_project(folder, PLANNED)
        study = Path("config/studies/large.yaml")
        runs = len(load_study(study, folder).runs)
        print(f"resolve {runs:,} runs: {cpu(lambda: load_study(study, folder)):.2f} s CPU", flush=True)
        print(f"finegrid plan, {runs:,} runs: {cost(folder, 'finegrid.cli', 'plan', 'large')}", flush=True)
        print(f"finegrid watch, {runs:,} runs: {cost(folder, 'finegrid.cli', 'watch', 'large', '--once')}", flush=True)
    print(f"finegrid fit: {cost(PROJECT, 'finegrid.cli', 'fit', '--gpu-memory', '24GB')}", flush=True)
    for runs in DRY_RUNS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            copy_project(folder, runs)
            used = cost(folder, "snakemake", "--dry-run", "--config", "study=large")
            jobs = int(re.search(r"^total +(\d+)$", used.output, flags=re.MULTILINE).group(1))
            print(f"snakemake -n, {runs:,} runs, {jobs:,} jobs: {used}", flush=True)


if __name__ == "__main__":
    main()
