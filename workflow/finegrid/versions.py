"""DVC beside Snakemake: ``dvc.yaml`` from the study files, and the command that its stages run.

Snakemake decides what must run; DVC remembers what came out. ``dvc.yaml`` has one stage a study, and one for each data
set, token set and base model that studies share. A stage runs ``finegrid build``, which runs snakemake: after a
finished snakemake that finds nothing to do, and DVC writes ``dvc.lock``.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finegrid import layout, records
from finegrid.errors import UserError
from finegrid.files import write_json, write_text

if TYPE_CHECKING:
    from finegrid.study import Run, Study

PIPELINE = Path("dvc.yaml")
PARAMETERS = Path("params.yaml")
CODE = "workflow/finegrid"
HEAD = """\
# Written by `finegrid dvc` from config/studies, and by each snakemake that ends well: edits are lost.
#
#   dvc repro study@insurance      build a study through snakemake, or find it built, and write dvc.lock
#   dvc push                       store what it made on the remote; make restore STUDY=insurance brings it back
#
# Everything is explained in docs/dvc.md. The lists `needs` are as long as the longest of them: a name that comes twice
# counts once.
"""
# What git keeps of results/<study>: DVC only notes its hash, so that a result edited by hand is seen.
FOLDERS = (
    "comparison",
    "data",
    "figures",
    "history",
    "metrics",
    "provenance",
    "settings",
    "tables",
    "training",
)
FILES = (records.NAME, "plan.json", "plan.tsv", "report.html")
SUMMARY = "summary"
SUMMARISED = ("loss", "validation_loss", "seeds", "train_seconds", "peak_memory_mb", "trainable_parameters")
PLOTTED = ("quality", "loss_curves", "cost")
INTERVALS = ("_low", "_high")


# ---------------------------------------------------------------- dvc.yaml


def pipeline(studies: Iterable[Study]) -> str:
    """Return the text of ``dvc.yaml`` for the studies, the same for the same studies in any order."""
    studies = sorted(studies, key=lambda study: study.name)
    runs = [run for study in studies for run in study.all_runs]
    groups = {
        "model": _items(runs, _model_item),
        "data": _items(runs, _data_item),
        "tokens": _items(runs, _tokens_item),
        "study": {study.name: _study_item(study) for study in studies},
    }
    stages: dict[str, Any] = {}
    if any(path.startswith(layout.DEMO_DATA) for run in runs for path in _raw_files(run)):
        stages["demo_data"] = _stage(layout.DEMO_DATA, [f"{CODE}/data/demo.py"], [layout.DEMO_DATA])
    outputs = {
        "model": f"{layout.MODELS}/${{key}}.json",
        "data": f"{layout.CLEAN}/${{key}}",
        "tokens": f"{layout.TOKENS}/${{key}}",
    }
    for name, output in outputs.items():
        if groups[name]:
            stages[name] = _group(groups[name], _stage(output, _slots(groups[name]), [output]))
    if studies:
        stages["study"] = _group(groups["study"], _study_stage(_slots(groups["study"])))
    content = {"stages": stages, "plots": _plots(studies)}
    import yaml

    return HEAD + yaml.dump(content, Dumper=_plain_dumper(), sort_keys=False, default_flow_style=None, width=120)


def write_pipeline(project: Path = Path()) -> bool:
    """Write ``dvc.yaml`` of all studies in ``config/studies``, if it is not so already; return whether it changed.

    Raises:
        UserError: a study has mistakes.
    """
    text = pipeline(all_studies(project))
    path = project / PIPELINE
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return False
    write_text(path, text)
    return True


def all_studies(project: Path) -> list[Study]:
    """Return every study of ``config/studies``.

    Raises:
        UserError: all mistakes of all of them.
    """
    from finegrid.study import load_study

    studies, problems = [], []
    for path in sorted((project / layout.STUDIES).glob("*.yaml")):
        try:
            studies.append(load_study(path.relative_to(project), project))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return studies


def stages_of(study: Study, runs: Iterable[Run] | None = None) -> list[str]:
    """Return the names of the stages that make what runs of a study (default: all) rest on, data before tokens."""
    runs = study.all_runs if runs is None else runs
    models = [f"model@{layout.model_name(run.settings.model)}" for run in runs]
    data = [f"data@{layout.clean_folder(run).name}" for run in runs]
    tokens = [f"tokens@{layout.tokens_folder(run).name}" for run in runs]
    return list(dict.fromkeys([*models, *data, *tokens]))


def raw_files(study: Study) -> list[str]:
    """Return the raw files of a study's data."""
    return _unique(path for run in study.all_runs for path in _raw_files(run))


