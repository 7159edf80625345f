"""`finegrid watch`: what it tells of real trainings that go on, fail, die and end, and how it fits a terminal."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from calls import counted_calls
from finegrid import cli, layout
from finegrid.errors import UserError
from finegrid.files import write_json
from finegrid.models import fetch_model
from finegrid.study import load_study
from finegrid.training.state import live_state, read_state, reason_in, reason_of
from finegrid.watch import Job, Watcher
from finegrid.watch_table import draw, summary, watch
from rich.console import Console
from token_rows import random_rows, write_tokens

RECIPE = {
    "model": {"model_name_or_path": "data/models/tiny"},
    "data_config": {"train_file": "data/raw/tiny/train.jsonl", "test_file": "data/raw/tiny/test.jsonl"},
    "training_args": {
        "use_cpu": True,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1.0e-3,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 40,
    },
    "peft_config": {"peft_type": "LORA", "r": 4, "target_modules": "all-linear"},
}
LEVELS = {
    "short": {},
    "other": {"peft_config.r": 2},
    "long": {"training_args.max_steps": 400},
    "wild": {"training_args.learning_rate": 1.0e30, "training_args.max_grad_norm": 0.0},
    "two": {"training_args.learning_rate": 1.0e30, "training_args.max_grad_norm": 0.0, "gpus": 2},
}


@pytest.fixture(scope="module")
def folder(tiny_model_dir, tmp_path_factory) -> Path:
    """A project with a study of five runs, its base model and its token files."""
    folder = tmp_path_factory.mktemp("watch")
    (folder / "config/studies").mkdir(parents=True)
    (folder / "config/recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    study = {"title": "Which?", "recipe": "config/recipe.yaml", "factors": {"kind": LEVELS}}
    study["compare"] = {"baseline": {"kind": "short"}, "metric": "rougeL", "margin": 0.01}
    (folder / "config/studies/tiny.yaml").write_text(yaml.safe_dump(study))
    (folder / "data/models").mkdir(parents=True)
    (folder / "data/models/tiny").symlink_to(tiny_model_dir)
    run = load_study(Path("config/studies/tiny.yaml"), folder).runs[0]
    fetch_model(run.settings.model, folder, folder / "data/models/tiny.json")
    splits = {
        split: random_rows(count, split=split) for split, count in (("train", 22), ("validation", 6), ("test", 6))
    }
    report = {"clean": {"import": {"files": {}}}}
    write_json(write_tokens(folder / layout.tokens_folder(run), **splits) / "report.json", report)
    return folder


@pytest.fixture
def project(folder, monkeypatch) -> Path:
    monkeypatch.chdir(folder)
    monkeypatch.delenv("FINEGRID_STUDY", raising=False)
    monkeypatch.setenv("PATH", os.environ["PATH"])
    return folder


def run_of(project: Path, level: str) -> str:
    study = load_study(Path("config/studies/tiny.yaml"), project)
    return next(run.id for run in study.runs if level in run.arms[0])


def row_of(project: Path, run: str, watcher: Watcher | None = None):
    sight = (watcher or Watcher("tiny", project)).look()
    return next(row for row in sight.rows if row.run == run)


def start(project: Path, run: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "finegrid.cli", "train", "tiny", run, "--log", f"logs/train/tiny/{run}.log"]
    return subprocess.Popen(
        command, cwd=project, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def wait_for(true, seconds: float = 120.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = true()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError("waited in vain")


def text_of(lines, width: int = 100) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(lines)
    return console.export_text()


# ---------------------------------------------------------------- real runs


def test_a_run_is_told_while_it_trains_after_it_was_ended_and_when_it_went_on_to_its_end(project):
    run, watcher = run_of(project, "long"), Watcher("tiny", project)
    assert row_of(project, run, watcher).state == "waiting"
    process = start(project, run)
    loading = wait_for(lambda: (row := row_of(project, run, watcher)).state == "running" and row)
    assert (loading.doing, loading.node) == ("loading", socket.gethostname().split(".")[0])
    row = wait_for(lambda: (row := row_of(project, run, watcher)).step and row)
    assert row.state == "running"
    assert row.steps == 400
    assert 0 < row.loss < 20
    assert 0 < row.eval_loss < 20
    assert row.tokens_per_second > 0
    assert 0 < row.seconds_left < 600
    scratch = project / "scratch/tiny" / run
    wait_for(lambda: list(scratch.glob("checkpoint-*/trainer_state.json")))
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == -signal.SIGTERM, "whoever asked it to end sees that it did"
    row = row_of(project, run, watcher)
    assert (row.state, row.reason) == ("failed", "ended by SIGTERM")
    assert row.log == f"logs/train/tiny/{run}.log"
    assert row.step > 0

    cli.train("tiny", run, log=None, scratch=Path("scratch"))
    row = row_of(project, run, watcher)
    assert (row.state, row.step, row.steps) == ("done", 400, 400)
    summary = json.loads((project / f"results/tiny/training/{run}.json").read_text())
    assert summary["resumed_from"] >= 40, "the state file doesn't hide the checkpoints"
    assert row.eval_loss == summary["final_eval_loss"]
    assert row.seconds == summary["train_seconds"]
    assert not scratch.exists(), "nothing is left in scratch of a run that is done"


def test_a_killed_run_shows_when_it_last_lived_and_is_running_again_when_it_is(project, monkeypatch):
    run, watcher = run_of(project, "short"), Watcher("tiny", project)
    process = start(project, run)
    wait_for(lambda: row_of(project, run, watcher).state == "running")
    process.kill()
    process.wait()
    state = project / "scratch/tiny" / run / "state.json"
    facts = read_state(state)
    assert facts["pid"] == process.pid
    # The last sign was a while ago.
    write_json(state, facts | {"updated": "2026-01-02T03:04:05+00:00"})
    row = row_of(project, run, watcher)
    assert row.state == "failed"
    assert row.reason.startswith("no sign of life since 02 Jan")
    write_json(state, facts | {"updated": now(-20)})
    assert row_of(project, run, watcher).reason.endswith("its process is gone")
    write_json(state, facts | {"updated": now(-20), "node": "another"})
    assert row_of(project, run, watcher).state == "running", "what another machine's processes do isn't known here"

    cli.train("tiny", run, log=None, scratch=Path("scratch"))
    assert row_of(project, run, watcher).state == "done"


def now(seconds: float) -> str:
    from datetime import UTC, datetime, timedelta

    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat(timespec="seconds")


def test_a_run_whose_loss_is_no_number_says_so(project):
    run = run_of(project, "wild")
    with pytest.raises(UserError):
        cli.train("tiny", run, log=None, scratch=Path("scratch"))
    row = row_of(project, run)
    assert row.state == "failed"
    assert re.fullmatch(r"(NaN|infinity) in (the gradient of )?step [1-6]", row.reason), row.reason
    assert row.step is not None
    assert "loss" not in row.reason


@pytest.mark.slow
def test_several_processes_leave_one_reason_whichever_met_it(project):
    run = run_of(project, "two")
    process = start(project, run)
    assert process.wait(180) == 1, (project / f"logs/train/tiny/{run}.log").read_text()[-2000:]
    row = row_of(project, run)
    assert row.state == "failed"
    assert re.fullmatch(r"(NaN|infinity) in (the gradient of )?step [1-6]", row.reason), row.reason


def test_a_broken_data_row_is_called_bad_data(project, tmp_path):
    run = run_of(project, "other")
    tokens = project / layout.tokens_folder(load_study(Path("config/studies/tiny.yaml"), project).run(run))
    kept = tokens.rename(tmp_path / "kept")
    try:
        broken = random_rows(22)
        broken[0]["input_ids"][0] = 10**6
        write_tokens(tokens, train=broken, validation=[])
        with pytest.raises(IndexError):
            cli.train("tiny", run, log=None, scratch=Path("scratch"))
        assert row_of(project, run).reason == "bad data: a token id beyond the model's vocabulary"
        (tokens / "train.arrow").write_bytes(b"no arrow")
        with pytest.raises(UserError):
            cli.train("tiny", run, log=None, scratch=Path("scratch"))
        assert re.match(r"bad data: data/tokens/\S+/train.arrow: can't be read", row_of(project, run).reason)
    finally:
        for file in tokens.iterdir():
            file.unlink()
        tokens.rmdir()
        kept.rename(tokens)


# ---------------------------------------------------------------- reasons


def failure(action) -> BaseException:
    try:
        action()
    except BaseException as error:
        return error
    raise AssertionError("it didn't fail")


def test_memory_that_is_refused_is_out_of_memory_whoever_says_so():
    assert reason_of(failure(lambda: torch.empty(1 << 60))) == "out of memory"
    assert reason_of(failure(lambda: bytearray(1 << 62))) == "out of memory"
    cuda = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has …")
    assert reason_of(cuda) == "out of memory"
    assert reason_of(RuntimeError("a\nb")) == "RuntimeError: a"


def test_a_disk_that_is_full_is_named(tmp_path):
    def write():
        with open("/dev/full", "w") as file:
            file.write("x")

    assert reason_of(failure(write)).startswith("disk full")


def test_several_mistakes_are_counted():
    assert reason_of(UserError("gpus: the recipe asks for 4", "b", "c")) == "gpus: the recipe asks for 4 (and 2 more)"


@pytest.mark.parametrize(("left", "reason"), [(30, "time-out"), (3600, "ended by SIGTERM")])
def test_a_job_that_is_ended_at_its_time_limit_timed_out(tmp_path, left, reason):
    code = f"""
