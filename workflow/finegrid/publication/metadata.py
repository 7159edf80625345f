"""What the landing page of `snakemake --report` says of a study's results: which commit, which data, which packages.

Read by `workflow/report/metadata.yaml`, in the process that made the report; the study is that of the Snakefile.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from finegrid import layout, provenance


def report_metadata(study: str | None = None, project: Path = Path()) -> dict[str, str | list[str]]:
    """Return name -> text or texts (reStructuredText), from the provenance of the study's runs.

    Args:
        study: its name; that of the environment variable FINEGRID_STUDY if None.
        project: the checkout.
    """
    study = Path(study or os.environ.get("FINEGRID_STUDY", "")).name.removesuffix(".yaml")
    results = project / layout.RESULTS / study
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((results / "provenance").glob("*.json"))]
    commits = dict.fromkeys(_commit(record) for record in records)
    files = {
        entry["file"]: entry["sha256"]
        for record in records
        for entry in record.get("inputs", {}).values()
        if isinstance(entry, dict) and entry.get("sha256")
    }
    return {
        "Study": _literal(study),
        "Commit of this checkout": _commit(provenance.commit(project)),
        "Commits of the runs": list(commits) or ["no run has provenance yet"],
        "Data and models (SHA-256)": [_literal(f"{name}  {digest}") for name, digest in sorted(files.items())]
        or ["none"],
        "Locked packages (SHA-256)": [_literal(lock) for lock in dict.fromkeys(map(_lock, records))] or ["none"],
    }


def _commit(record: dict) -> str:
    if not record.get("commit"):
        return "not in a git checkout"
    return _literal(record["commit"]) + (" with changes that were not committed" if record.get("dirty") else "")


def _lock(record: dict) -> str:
    return f"envs/lock.txt  {record.get('lock') or 'not there'}"


def _literal(text: str) -> str:
    """Text that reStructuredText leaves as it is."""
    return f"``{text}``" if text else ""
