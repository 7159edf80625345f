"""Versions of results: built, pushed, cloned, restored, changed and gone back to, by git, DVC and Snakemake.

One study of one run is built once for the file; each test works on a copy or a clone of it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import RECIPE, Checkout, copy_project, raw_rows
from finegrid.figures import FIGURES, NEEDS, PLAN_FIGURES

pytestmark = pytest.mark.slow

STUDY = """\
title: Does a wider adapter learn better?
recipe: config/recipes/tiny.yaml
factors:
  rank:
    key: peft_config.r
    levels: [2]
compare: {metric: rougeL, margin: 0.01}
"""
DRAWN = [name for name in FIGURES if name not in NEEDS and name not in PLAN_FIGURES]
# Several commands of finegrid in one process: most of their time goes into its start.
DRAW = """\
import sys
from finegrid.cli import app
for words in map(str.split, sys.argv[1:]):
    app([words[0], "tiny", *words[1:]], standalone_mode=False)
"""
AFTER_EVALUATION = {"compare": 1, "advice": 1, "figure": len(DRAWN), "study_tables": 1, "study_report": 1}


class Versioned(Checkout):
    """A checkout under git and DVC."""

    def __call__(self, *command: str, check: bool = True) -> subprocess.CompletedProcess:
        environment = os.environ | {
            "PYTHONPATH": str(self.folder / "workflow"),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "GIT_CONFIG_GLOBAL": os.devnull,
            **{f"GIT_{who}_{what}": "test@test" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
        }
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        if check:
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    def commit(self, message: str) -> str:
        self("git", "add", "-A")
        self("git", "commit", "-q", "-m", message)
        return self("git", "rev-parse", "HEAD").stdout.strip()

    def clone(self, folder: Path) -> Versioned:
        self("git", "clone", "-q", str(self.folder), str(folder))
        return Versioned(folder)

    def runs(self) -> set[str]:
        return {path.name for path in (self.folder / "results/tiny/runs").glob("lora-*")}

    def json(self, path: str) -> dict:
        return json.loads((self.folder / path).read_text())


@pytest.fixture(scope="module")
def versioned(project, tiny_model_dir, insuranceqa_dir, tmp_path_factory) -> Versioned:
    """A project whose study DVC built, through snakemake, and recorded; pushed to a remote and committed."""
    folder = tmp_path_factory.mktemp("versions") / "project"
    copy_project(project, tiny_model_dir, folder)
    for name in (".gitignore", ".dvcignore", "params.yaml", ".dvc/config", ".dvc/.gitignore"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(project / name, folder / name)
    shutil.rmtree(folder / "config/studies")
    (folder / "config/studies").mkdir()
    (folder / "config/studies/tiny.yaml").write_text(STUDY)
    raw = folder.parent / "raw"
    raw.mkdir()
    for split, count in {"train": 16, "validation": 8, "test": 8}.items():
        rows = "".join(json.dumps(row) + "\n" for row in raw_rows(insuranceqa_dir, split, count))
        (raw / f"{split}.jsonl").write_text(rows)
    checkout = Versioned(folder)
    checkout("git", "init", "-q")
    checkout("dvc", "add", "-q", "data/models/tiny")
    files = [str(raw / f"{split}.jsonl") for split in ("train", "validation", "test")]
    checkout("finegrid", "add-data", "tiny", *files)
    (folder / "config/recipes/tiny.yaml").write_text(RECIPE)
    checkout("dvc", "remote", "add", "--default", "store", str(folder.parent / "store"))
    checkout.commit("The study")
    checkout("finegrid", "dvc")
    checkout("dvc", "repro", "study@tiny")
    checkout("dvc", "push", "-q")
    checkout.commit("Its results")
    return checkout


def test_results_travel_change_and_come_back(versioned, tmp_path):
    first = versioned("git", "rev-parse", "HEAD").stdout.strip()
    assert versioned("dvc", "status").stdout.strip() == "Data and pipelines are up to date."
    clone = versioned.clone(tmp_path / "clone")
    assert not (clone.folder / "results/tiny/runs").exists()

    # A clone is restored: nothing to do, and edits are seen as if the jobs had run there.
    said = clone("finegrid", "restore", "tiny").stdout
    assert "nothing is left to do" in said
    assert clone.pending() == {}
    assert clone("dvc", "status").stdout.strip() == "Data and pipelines are up to date."
    logic = clone.folder / "workflow/finegrid/training/train.py"
    logic.write_text(logic.read_text() + "\nCHANGED = 1\n")
    assert clone.pending() == {"train_adapter": 1, "evaluate": 1, **AFTER_EVALUATION}
    clone("git", "checkout", "-q", ".")
    raw = clone.folder / "data/raw/tiny/train.jsonl"
    before = raw.read_text()
    raw.write_text(before.replace("insurance", "assurance", 1))
    pending = clone.pending()
    assert (pending["import_data"], pending["train_adapter"]) == (1, 1)
    raw.write_text(before)

    # A new level: one run trains, none is lost, and DVC records it without running anything.
    before = clone.runs()
    written = {path: path.stat().st_mtime_ns for path in (clone.folder / "results/tiny/runs").rglob("*.safetensors")}
    clone.edit("config/studies/tiny.yaml", "[2]", "[2, 4]")
    plan = {"study_plan": 1, "plan_figure": 1}
    assert clone.pending() == {**plan, "train_adapter": 1, "evaluate": 1, **AFTER_EVALUATION}
    clone.snakemake()
    assert len(clone.runs()) == 2
    assert before < clone.runs()
    assert {path: path.stat().st_mtime_ns for path in written} == written
    changed = clone("dvc", "params", "diff").stdout
    assert "factors.rank.levels" in changed
    assert "[2, 4]" in changed
    repro = clone("dvc", "repro", "study@tiny")
    assert "Nothing to be done" in repro.stdout + repro.stderr
    assert len(clone.runs()) == 2
    metrics = json.loads(clone("dvc", "metrics", "diff", "--json").stdout)["results/tiny/summary/4.json"]
    assert metrics["loss"]["new"] > 0
    second = clone.commit("A wider adapter")

    # Back to the old commit, and forth: the results of each are there, and nothing wants to run.
    clone("git", "checkout", "-q", first)
    clone("dvc", "checkout", "-q")
    assert clone.runs() == before
    assert clone.pending() == {}
    clone("git", "checkout", "-q", second)
    clone("dvc", "checkout", "-q")
    assert len(clone.runs()) == 2
    assert clone.pending() == {}


def test_restore_of_one_run_brings_its_files_alone(versioned, tmp_path):
    clone = versioned.clone(tmp_path / "clone")
    run = sorted(versioned.runs())[0]
    clone("finegrid", "restore", "tiny", "--run", run)
    assert clone.runs() == {run}
    assert (clone.folder / f"results/tiny/runs/{run}/predictions.jsonl").is_file()
    assert clone.pending(f"results/tiny/metrics/{run}.json") == {}


def test_restore_refuses_what_is_not_whole(versioned, tmp_path):
    clone = versioned.clone(tmp_path / "clone")
    done = clone("finegrid", "restore", "tine", check=False)
    assert done.returncode == 1
    assert "did you mean 'tiny'" in done.stderr

    # A result in git that is not the one of dvc.lock.
    metrics = next((clone.folder / "results/tiny/metrics").glob("lora-*"))
    text = metrics.read_text()
    metrics.write_text(text.replace('"loss": 10.', '"loss": 9.'))
    done = clone("finegrid", "restore", "tiny", check=False)
    assert done.returncode == 1
    assert "results/tiny/metrics: modified, by dvc.lock (study@tiny)" in done.stderr
    metrics.write_text(text)

    # A lock that names other predictions than the records do.
    lines = (clone.folder / "results/tiny/jobs.jsonl").read_text()
    predictions = next(json.loads(line) for line in lines.splitlines() if '"rule": "evaluate"' in line)["outputs"]
    digest = next(digest for path, digest in predictions.items() if path.endswith(".jsonl"))
    (clone.folder / "results/tiny/jobs.jsonl").write_text(lines.replace(digest, "0" * 64))
    done = clone("finegrid", "restore", "tiny", check=False)
    assert done.returncode == 1
    assert "predictions.jsonl: not the file that" in done.stderr or "jobs.jsonl: modified" in done.stderr
    assert "Traceback" not in done.stderr

    # Neither does snakemake take over what is another file.
    done = clone.snakemake("--dry-run", check=False)
    assert done.returncode == 1
    assert "not the file that results/tiny/jobs.jsonl tells of" in done.stderr
    assert "dvc checkout" in done.stderr

    clone("git", "checkout", "-q", ".")
    shutil.rmtree(clone.folder / ".dvc/cache")
    shutil.rmtree(clone.folder / "results/tiny/runs")
    clone("dvc", "remote", "modify", "store", "url", str(tmp_path / "empty"))
    done = clone("finegrid", "restore", "tiny", check=False)
    assert done.returncode == 1
    assert f"from store {tmp_path / 'empty'} (default)" in done.stderr
    assert "md5" not in done.stderr
    clone("dvc", "remote", "remove", "store")
    done = clone("finegrid", "restore", "tiny", check=False)
    assert done.returncode == 1
    assert "there is no remote to pull from" in done.stderr


def test_restore_refuses_what_a_remote_damaged(versioned, tmp_path):
    clone = versioned.clone(tmp_path / "clone")
    shutil.copytree(versioned.folder.parent / "store", tmp_path / "store")
    clone("dvc", "remote", "modify", "store", "url", str(tmp_path / "store"))
    run = sorted(versioned.runs())[0]
    weights = f"results/tiny/runs/{run}/adapter/adapter_model.safetensors"
    content = (versioned.folder / weights).read_bytes()
    (stored,) = [path for path in (tmp_path / "store").rglob("*") if path.is_file() and path.read_bytes() == content]
    stored.chmod(0o644)
    stored.write_bytes(content[:-1] + b"?")
    done = clone("finegrid", "restore", "tiny", "--run", run, check=False)
    assert done.returncode == 1
    assert weights in done.stderr


def test_trace_goes_back_to_raw_data_and_names_a_broken_link(versioned, tmp_path):
    copy = Versioned(tmp_path / "project")
    shutil.copytree(versioned.folder, copy.folder, symlinks=True)
    said = copy("finegrid", "trace", "quality").stdout
    for part in (
        "evaluate",
        "train_adapter",
        "tokenise",
        "import_data",
        "data/raw/tiny/train.jsonl",
        "every hash holds",
    ):
        assert part in said
    assert "arms.tex" in copy("finegrid", "trace", "arms.tex").stdout
    assert "report.html: " in copy("finegrid", "trace", "report.html").stdout
    assert copy("finegrid", "trace", "tinyExamples").stdout.startswith(r"\tinyExamples = 8")
    unknown = copy("finegrid", "trace", "tinyExample", check=False)
    assert unknown.returncode == 1
    assert "did you mean 'tinyExamples'" in unknown.stderr
    for broken in ("data/raw/tiny/train.jsonl", "results/tiny/runs/{run}/adapter/adapter_model.safetensors"):
        path = copy.folder / broken.format(run=sorted(copy.runs())[0])
        content = path.read_bytes()
        path.write_bytes(content[:-2] + b"  ")
        done = copy("finegrid", "trace", "quality", check=False)
        assert done.returncode == 1
        assert f"BROKEN  {path.relative_to(copy.folder)}" in done.stdout
        path.write_bytes(content)
    assert copy("finegrid", "trace", "quality").returncode == 0


def test_run_trained_again_has_its_recorded_metrics(versioned, tmp_path):
    copy = Versioned(tmp_path / "project")
    shutil.copytree(versioned.folder, copy.folder, symlinks=True)
    run = sorted(copy.runs())[0]
    said = copy("finegrid", "verify", "tiny", "--run", run).stdout
    assert f"metrics of {run} are the recorded ones (to the last bit); weights are the same bytes" in said
    assert not list((copy.folder / "scratch/verify/tiny").iterdir())


def test_figures_name_study_and_commit_and_a_later_commit_alone_draws_all_the_same(versioned, tmp_path):
    clone = versioned.clone(tmp_path / "clone")
    pdf, png = (clone.folder / f"results/tiny/figures/quality.{kind}" for kind in ("pdf", "png"))
    record = clone.json("results/tiny/figures/quality.json")
    head = clone("git", "rev-parse", "HEAD").stdout.strip()
    assert record["commit"] not in (None, head)  # drawn before its results were committed
    assert record["dirty"] is False
    before = pdf.read_bytes(), png.read_bytes()
    for content in before:
        assert record["commit"].encode() in content
    assert b"study tiny" in before[0]
    clone("finegrid", "plan", "tiny", "--gpus", "rtx-4090")  # a look changes nothing
    drawn = {path.stem for path in pdf.parent.glob("*.pdf")}
    for path in pdf.parent.iterdir():
        if path.suffix != ".json":
            path.unlink()
    clone(sys.executable, "-c", DRAW, *[f"figure {name}" for name in sorted(drawn)], "tables")
    assert clone("git", "status", "--porcelain").stdout == ""


def test_provenance_of_a_run_names_all_that_made_it(versioned):
    run = sorted(versioned.runs())[0]
    record = versioned.json(f"results/tiny/provenance/{run}.json")
    for key in ("commit", "settings_hash", "code", "lock", "packages", "device", "seed", "command", "inputs"):
        assert record[key] is not None, key
    assert record["dirty"] is False
    assert f"results/tiny/runs/{run}/adapter/adapter_model.safetensors" in record["outputs"]
    assert record["data_version"].keys() == {
        f"data/raw/tiny/{split}.jsonl" for split in ("train", "validation", "test")
    }
