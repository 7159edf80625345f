"""What reruns and what does not: section 4 of the design, counted in the jobs of a dry run."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import subprocess
import time
import zipfile
from pathlib import Path

import pytest
from finegrid.figures import FIGURES, NEEDS, PLAN_FIGURES

pytestmark = pytest.mark.slow

# The tiny study has one factor and two seeds. The plan's figures are no work of what comes after training.
FIGURE_NAMES = [name for name in FIGURES if name == "seeds" or name not in NEEDS]
DRAWN = len(FIGURE_NAMES) - len(PLAN_FIGURES)
AFTER_EVALUATION = {"compare": 1, "advice": 1, "figure": DRAWN, "study_tables": 1, "study_report": 1}


def touch(path: Path) -> None:
    later = time.time() + 60
    os.utime(path, (later, later))


def test_finished_study_has_nothing_to_do(checkout):
    assert checkout.pending() == {}


def test_touched_files_rerun_nothing(checkout):
    for pattern in ("data/raw/**/*", "config/**/*", "workflow/**/*.py", "workflow/**/*.smk", "data/models/**/*"):
        for path in checkout.folder.glob(pattern):
            touch(path)
    assert checkout.pending() == {}


def test_comments_and_docstrings_rerun_nothing(checkout):
    for name in ("training/trainer.py", "data/cleaning.py", "evaluation/metrics.py", "analysis/comparison.py"):
        path = checkout.folder / "workflow/finegrid" / name
        head, rest = path.read_text().split("\n", 1)
        path.write_text(f"{head.replace(chr(34) * 3, chr(34) * 3 + 'Edited. ', 1)}\n{rest}\n# a comment\n")
    checkout.edit("config/recipes/tiny.yaml", "max_input_length", "# a comment\nmax_input_length")
    checkout.edit("config/studies/tiny.yaml", "factors:", "# a comment\nfactors:")
    assert checkout.pending() == {}


def test_moved_checkout_has_nothing_to_do(checkout):
    moved = checkout.folder.with_name("elsewhere")
    checkout.folder.rename(moved)
    checkout.folder = moved
    assert checkout.pending() == {}


def test_changed_training_logic_retrains_every_run_but_no_base(checkout):
    path = checkout.folder / "workflow/finegrid/training/train.py"
    path.write_text(path.read_text() + "\nCHANGED = 1\n")
    assert checkout.pending() == {"train_adapter": 2, "train_model": 2, "evaluate": 4, **AFTER_EVALUATION}


def test_changed_evaluation_logic_retrains_nothing(checkout):
    path = checkout.folder / "workflow/finegrid/evaluation/metrics.py"
    path.write_text(path.read_text() + "\nCHANGED = 1\n")
    assert checkout.pending() == {"evaluate": 5, **AFTER_EVALUATION}


def test_changed_figure_logic_redraws_that_figure(checkout):
    path = checkout.folder / "workflow/finegrid/figures/lengths.py"
    path.write_text(path.read_text() + "\nCHANGED = 1\n")
    assert checkout.pending() == {"figure": 1, "study_report": 1}


def test_added_level_trains_only_its_own_runs(checkout):
    checkout.edit("config/studies/tiny.yaml", "seeds:", "    wide: {peft_config.r: 16}\nseeds:")
    assert checkout.pending() == {
        "study_plan": 1,
        "plan_figure": 1,
        "train_adapter": 2,
        "evaluate": 2,
        **AFTER_EVALUATION,
    }


def test_added_seed_trains_one_run_an_arm(checkout):
    checkout.edit("config/studies/tiny.yaml", "seeds: [0, 1]", "seeds: [0, 1, 2]")
    pending = checkout.pending()
    assert pending == {
        "study_plan": 1,
        "plan_figure": 1,
        "train_adapter": 1,
        "train_model": 1,
        "evaluate": 2,
        **AFTER_EVALUATION,
    }


def test_changed_setting_of_one_level_trains_its_runs_anew(checkout):
    checkout.edit("config/studies/tiny.yaml", "peft_config.r: 4", "peft_config.r: 2")
    assert checkout.pending() == {
        "study_plan": 1,
        "plan_figure": 1,
        "train_adapter": 2,
        "evaluate": 2,
        **AFTER_EVALUATION,
    }


def test_changed_generation_setting_evaluates_again_without_training(checkout):
    checkout.edit("config/recipes/tiny.yaml", "max_new_tokens: 8", "max_new_tokens: 6")
    assert checkout.pending() == {"evaluate": 5, **AFTER_EVALUATION}


def test_operational_settings_rerun_nothing(checkout):
    checkout.edit("config/recipes/tiny.yaml", "  max_steps: 4", "  max_steps: 4\n  dataloader_num_workers: 2")
    checkout.edit("config/recipes/tiny.yaml", "batch_size: 8}", "batch_size: 4}")
    assert checkout.pending() == {}


def test_changed_row_of_raw_data_reruns_everything_after_it(checkout):
    path = checkout.folder / "data/raw/tiny/train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[3]["answer"] += " Ask your agent."
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pending = checkout.pending()
    assert pending.pop("import_data") == 1
    assert pending == {
        "clean": 1,
        "tokenise": 1,
        "data_report": 1,
        "study_plan": 1,
        "plan_figure": 1,
        "train_adapter": 2,
        "train_model": 2,
        "evaluate": 5,
        **AFTER_EVALUATION,
    }


def test_lost_adapter_is_trained_again_alone_when_it_is_asked_for(checkout):
    run = next((checkout.folder / "results/tiny/runs").glob("lora-*"))
    shutil.rmtree(run / "adapter")
    assert checkout.pending() == {}  # scores and figures are there, and rest on nothing that changed
    assert checkout.pending(f"results/tiny/runs/{run.name}/adapter") == {"train_adapter": 1}


def test_single_targets_work(checkout):
    run = next((checkout.folder / "results/tiny/runs").glob("lora-*")).name
    for path in (checkout.folder / "results/tiny/figures").iterdir():
        path.unlink()
    assert checkout.pending(f"results/tiny/metrics/{run}.json") == {}
    assert checkout.pending("figures") == {"figures": 1, "figure": DRAWN, "plan_figure": 1}
    assert "effective batch" in checkout.snakemake("plan").stdout


# ---------------------------------------------------------------- what the finished study left behind


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_training_did_what_the_plan_said(finished):
    results = finished.folder / "results/tiny"
    planned = {run["run"]: run for run in read(results / "plan.json")["runs"] if run["train"]}
    assert len(planned) == 4
    for name, run in planned.items():
        summary = read(results / f"training/{name}.json")
        for key in ("steps", "epochs", "effective_batch_size", "label_tokens"):
            assert run[key] == summary[key], key
        assert run["tokens_seen"] == summary["tokens"]
        with (results / f"history/{name}.csv").open() as file:
            evaluations = [row for row in csv.DictReader(file) if row["eval_loss"]]
        assert run["evaluations"] == len(evaluations)


def test_provenance_holds_the_hashes_of_what_a_run_read(finished):
    results = finished.folder / "results/tiny"
    for path in (results / "provenance").glob("*.json"):
        record = read(path)
        for entry in record["inputs"].values():
            content = (finished.folder / entry["file"]).read_bytes()
            assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert record["settings_hash"] == path.stem.rpartition("-")[2]
        assert record["packages"]["torch"]


def test_every_promised_file_is_there_and_names_no_machine(finished):
    results = finished.folder / "results/tiny"
    names = {path.relative_to(results).as_posix() for path in results.rglob("*") if path.is_file()}
    figures = {f"figures/{name}.{kind}" for name in FIGURE_NAMES for kind in ("pdf", "png", "csv", "json")}
    assert figures | {"report.html", "plan.tsv", "tables/arms.tex", "tables/numbers.tex"} <= names
    for path in results.rglob("*"):
        if path.suffix in (".json", ".tsv", ".csv", ".html", ".tex", ".md"):
            assert str(finished.folder) not in path.read_text(encoding="utf-8"), path


def test_snakemakes_own_report_has_captions_commit_and_data_hashes(checkout):
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run([*git, "init", "-q"], cwd=checkout.folder, check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], cwd=checkout.folder, check=True)
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=checkout.folder, capture_output=True, text=True
    ).stdout.strip()

    checkout.snakemake("--report", "report.zip")

    with zipfile.ZipFile(checkout.folder / "report.zip") as file:
        page = file.read("report/report.html").decode("utf-8")
    for part in (head, "Mean of the primary metric by arm", "Every arm of study"):
        assert part in page, part
    data = read(next((checkout.folder / "results/tiny/provenance").glob("lora-*.json")))["inputs"]["train"]["sha256"]
    assert data[:32] in page
    assert data[32:] in page


def test_a_mistake_in_the_study_ends_snakemake_with_its_message_alone(checkout):
    checkout.edit("config/studies/tiny.yaml", "peft_config.r: 4", "peft_config.rr: 4")
    done = checkout.snakemake("--dry-run", check=False)
    assert done.returncode == 1
    assert "factors.method.lora.peft_config.rr" in done.stderr
    assert "did you mean" in done.stderr
    assert "Traceback" not in done.stderr


def test_plan_is_shown_before_anything_is_there(checkout):
    for folder in ("data/clean", "data/tokens", "results", ".snakemake"):
        shutil.rmtree(checkout.folder / folder)
    (checkout.folder / "data/models/tiny/model.safetensors").unlink()
    done = checkout.snakemake("plan")
    assert "effective batch" in done.stdout
    assert "raw files" in done.stdout
    assert (checkout.folder / "results/tiny/figures/grid.pdf").read_bytes().startswith(b"%PDF")
    assert not (checkout.folder / "data/clean").exists()
    # What was shown is no substitute for the exact plan, nor for the picture of that.
    pending = checkout.pending()
    assert (pending["study_plan"], pending["plan_figure"], pending["train_adapter"]) == (1, 1, 2)


def test_error_of_the_plan_stops_every_later_stage(checkout):
    shutil.rmtree(checkout.folder / "results/tiny")
    checkout.edit("config/recipes/tiny.yaml", "  max_steps: 4", "  max_steps: 4\n  warmup_steps: 9")
    done = checkout.snakemake(check=False)
    assert done.returncode == 1
    assert "warmup" in done.stderr
    assert not (checkout.folder / "results/tiny/runs").exists()
    assert not (checkout.folder / "results/tiny/plan.json").exists()


def test_a_data_limit_stops_the_stage_and_says_what_to_change(checkout):
    checkout.edit("config/recipes/tiny.yaml", "max_output_length: 96", "max_output_length: 24")
    done = checkout.snakemake(check=False)
    assert done.returncode == 1
    assert "limits.truncated_answers" in done.stderr
    assert not list((checkout.folder / "data/tokens").glob("*/train.arrow.part"))
