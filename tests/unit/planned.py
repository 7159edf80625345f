"""A plan's entries and token reports for tests of its findings, made from a study's text and a few numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from finegrid.arithmetic import training_arithmetic
from finegrid.findings import find
from finegrid.gpus import Gpu
from finegrid.layout import tokens_folder
from finegrid.study import Study, load_study

GIB = 2**30
TRAIN = {
    "rows_in": 100,
    "rows": 100,
    "truncated_answers": 0,
    "dropped": {},
    "label_tokens": 7_000,
    "tokens": 11_000,
    "answer_lengths": {"quantiles": {"50": 60, "90": 120, "99": 180, "max": 400}},
}
VALIDATION = {"rows": 50, "label_tokens": 3_500, "tokens": 5_000}
TEST = {"rows": 500, "label_tokens": 35_000, "tokens": 55_000}
CLEAN = {"rows": {"train": {"in": 110, "rejected": 5}}, "leaks": {"rows_left": 0}}
MEMORY = {
    "weights": 16 * GIB,
    "adapters": 0,
    "gradients": 16 * GIB,
    "optimiser": 32 * GIB,
    "activations": 8 * GIB,
    "logits": 2 * GIB,
    "quantisation": 0,
    "runtime": GIB,
    "total": 74 * GIB,
    "host": 0,
}


def write_study(folder: Path, study: dict[str, Any] | str, recipe: dict[str, Any] | None = None) -> Study:
    """Write ``config/studies/mine.yaml`` (and ``recipe.yaml``) and load it."""
    path = folder / "config/studies/mine.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(study if isinstance(study, str) else yaml.safe_dump(study, sort_keys=False))
    if recipe is not None:
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return load_study(path, folder)


def report(train: dict | None = None, clean: dict | None = None, **splits: dict) -> dict[str, Any]:
    """Return a token report: 100 rows of 70 label tokens to train on, 50 to validate and 500 to test on."""
    held_out = {"validation": VALIDATION | splits.get("validation", {}), "test": TEST | splits.get("test", {})}
    return {"splits": {"train": TRAIN | (train or {})} | held_out, "clean": CLEAN | (clean or {}), "findings": []}


def entries(study: Study, reports: dict[str, dict | None]) -> list[dict[str, Any]]:
    """Return the plan's entries of a study's runs, as far as findings read them."""
    found = []
    for run in study.all_runs:
        tokens = tokens_folder(run).name
        train = ((reports.get(tokens) or {}).get("splits") or {}).get("train") or {}
        entry = {"run": run.id, "method": run.method, "tuned": dict(run.tuned), "seed": run.seed, "tokens": tokens}
        entry["train"] = run.method != "base"
        if entry["train"]:
            counts = (train.get(key) for key in ("rows", "label_tokens", "tokens"))
            facts = training_arithmetic(run.settings, *counts)
            facts["tokens_seen"] = facts.pop("tokens")
            entry |= facts | {"fits": True, "memory": MEMORY}
        found += [entry | {"arm": arm} for arm in run.arms]
    return found


def all_findings(
    study: Study,
    reports: dict | None = None,
    change: dict[str, dict] | None = None,
    hardware: tuple[Gpu, ...] = (),
) -> list[dict[str, str]]:
    """Return the findings about a study.

    Args:
        reports: token reports by token folder, or one for all of them; default: :func:`report`.
        change: by arm, what its entries have instead.
    """
    folders = {tokens_folder(run).name for run in study.all_runs}
    if reports is None or "splits" in reports:
        reports = dict.fromkeys(folders, reports or report())
    runs = entries(study, reports)
    runs = [run | (change or {}).get(run["arm"], {}) for run in runs]
    return find(study, runs, reports, {run.id: run.settings for run in study.all_runs}, hardware)


def sentences(found: list[dict[str, str]]) -> list[str]:
    """Return findings as the plan prints them."""
    return [f"{one['severity']}: {one['place']}: {one['message']}; {one['mend']}" for one in found]
