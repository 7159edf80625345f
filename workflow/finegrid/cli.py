"""The command line: `finegrid <stage> …`, one command a rule; any stage can be typed by hand.

Each command finds its settings in the study's file by the run's id, calls one function of the package and writes
what the rule of the same name declares. Heavy packages are imported inside the commands, so `--help` is quick.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finegrid import layout, packing, provenance, versions_cli
from finegrid.errors import UserError, nearest
from finegrid.files import write_json
from finegrid.placing import IN_PACK
from finegrid.run_records import evaluation_record, training_record
from finegrid.staging import (
    RECORD,
    Failed,
    Staging,
    evaluation_identity,
    evaluation_places,
    raise_failure,
    training_facts,
    training_identity,
    training_inputs,
    training_places,
)
from finegrid.startup import importing, leave_out_unused
from finegrid.training import launch
from finegrid.training.state import live_state
from finegrid.training.stopping import Stop

if TYPE_CHECKING:
    from finegrid.study import Run, Study

Progress = Callable[[str], None]
StudyName = Annotated[str, typer.Argument(help="Name of a file in config/studies, or its path.", show_default=False)]
PackName = Annotated[str, typer.Argument(help="Name of a pack, as Snakemake shows it.", show_default=False)]
RunId = Annotated[str, typer.Argument(help="Id of a run of the study, as in its plan.", show_default=False)]
DataId = Annotated[str, typer.Argument(help="Data set and id, as in data/clean/<dataset>-<id>.", show_default=False)]
StudyOption = Annotated[
    str | None, typer.Option(envvar="FINEGRID_STUDY", help="Study to look in first; then all of config/studies.")
]
Scratch = Annotated[Path, typer.Option(envvar="FINEGRID_SCRATCH", help="Folder for checkpoints of unfinished runs.")]
Gpus = Annotated[
    str | None,
    typer.Option(
        envvar="FINEGRID_GPUS",
        help="GPUs to plan for, such as rtx-4090,a100-80gb; the first that a run fits on is taken. auto: the study's, "
        "or those of this machine. Default: `gpus` of config/config.yaml.",
    ),
]
Log = Annotated[Path | None, typer.Option(help="File for everything that the libraries print.")]

ADVICE = ("advice", "next_study")  # beside the comparison, but nothing is drawn from them

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Finegrid: from a declared study of fine-tuning settings to trained runs, honest comparisons and figures.",
)

app.add_typer(versions_cli.app)


def main() -> None:
    """Run the command line; a user's mistake is shown without a traceback and ends with status 1."""
    try:
        app()
    except UserError as error:
        _print_problems(error, sys.stderr)
        raise SystemExit(1) from None
    except SystemExit as end:
        if "RANK" not in os.environ or not isinstance(end.code, int | None):  # no worker of several
            raise
        launch.leave(end.code or 0)


# ---------------------------------------------------------------- data


@app.command("demo-model")
def demo_model(output: Path, log: Log = None) -> None:
    """Convert the demo's base model, SmolLM2-135M-Instruct, from its Python package."""
    with _stage("demo-model", log):
        from finegrid.data.demo import convert_model

        convert_model(output)


@app.command("demo-data")
def demo_data(output: Path, log: Log = None) -> None:
    """Write the demo's data set, InsuranceQA English, from its Python package."""
    with _stage("demo-data", log):
        from finegrid.data.demo import export_insuranceqa

        export_insuranceqa(output)


@app.command()
def model(name: str, study: StudyOption = None, log: Log = None) -> None:
    """Fetch a base model at its pinned revision, or take a folder, and write its manifest."""
    with _stage(f"model {name}", log):
        from finegrid.models import fetch_model

        run = _find(study, lambda run: layout.model_name(run.settings.model) == name, f"base model '{name}'")
        fetch_model(run.settings.model, Path.cwd(), layout.MODELS / f"{name}.json")


