"""`make restore`: bring a study's results from the remote into a clone, and make Snakemake know how they were made.

Git has the small results, `dvc.lock` and the records of the jobs; DVC has raw data, rows, tokens, manifests, weights
and predictions. What comes is held against both before Snakemake is told: restored is only what is whole.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finegrid import layout, records, versions
from finegrid.errors import UserError
from finegrid.fingerprint import file_hash
from finegrid.records import some

if TYPE_CHECKING:
    from finegrid.settings import ModelSettings
    from finegrid.study import Run, Study

Say = Callable[[str], None]
LOCK = Path("dvc.lock")


def restore(study: Study, run: Run | None, say: Say = print) -> None:
    """Bring the results of a study, or of one run, and say what is left to do.

    Raises:
        UserError: the project is not under DVC, the study was never recorded in dvc.lock, there is no remote, or what
            came is not what dvc.lock and the records tell of.
    """
    lock = _lock(study.name)
    targets = _targets(study, run, lock)
    say(f"restore {study.name}: {len(targets)} targets of DVC: {', '.join(some(targets))}")
    _bring(targets, say)
    _check_lock(targets, None if run is None else f"{layout.RESULTS}/{study.name}/runs/{run.id}")
    jobs = records.read(study.name)
    _check_records(study.name, jobs, targets, run)
    for note in records.put_back(study.name):
        say(f"restore {note}")
    for note in _models(study.all_runs if run is None else [run]):
        say(f"restore {study.name}: {note}")
    _dry_run(study.name, run, say)


def _lock(study: str) -> dict[str, Any]:
    """Return the stages of dvc.lock."""
    import yaml

    if not Path(".dvc").is_dir():
        raise UserError("restore: there is no .dvc here; expected a clone of a project under DVC (`dvc init`)")
    if not LOCK.is_file():
        raise UserError(f"restore: there is no {LOCK}; expected it in git, written by `dvc repro study@{study}`")
    try:
        stages = (yaml.safe_load(LOCK.read_text(encoding="utf-8")) or {}).get("stages", {})
    except yaml.YAMLError:
        raise UserError(f"{LOCK}: not valid YAML; after a merge, take one side and run `dvc repro`") from None
    if f"study@{study}" not in stages:
        recorded = sorted(name.partition("@")[2] for name in stages if name.startswith("study@"))
        raise UserError(
            f"{LOCK}: study '{study}' was never recorded; expected it after `dvc repro study@{study}` and "
            f"`dvc push`, committed to git; recorded are: {', '.join(recorded) or 'none'}"
        )
    return stages


def _targets(study: Study, run: Run | None, lock: dict[str, Any]) -> list[str]:
    """Return what DVC is to bring: stages, raw files, and the study's runs or one of them."""
    stages = versions.stages_of(study, None if run is None else [run])
    raw = [path for path in versions.raw_files(study) if _is_added(path)]
    demo = ["demo_data"] if "demo_data" in lock and any(_is_demo(path) for path in versions.raw_files(study)) else []
    models = [path for path in _model_folders(study, run) if _is_added(path)]
    own = f"study@{study.name}" if run is None else f"{layout.RESULTS}/{study.name}/runs/{run.id}"
    return [*demo, *raw, *models, *(stage for stage in stages if stage in lock), own]


def _is_added(path: str) -> bool:
    """Whether `dvc add` put it, or a folder it lies in, under DVC."""
    return any(Path(f"{part}.dvc").is_file() for part in (Path(path), *Path(path).parents))


def _is_demo(path: str) -> bool:
    return path.startswith(f"{layout.DEMO_DATA}/")


def _model_folders(study: Study, run: Run | None) -> list[str]:
    runs = study.all_runs if run is None else [run]
    return list(dict.fromkeys(layout.model_folder(each.settings.model).as_posix() for each in runs))


def _bring(targets: list[str], say: Say) -> None:
    """Pull; where there is no remote, what the cache of this machine has will do."""
    remotes = [" ".join(line.split()) for line in versions.dvc("remote", "list", check=False).stdout.splitlines()]
    done = versions.dvc("pull" if remotes else "checkout", *targets, check=False)
    if done.returncode == 0:
        say(done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "everything was here")
        return
    lines = [line.strip().removeprefix("WARNING: ").removeprefix("ERROR: ") for line in done.stderr.splitlines()]
    hashes = ("Some of the cache files", "md5: ")  # which say nothing to a person: the files are named after them
    said = [line for line in lines if line and not line.startswith(hashes)]
    if not remotes:
        raise UserError(
            "restore: there is no remote to pull from, and the cache here has not all of it; expected one: "
            "`dvc remote add --default NAME URL` (docs/dvc.md)",
            *some(said),
        )
    if any("confirmation" in line for line in said):
        raise UserError(
            "restore: files at hand are not in any cache and would be lost; keep them (`dvc commit`, or move them "
            "away) or delete them, then this again",
            *some(said),
        )
    raise UserError(
        f"restore: `dvc pull` failed, from {', '.join(remotes)}; expected a remote that can be reached and to which "
        "everything was pushed (`dvc push`)",
        *some(said),
    )