def _items(runs: Iterable[Run], item) -> dict[str, Any]:
    return dict(sorted(dict(item(run) for run in runs).items()))


def _model_item(run: Run) -> tuple[str, Any]:
    model = run.settings.model
    demo = [f"{CODE}/data/demo.py"] if model.model_name_or_path == layout.DEMO_MODEL else []
    config = [] if model.revision or demo else [(layout.model_folder(model) / "config.json").as_posix()]
    return layout.model_name(model), {"needs": [f"{CODE}/models.py", *demo, *config]}


def _data_item(run: Run) -> tuple[str, Any]:
    demo = [layout.DEMO_DATA]
    raw = _unique(layout.DEMO_DATA if path.startswith(f"{demo[0]}/") else path for path in _raw_files(run))
    return layout.clean_folder(run).name, {"needs": [f"{CODE}/data", *raw]}


def _tokens_item(run: Run) -> tuple[str, Any]:
    model = run.settings.model
    template = [model.chat_template] if model.chat_template else []
    needs = [f"{CODE}/data", layout.clean_folder(run).as_posix(), _manifest(run), *template]
    return layout.tokens_folder(run).name, {"needs": needs}


def _study_item(study: Study) -> dict[str, Any]:
    tokens = _unique(layout.tokens_folder(run).as_posix() for run in study.all_runs)
    models = _unique(_manifest(run) for run in study.all_runs)
    named = [run.settings.training_args.get(key) for run in study.runs for key in ("deepspeed", "fsdp_config")]
    configs = _unique(path for path in named if isinstance(path, str) and not path.startswith("{"))
    settings = [path.as_posix() for path in (study.path, study.recipe) if path]
    return {"settings": settings, "needs": ["Snakefile", "workflow", *models, *tokens, *configs]}


def _group(items: dict[str, Any], stage: dict[str, Any]) -> dict[str, Any]:
    """Return a ``foreach``; each list of an item as long as the longest, for a template has a fixed number of lines."""
    for name in ("needs", "settings"):
        longest = max(len(item.get(name, [])) for item in items.values())
        for item in items.values():
            if name in item:
                item[name] = item[name] + item[name][-1:] * (longest - len(item[name]))
    return {"foreach": items, "do": stage}


def _slots(items: dict[str, Any], name: str = "needs") -> list[str]:
    longest = max((len(item[name]) for item in items.values()), default=0)
    return [f"${{item.{name}[{number}]}}" for number in range(longest)]


def _stage(target: str, needs: list[str], outputs: list[str]) -> dict[str, Any]:
    return {"cmd": f"finegrid build {target}", "deps": needs, "outs": [_persistent(path) for path in outputs]}


def _study_stage(needs: list[str]) -> dict[str, Any]:
    folder = f"{layout.RESULTS}/${{key}}"
    return {
        "cmd": "finegrid build ${key}",
        "deps": needs,
        "params": [{f"${{item.settings[{number}]}}": None} for number in range(2)],
        "metrics": [_persistent(f"{folder}/{SUMMARY}", cache=False)],
        "outs": [
            _persistent(f"{folder}/runs"),
            *(_persistent(f"{folder}/{name}", cache=False) for name in (*FOLDERS, *FILES)),
        ],
    }


def _persistent(path: str, cache: bool = True) -> dict[str, Any]:
    """DVC deletes an output before its stage runs, and with it every finished run, unless it persists."""
    return {path: {"persist": True} if cache else {"cache": False, "persist": True}}


def _plots(studies: Iterable[Study]) -> list[Any]:
    """Bars of each arm's primary metric, and the figures as they are: side by side in ``dvc plots diff``."""
    plots: list[Any] = []
    for study in studies:
        folder = f"{layout.RESULTS}/{study.name}"
        plots.append(
            {
                f"{folder}/comparison/arms.tsv": {
                    "x": study.compare.metric,
                    "y": "label",
                    "template": "bar_horizontal",
                    "title": f"{study.name}: {study.compare.metric}",
                }
            }
        )
        plots += [f"{folder}/figures/{name}.png" for name in PLOTTED]
    return plots


def _manifest(run: Run) -> str:
    return f"{layout.MODELS}/{layout.model_name(run.settings.model)}.json"


def _raw_files(run: Run) -> list[str]:
    data = run.settings.data_config
    files = [data.train_file, data.val_file, data.test_file]
    return [path for file in files if file for path in ([file] if isinstance(file, str) else file)]


def _unique(items: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(items))


def _plain_dumper() -> Any:
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    return Dumper


# ---------------------------------------------------------------- build