@app.command("import")
def import_(data: DataId, study: StudyOption = None, log: Log = None) -> None:
    """Read raw files of any accepted format into one schema."""
    with _stage(f"import {data}", log) as progress:
        from finegrid.data.importing import import_data

        run = _find_data(study, data)
        import_data(run.settings, Path.cwd(), layout.CLEAN / data / "imported", progress)


@app.command()
def clean(data: DataId, study: StudyOption = None, log: Log = None) -> None:
    """Clean the imported rows; every rejected row is kept with its reason."""
    with _stage(f"clean {data}", log) as progress:
        from finegrid.data.cleaning import clean

        run = _find_data(study, data)
        clean(run.settings, layout.CLEAN / data / "imported", layout.CLEAN / data, progress)


@app.command()
def tokenise(tokens: DataId, study: StudyOption = None, log: Log = None) -> None:
    """Turn clean rows into token rows with labels, within the recipe's length limits."""
    with _stage(f"tokenise {tokens}", log) as progress:
        from finegrid.data.tokenising import tokenise

        run = _find(study, lambda run: layout.tokens_folder(run).name == tokens, f"token set '{tokens}'")
        folder = layout.model_folder(run.settings.model)
        tokenise(run.settings, layout.clean_folder(run), folder, layout.TOKENS / tokens, progress)


# ---------------------------------------------------------------- recipe, study and runs


@app.command()
def resolve(
    recipe: Annotated[Path, typer.Argument(help="Recipe, as fine-tuners write it.", show_default=False)],
    model: Annotated[str | None, typer.Option(help="Base model, where the recipe names none.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit of a hub model.")] = None,
) -> None:
    """Check a recipe and print it with all defaults, as its runs would use it."""
    import yaml

    from finegrid.settings import load_recipe

    base = {key: value for key, value in {"model_name_or_path": model, "revision": revision}.items() if value}
    settings, notes = load_recipe(recipe, Path.cwd(), {"model": base} if base else None)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True), end="")


@app.command()
def plan(study: StudyName, gpus: Gpus = None, log: Log = None) -> None:
    """Show all that a study will do, need and prove; needs no weights, no GPU and no prepared data.

    Writes plan.json and plan.tsv beside the study's results; those that results were made with stay as they are.
    Errors among its findings end with status 1 and stop every later stage.
    """
    with _stage(f"plan {study}", log):
        from finegrid.plan import errors, write_plan
        from finegrid.records import records_file

        the_study = _study(study)
        made = write_plan(the_study, Path.cwd(), gpus, keep=log is None and records_file(the_study.name).is_file())
        if log is not None:
            if errors(made):
                raise UserError(*errors(made))
            return
        from finegrid.plan_table import print_plan

        print_plan(made)
        if errors(made):
            raise SystemExit(1)


