"""What made an artefact: commit, settings, data, model, code, packages, device, seed and command.

Every run and every figure carries such a file. Nothing that later stages depend on is in here, so a new commit or
another machine does not make anything stale.
"""

from __future__ import annotations

import functools
import json
import platform
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from finegrid.files import write_json
from finegrid.fingerprint import file_hash, short_hash

WRITTEN = ("results", "dvc.yaml", "dvc.lock")
PASSING = ("command", "finished")  # what may differ when the same is made again of the same
PACKAGES = [
    "accelerate",
    "bitsandbytes",
    "datasets",
    "deepspeed",
    "dvc",
    "finegrid",
    "numpy",
    "pandas",
    "peft",
    "rouge-score",
    "sacrebleu",
    "scipy",
    "snakemake",
    "tokenizers",
    "torch",
    "transformers",
]


def write(
    output: Path,
    project: Path,
    *,
    inputs: dict[str, Path],
    made_at: dict[str, object] | None = None,
    keep: bool = False,
    **facts: object,
) -> None:
    """Write ``output``: the given facts, the hash of each input file, and what is true of this machine and checkout.

    Args:
        inputs: name -> file whose SHA-256 is recorded; a missing file is recorded as null.
        made_at: ``commit`` and ``dirty`` to record; default: those of the checkout.
        keep: leave a record that differs in nothing but date and command, so that what is drawn again is on record
            as git has it.
        facts: further JSON-able entries, such as ``run``, ``seed``, ``settings_hash``, ``code``, ``command``.
    """
    made = record(project, inputs=inputs, made_at=made_at, **facts)
    if not (keep and _lasting(made) == _lasting(_json(output))):
        write_json(output, made)


def record(
    project: Path,
    *,
    inputs: dict[str, Path],
    made_at: dict[str, object] | None = None,
    lying: Mapping[str, Path] | None = None,
    **facts: object,
) -> dict[str, object]:
    """Return what :func:`write` writes.

    Args:
        lying: name -> file, of inputs that are not yet where ``inputs`` says.
    """
    found = {name: project / (lying or {}).get(name, path) for name, path in inputs.items()}
    return {
        **facts,
        **(made_at or commit(project)),
        "inputs": {
            name: {"file": path.as_posix(), "sha256": file_hash(found[name]) if found[name].is_file() else None}
            for name, path in inputs.items()
        },
        "lock": file_hash(project / "envs/lock.txt") if (project / "envs/lock.txt").exists() else None,
        "packages": package_versions(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def commit(project: Path) -> dict[str, object]:
    """Return ``commit`` and ``dirty`` (code or settings differ from it); both null outside a git checkout.

    Results, ``dvc.yaml`` and ``dvc.lock`` are what a workflow writes: they make nothing dirty.
    """
    head = _git(project, "rev-parse", "HEAD")
    changed = _git(project, "status", "--porcelain", "-uno", "--", ".", *(f":!{path}" for path in WRITTEN))
    return {"commit": head, "dirty": None if head is None else bool(changed)}


def drawn_at(project: Path, output: Path, inputs: dict[str, Path], code: str) -> dict[str, object]:
    """Return ``commit`` and ``dirty`` of a figure or the tables: those that git has, if made of the same by the same.

    So the commit in a figure's metadata is the one whose code first drew it, and drawing it again at any later commit
    gives the same bytes.

    Args:
        output: the provenance file, relative to the project.
        inputs: name -> file that is read.
        code: fingerprint of the code that draws.
    """
    try:
        known = json.loads(_git(project, "show", f"HEAD:./{output.as_posix()}") or "{}")
        before = {name: entry["sha256"] for name, entry in known.get("inputs", {}).items()}
    except (ValueError, AttributeError, KeyError, TypeError):  # an older or foreign file of that name
        return commit(project)
    now = {name: file_hash(project / path) for name, path in inputs.items() if (project / path).is_file()}
    if known.get("commit") and known.get("code") == code and before == now:
        return {"commit": known["commit"], "dirty": known.get("dirty")}
    return commit(project)


def data_version(report: Path) -> dict[str, str]:
    """Return raw file -> SHA-256 when it was imported, from the report of a token set; of a hub's data, its name.

    Raises:
        FileNotFoundError: there is no such report.
    """
    imported = json.loads(report.read_text(encoding="utf-8"))["clean"]["import"]
    files = [entry for entries in imported["files"].values() for entry in entries]
    return {entry["file"]: entry.get("sha256", entry["file"]) for entry in files}


def other_versions(records: dict[str, Path]) -> list[str]:
    """Return what is wrong with comparing runs that were trained on different versions of one raw file.

    Args:
        records: run -> its provenance file; one that says nothing of its data is passed over.
    """
    first: dict[str, tuple[str, str]] = {}
    problems = []
    for run, path in records.items():
        versions = json.loads(path.read_text(encoding="utf-8")).get("data_version", {}) if path.is_file() else {}
        for file, version in versions.items():
            before, other = first.setdefault(file, (version, run))
            if version != before:
                problems.append(
                    f"run {run}: trained on version {version[:12]} of {file}, but {other} on {before[:12]}; expected "
                    "one version for all runs of a comparison: train the older ones anew"
                )
    return problems


def of_runs(records: Iterable[Path]) -> dict[str, object]:
    """Return what runs were made of: settings, data, models, devices, seeds and commits.

    Args:
        records: provenance files of the runs; those that are not there yet are passed over.
    """
    found = [json.loads(path.read_text(encoding="utf-8")) for path in records if path.is_file()]
    if not found:
        return {}

    def all_of(*keys: str) -> list:
        values = [value for record in found if (value := _inside(record, keys)) is not None]
        return sorted(set(values))

    versions = [version for record in found for version in record.get("data_version", {}).items()]
    return {
        "runs": len(found),
        "settings_hash": short_hash(all_of("settings_hash")),
        "data_version": dict(sorted(versions)),
        "models": all_of("inputs", "model", "sha256"),
        "devices": all_of("device"),
        "seeds": all_of("seed"),
        "trained_at": all_of("commit"),
    }


def _inside(record: object, keys: tuple[str, ...]) -> object:
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record


def hashes_of(path: Path, lying: Path | None = None) -> dict[str, str]:
    """Return path -> SHA-256 of a file, or of those in a folder, such as a run's weights.

    Args:
        lying: where the file or folder is, if it is not yet there.
    """
    lying = lying or path
    files = [lying] if lying.is_file() else sorted(lying.rglob("*"))
    return {(path / file.relative_to(lying)).as_posix(): file_hash(file) for file in files if file.is_file()}


@functools.cache
def package_versions() -> dict[str, str]:
    """Return name -> version of the packages that results hang on, as installed."""
    return {name: version for name in PACKAGES if (version := _version(name))}


def _lasting(record: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in record.items() if key not in PASSING}


def _json(path: Path) -> dict[str, object]:
    """Return the object in a JSON file; an empty one if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _git(project: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(project), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    from importlib import metadata  # a tenth of the start of `finegrid --help`

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
