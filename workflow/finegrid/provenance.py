"""What made an artefact: commit, settings, data, model, code, packages, device, seed and command.

Every run and every figure carries such a file. Nothing that later stages depend on is in here, so a new commit or
another machine does not make anything stale.
"""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from finegrid.files import write_json
from finegrid.fingerprint import file_hash

PACKAGES = [
    "accelerate",
    "bitsandbytes",
    "datasets",
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


def write(output: Path, project: Path, *, inputs: dict[str, Path], **facts: object) -> None:
    """Write ``output``: the given facts, the hash of each input file, and what is true of this machine and checkout.

    Args:
        inputs: name -> file whose SHA-256 is recorded; a missing file is recorded as null.
        facts: further JSON-able entries, such as ``run``, ``seed``, ``settings_hash``, ``code``, ``command``.
    """
    record = {
        **facts,
        **commit(project),
        "inputs": {
            name: {"file": path.as_posix(), "sha256": file_hash(project / path) if (project / path).is_file() else None}
            for name, path in inputs.items()
        },
        "lock": file_hash(project / "envs/lock.txt") if (project / "envs/lock.txt").exists() else None,
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(output, record)


def commit(project: Path) -> dict[str, object]:
    """Return ``commit`` and ``dirty`` (tracked files differ from it); both null outside a git checkout."""
    head = _git(project, "rev-parse", "HEAD")
    return {"commit": head, "dirty": None if head is None else bool(_git(project, "status", "--porcelain", "-uno"))}


def _git(project: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(project), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
