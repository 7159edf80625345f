"""What the landing page of `snakemake --report` says of a study's results: which commit, which data, which packages.

The Snakefile puts it into the configuration where a report is asked for; `workflow/report/workflow.rst` prints it.
(Snakemake's own `--report-metadata` shows such lists as `[object Object]`, in 9.27.)
"""

from __future__ import annotations

import json
from pathlib import Path

from finegrid import layout, provenance


def report_metadata(study: str, project: Path = Path()) -> dict[str, list[str]]:
    """Return name -> texts (reStructuredText), from the provenance of the study's runs.

    Args:
        study: its name or file.
        project: the checkout.
    """
    study = Path(study).name.removesuffix(".yaml")
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
        "Commit of this checkout": [_commit(provenance.commit(project))],
        "Commits of the runs": list(commits) or ["no run has provenance yet"],
        "Data and models (SHA-256)": [_hashed(name, digest) for name, digest in sorted(files.items())] or ["none"],
        "Locked packages (SHA-256)": [
            _hashed("envs/lock.txt", lock) for lock in dict.fromkeys(record.get("lock") for record in records) if lock
        ]
        or ["none"],
    }


def _commit(record: dict) -> str:
    if not record.get("commit"):
        return "not in a git checkout"
    return _literal(record["commit"]) + (" with changes that were not committed" if record.get("dirty") else "")


def _hashed(name: str, digest: str) -> str:
    """A hash in two halves: in one piece it runs out of the page's column."""
    half = len(digest) // 2
    return " ".join(map(_literal, (name, digest[:half], digest[half:])))


def _literal(text: str) -> str:
    """Text that reStructuredText leaves as it is."""
    return f"``{text}``" if text else ""
