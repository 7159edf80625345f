# What all rules share: the studies, where a run's files lie, and the fingerprints of the stages' code.
import atexit
import functools
import gc
import inspect
import json
import os
import shlex
import sys
from pathlib import Path

from finegrid import controllers, layout, pack_jobs, packs, records, staging, versions
from finegrid.errors import UserError
from finegrid.figures import PLAN_FIGURES, fitting
from finegrid.fingerprint import code_fingerprint, file_hash
from finegrid.gpus import detected
from finegrid.memory import allocator
from finegrid.plan import (
    Context,
    cluster_gpus,
    evaluates_without_gpu,
    evaluation_needs,
    evaluation_pack_needs,
    hardware_of,
    pack_needs,
    plan_settings,
    scores_with_training,
    training_needs,
)
from finegrid.publication.metadata import report_metadata
from finegrid.settings import check_files
from finegrid.study import load_study
from snakemake.common import get_function_params, overwrite_function_params
from snakemake.exceptions import WorkflowError
from snakemake.resources import Resource

TABLES = (
    "arms.tex",
    "arms.md",
    "arms.csv",
    "settings.tex",
    "numbers.tex",
    "provenance.json",
)
SPLITS = ("train", "validation", "test")
# What a run's own job asks for when a pack did its work: it moves files, in a second.
PLACING_MB = 100
PLACING_MINUTES = 1

# Snakemake keeps every job and path that it makes, so the garbage collector finds nothing among them. Looking as often
# as Python does by default takes a sixth of a dry run of thousands of jobs, and looking once more at the end another.
gc.set_threshold(100_000, 50, 50)
atexit.register(gc.freeze)

# Which study was asked for and where checkpoints live change no result: they reach the commands as environment
# variables, not as tracked parameters. KEEPS_MEMORY is for `env`, in front of what trains or scores: the allocator reads
# its settings before a process starts.
shell.prefix(
    f"export FINEGRID_STUDY={shlex.quote(config['study'])} FINEGRID_SCRATCH={shlex.quote(config['scratch'])} "
    f"FINEGRID_GPUS={shlex.quote(json.dumps(config['gpus']))} "
    f"KEEPS_MEMORY={shlex.quote(' '.join(f'{name}={value}' for name, value in allocator(os.environ).items()))}; "
)


PREFIX = (
    shell._process_prefix
)  # of a job that is sent elsewhere; those that place say so
pack_jobs.install()


wildcard_constraints:
    study=r"[\w.-]+",
    pack=packs.NAME.pattern,
    run=r"[a-z0-9_]+-[0-9a-f]{8}",
    data=r"[\w.-]+-[0-9a-f]{8}",
    tokens=r"[\w.-]+-[0-9a-f]{8}",
    model=r"[\w.-]+",
    figure=r"\w+",


@functools.cache
def study_of(name):
    """The study of that name.

    Its mistakes, and files that it names and that are not there, end snakemake before anything runs.
    """
    made = (layout.DEMO_MODEL, layout.DEMO_DATA)
    try:
        study = load_study(layout.study_file(name), Path.cwd())
        place = study.path.as_posix()
        missing = unique(
            problem
            for run in study.runs
            for problem in check_files(run.settings, Path.cwd(), place, made)
        )
        if missing:
            raise UserError(*missing)
    except UserError as error:
        stop(error)
    return study


@functools.cache
def plan_of(name):
    """What the plan of that study rests on: its jobs' needs are worked out of it."""
    try:
        return Context(
            name,
            Path.cwd(),
            hardware_of(study_of(name), Path.cwd(), config["gpus"]),
            config["threads"],
        )
    except UserError as error:
        stop(error)


def stop(error):
    """End snakemake with a user's mistake alone."""
    for problem in error.problems:
        print(f"error: {problem}", file=sys.stderr)
    sys.exit(1)


def put_back_records(study):
    """Make Snakemake know the finished jobs that git brought, after a clone or a checkout."""
    try:
        for note in records.put_back(study):
            print(note, file=sys.stderr)
    except UserError as error:
        stop(error)


@functools.cache
def training(study, run):
    """What a training asks for, see finegrid.plan.training_needs."""
    return training_needs(plan_of(study), study_of(study).run(run))


@functools.cache
def evaluation(study, run):
    """What an evaluation asks for, see finegrid.plan.evaluation_needs."""
    return evaluation_needs(
        plan_of(study), study_of(study).run(run), evaluations_without_gpu(study)
    )


@functools.cache
def evaluations_without_gpu(study):
    """Whether a study's evaluations hold no GPU, see finegrid.plan.evaluates_without_gpu."""
    return evaluates_without_gpu(plan_of(study), study_of(study))


