"""A pack against its runs alone, on the real model and data: the training losses of 200 steps, one by one.

    python tests/benchmarks/packed.py [--steps 200] [--rates 2e-4 1e-3 3e-3 1e-2] [--batch 2] [--ways after step padded]

LoRA runs of SmolLM2-135M in fp32 on short rows of InsuranceQA, one thread; with the last rate the loss doubles and
doesn't come back. Each run is trained alone, which is the oracle; after the others in one process, as packs
do on a CPU; and in one step with the others, as they do on a GPU. Trained alone once more with padding, as the Trainer
does it, it has other roundings and the same arithmetic: how far that leads tells what a rounding does at such a rate.
Printed is by how much losses differ at most from the oracle's, over all steps and over the last ten, and whether the
adapters have the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import grid

WAYS = {"after": "after the others", "step": "in one step", "padded": "alone with padding"}
LAST = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rates", type=float, nargs="*", default=[2e-4, 1e-3, 3e-3, 1e-2])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        project = Path(name) / "project"
        recipe = grid.RECIPE.replace("max_input_length: 256", "max_input_length: 64")
        recipe = recipe.replace("max_output_length: 256", "max_output_length: 24")
        grid.prepare("135M", project, recipe, counts={"train": 800, "validation": 4, "test": 4})
        print(grid.lengths(project), flush=True)
        os.chdir(project)
        compare(options.steps, options.rates, options.batch, options.ways)


def compare(steps: int, rates: list[float], batch: int, ways: list[str]) -> None:
    import torch

    torch.set_num_threads(1)
    runs = {f"{rate:g}": settings(steps, rate, batch) for rate in rates}
    alone(runs, Path("alone"))
    oracle = {name: losses_of(Path("alone") / name) for name in runs}
    for name, losses in oracle.items():
        curve = " ".join(f"{losses[n]:.2f}" for n in range(0, steps, max(1, steps // 10)))
        print(f"rate {name}: {curve} {losses[-1]:.2f}", flush=True)
    for way in ways:
        started, folder = time.perf_counter(), Path(way)
        if way == "padded":
            alone({f"{rate:g}": settings(steps, rate, batch, padding_free=False) for rate in rates}, folder)
        else:
            together(runs, folder, at_once=1 if way == "after" else len(runs))
        for name, expected in oracle.items():
            found = losses_of(folder / name)
            apart = [abs(one - other) for one, other in zip(found, expected, strict=True)]
            same = weights(folder / name) == weights(Path("alone") / name)
            print(
                f"rate {name}, {WAYS[way]}: at most {max(apart):.1e}, of the last {LAST} {max(apart[-LAST:]):.1e}; "
                f"adapters {'the same' if same else 'differ'}",
                flush=True,
            )
        print(f"{WAYS[way]}: {time.perf_counter() - started:.0f} s", flush=True)


def settings(steps: int, rate: float, batch: int, padding_free: bool = True) -> Any:
    from finegrid.settings import load_recipe

    arguments = {"max_steps": steps, "learning_rate": rate, "per_device_train_batch_size": batch, "bf16": False}
    changes = {"training_args": arguments, "training.padding_free": padding_free}
    return load_recipe(Path("config/recipes/grid.yaml"), Path.cwd(), changes)[0]


def alone(runs: dict[str, Any], folder: Path) -> None:
    for name, run in runs.items():
        trained(run, folder / name)


def trained(run: Any, folder: Path, **options: Any) -> None:
    from finegrid.training.train import train

    train(
        run,
        tokens=grid.tokens_of(Path.cwd()),
        model=Path("data/models/135M"),
        output=folder / "adapter",
        history=folder / "history.csv",
        summary=folder / "summary.json",
        checkpoints=folder / "scratch",
        **options,
    )


def together(runs: dict[str, Any], folder: Path, at_once: int) -> None:
    """Train the runs with one base, so many in one step."""
    import torch
    from finegrid.training.joint import JointPass
    from finegrid.training.lockstep import Lane, run_together
    from finegrid.training.resident import ResidentBase

    base, model = ResidentBase(), Path("data/models/135M")
    joint = JointPass(lambda trainer: base.base(next(iter(runs.values())), model, torch.device("cpu")))

    def work(lane: Lane) -> None:
        company = (lane, joint) if at_once > 1 else None
        trained(runs[lane.name], folder / lane.name, load=base.base, company=company)
        joint.leave(lane)

    for name in runs:
        (folder / name).mkdir(parents=True)
    run_together([Lane(name, work, folder / name / "log") for name in runs], at_once, joint)


def losses_of(folder: Path) -> list[float]:
    with (folder / "history.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]


def weights(folder: Path) -> bytes:
    return (folder / "adapter/adapter_model.safetensors").read_bytes()


if __name__ == "__main__":
    main()