@app.command()
def fit(
    gpu_memory: Annotated[str | None, typer.Option(help="Memory of one GPU, such as 24GB.")] = None,
    gpu: Annotated[str | None, typer.Option(help="A card by name instead, such as rtx-4090.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of a row, for the largest batch.")] = 1024,
    model: Annotated[str | None, typer.Option(help="Part of a hub id, or a folder with a config.json.")] = None,
    rank: Annotated[int, typer.Option(help="Rank of LoRA and QLoRA.")] = 16,
    checkpointing: Annotated[bool, typer.Option(help="Activation checkpointing.")] = True,
    gpus: Annotated[int, typer.Option(help="GPUs that train together.")] = 1,
    zero: Annotated[int, typer.Option(help="DeepSpeed's ZeRO stage; 0 without.")] = 0,
    offload: Annotated[bool, typer.Option("--offload", help="Optimiser (and parameters) in host memory.")] = False,
    label_share: Annotated[float, typer.Option(help="Share of tokens that carry loss.")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what can be fine-tuned on a GPU: model by method, largest batch and longest row."""
    from finegrid.fit import print_fit

    print_fit(gpu_memory, gpu, length, model, rank, checkpointing, gpus, zero, offload, label_share, as_json)


@app.command()
def train(study: StudyName, run: RunId, log: Log = None, scratch: Scratch = Path("scratch")) -> None:
    """Train one run; goes on from its last checkpoint if it was stopped."""
    with _stage(f"train {run}", log) as progress:
        the_study = _study(study)
        the_run = the_study.run(run)
        worker = launch.this_worker()
        if worker is None and _placed(the_study, the_run, scratch, "train"):
            progress(IN_PACK["train"])
            return
        starts_workers = worker is None and launch.is_needed(the_run.settings)
        is_first = worker is None or worker.rank == 0
        checkpoints = scratch / the_study.name / run
        results, state = layout.RESULTS / the_study.name, checkpoints / "state.json"
        trained_before = _finished(results, run)
        with (
            Stop() as stop,
            _only_one(is_first and not _has_launcher(worker), scratch / the_study.name, run, progress) as waited,
            live_state(state, run, log, writes=is_first, is_launcher=starts_workers, stop=stop) as tell,
        ):
            if waited and _is_trained(the_study, the_run, trained_before):
                progress("the other process has trained it")
                return
            if starts_workers:
                os.environ["FINEGRID_SCRATCH"] = str(scratch)
                command = ["train", study, run, *(["--log", str(log)] if log else [])]
                launch.start(the_run.settings, command, progress, stop, checkpoints)
                return
            made_at = provenance.commit(Path.cwd())
            leave_out_unused([the_run.settings])
            with importing():
                from finegrid.training.train import train

            train(
                the_run.settings,
                tokens=layout.tokens_folder(the_run),
                model=layout.model_folder(the_run.settings.model),
                output=layout.weights_folder(the_study.name, the_run),
                history=results / "history" / f"{run}.csv",
                summary=results / "training" / f"{run}.json",
                checkpoints=checkpoints,
                progress=progress,
                tell=tell,
                stop=stop,
            )
            if is_first:
                places = training_places(the_study, the_run)
                write_json(places["settings.json"], the_run.settings.model_dump(mode="json"))
                write_json(places[RECORD], training_record(the_study, the_run, made_at, _command()))


@app.command()
def evaluate(
    study: StudyName,
    run: RunId,
    gpus: Annotated[int, typer.Option(help="0: on the CPU, whatever GPUs there are.")] = 1,
    log: Log = None,
    scratch: Scratch = Path("scratch"),
) -> None:
    """Score one run, or an untrained base model: predictions of every example and metrics."""
    if not gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with _stage(f"evaluate {run}", log) as progress:
        the_study = _study(study)
        the_run = the_study.run(run)
        if _placed(the_study, the_run, scratch, "evaluate"):
            progress(IN_PACK["evaluate"])
            return
        results = layout.RESULTS / the_study.name
        made_at = provenance.commit(Path.cwd())
        with live_state(scratch / the_study.name / run / "evaluation.json", run, log) as tell:
            leave_out_unused([the_run.settings])
            with importing():
                from finegrid.evaluation.evaluate import evaluate

            def say(line: str) -> None:
                tell(state="evaluating", line=line)
                progress(line)

            evaluate(
                the_run.settings,
                run,
                tokens=layout.tokens_folder(the_run),
                clean=layout.clean_folder(the_run),
                model=layout.model_folder(the_run.settings.model),
                adapter=layout.weights_folder(the_study.name, the_run) if the_run.method != "base" else None,
                predictions=results / "runs" / run / "predictions.jsonl",
                metrics=results / "metrics" / f"{run}.json",
                progress=say,
            )
        # No output of the rule, for it says nothing that later stages hang on.
        record = evaluation_record(the_study, the_run, made_at, packing.device_name(the_run), _command())
        write_json(evaluation_places(the_study, the_run)[RECORD], record)


@app.command("train-pack")
def train_pack(
    study: StudyName,
    pack: PackName,
    together: Annotated[
        int | None,
        typer.Option(help="How many runs make their steps together, on a GPU. Default: what Snakemake says, or 1."),
    ] = None,
    score: Annotated[
        int | None,
        typer.Option(
            help="Score them too if Snakemake needs that: see --rows of evaluate-pack. Default: if it says so."
        ),
    ] = None,
    log: Log = None,
    scratch: Scratch = Path("scratch"),
) -> None:
    """Train the runs of a pack in one process; the jobs of these runs put the results in place.

    Snakemake says which runs are needed; without it, all of the pack's. A stopped pack goes on where it was.
    """
    log = log or Path("logs/train_pack") / study / f"{pack}.log"
    with _stage(f"train-pack {pack}", log) as progress:
        packing.train_pack(_study(study), pack, scratch, progress, together, score)


@app.command("evaluate-pack")
def evaluate_pack(
    study: StudyName,
    pack: PackName,
    gpus: Annotated[int, typer.Option(help="0: on the CPU, whatever GPUs there are.")] = 1,
    rows: Annotated[
        int | None,
        typer.Option(
            help="Rows of all runs in one batch of answers at most; 0: run by run. Default: what Snakemake says, or 0."
        ),
    ] = None,
    log: Log = None,
    scratch: Scratch = Path("scratch"),
) -> None:
    """Score the runs of a pack in one process; the jobs of these runs put the results in place."""
    if not gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    log = log or Path("logs/evaluate_pack") / study / f"{pack}.log"
    with _stage(f"evaluate-pack {pack}", log) as progress:
        packing.evaluate_pack(_study(study), pack, scratch, progress, rows)


@app.command()
def watch(
    study: Annotated[
        str | None, typer.Argument(help="Study; default: that of config.yaml.", show_default=False)
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print it once and end.")] = False,
    interval: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.2)] = 2.0,
    scratch: Annotated[Path | None, typer.Option(envvar="FINEGRID_SCRATCH", help="As in config.yaml.")] = None,
) -> None:
    """Show a study's runs while they train, here or on a cluster: state, step, loss, speed, time left, failures.

    Ends when every run is done or failed and nothing goes on, with status 1 if any failed. Ctrl-C ends the watching,
    not the runs.
    """
    from finegrid.watch import Watcher, project_settings
    from finegrid.watch_table import watch

    settings = project_settings(Path.cwd())
    name = study or os.environ.get("FINEGRID_STUDY") or settings.get("study", "")
    sight = watch(Watcher(name, Path.cwd(), scratch or Path(settings.get("scratch", "scratch"))), interval, once)
    if sight.is_over and sight.count("failed"):
        raise SystemExit(1)


@app.command()
def orphans(
    study: Annotated[
        str | None, typer.Argument(help="Study; default: that of config.yaml.", show_default=False)
    ] = None,
    adopt: Annotated[bool, typer.Option("--adopt", help="Keep what still runs, and unlock.")] = False,
    end: Annotated[bool, typer.Option("--end", help="End what still runs, and unlock.")] = False,
) -> None:
    """Show what a killed snakemake left running, keep or end it, and unlock the study.

    What is kept goes on: Slurm's jobs are taken over by the next snakemake, and its trainings wait for those of this
    machine. What is ended saves a checkpoint first.
    """
    from finegrid import controllers
    from finegrid.watch import project_settings

    name = study or os.environ.get("FINEGRID_STUDY") or project_settings(Path.cwd()).get("study", "")
    where = {True: "is alive: let it end first", False: "is on another machine: run this command there"}
    living = [
        f"study {record['study']}: {controllers.describe(record)}, {where[record['node'] == socket.gethostname()]}"
        for record in controllers.alive()
    ]
    if living:
        raise UserError(*living)
    for record in controllers.others(name):
        print(f"killed: {controllers.describe(record)}")
    found = controllers.orphans(name)
    for each in found:
        print(f"  {each}")
    if not found:
        print(f"Nothing runs for study {name} without a snakemake that waits for it.")
    elif not (adopt or end):
        if not sys.stdin.isatty():
            raise UserError("orphans: nobody to ask; expected --adopt (keep them) or --end")
        answer = input("Keep them, and let the next snakemake go on with them, or end them? [keep/end/nothing] ")
        adopt, end = answer.strip().lower() in ("k", "keep"), answer.strip().lower() in ("e", "end")
        if not (adopt or end):
            return
    if end:
        controllers.end(found, print)
        left = controllers.orphans(name)
        if left:
            raise UserError(*(f"{each}: does not end; nothing was unlocked" for each in left))
    elif found:
        controllers.wait_for_stages(found, print)
    if not controllers.unlock(name):
        raise SystemExit(1)
    print(f"Unlocked. `snakemake --config study={name}` goes on.")


# ---------------------------------------------------------------- analysis and publication


@app.command()
def compare(study: StudyName, log: Log = None) -> None:
    """Compare the arms of a study: estimates, intervals, verdicts."""
    with _stage(f"compare {study}", log):
        with importing():
            from finegrid.analysis.compare import compare
        from finegrid.provenance import other_versions

        the_study = _study(study)
        results = layout.RESULTS / the_study.name
        runs = [run.id for run in the_study.all_runs]
        if problems := other_versions({run.id: results / "provenance" / f"{run.id}.json" for run in the_study.runs}):
            raise UserError(*problems)
        compare(
            results / "plan.json",
            metrics=[results / "metrics" / f"{run}.json" for run in runs],
            predictions=[results / "runs" / run / "predictions.jsonl" for run in runs],
            training=[results / "training" / f"{run.id}.json" for run in the_study.runs],
            histories=[results / "history" / f"{run.id}.csv" for run in the_study.runs],
            output=results / "comparison",
        )


@app.command()
def advice(study: StudyName, log: Log = None) -> None:
    """Say what to try next, with the evidence, and write the study file that tries it."""
    with _stage(f"advice {study}", log):
        from finegrid.analysis.advice import print_advice, write_advice
        from finegrid.study import load_study
        from finegrid.yaml_file import read_yaml

        the_study = _study(study)
        results = layout.RESULTS / the_study.name
        mapping, _ = read_yaml(the_study.path, the_study.path.as_posix())
        print_advice(write_advice(results, the_study.path, mapping, lambda path: load_study(path, Path.cwd())))


@app.command()
def figure(study: StudyName, name: str, log: Log = None) -> None:
    """Draw one figure of a study as PDF, PNG and CSV, with its provenance."""
    with _stage(f"figure {name}", log):
        import importlib

        from finegrid.figures import FIGURES, NEEDS, PLAN_FIGURES, fitting
        from finegrid.figures.stamp import stamped
        from finegrid.fingerprint import code_fingerprint
        from finegrid.plan import plan_settings
        from finegrid.provenance import drawn_at

        if name not in FIGURES:
            raise UserError(f"figure '{name}': no such figure; there are {', '.join(FIGURES)}{nearest(name, FIGURES)}")
        module = f"finegrid.figures.{name}"
        the_study = _study(study)
        fits = fitting(plan_settings(the_study))
        if name not in fits:
            raise UserError(f"figure '{name}': needs {NEEDS[name]}; of {study} there are {', '.join(fits)}")
        results = layout.RESULTS / the_study.name
        inputs = {"plan.json": results / "plan.json"} if name in PLAN_FIGURES else _study_inputs(the_study)
        record, code = results / "figures" / f"{name}.json", code_fingerprint(module)
        made_at = drawn_at(Path.cwd(), record, inputs, code)
        with importing():
            drawing = importlib.import_module(module)
        with stamped(the_study.name, made_at):
            drawing.draw(results, results / "figures" / name)
        _write_study_provenance(the_study, record, inputs, code, made_at)


@app.command()
def tables(study: StudyName, log: Log = None) -> None:
    """Write the study's tables (LaTeX, Markdown, CSV) and numbers.tex."""
    with _stage(f"tables {study}", log):
        from finegrid.fingerprint import code_fingerprint
        from finegrid.provenance import drawn_at

        with importing():
            from finegrid.publication.numbers import write_numbers  # which reads the tables' module too
            from finegrid.publication.tables import write_tables

        the_study = _study(study)
        results = layout.RESULTS / the_study.name
        write_tables(results, results / "tables")
        write_numbers(results, results / "tables" / "numbers.tex")
        record, code = results / "tables" / "provenance.json", code_fingerprint("finegrid.publication.numbers")
        inputs = _study_inputs(the_study)
        _write_study_provenance(the_study, record, inputs, code, drawn_at(Path.cwd(), record, inputs, code))


@app.command()
def report(study: StudyName, log: Log = None) -> None:
    """Write the study's report, one HTML file, and print its path."""
    with _stage(f"report {study}", log) as progress:
        with importing():
            from finegrid.publication.report import write_report

        output = layout.RESULTS / _study(study).name / "report.html"
        write_report(output.parent, output)
        progress(f"written to {output}")


@app.command()
def check(study: StudyName) -> None:
    """Say whether every arm learned: its validation loss must lie below that of its own untrained base."""
    from finegrid.analysis.learning import print_learning

    results = layout.RESULTS / _study(study).name
    if not print_learning(results):
        raise SystemExit(1)
    print(f"report: {results / 'report.html'}")


# ---------------------------------------------------------------- helpers


@contextlib.contextmanager
def _stage(name: str, log: Path | None) -> Iterator[Progress]:
    """Send what the libraries print to the log; yield a function that prints one line to the terminal and the log.

    A user's mistake ends the process with status 1 and its message in both places; any other exception leaves its
    traceback in the log and one line with the log's path on the terminal.
    """
    worker = launch.this_worker()
    if worker is not None:
        with _worker_stage(worker, log) as progress:
            yield progress
        return
    if log is None:
        yield lambda line: print(f"{name}: {line}", flush=True)
        return
    terminal = os.fdopen(os.dup(2), "w", buffering=1)
    _print_to(log)
    logged = os.fdopen(os.dup(1), "w", buffering=1)  # a pack prints to its runs' logs in between

    def progress(line: str) -> None:
        print(f"{name}: {line}", file=terminal, flush=True)
        print(line, file=logged, flush=True)

    progress("started")
    try:
        yield progress
    except UserError as error:
        _print_problems(error, terminal)
        _print_problems(error, sys.stderr)
        raise SystemExit(1) from None
    except Failed as error:
        print(f"{name}: {error}; the traceback is in {log}", file=terminal, flush=True)
        raise SystemExit(2) from None
    except Exception as error:
        traceback.print_exc()
        print(f"{name}: {type(error).__name__}: {error}; the traceback is in {log}", file=terminal, flush=True)
        raise SystemExit(2) from None


@contextlib.contextmanager
def _worker_stage(worker: launch.Worker, log: Path | None) -> Iterator[Progress]:
    """The same for one of several processes: its launcher has the terminal, and hears from it what is to be said."""
    if log is not None:
        _print_to(log)
    try:
        yield worker.say
    except Exception as error:
        if not isinstance(error, UserError):
            traceback.print_exc()
        worker.fail(error)
        raise SystemExit(1 if isinstance(error, UserError) else 2) from None


def _print_to(log: Path) -> None:
    """Send the process's output and errors, those of compiled libraries too, to the end of a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _print_problems(error: UserError, file) -> None:
    for problem in error.problems:
        print(f"error: {problem}", file=file, flush=True)


def _study(name: str) -> Study:
    from finegrid.study import load_study

    return load_study(layout.study_file(name), Path.cwd())


def _find(study: str | None, wanted: Callable[[Run], bool], what: str) -> Run:
    """Return the first run that fits, in the given study or in any: data and models are shared between studies."""
    names = [study] if study else []
    names += [path.stem for path in sorted(layout.STUDIES.glob("*.yaml")) if path.stem != study]
    problems = []
    for name in names:
        try:
            runs = _study(name).all_runs
        except UserError as error:  # a broken study elsewhere does not stop this one
            problems += error.problems
            continue
        for run in runs:
            if wanted(run):
                return run
    raise UserError(f"{what}: no study uses it; looked in {', '.join(names)}", *problems)


def _find_data(study: str | None, data: str) -> Run:
    return _find(study, lambda run: layout.clean_folder(run).name == data, f"data set '{data}'")


def _has_launcher(worker: launch.Worker | None) -> bool:
    return worker is not None and worker.folder is not None


@contextlib.contextmanager
def _only_one(is_needed: bool, folder: Path, run: str, say: Progress) -> Iterator[bool]:
    """Keep other processes from training the run while the block runs; say whether one had to be waited for."""
    if not is_needed:
        yield False
        return
    from finegrid.training.lock import RunLock

    with RunLock(folder, run, say) as lock:
        yield lock.waited


def _finished(results: Path, run: str) -> int | None:
    """Return when a run's last file was written, or None."""
    try:
        return (results / "provenance" / f"{run}.json").stat().st_mtime_ns
    except OSError:
        return None


def _is_trained(study: Study, run: Run, before: int | None) -> bool:
    """Return whether another process has trained the run meanwhile, from the same settings, code, data and model."""
    from finegrid.fingerprint import file_hash

    results = layout.RESULTS / study.name
    if _finished(results, run.id) in (None, before) or not layout.weights_folder(study.name, run).exists():
        return False
    made = json.loads((results / "provenance" / f"{run.id}.json").read_text())
    hashes = {name: file_hash(path) for name, path in training_inputs(run).items() if path.is_file()}
    facts = training_facts(run)
    same = all(made["inputs"][name]["sha256"] == value for name, value in hashes.items())
    return same and all(made[name] == value for name, value in facts.items())


def _placed(study: Study, run: Run, scratch: Path, stage: str) -> bool:
    """Put in place what a pack has made for the run; return whether there was anything.

    Raises:
        UserError, Failed: the run failed in its pack.
    """
    place = Staging.of(scratch, study.name, run.id, stage)
    done = None
    if place.folder.is_dir():
        done = place.done(training_identity(run) if stage == "train" else evaluation_identity(study, run))
    if done is not None and not place.has_all(done):
        done = None
    if done is not None:
        print(place.log.read_text(encoding="utf-8"), end="", flush=True)
        raise_failure(done)
        place.place(done["places"], _command())
    elif os.environ.get("FINEGRID_ONLY_PLACES"):
        raise UserError(f"{place.folder}: nothing of today's settings, code and data is there; run snakemake again")
    return done is not None


def _study_inputs(study: Study) -> dict[str, Path]:
    results = layout.RESULTS / study.name
    compared = sorted((results / "comparison").glob("*"))
    inputs = {path.name: path for path in (results / "plan.json", *compared) if path.stem not in ADVICE}
    return inputs | {f"metrics/{run.id}": results / "metrics" / f"{run.id}.json" for run in study.all_runs}


def _write_study_provenance(
    study: Study, output: Path, inputs: dict[str, Path], code: str, made_at: dict[str, object] | None = None
) -> None:
    runs = [layout.RESULTS / study.name / "provenance" / f"{run.id}.json" for run in study.runs]
    facts = {"study": study.name, "code": code, "command": _command(), **provenance.of_runs(runs)}
    provenance.write(output, Path.cwd(), inputs=inputs, made_at=made_at, keep=True, **facts)


def _command() -> str:
    return shlex.join(["finegrid", *sys.argv[1:]])


if __name__ == "__main__":
    main()