def run_of(wildcards):
    """The run of a job's wildcards."""
    try:
        return study_of(wildcards.study).run(wildcards.run)
    except UserError as error:
        raise WorkflowError(str(error))


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
    return [ancient(path.as_posix()) for path in (study.path, study.recipe) if path]


def manifest(run):
    return f"{layout.MODELS}/{layout.model_name(run.settings.model)}.json"


def token_files(run, *splits):
    folder = layout.tokens_folder(run)
    return [f"{folder}/{split}.arrow" for split in splits]


@functools.cache
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
        for name in fitting(plan_settings(study_of(study)))
        for kind in ("pdf", "png", "csv", "json")
    ]


def table_files(study):
    return [f"results/{study}/tables/{name}" for name in TABLES]


def unique(items):
    return list(dict.fromkeys(items))


# ---- data


def raw_files(wildcards):
    """The raw files of a data set; those of a hub data set are the hub's."""
    return raw_files_of(shared("data", wildcards.data))


def raw_files_of(run):
    data = run.settings.data_config
    files = [data.train_file, data.val_file, data.test_file]
    return [
        path
        for file in files
        if file
        for path in ([file] if isinstance(file, str) else file)
    ]


def study_raw_files(wildcards):
    """The raw files of the configured study: its plan is estimated from them."""
    return unique(
        path
        for run in study_of(config["study"]).base_runs
        for path in raw_files_of(run)
    )


def data_settings(wildcards):
    return shared("data", wildcards.data).settings.data_settings()


def token_settings(wildcards):
    return shared("tokens", wildcards.tokens).settings.token_settings()


def data_processes(wildcards):
    return shared("data", wildcards.data).settings.data_config.num_proc


def token_processes(wildcards):
    return shared("tokens", wildcards.tokens).settings.data_config.num_proc


def clean_splits(wildcards):
    folder = layout.clean_folder(shared("tokens", wildcards.tokens))
    return [
        (folder / name).as_posix()
        for name in ("train.jsonl", "validation.jsonl", "test.jsonl", "report.json")
    ]


def chat_template(wildcards):
    template = shared("tokens", wildcards.tokens).settings.model.chat_template
    return [template] if template else []


def tokens_manifest(wildcards):
    return manifest(shared("tokens", wildcards.tokens))


def model_files(wildcards):
    """The files of a base model in a folder; those of a hub model are fetched by the job itself."""
    model = shared("model", wildcards.model).settings.model
    return (
        []
        if model.revision
        else [(layout.model_folder(model) / "config.json").as_posix()]
    )


def model_settings(wildcards):
    model = shared("model", wildcards.model).settings.model
    return {"model_name_or_path": model.model_name_or_path, "revision": model.revision}


# ---- packs


@functools.cache
def most_runs():
    """The most runs of a pack, see finegrid.packs.most_runs."""
    try:
        return packs.most_runs(config.get("pack"))
    except UserError as error:
        stop(error)


def begin_packs(study):
    """Say which runs the packs have to train, before the first job starts."""
    scratch = Path(config["scratch"])
    pack_jobs.begin(workflow.dag, scratch, planned_pack)
    staging.tidy(scratch, study, {run.id for run in study_of(study).runs})
    if workflow.non_local_exec:  # a login node is no place to train what is not staged
        shell.prefix(f"{PREFIX}export FINEGRID_ONLY_PLACES=1; ")


@functools.cache
def packs_of(study):
    """The packs of a study, by run; none where a job of a cluster does what it was sent for."""
    if most_runs() == 0 or not workflow.is_main_process:
        return {}
    the_study = study_of(study)
    if is_on_cluster():
        seconds = {
            run.id: plan_of(study).facts(run)["seconds"] for run in the_study.runs
        }
        found = packs.packs_on_cluster(the_study, seconds, most_runs())
    else:
        found = packs.packs_here(the_study, side_by_side(study), most_runs())
    return {run.id: pack.name for pack in found for run in pack.runs}


def is_on_cluster():
    """Whether trainings are jobs of a cluster; of a dry run its number of jobs tells, which a profile says."""
    jobs_here = any(argument.startswith(("-j", "--jobs")) for argument in sys.argv)
    jobs = workflow.resource_settings.nodes is not None and not jobs_here
    return not workflow.local_exec or (workflow.dryrun and jobs)


