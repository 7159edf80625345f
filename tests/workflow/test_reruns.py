"""What reruns and what does not: section 4 of the design, counted in the jobs of a dry run."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

FIGURES = 5
AFTER_EVALUATION = {"compare": 1, "figure": FIGURES, "study_tables": 1, "study_report": 1}


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
    assert checkout.pending() == {"study_plan": 1, "train_adapter": 2, "evaluate": 2, **AFTER_EVALUATION}


def test_added_seed_trains_one_run_an_arm(checkout):
    checkout.edit("config/studies/tiny.yaml", "seeds: [0, 1]", "seeds: [0, 1, 2]")
    pending = checkout.pending()
    assert pending == {"study_plan": 1, "train_adapter": 1, "train_model": 1, "evaluate": 2, **AFTER_EVALUATION}


def test_changed_setting_of_one_level_trains_its_runs_anew(checkout):
    checkout.edit("config/studies/tiny.yaml", "peft_config.r: 4", "peft_config.r: 2")
    assert checkout.pending() == {"study_plan": 1, "train_adapter": 2, "evaluate": 2, **AFTER_EVALUATION}


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
        "train_adapter": 2,
        "train_model": 2,
        "evaluate": 5,
        **AFTER_EVALUATION,
    }


def test_lost_adapter_is_trained_again_alone(checkout):
    run = next((checkout.folder / "results/tiny/runs").glob("lora-*"))
    for path in (run / "adapter").iterdir():
        path.unlink()
    (run / "adapter").rmdir()
    pending = checkout.pending()
    assert (pending["train_adapter"], pending.get("train_model", 0)) == (1, 0)


def test_single_targets_work(checkout):
    run = next((checkout.folder / "results/tiny/runs").glob("lora-*")).name
    for path in (checkout.folder / "results/tiny/figures").iterdir():
        path.unlink()
    assert checkout.pending(f"results/tiny/metrics/{run}.json") == {}
    assert checkout.pending("figures") == {"figures": 1, "figure": FIGURES}
    assert "full-" in checkout.snakemake("plan").stdout
