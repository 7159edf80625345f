"""Did training do anything? Each arm against its own untrained base, before any arm is compared with another."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from finegrid.errors import UserError


@dataclass(frozen=True)
class Learning:
    """One run against its untrained base: losses in nats per label token, answers that changed of all generated."""

    run: str
    arm: str
    base_loss: float
    loss: float
    changed_answers: int
    answers: int

    @property
    def learned(self) -> bool:
        """The validation loss lies below the base's."""
        return self.loss < self.base_loss


def learning(study_dir: Path) -> list[Learning]:
    """Return one entry a trained run, read from the plan, the metrics and, where they are at hand, the predictions.

    Raises:
        UserError: the study has no plan, or a run has no metrics yet.
    """
    plan = _json(study_dir / "plan.json")
    losses = {run["run"]: _validation_loss(study_dir, run["run"]) for run in plan["runs"]}
    predictions = {run: _predictions(study_dir, run) for run in losses}
    found = []
    for run in (run for run in plan["runs"] if run["train"]):
        base, own = predictions[run["base"]], predictions[run["run"]]
        changed = sum(own[key] != base.get(key) for key in own)
        found.append(Learning(run["run"], run["arm"], losses[run["base"]], losses[run["run"]], changed, len(own)))
    return found


def print_learning(study_dir: Path) -> bool:
    """Print the table of :func:`learning`; return whether every run learned."""
    from rich.console import Console
    from rich.table import Table

    entries = learning(study_dir)
    table = Table(show_edge=False)
    for column, justify in {"run": "left", "validation loss": "right", "": "left", "answers changed": "right"}.items():
        table.add_column(column, justify=justify)
    for entry in entries:
        verdict = "[green]learned[/]" if entry.learned else "[red]did not learn[/]"
        answers = f"{entry.changed_answers} of {entry.answers}" if entry.answers else "not at hand"
        table.add_row(entry.run, f"{entry.base_loss:.3f} → {entry.loss:.3f}", verdict, answers)
    Console().print(table)
    return all(entry.learned for entry in entries)


def _validation_loss(study_dir: Path, run: str) -> float:
    return _json(study_dir / "metrics" / f"{run}.json")["splits"]["validation"]["loss"]


def _predictions(study_dir: Path, run: str) -> dict[str, str]:
    path = study_dir / "runs" / run / "predictions.jsonl"
    if not path.exists():
        return {}
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return {f"{row['split']}/{row['id']}": row["prediction"] for row in rows if row["prediction"] is not None}


def _json(path: Path) -> dict:
    if not path.exists():
        raise UserError(f"{path}: not there yet; run `snakemake` for this study first")
    return json.loads(path.read_text(encoding="utf-8"))