def side_by_side(study):
    """How many trainings this machine does at a time: by cores, and no more than it has GPUs."""
    by_cores = max(1, workflow.cores // config["threads"])
    gpus = len(detected()) if plan_of(study).hardware.gpus else 0
    return min(by_cores, gpus) if gpus else by_cores


def marker(stage, wildcards):
    name = packs_of(wildcards.study).get(wildcards.run)
    return ancient(pack_jobs.marker(stage, wildcards.study, name)) if name else []


def training_pack(wildcards):
    """What the pack of a run makes when it has trained; nothing for a run that trains alone."""
    return marker("train", wildcards)


def evaluation_pack(wildcards):
    """What the pack of a run makes when it has scored; nothing for a run that is scored alone."""
    return marker("evaluate", wildcards)


def is_packed(stage, wildcards):
    """Whether a pack does the work of a run's own job of a stage (`train`, `evaluate`)."""
    study, run = wildcards.study, wildcards.run
    return run in packs_of(study) and (stage, study, run) not in pack_jobs.by_themselves


@functools.cache
def runs_of_pack(study, pack):
    try:
        return packs.pack_of_name(study_of(study), pack).runs
    except UserError as error:
        raise WorkflowError(str(error))


@functools.cache
def training_of_pack(study, pack):
    """What the training of a pack asks for, see finegrid.plan.pack_needs."""
    return pack_needs(plan_of(study), runs_of_pack(study, pack))


@functools.cache
def evaluation_of_pack(study, pack):
    """What the scoring of a pack asks for, see finegrid.plan.evaluation_pack_needs."""
    runs = runs_of_pack(study, pack)
    return evaluation_pack_needs(plan_of(study), runs, evaluations_without_gpu(study))


def pack_tokens(wildcards):
    return token_files(runs_of_pack(wildcards.study, wildcards.pack)[0], *SPLITS)


def pack_rows(wildcards):
    run = runs_of_pack(wildcards.study, wildcards.pack)[0]
    references = [
        f"{layout.clean_folder(run)}/{split}.jsonl" for split in ("validation", "test")
    ]
    return token_files(run, "validation", "test") + references


def pack_manifest(wildcards):
    return manifest(runs_of_pack(wildcards.study, wildcards.pack)[0])


def pack_training_memory(wildcards, attempt):
    """Megabytes: the base once, and what belongs to each run."""
    needed = training_of_pack(wildcards.study, wildcards.pack)["mem_mb"]
    if scores_too(wildcards.study, wildcards.pack):
        scoring = evaluation_of_pack(wildcards.study, wildcards.pack)["mem_mb"]
        needed = max(needed, scoring)
    return int(needed * (1 + (attempt - 1) / 2))


def pack_training_minutes(wildcards, attempt):
    needs = training_of_pack(wildcards.study, wildcards.pack)
    minutes = needs.get("runtime", 1440)
    if scores_too(wildcards.study, wildcards.pack):
        minutes += pack_evaluation_minutes(wildcards, 1)
    return minutes * attempt


def planned_pack(stage, study, pack):
    """What a pack is told beside its runs: of a training how many of them make their steps together, and of both the
    rows of all runs in one batch of answers; None where the scores are a job of their own.
    """
    scoring = evaluation_of_pack(study, pack)
    if stage == "evaluate":
        return {"rows": scoring["rows"]}
    return {
        "together": training_of_pack(study, pack)["together"],
        "rows": scoring["rows"] if scores_too(study, pack) else None,
    }


def scores_too(study, pack):
    """Whether the training of a pack scores its runs, see finegrid.plan.scores_with_training."""
    return scores_with_training(
        training_of_pack(study, pack), evaluation_of_pack(study, pack)
    )


def pack_training_gpus(wildcards):
    return training_of_pack(wildcards.study, wildcards.pack)["gpus"]


def pack_evaluation_memory(wildcards, attempt):
    """Megabytes: the base and a generation batch, and the adapters of all runs."""
    needed = evaluation_of_pack(wildcards.study, wildcards.pack)["mem_mb"]
    return int(needed * (1 + (attempt - 1) / 2))


def pack_evaluation_minutes(wildcards, attempt):
    needs = evaluation_of_pack(wildcards.study, wildcards.pack)
    return needs.get("runtime", 1440) * attempt


def pack_evaluation_gpus(wildcards):
    return evaluation_of_pack(wildcards.study, wildcards.pack)["gpus"]


# ---- training


def training_settings(wildcards):
    return run_of(wildcards).settings.training_settings()


def training_tokens(wildcards):
    return token_files(run_of(wildcards), "train", "validation")


def training_configs(wildcards):
    """Files that the settings name, such as DeepSpeed's: the run's id holds their path alone."""
    named = [
        run_of(wildcards).settings.training_args.get(key)
        for key in ("deepspeed", "fsdp_config")
    ]
    return [
        path for path in named if isinstance(path, str) and not path.startswith("{")
    ]


def run_manifest(wildcards):
    return manifest(run_of(wildcards))


def planned_gpus(wildcards):
    """What was said of the GPUs to plan for, in config.yaml or in the cluster's file."""
    if config["gpus"] not in (None, "auto"):
        return config["gpus"]
    named = cluster_gpus(Path.cwd())
    return "auto" if named is None else named


def study_plan(wildcards):
    return plan_settings(study_of(wildcards.study))


def plan_reports(wildcards):
    return token_reports(wildcards.study)


def plan_manifests(wildcards):
    return unique(manifest(run) for run in study_of(wildcards.study).all_runs)


def training_memory(wildcards, attempt):
    """Megabytes, half as much again after each out-of-memory."""
    if is_packed("train", wildcards):
        return PLACING_MB
    needed = training(wildcards.study, wildcards.run)["mem_mb"]
    return int(needed * (1 + (attempt - 1) / 2))


def training_minutes(wildcards, attempt):
    """Minutes, as much again after each time-out; a day where the plan can't tell."""
    if is_packed("train", wildcards):
        return PLACING_MINUTES
    return training(wildcards.study, wildcards.run).get("runtime", 1440) * attempt


def training_gpus(wildcards):
    """GPUs on each node."""
    if is_packed("train", wildcards):
        return 0
    return training(wildcards.study, wildcards.run)["gpus"]


def training_nodes(wildcards):
    """Nodes, where a recipe asks for several; None says nothing to the cluster."""
    nodes = training(wildcards.study, wildcards.run)["nodes"]
    return nodes if nodes > 1 else None


# ---- evaluation


def evaluation_settings(wildcards):
    return run_of(wildcards).settings.evaluation_settings()


def scored_rows(wildcards):
    run = run_of(wildcards)
    clean = layout.clean_folder(run)
    references = [f"{clean}/{split}.jsonl" for split in ("validation", "test")]
    return token_files(run, "test") + references


def untrained_model(wildcards):
    """What an untrained model's scores rest on; a trained run's summary changes with all of these."""
    run = run_of(wildcards)
    if run.method != "base":
        return []
    return [manifest(run), *token_files(run, "validation")]


def trained_model(wildcards):
    """What the run trained, and its summary: written at the same time, it tells whether the weights changed."""
    run = run_of(wildcards)
    if run.method == "base":
        return []
    weights = layout.weights_folder(wildcards.study, run).as_posix()
    return [
        ancient(weights),
        *results(wildcards.study, "training/{run}.json", [run]),
    ]


def evaluation_memory(wildcards, attempt):
    """Megabytes: the base model and a generation batch, half as much again after each out-of-memory."""
    if is_packed("evaluate", wildcards):
        return PLACING_MB
    needed = evaluation(wildcards.study, wildcards.run)["mem_mb"]
    return int(needed * (1 + (attempt - 1) / 2))


def evaluation_minutes(wildcards, attempt):
    """Minutes, as much again after each time-out; a day where the plan can't tell."""
    if is_packed("evaluate", wildcards):
        return PLACING_MINUTES
    return evaluation(wildcards.study, wildcards.run).get("runtime", 1440) * attempt


def evaluation_gpus(wildcards):
    return evaluation(wildcards.study, wildcards.run)["gpus"]


# ---- analysis


def all_metrics(wildcards):
    return results(
        wildcards.study, "metrics/{run}.json", study_of(wildcards.study).all_runs
    )


def all_predictions(wildcards):
    return results(
        wildcards.study,
        "runs/{run}/predictions.jsonl",
        study_of(wildcards.study).all_runs,
    )


def all_summaries(wildcards):
    """The summaries, and so the histories: a training writes both."""
    return results(
        wildcards.study, "training/{run}.json", study_of(wildcards.study).runs
    )


# ---- publication


def study_token_reports(wildcards):
    return token_reports(wildcards.study)


def study_figures(wildcards):
    return figure_files(wildcards.study)


def study_tables(wildcards):
    return table_files(wildcards.study)


def figure_code(wildcards):
    return code_fingerprint(f"finegrid.figures.{wildcards.figure}")


def publication_code(*modules):
    return [code_fingerprint(f"finegrid.publication.{module}") for module in modules]


# Snakemake asks for a function's parameters at each call, twice; worked out once, a call costs half as much.
for _function in [value for value in globals().values() if inspect.isfunction(value)]:
    if _function.__globals__ is globals():
        overwrite_function_params(_function, get_function_params(_function))
overwrite_function_params(
    Resource.evaluate,
    {
        name: parameter
        for name, parameter in get_function_params(Resource.evaluate).items()
        if name != "self"
    },
)
