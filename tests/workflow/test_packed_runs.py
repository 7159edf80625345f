"""Packs as a user meets them: what reruns, what a failed run does to the others, and how a killed pack goes on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import Checkout, copy_project, write_tiny_study
from finegrid import packing
from finegrid.errors import UserError
from finegrid.packs import packs_here
from finegrid.placing import placed
from finegrid.provenance import hashes_of
from finegrid.staging import Staging, training_identity, training_inputs, training_places
from finegrid.study import load_study
from finegrid.training.stopping import Stop
from finegrid.watch import Watcher

pytestmark = pytest.mark.slow
STUDY = """\
title: Do packs hold?
recipe: config/recipes/tiny.yaml
factors:
  rate: {key: training_args.learning_rate, levels: [1.0e-2, 1.0e+30]}
seeds: [0, 1]
compare: {baseline: {rate: 1.0e-2}, metric: rougeL, margin: 0.01}
"""


class Packed(Checkout):
    """A project whose study is run on one core: one pack of four runs, two of which can only fail."""

    @property
    def runs(self) -> list[str]:
        """The runs of the first level, then of the second."""
        return [run.id for run in load_study(Path("config/studies/tiny.yaml"), self.folder).runs]

    def metrics(self, runs: list[str]) -> list[str]:
        return [f"results/tiny/metrics/{run}.json" for run in runs]

    def one_core(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
        return self.snakemake("--cores", "1", *arguments, check=check)

    def jobs(self, *arguments: str, targets: list[str]) -> dict[str, int]:
        """Return how many jobs of each rule a dry run on one core would start."""
        text = self.one_core("--dry-run", "--quiet", "rules", *arguments, "--", *targets).stdout
        rows = [line.split() for line in text.splitlines()]
        return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit() and row[0] != "total"}

    def path(self, name: str) -> Path:
        return self.folder / name

    def summary(self, run: str) -> dict:
        return json.loads(self.path(f"results/tiny/training/{run}.json").read_text())


@pytest.fixture(scope="module")
def failed(project, tiny_model_dir, insuranceqa_dir, tmp_path_factory) -> tuple[Packed, subprocess.CompletedProcess]:
    """The study, run once, and what that printed."""
    folder = tmp_path_factory.mktemp("packs") / "project"
    copy_project(project, tiny_model_dir, folder)
    write_tiny_study(folder, insuranceqa_dir, STUDY)
    packed = Packed(folder)
    done = packed.one_core("--", *packed.metrics(packed.runs), check=False)
    return packed, done


@pytest.fixture
def copy(failed, tmp_path) -> Packed:
    folder = tmp_path / "project"
    shutil.copytree(failed[0].folder, folder, symlinks=True)
    return Packed(folder)


def test_a_run_that_fails_leaves_the_others_of_its_pack_alone(failed):
    packed, done = failed
    calm, wild = packed.runs[:2], packed.runs[2:]
    assert done.returncode == 1
    assert "4 of 4 runs to train" in done.stderr
    for run in calm:
        assert packed.path(f"results/tiny/runs/{run}/adapter/adapter_model.safetensors").is_file()
        assert packed.path(f"results/tiny/metrics/{run}.json").is_file()
        provenance = json.loads(packed.path(f"results/tiny/provenance/{run}.json").read_text())
        assert provenance["command"] == f"finegrid train tiny {run} --log logs/train/tiny/{run}.log"
        log = packed.path(f"logs/train/tiny/{run}.log").read_text()
        assert "step 4/4" in log
        assert run not in log
    for run in wild:
        assert not packed.path(f"results/tiny/training/{run}.json").exists()
        log = packed.path(f"logs/train/tiny/{run}.log").read_text()
        (problem,) = [line for line in log.splitlines() if line.startswith("error: ")]
        assert problem in done.stderr
        assert "Traceback" not in log
    rows = {row.run: row for row in Watcher("tiny", packed.folder).look().rows}
    assert [rows[run].state for run in (*calm, *wild)] == ["done", "done", "failed", "failed"]
    assert "NaN" in rows[wild[0]].reason or "infinity" in rows[wild[0]].reason


def test_packs_or_none_rerun_nothing(failed):
    packed, _ = failed
    targets = packed.metrics(packed.runs[:2])
    for arguments in ([], ["--config", "study=tiny", "pack=off"], ["--cores", "7"]):
        assert packed.jobs(*arguments, targets=targets) == {}


def test_a_changed_level_trains_its_own_runs_in_one_pack(copy):
    copy.edit("config/studies/tiny.yaml", "1.0e+30", "1.0e-3")
    jobs = copy.jobs(targets=copy.metrics(copy.runs))
    packed = {"train_pack": 1, "train_adapter": 2, "evaluate_pack": 1, "evaluate": 2}
    assert jobs == {"study_plan": 1, **packed}
    # The plan's file is ancient to what it lets go on: that it is made anew hides no missing result.
    copy.edit("workflow/finegrid/plan.py", "MARGIN = 1.1", "MARGIN = 1.2")
    assert copy.jobs(targets=copy.metrics(copy.runs)) == {"study_plan": 1, **packed}
    assert copy.jobs("--config", "study=tiny", "pack=off", targets=copy.metrics(copy.runs)) == {
        "study_plan": 1,
        "train_adapter": 2,
        "evaluate": 2,
    }


def test_a_pack_scores_what_it_has_trained(failed):
    packed, _ = failed
    (trained,) = packed.path("logs/train_pack/tiny").glob("*.log")
    (scored,) = packed.path("logs/evaluate_pack/tiny").glob("*.log")
    for run in packed.runs[:2]:
        assert f"{run}: test: 8/8 losses computed" in trained.read_text()
        assert "evaluated in its pack" in packed.path(f"logs/evaluate/tiny/{run}.log").read_text()
    assert "computed" not in scored.read_text()


def test_a_single_run_needs_no_pack(copy):
    run = copy.runs[0]
    shutil.rmtree(copy.folder / f"results/tiny/runs/{run}/adapter")
    assert copy.jobs(targets=[f"results/tiny/runs/{run}/adapter"]) == {"train_adapter": 1}


def test_a_killed_pack_goes_on_without_training_again_what_was_done(copy):
    copy.edit("config/studies/tiny.yaml", "[1.0e-2, 1.0e+30]", "[1.0e-2]")
    copy.edit("config/studies/tiny.yaml", "[0, 1]", "[0, 1, 2]")
    copy.edit("config/recipes/tiny.yaml", "max_steps: 4", "max_steps: 60")
    copy.edit("config/recipes/tiny.yaml", "eval_steps: 2", "eval_steps: 30")
    copy.edit("config/recipes/tiny.yaml", "save_steps: 2", "save_steps: 5")
    copy.one_core("--", "results/tiny/plan.json")
    study = load_study(Path("config/studies/tiny.yaml"), copy.folder)
    (pack,) = packs_here(study, 1)
    first, second, third = (run.id for run in pack.runs)
    targets = [f"results/tiny/training/{run}.json" for run in (first, second, third)]
    environment = os.environ | {"PYTHONPATH": str(copy.folder / "workflow")}
    command = ["snakemake", "--config", "study=tiny", "--cores", "1", "--", *targets]
    controller = subprocess.Popen(
        command, cwd=copy.folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    family = [psutil.Process(controller.pid)]
    try:
        wait_for(lambda: step(copy, second) >= 1 or controller.poll() is not None)
        family = [*family[0].children(recursive=True), *family]  # looked for in time: 60 steps are soon done
        wait_for(lambda: step(copy, second) >= 10 or controller.poll() is not None)
    finally:
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        controller.wait(60)
    staged = copy.folder / f"scratch/tiny/packed/{first}/train/summary.json"
    before = staged.read_bytes()
    copy.snakemake("--unlock")
    done = copy.one_core("--", *targets)
    assert f"2 of 3 runs to train: {second}, {third}" in done.stderr
    assert [copy.summary(run)["resumed_from"] is None for run in (first, second, third)] == [True, False, True]
    assert copy.path(f"results/tiny/training/{first}.json").read_bytes() == before
    assert not copy.path("scratch/tiny/packed").exists()  # nor what is left of runs that the study has no more


def step(project: Packed, run: str) -> int:
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int((project.folder / f"scratch/tiny/{run}/history.csv").read_text().splitlines()[-1].split(",")[0])
    return 0


def wait_for(condition, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_runs_that_train_together_are_staged_as_runs_one_after_the_other(copy, monkeypatch):
    monkeypatch.chdir(copy.folder)
    monkeypatch.setattr(sys, "stdout", os.fdopen(1, "w", closefd=False))  # pytest has taken its place
    study = load_study(Path("config/studies/tiny.yaml"), copy.folder)
    runs, scratch = study.runs[1:3], Path("scratch")  # one that learns and one that can only fail
    places = {run.id: Staging.of(scratch, "tiny", run.id, "train") for run in runs}
    identities = {run.id: training_identity(run) for run in runs}
    said: list[str] = []
    with Stop() as stop:
        packing._train_together(study, runs, scratch, places, identities, 2, stop, said.append, {})
    calm, wild = (run.id for run in runs)
    assert places[calm].is_whole(identities[calm])
    assert "failed" in places[wild].done(identities[wild])
    summary = json.loads((places[calm].folder / "summary.json").read_text())
    assert any("together with other runs" in note for note in summary["notes"])
    before = copy.summary(calm)
    assert summary["final_eval_loss"] == pytest.approx(before["final_eval_loss"], abs=1e-5)
    for key in ("steps", "label_tokens", "trainable_parameters", "effective_batch_size"):
        assert summary[key] == before[key]
    log = places[calm].log.read_text()
    assert "step 4/4" in log
    assert wild not in log
    assert any(line.startswith(f"{wild}: failed") for line in said)


def test_a_pack_that_can_not_score_has_still_trained(copy, monkeypatch):
    monkeypatch.chdir(copy.folder)
    study = load_study(Path("config/studies/tiny.yaml"), copy.folder)
    (pack,) = packs_here(study, 1)
    needed = {"train": {pack.name: {"runs": []}}, "evaluate": {pack.name: {"runs": [study.runs[0].id]}}}
    Path("scratch/tiny/needed.json").write_text(json.dumps(needed))
    asked: list[tuple[list[str], int]] = []

    def no_room(study, runs, scratch, rows, *rest):
        asked.append(([run.id for run in runs], rows))
        raise MemoryError("no room")

    monkeypatch.setattr(packing, "_score", no_room)
    said: list[str] = []
    packing.train_pack(study, pack.name, Path("scratch"), said.append, rows=0)
    assert asked == [([], 0)]  # of those that it has trained: none, here
    assert said[-1] == "scores are left to a job of their own: MemoryError: no room"
    packing.train_pack(study, pack.name, Path("scratch"), said.append)
    assert len(asked) == 1
    needed["train"][pack.name]["rows"] = 8  # as Snakemake says it
    Path("scratch/tiny/needed.json").write_text(json.dumps(needed))
    packing.train_pack(study, pack.name, Path("scratch"), said.append)
    assert asked[1:] == [([], 8)]


def test_nothing_stale_is_placed(copy, monkeypatch):
    monkeypatch.chdir(copy.folder)
    run = load_study(Path("config/studies/tiny.yaml"), copy.folder).runs[0]
    place, identity = staged(run)
    assert place.is_whole(training_identity(run))
    tokens = next(Path("data/tokens").glob("*/train.arrow"))
    tokens.write_bytes(tokens.read_bytes() + b"x")
    assert not place.is_whole(training_identity(run))
    assert not place.is_whole(identity | {"code": "another"})


def staged(run) -> tuple[Staging, dict]:
    """Take a trained run's results to where its pack would have staged them."""
    study = load_study(Path("config/studies/tiny.yaml"), Path.cwd())
    place, identity = Staging.of(Path("scratch"), "tiny", run.id, "train"), training_identity(run)
    place.begin()
    for name, path in training_places(study, run).items():
        path.rename(place.folder / name)
    place.log.write_text("what was printed for the run\n")
    place.finish(identity, study, training_inputs(run), training_places(study, run))
    return place, identity