def build(target: str, arguments: Iterable[str] = ()) -> None:
    """Run snakemake for a study, or for a shared data set or base model by its path, as the stages of dvc.yaml do.

    The profile is `profile` of params.yaml; the environment variable SNAKEMAKE_PROFILE goes before it.

    Raises:
        UserError: there is no such target, or dvc.yaml is older than the study.
    """
    study, wanted = _target(target)
    if PIPELINE.is_file():
        _check_pipeline()
    profile = [] if os.environ.get("SNAKEMAKE_PROFILE") else _profile()
    command = ["snakemake", *profile, "--config", f"study={study}", *arguments, "--", *wanted]
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    finish(study)


def finish(study: str) -> None:
    """Write what a study's finished jobs leave for git and DVC: their records, a summary, and dvc.yaml."""
    records.write(study)
    write_summary(study)
    if Path(".dvc").is_dir():
        try:
            write_pipeline()
        except UserError as error:
            print(f"dvc.yaml is left as it is: {error.problems[0]}", file=sys.stderr)


def write_summary(study: str) -> None:
    """Write ``summary/<arm>.json``, what `dvc metrics` shows: a row an arm, a column a number.

    These are the metric that the study compares, with its interval, the losses and the costs; all others are in
    ``comparison/arms.tsv``. Nothing is written before there is a comparison.
    """
    folder = layout.RESULTS / study
    arms, comparison = folder / "comparison/arms.tsv", folder / "comparison/comparison.json"
    if not (arms.is_file() and comparison.is_file()):
        return
    metric = json.loads(comparison.read_text(encoding="utf-8"))["metric"]
    names = list(dict.fromkeys([metric, *(f"{metric}{end}" for end in INTERVALS), *SUMMARISED]))
    with arms.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    written = set()
    for row in rows:
        path = folder / SUMMARY / f"{_file_name(row['arm'], written)}.json"
        written.add(path.stem)
        write_json(path, {name: float(row[name]) for name in names if _is_number(row.get(name))})
    for path in (folder / SUMMARY).glob("*.json"):
        if path.stem not in written:
            path.unlink()


def _file_name(arm: str, taken: set[str]) -> str:
    """An arm's name with what file systems and DVC dislike replaced; two that come to the same get a number."""
    name = first = re.sub(r"[^\w.=+-]+", "_", arm).strip("_") or "arm"
    number = 1
    while name in taken:
        number += 1
        name = f"{first}_{number}"
    return name


def _is_number(text: str | None) -> bool:
    try:
        return math.isfinite(float(text))
    except (TypeError, ValueError):
        return False


def _target(target: str) -> tuple[str, list[str]]:
    """Return the study to configure and the files to ask snakemake for."""
    path = Path(target)
    if path.parent == Path() and not path.suffix:
        return layout.study_file(target).stem, ["report"]
    if target == layout.DEMO_DATA:
        return _user_of(target), [f"{target}/{split}.jsonl.gz" for split in ("train", "validation", "test")]
    if path.parent == layout.MODELS:
        return _user_of(target), [target]
    if path.parent in (layout.CLEAN, layout.TOKENS):
        return _user_of(target), [f"{target}/report.json"]
    raise UserError(
        f"build: '{target}' is no target; expected a study's name, or a path as in data/tokens/<dataset>-<id>"
    )


def _user_of(target: str) -> str:
    """Return the first study that uses a shared file or folder."""
    for study in all_studies(Path.cwd()):
        for run in study.all_runs:
            shared = (layout.clean_folder(run).as_posix(), layout.tokens_folder(run).as_posix(), _manifest(run))
            if target in shared or any(path.startswith(f"{target}/") for path in _raw_files(run)):
                return study.name
    raise UserError(f"build: no study of {layout.STUDIES} uses {target}; `finegrid dvc` brings dvc.yaml up to date")


def _check_pipeline() -> None:
    if PIPELINE.read_text(encoding="utf-8") != pipeline(all_studies(Path.cwd())):
        raise UserError("dvc.yaml: not that of the studies in config/studies; run `finegrid dvc`, then this again")


def _profile() -> list[str]:
    import yaml

    if not PARAMETERS.is_file():
        return []
    name = (yaml.safe_load(PARAMETERS.read_text(encoding="utf-8")) or {}).get("profile")
    return ["--profile", name] if name else []


# ---------------------------------------------------------------- dvc


def dvc(*arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    """Run DVC of this environment and return what it said.

    Raises:
        UserError: it failed; with its last words.
    """
    command = [sys.executable, "-m", "dvc", *arguments]
    environment = os.environ | {"COLUMNS": "10000"}  # else paths and addresses are broken over lines
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if check and done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise UserError(f"dvc {' '.join(arguments)}: " + " ".join(line.strip() for line in said[-6:]))
    return done
