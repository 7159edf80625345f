"""The history made of the trainer's log, and the guards."""

from __future__ import annotations

import csv
import math
import sys
import time

import pytest
import torch
from finegrid.errors import UserError
from finegrid.training.guards import check_evaluation, check_step
from finegrid.training.history import COLUMNS, HistoryFile, forget_peak, history_rows, peak_memory_mb, write_history
from finegrid.training.progress import duration

LOG = [
    {"step": 0, "epoch": 0, "eval_loss": 3.5, "eval_runtime": 1.0, "label_tokens": 0, "tokens": 0},
    {"step": 5, "epoch": 0.5, "loss": 0.1 + 0.2, "learning_rate": 1e-3, "grad_norm": 2.0, "label_tokens": 70},
    {"step": 5, "epoch": 0.5, "eval_loss": 3.25, "label_tokens": 70},
    {"step": 10, "train_runtime": 3.0, "train_loss": 3.1, "total_flos": 1.0},
]


def test_training_rows_and_evaluations_are_kept_in_order_and_nothing_else():
    rows = history_rows(LOG)
    assert [(row["step"], row["loss"], row["eval_loss"]) for row in rows] == [
        (0, None, 3.5),
        (5, 0.1 + 0.2, None),
        (5, None, 3.25),
    ]
    assert all(list(row) == COLUMNS for row in rows)


def test_the_csv_keeps_all_digits_and_leaves_missing_values_empty(tmp_path):
    path = tmp_path / "history" / "run.csv"
    write_history(path, history_rows(LOG))
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[1]["loss"]) == 0.1 + 0.2
    assert rows[0]["loss"] == ""
    assert [file.name for file in path.parent.iterdir()] == ["run.csv"]


def test_a_long_history_is_written_now_and_then_and_whole_at_the_end(tmp_path):
    from transformers import TrainerControl, TrainerState

    file, state = HistoryFile(tmp_path / "history.csv"), TrainerState(is_world_process_zero=True)
    written, start = 0, time.monotonic()
    for step in range(1, 2001):
        state.log_history.append({"step": step, "loss": 3.5})
        before = file.path.stat().st_mtime_ns if file.path.exists() else None
        file.on_log(None, state, TrainerControl())
        written += file.path.stat().st_mtime_ns != before
        if step == 1:
            assert written == 1
    assert written < 100 + 100 * (time.monotonic() - start)  # of 2,000; a row takes some microseconds
    file.on_train_end(None, state, TrainerControl())
    assert len(file.path.read_text().splitlines()) == 2001


def test_peak_memory_never_falls_and_sees_an_allocation():
    before = peak_memory_mb(torch.device("cpu"))
    block = torch.ones(64 * 2**20, dtype=torch.float32)
    during = peak_memory_mb(torch.device("cpu"))
    del block
    assert 20 < before <= during <= peak_memory_mb(torch.device("cpu")) < 2**20


def test_a_finite_step_passes():
    check_step(3, [1.0, 2.0], [["a"], ["b"]], 0.5)
    check_step(3, [1.0], [["a"]], None)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_names_the_step_and_the_rows_of_its_own_micro_batch(value):
    with pytest.raises(UserError, match=r"step 7: the loss of rows c, d is") as error:
        check_step(7, [1.0, value], [["a", "b"], ["c", "d"]], 1.0)
    assert "a, b" not in str(error.value)


def test_a_gradient_that_is_no_number_names_the_step_and_all_rows_of_the_window():
    with pytest.raises(UserError, match=r"step 7: the gradient's norm on rows a, b is inf"):
        check_step(7, [1.0, 1.0], [["a"], ["b"]], math.inf)


def test_a_long_list_of_rows_is_cut_and_counted():
    with pytest.raises(UserError, match="and 84 more"):
        check_step(1, [math.nan], [[str(number) for number in range(100)]], None)


def test_a_validation_loss_that_is_no_number_stops():
    check_evaluation(4, 3.0)
    with pytest.raises(UserError, match="after step 4 is nan"):
        check_evaluation(4, math.nan)


@pytest.mark.parametrize(
    ("seconds", "said"), [(41.2, "41 s"), (89, "89 s"), (720, "12 min"), (5399, "1 h 30 min"), (11100, "3 h 05 min")]
)
def test_durations_are_said_as_a_person_says_them(seconds, said):
    assert duration(seconds) == said


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process can be forgotten on Linux alone")
def test_a_run_in_a_pack_has_none_of_the_memory_of_the_run_before_it():
    cpu = torch.device("cpu")
    forget_peak()
    start = peak_memory_mb(cpu)
    before_it = torch.ones(256 * 2**18)  # MiB
    assert 200 < peak_memory_mb(cpu) - start < 300
    del before_it
    forget_peak()
    own = torch.ones(64 * 2**18)
    assert 50 < peak_memory_mb(cpu) - start < 100
    del own