def _check_lock(targets: list[str], only: str | None) -> None:
    """Refuse outputs that are not those of dvc.lock; edited code and settings are Snakemake's to judge."""
    stages = [target for target in targets if target != only]
    done = versions.dvc("status", "--json", *stages) if stages else None
    problems = []
    for stage, changes in (json.loads(done.stdout) if done else {}).items():
        for change in changes:
            if isinstance(change, dict) and "changed outs" in change:
                problems += [f"{path}: {how}, by dvc.lock ({stage})" for path, how in change["changed outs"].items()]
    if problems:
        raise UserError(
            *some(problems),
            "restore: files here are not those of dvc.lock; expected a clean checkout whose dvc.lock was committed "
            "together with its results: `git status` and `git diff --stat` show what was edited",
        )


def _check_records(study: str, jobs: Iterable[records.Job], targets: list[str], run: Run | None) -> None:
    """Refuse what DVC and git brought if the jobs' records tell of other files, or of files that did not come."""
    found = records.compare(jobs)
    problems = [f"{path}: not the file that {records.records_file(study)} tells of" for path in found.results]
    problems += [f"{path}: not the version that the results were made from" for path in found.sources]
    runs = f"{layout.RESULTS}/{study}/runs/"
    wanted = runs if run is None else f"{runs}{run.id}/"
    problems += [f"{path}: did not come" for path in found.missing if path.startswith(wanted)]
    problems += _other_weights(study, wanted)
    if problems:
        raise UserError(
            *some(problems),
            "restore: what came does not fit the records in git; expected a commit whose dvc.lock and results were "
            f"committed together (after snakemake: `dvc repro study@{study}`, `dvc push`, then git commit)",
        )


def _other_weights(study: str, wanted: str) -> list[str]:
    """Hold weights to the hashes that the run's provenance has of them: DVC takes a remote's word for what it sends."""
    problems = []
    with records.Hashes() as hashes:
        for record in sorted((layout.RESULTS / study / "provenance").glob("*.json")):
            recorded = json.loads(record.read_text(encoding="utf-8")).get("outputs") or {}
            for path, digest in recorded.items():
                if path.startswith(wanted) and hashes.of(path) != digest:
                    problems.append(f"{path}: not the file that {record} tells of")
    return problems


def _models(runs: Iterable[Run]) -> list[str]:
    """Say which base models are here with the files that results were made with, and how the others are brought.

    Nothing is fetched: results are read and redrawn without the base model, and it may be large.

    Raises:
        UserError: a base model has other files than its manifest tells of.
    """
    notes = []
    for name, model in {layout.model_name(run.settings.model): run.settings.model for run in runs}.items():
        manifest, folder = layout.MODELS / f"{name}.json", layout.model_folder(model)
        recorded = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        if not all((folder / file).is_file() for file in recorded):
            notes.append(f"base model {name}: not all here, which new runs need; {_how_to_bring(model, folder)}")
            continue
        other = [file for file, entry in recorded.items() if file_hash(folder / file) != entry["sha256"]]
        if other:
            raise UserError(
                f"base model {folder}: {', '.join(some(other))}: not the files of {manifest}; expected those that the "
                "results were made with"
            )
        notes.append(f"base model {name}: {len(recorded)} files, hashes as recorded")
    return notes


def _how_to_bring(model: ModelSettings, folder: Path) -> str:
    if model.revision:
        return f"`finegrid model {layout.model_name(model)}` fetches it from the hub"
    if model.model_name_or_path == layout.DEMO_MODEL:
        return f"`finegrid demo-model {folder}` makes it"
    return f"put the files of its manifest into {folder}"


def _dry_run(study: str, run: Run | None, say: Say) -> None:
    target = "report" if run is None else f"{layout.RESULTS}/{study}/metrics/{run.id}.json"
    command = ["snakemake", "--dry-run", "--quiet", "rules", "--config", f"study={study}", "--", target]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    if done.returncode:
        raise UserError("restore: `snakemake -n` failed", *done.stderr.strip().splitlines()[-8:])
    if "Nothing to be done" in done.stdout + done.stderr:
        say(f"restore {study}: nothing is left to do (snakemake --dry-run)")
    else:
        say(f"restore {study}: the settings, code or data of this checkout are newer than its results; snakemake has:")
        say(done.stdout.strip())