import time
from pathlib import Path
from finegrid.training.state import live_state
with live_state(Path({str(tmp_path)!r}, "run", "state.json"), "run-1", None) as tell:
    tell(step=3, steps=9)
    while tell.__self__.deadline is None:  # a thread asks for it
        time.sleep(0.01)
    print("up", flush=True)
    time.sleep(600)
"""
    environment = os.environ | {"SLURM_JOB_ID": "1", "SLURM_JOB_END_TIME": str(int(time.time()) + left)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    process.terminate()
    assert process.wait(60) == -signal.SIGTERM
    facts = read_state(tmp_path / "run/state.json")
    assert (facts["state"], facts["reason"], facts["step"], facts["job"]) == ("failed", reason, 3, "1")


def test_a_log_tells_the_last_reason_in_it():
    assert reason_in("loading\nstep 3\n") is None
    trace = "Traceback (most recent call last):\n  File x, line 3, in f\n    g()\n{}\n"
    assert reason_in(trace.format("ValueError: no\nsuch thing")) == "ValueError: no"
    assert reason_in(trace.format("torch.OutOfMemoryError: CUDA out of memory. Tried")) == "out of memory"
    assert reason_in(trace.format("ValueError: old") + "error: gpus: 4 found\n") == "gpus: 4 found"
    problem = "training: step 12: the loss of rows a-1 is nan; expected a finite number"
    assert reason_in(f"error: {problem}\n") == "NaN in step 12"
    slurm = "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-24T10:00:00 DUE TO TIME LIMIT ***\n"
    assert reason_in(slurm) == "time-out"
    assert reason_in("slurmstepd: error: Detected 1 oom_kill event in StepId=7.0") == "out of memory"


def test_a_copy_of_the_process_that_is_ended_says_nothing(tmp_path):
    path = tmp_path / "run/state.json"
    with live_state(path, "run-1", None):
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        time.sleep(0.2)
        os.kill(child, signal.SIGTERM)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
        assert read_state(path)["state"] == "loading"
    assert not path.parent.exists()


# ---------------------------------------------------------------- what the files tell


@pytest.fixture
def planned(tmp_path) -> Path:
    """A project with nothing but a plan of a thousand runs."""
    make_plan(tmp_path, 1000)
    return tmp_path


def name_of(number: int) -> str:
    return f"lora-{number:08x}"


def make_plan(project: Path, count: int) -> None:
    runs = [
        {
            "run": name_of(number),
            "arm": f"arm{number // 10}",
            "tuned": {"learning_rate": "0.001"},
            "seed": number % 10,
            "train": True,
            "steps": 200,
            "seconds": 100.0,
        }
        for number in range(count)
    ]
    arms = [{"arm": f"arm{number}", "label": f"LoRA, rank {number}, all linears"} for number in range(count // 10)]
    base = {"run": "base-00000000", "arm": "base", "tuned": {}, "seed": None, "train": False}
    plan = {"study": "big", "title": "Which rank?", "arms": [*arms, {"arm": "base", "label": "Base"}]}
    write_json(project / "results/big/plan.json", plan | {"runs": [base, *runs]})
    (project / "scratch/big").mkdir(parents=True)
    (project / "results/big/training").mkdir()


def add_state(project: Path, number: int, **facts) -> None:
    known = {
        "run": name_of(number),
        "state": "training",
        "step": 50,
        "steps": 200,
        "loss": 2.345678,
        "eval_loss": 2.5,
        "tokens_per_second": 12345.6,
        "seconds_left": 75.0,
        "started": now(-25),
        "updated": now(0),
        "node": "node7.cluster",
        "pid": 1,
        "job": None,
        "log": f"logs/train/big/{name_of(number)}.log",
    }
    write_json(project / "scratch/big" / name_of(number) / "state.json", known | facts)


def add_result(project: Path, number: int) -> None:
    result = {"steps": 200, "train_seconds": 100.0, "tokens_per_second": 12000.0, "final_eval_loss": 2.2}
    write_json(project / f"results/big/training/{name_of(number)}.json", result)


def test_a_thousand_runs_fit_the_terminal_with_running_and_failed_ones_first(planned):
    for number in range(300):
        add_result(planned, number)
    for number in range(300, 304):
        add_state(planned, number)
    for number in range(400, 403):
        add_state(planned, number, state="failed", reason="out of memory")
    watcher = Watcher("big", planned)
    sight = watcher.look()
    for width in (80, 100, 140):
        lines = text_of(draw(sight, width, 40), width).splitlines()
        assert len(lines) <= 40
        assert max(len(line) for line in lines) <= width
        assert "300 of 1000 trained" in lines[1]
        assert lines[2] == "4 running · 3 failed · 300 done · 694 waiting · on node7"
        assert all(f"{name_of(number)}" in lines[4 + number - 300] for number in range(300, 304))
        assert [line for line in lines if "out of memory" in line] == [
            f"  out of memory · logs/train/big/{name_of(number)}.log" for number in range(400, 403)
        ]
        assert re.fullmatch(r"… and \d+ done, 694 waiting more", lines[-2])
    assert "LoRA, rank 30, all linears · 0.001 · seed 0" in text_of(draw(sight, 140, 40), 140)


def test_with_more_failed_runs_than_lines_the_running_ones_are_still_seen(planned):
    for number in range(100):
        add_state(planned, number, state="failed", reason="time-out", updated=now(-5))
    for number in range(100, 130):
        add_state(planned, number)
    lines = text_of(draw(Watcher("big", planned).look(), 100, 30)).splitlines()
    assert len(lines) <= 30
    assert sum(" running " in line for line in lines[3:]) >= 10
    assert sum(" failed " in line for line in lines[3:]) >= 5
    assert re.fullmatch(r"… and \d+ running, \d+ failed, 871 waiting more", lines[-2])


def test_the_end_is_expected_from_the_forecast_and_how_others_kept_to_it(planned):
    for number in range(10):
        add_result(planned, number)
    for number in range(10, 12):
        add_state(planned, number)  # 25 s and 75 s to go, as forecast
    sight = Watcher("big", planned).look()
    assert sight.ends - sight.at == pytest.approx((2 * 75 + 988 * 100) / 2, rel=0.01)


def test_a_second_look_opens_no_file_that_did_not_change(planned):
    for number in range(500):
        add_result(planned, number)
    for number in range(500, 520):
        add_state(planned, number)
    watcher = Watcher("big", planned)
    watcher.look()
    time.sleep(1.1)
    watcher.look()
    opened: list[str] = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" and listening else None)
    listening = True
    with counted_calls() as calls:
        watcher.look()
    listening = False
    assert [path for path in opened if str(planned) in path] == []
    assert calls[0] < 600_000  # 270,000 where this was written
    add_state(planned, 507, step=60)
    listening = True
    row = next(row for row in watcher.look().rows if row.run == name_of(507))
    listening = False
    assert row.step == 60
    assert [path for path in opened if str(planned) in path] == [str(planned / f"scratch/big/{row.run}/state.json")]


def test_the_command_starts_at_once_and_loads_nothing_heavy(planned):
    code = "import sys; from finegrid import cli, watch, watch_table; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "pandas", "numpy", "pydantic", "snakemake"} & set(loaded)
    command = [sys.executable, "-m", "finegrid.cli", "watch", "big", "--once"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FINEGRID_")}
    done = subprocess.run(command, cwd=planned, env=environment, capture_output=True, text=True, check=True)
    assert "1001 waiting" in done.stdout
    assert len(loaded) < 350  # 235 where this was written
    with counted_calls() as calls:
        watch(Watcher("big", planned), 1.0, once=True)
    assert calls[0] < 1_800_000  # 880,000 where this was written


def test_the_queue_of_slurm_tells_what_waits_and_what_came_back(planned, monkeypatch):
    comment = "1f0e-run rule_train_adapter_wildcards_big_{}"
    add_state(planned, 3, state="failed", reason="ended by SIGTERM", job="13")
    watcher = Watcher("big", planned)
    monkeypatch.setattr(watcher.queue, "ask", lambda: None)
    watcher.queue.jobs = [
        Job("11", "PENDING", "", "Resources", comment.format(name_of(1))),
        Job("12", "RUNNING", "node3", "None", comment.format(name_of(2))),
        Job("13", "PENDING", "", "BeginTime", comment.format(name_of(3))),
        Job("16", "RUNNING", "node5", "None", name_of(6) + ".train_adapter.big rule_train_adapter"),
        Job("17", "RUNNING", "node5", "None", name_of(7) + ".train_adapter.bigger"),
        Job("14", "PENDING", "", "Priority", "x rule_train_adapter_wildcards_other_" + name_of(4)),
        Job("15", "RUNNING", "node4", "None", "x rule_evaluate_wildcards_big_base-00000000"),
    ]
    rows = {row.run: row for row in watcher.look().rows}
    assert (rows[name_of(1)].state, rows[name_of(1)].note) == ("queued", "Resources")
    assert (rows[name_of(2)].state, rows[name_of(2)].doing, rows[name_of(2)].node) == ("running", "starting", "node3")
    assert rows[name_of(3)].state == "queued", "requeued: what ended it before is past"
    assert rows[name_of(4)].state == "waiting", "another study's run of the same settings"
    assert rows["base-00000000"].state == "evaluating"
    assert (rows[name_of(6)].state, rows[name_of(7)].state) == ("running", "waiting")
    # A job that Slurm ended tells why in the job's own log.
    watcher.queue.jobs = []
    log = planned / f".snakemake/slurm_logs/rule_train_adapter/big_{name_of(3)}/13.log"
    log.parent.mkdir(parents=True)
    log.write_text("slurmstepd: error: *** JOB 13 ON n CANCELLED AT 2026-11-24T10:00:00 DUE TO TIME LIMIT ***\n")
    row = next(row for row in watcher.look().rows if row.run == name_of(3))
    assert (row.state, row.reason) == ("failed", "time-out")


def test_an_evaluation_is_counted_and_told(planned):
    add_result(planned, 1)
    path = planned / "scratch/big" / name_of(1) / "evaluation.json"
    with live_state(path, name_of(1), Path("logs/evaluate/big/x.log")) as tell:
        tell(state="evaluating", line="test: 30/60 answers generated")
        watcher = Watcher("big", planned)
        row = next(row for row in watcher.look().rows if row.run == name_of(1))
        assert row.state == "evaluating"
        tell(line="test: 31/60 answers generated", state="saving")
    with pytest.raises(UserError), live_state(path, name_of(1), Path("logs/evaluate/big/x.log")) as tell:
        raise UserError("evaluation.split: 'test' has no rows")
    sight = watcher.look()
    row = next(row for row in sight.rows if row.run == name_of(1))
    assert (row.state, row.reason) == ("failed", "evaluation.split: 'test' has no rows")
    assert (sight.trained, sight.evaluated) == (1, 0)
    write_json(planned / f"results/big/metrics/{name_of(1)}.json", {})
    sight = watcher.look()
    assert next(row for row in sight.rows if row.run == name_of(1)).state == "done"
    assert sight.evaluated == 1


def test_a_command_that_failed_before_it_could_say_a_word_is_found_in_snakemakes_log(planned):
    folder = planned / ".snakemake/log"
    folder.mkdir(parents=True)
    watcher = Watcher("big", planned)
    assert watcher.look().count("failed") == 0
    command = f"Command 'set -euo pipefail; finegrid train big {name_of(5)} --log x' returned non-zero exit status"
    with (folder / "2026-11-24T100000.snakemake.log").open("w") as log:
        log.write(f"RuleException:\n{command} 127.\n{command.replace(name_of(5), name_of(6))} 1")
        log.flush()
        rows = {row.run: row for row in watcher.look().rows}
        assert rows[name_of(5)].reason == "the command `finegrid` was not found"
        assert rows[name_of(6)].state == "waiting", "half a line is no line"
        log.write("37.\n")
    rows = {row.run: row for row in watcher.look().rows}
    assert rows[name_of(6)].reason == "killed (SIGKILL); out of memory?"


def test_watching_ends_with_a_summary_when_nothing_is_left(tmp_path, monkeypatch, capsys):
    make_plan(tmp_path, 10)
    monkeypatch.chdir(tmp_path)
    for number in range(9):
        add_result(tmp_path, number)
    add_state(tmp_path, 9, state="failed", reason="NaN in step 12")
    sight = watch(Watcher("big", tmp_path), 0.2, once=False)
    assert sight.is_over
    text = capsys.readouterr().out
    assert "big: 9 of 10 runs trained, 0 of 11 evaluated, 1 failed" in text
    assert f"{name_of(9)}  LoRA, rank 0, all linears · 0.001 · seed 9" in text
    assert f"    NaN in step 12\n    logs/train/big/{name_of(9)}.log\n" in text
    add_state(tmp_path, 9)
    sight = Watcher("big", tmp_path).look()
    assert not sight.is_over
    assert "1 go on" in text_of(summary(sight))
