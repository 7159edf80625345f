# What all rules share: the studies, where a run's files lie, and the fingerprints of the stages' code.
import functools
from pathlib import Path

from finegrid import layout
from finegrid.errors import UserError
from finegrid.figures import FIGURES
from finegrid.fingerprint import code_fingerprint, file_hash
from finegrid.plan import memory_estimate, plan_settings
from finegrid.study import load_study
from snakemake.exceptions import WorkflowError


wildcard_constraints:
    study=r"[\w.-]+",
    run=r"[a-z0-9_]+-[0-9a-f]{8}",
    data=r"[\w.-]+-[0-9a-f]{8}",
    tokens=r"[\w.-]+-[0-9a-f]{8}",
    model=r"[\w.-]+",
    figure=r"\w+",


@functools.cache
def study_of(name):
    """The study of that name; its mistakes end snakemake with their message alone."""
    try:
        return load_study(layout.study_file(name), Path.cwd())
    except UserError as error:
        raise WorkflowError("\n".join(error.problems))


@functools.cache
def runs_by_id(study):
    return {run.id: run for run in study_of(study).all_runs}


def run_of(wildcards):
    """The run of a job's wildcards."""
    try:
        return runs_by_id(wildcards.study)[wildcards.run]
    except KeyError:
        raise WorkflowError(f"study '{wildcards.study}' has no run '{wildcards.run}'")


def studies():
    """The configured study first, then the others: data and base models are shared between studies."""
    names = sorted(path.stem for path in layout.STUDIES.glob("*.yaml"))
    return [config["study"], *(name for name in names if name != config["study"])]


@functools.cache
def shared(kind, name):
    """The first run that uses the data set, token set or base model of that name."""
    place = {
        "data": lambda run: layout.clean_folder(run).name,
        "tokens": lambda run: layout.tokens_folder(run).name,
        "model": lambda run: layout.model_name(run.settings.model),
    }[kind]
    for study in studies():
        for run in study_of(study).all_runs:
            if place(run) == name:
                return run
    raise WorkflowError(f"no study uses the {kind} '{name}'")


def study_files(wildcards):
    """The study's own files: the ids of its runs hold what matters of them, so a newer date says nothing."""
    study = study_of(wildcards.study)
    return [ancient(path) for path in study.files]


def manifest(run):
    return (layout.MODELS / f"{layout.model_name(run.settings.model)}.json").as_posix()


def token_files(run, *splits):
    return [
        (layout.tokens_folder(run) / f"{split}.arrow").as_posix() for split in splits
    ]


def token_reports(study):
    return unique(
        f"results/{study}/data/{layout.tokens_folder(run).name}.json"
        for run in study_of(study).all_runs
    )


def results(study, pattern, runs):
    """The files of a study that follow a pattern, one a run."""
    return [f"results/{study}/{pattern.format(run=run.id)}" for run in runs]


def figure_files(study):
    return [
        f"results/{study}/figures/{name}.{kind}"
        for name in FIGURES
        for kind in ("pdf", "png", "csv", "json")
    ]


def table_files(study):
    return [f"results/{study}/tables/{name}" for name in TABLES]


def unique(items):
    return list(dict.fromkeys(items))


TABLES = (
    "arms.tex",
    "arms.md",
    "arms.csv",
    "settings.tex",
    "numbers.tex",
    "provenance.json",
)
SPLITS = ("train", "validation", "test")