def test_a_run_is_placed_without_a_look_at_the_study_only_while_nothing_has_changed(copy, monkeypatch, capsys):
    monkeypatch.chdir(copy.folder)
    declared = Path("config/studies/tiny.yaml")
    study = load_study(declared, copy.folder)
    run = study.runs[0]
    before = {name: hashes_of(path) for name, path in training_places(study, run).items()}
    place, _ = staged(run)
    command = ["train", "tiny", run.id, "--log", "logs/placed.log"]
    tokens = next(Path("data/tokens").glob("*/train.arrow"))
    for path in (declared, study.recipe, tokens, Path(place.folder / "done.json")):
        content = path.read_bytes()
        path.write_bytes(content + b"\n" if path.suffix != ".json" else b"{}")
        assert not placed(command), path
        path.write_bytes(content)
    with monkeypatch.context() as changed:
        changed.setattr("finegrid.staging.code_fingerprint", lambda module: "another")
        assert not placed(command)
    assert not placed(["train", "tiny", run.id, "--scratch", "scratch"])  # what only the command line reads
    assert not placed(["plan", "tiny", run.id])
    assert not placed(["train", "tiny", "lora-00000000"])
    assert place.is_whole(training_identity(run))

    assert placed(command)
    assert f"train {run.id}: trained in its pack" in capsys.readouterr().err
    assert Path("logs/placed.log").read_text() == "started\nwhat was printed for the run\ntrained in its pack\n"
    after = {name: hashes_of(path) for name, path in training_places(study, run).items()}
    made = json.loads(training_places(study, run)["provenance.json"].read_text())
    assert made["command"] == " ".join(["finegrid", *command])
    assert {name for name in before if before[name] != after[name]} == {"provenance.json"}
    assert not place.folder.exists()
    assert not placed(command)


def test_what_an_interrupted_placing_has_left_is_no_run(copy, monkeypatch):
    monkeypatch.chdir(copy.folder)
    run = load_study(Path("config/studies/tiny.yaml"), copy.folder).runs[0]
    place, identity = staged(run)
    (place.folder / "weights").rename("moved")
    assert not place.is_whole(identity)  # its pack trains it again
    command = ["train", "tiny", run.id, "--log", "logs/half.log"]
    assert not placed(command)
    environment = os.environ | {"PYTHONPATH": "workflow", "FINEGRID_ONLY_PLACES": "1"}
    call = [sys.executable, "-m", "finegrid.cli", *command]
    done = subprocess.run(call, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert "run snakemake again" in done.stderr
    Path("moved").rename(place.folder / "weights")
    assert placed(command)


def test_a_run_that_failed_in_its_pack_is_left_to_the_command(copy, monkeypatch):
    monkeypatch.chdir(copy.folder)
    run = load_study(Path("config/studies/tiny.yaml"), copy.folder).runs[2]
    place = Staging.of(Path("scratch"), "tiny", run.id, "train")
    place.begin()
    place.log.write_text("what was printed for the run\n")
    place.fail(training_identity(run), UserError("the loss is no number"))
    assert not placed(["train", "tiny", run.id])
    done = subprocess.run(
        [sys.executable, "-m", "finegrid.cli", "train", "tiny", run.id, "--log", "logs/failed.log"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": "workflow"},
        check=False,
    )
    assert done.returncode == 1
    assert "error: the loss is no number" in done.stderr
