"""What a study will do, before it starts: arms, runs, batches, steps, label tokens and findings.

Reads the study, the token reports and the sizes of the base models' files; writes ``plan.json`` and ``plan.tsv``.
Every later stage takes the study's shape from the plan.
"""

from __future__ import annotations

import csv
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from finegrid import layout
from finegrid.errors import UserError
from finegrid.files import whole, write_json

if TYPE_CHECKING:
    from finegrid.settings import RunSettings
    from finegrid.study import Run, Study

WIDTH = 100  # of the printed plan
COLUMNS = [
    "arm",
    "run",
    "method",
    "seed",
    "tuned",
    "per_device_train_batch_size",
    "gpus",
    "gradient_accumulation_steps",
    "effective_batch_size",
    "steps",
    "epochs",
    "warmup_steps",
    "train_rows",
    "label_tokens",
]


def write_plan(study: Study, project: Path) -> None:
    """Write ``results/<study>/plan.json`` and ``plan.tsv`` (one row an arm and run)."""
    plan = make_plan(study, project)
    output = project / layout.RESULTS / study.name
    write_json(output / "plan.json", plan)
    with whole(output / "plan.tsv") as half, half.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter="\t", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for run in plan["runs"]:
            writer.writerow({**run, "tuned": "; ".join(f"{key}={value}" for key, value in run["tuned"].items())})


def make_plan(study: Study, project: Path) -> dict:
    """Return the plan: ``study, title, compare, seeds, tune, arms, runs, notes, findings``.

    Notes say what of the study's files was read differently from how it stands there, such as an old name.

    Raises:
        UserError: a token report is not there yet, or the data is past a limit that was lowered after it was made.
    """
    reports: dict[str, dict] = {}
    runs = []
    for run in study.all_runs:
        folder = layout.tokens_folder(run)
        if folder.name not in reports:
            reports[folder.name] = _read(project / folder / "report.json", study.name)
        tokens = reports[folder.name]["splits"]["train"]
        facts = training_arithmetic(run.settings, tokens) if run.method != "base" else {}
        runs += [_entry(run, arm) | facts for arm in run.arms]
    over = [problem for run in study.runs for problem in _past_limits(run, reports[layout.tokens_folder(run).name])]
    if over:
        raise UserError(*dict.fromkeys(over))
    plan = plan_settings(study)
    plan["runs"] = runs
    plan["notes"] = list(study.notes)
    plan["findings"] = [finding for report in reports.values() for finding in report["findings"]] + findings(study)
    return plan


def plan_settings(study: Study) -> dict:
    """Return what the plan depends on, as plain data: Snakemake's ``params`` of the plan."""
    return {
        "study": study.name,
        "title": study.title,
        "compare": asdict(study.compare),
        "seeds": list(study.seeds),
        "tune": {factor.name: [level.name for level in factor.levels] for factor in study.tune},
        "arms": [
            {"arm": arm.name, "label": arm.label, "factors": dict(arm.factors), "base": arm.base}
            for arm in study.base_arms + study.arms
        ],
        "runs": [run.id for run in study.all_runs],
        "limits": [limits for _, limits in sorted({run.data_id: _limits(run) for run in study.runs}.items())],
    }


def training_arithmetic(settings: RunSettings, tokens: dict) -> dict:
    """Return batch, steps, epochs, warmup and label tokens of a run, as transformers' Trainer counts them.

    Args:
        settings: the run's settings.
        tokens: the train part of the token report: ``rows`` and ``label_tokens`` of one epoch.

    Label tokens are exact for whole epochs; for a part of an epoch they are its share of the rows, rounded.
    Source: ``Trainer.set_initial_training_values``.
    """
    batch = settings.training_arg("per_device_train_batch_size")
    accumulation = settings.training_arg("gradient_accumulation_steps")
    gpus = 1
    effective = batch * gpus * accumulation
    rows = tokens["rows"]
    per_epoch = max(math.ceil(math.ceil(rows / (batch * gpus)) / accumulation), 1)
    steps = settings.training_arg("max_steps")
    if steps <= 0:
        steps = math.ceil(settings.training_arg("num_train_epochs") * per_epoch)
    whole, part = divmod(steps, per_epoch)
    rows_seen = whole * rows + min(part * effective, rows)
    warmup = settings.training_arg("warmup_steps")
    return {
        "per_device_train_batch_size": batch,
        "gpus": gpus,
        "gradient_accumulation_steps": accumulation,
        "effective_batch_size": effective,
        "steps": steps,
        "epochs": round(steps / per_epoch, 4),
        "warmup_steps": int(warmup) if warmup >= 1 else math.ceil(steps * warmup),
        "train_rows": rows,
        "label_tokens": round(tokens["label_tokens"] * rows_seen / rows) if rows else 0,
    }


def findings(study: Study) -> list[dict]:
    """Return what makes the study's comparison weaker than it looks."""
    found = []
    if len(study.seeds) == 1:
        found.append(
            {
                "severity": "warning",
                "place": "seeds",
                "message": "one seed: differences between arms can't be told from the luck of the seed",
                "mend": "give at least three seeds",
            }
        )
    rates: dict[float, set[str]] = {}
    for run in study.runs:
        kind = "full fine-tuning" if run.settings.method == "full" else "adapters"
        rates.setdefault(run.settings.training_arg("learning_rate"), set()).add(kind)
    if not study.tune:
        for rate, kinds in rates.items():
            if len(kinds) > 1:
                found.append(
                    {
                        "severity": "warning",
                        "place": "training_args.learning_rate",
                        "message": f"full fine-tuning and adapters are trained at the same learning rate {rate}; "
                        "the best rate of adapters is about ten times higher",
                        "mend": "give each method its own learning rate, or tune it inside each arm",
                    }
                )
    return found


def memory_estimate(settings: RunSettings, project: Path, train: bool = True) -> int:
    """Return roughly how much memory (MB) a job takes: weights, gradients, two optimiser moments, and the process.

    The weights' size is that of their files; before a hub model is fetched it is taken as 4 GB.
    """
    files = list((project / layout.model_folder(settings.model)).glob("*.safetensors"))
    weights = sum(path.stat().st_size for path in files) / 1e6 if files else 4000
    if train:
        return round(1500 + weights * (4.2 if settings.method == "full" else 1.2))
    return round(1200 + weights * 1.2)


def print_plan(path: Path) -> None:
    """Print ``plan.json`` as a table of at most 100 columns.

    Raises:
        UserError: there is no plan yet.
    """
    from rich.console import Console
    from rich.table import Table

    plan = _read(path, path.parent.name)
    console = Console()
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    title = f"{plan['study']}: {plan['title']}"
    caption = "effective batch = batch per device × GPUs × accumulation steps"
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left", show_edge=False)
    table.add_column("arm", overflow="fold")
    table.add_column("run", no_wrap=True)
    table.add_column("tuned", overflow="fold")
    for column in ("seed", "effective batch", "steps", "epochs", "label tokens"):
        table.add_column(column, justify="right")
    for run in plan["runs"]:
        if not run["train"]:
            table.add_row(run["arm"], run["run"], "", "", "untrained")
            continue
        batch = "{effective_batch_size} = {per_device_train_batch_size}×{gpus}×{gradient_accumulation_steps}"
        table.add_row(
            run["arm"],
            run["run"],
            "\n".join(f"{key} {value}" for key, value in run["tuned"].items()),
            str(run["seed"]),
            batch.format(**run),
            f"{run['steps']:,}",
            f"{run['epochs']:g}",
            f"{run['label_tokens']:,}",
        )
    console.print(table)
    for note in plan["notes"]:
        console.print(f"note: {note}", markup=False)
    for finding in plan["findings"]:
        text = f"{finding['severity']}: {finding['place']}: {finding['message']}; {finding['mend']}"
        console.print(text, markup=False)


def _read(path: Path, study: str) -> dict:
    if not path.exists():
        raise UserError(f"{path}: not there yet; `snakemake plan --config study={study}` makes it first")
    return json.loads(path.read_text(encoding="utf-8"))


def _limits(run: Run) -> dict:
    return run.settings.data_config.limits.model_dump()


def _past_limits(run: Run, report: dict) -> list[str]:
    """Hold the data against the limits as they are now: they are in no id, so lowering one makes nothing anew."""
    limits, train = run.settings.data_config.limits, report["splits"]["train"]
    cleaned = report["clean"]["rows"]["train"]
    shares = {
        "truncated_answers": ("answers of train are cut", train["truncated_answers"], train["rows"]),
        "dropped": ("rows of train were dropped for their lengths", sum(train["dropped"].values()), train["rows_in"]),
    }
    found = [
        f"data_config.limits.{key}: {getattr(limits, key):.1%} allowed, {count:,} of {total:,} {what}"
        for key, (what, count, total) in shares.items()
        if count > getattr(limits, key) * total
    ]
    if cleaned["rejected"] > limits.dropped * cleaned["in"]:
        found.append(
            f"data_config.limits.dropped: {limits.dropped:.1%} allowed, cleaning rejected "
            f"{cleaned['rejected']:,} of {cleaned['in']:,} rows of train"
        )
    leaked = report["clean"]["leaks"]["rows_left"]
    if leaked > limits.leaked:
        found.append(
            f"data_config.limits.leaked: {limits.leaked:,} allowed, {leaked:,} rows of train leak held-out rows"
        )
    return [f"{problem}; raise the limit or change the data settings" for problem in found]


def _entry(run: Run, arm: str) -> dict:
    return {
        "run": run.id,
        "arm": arm,
        "method": run.method,
        "tuned": dict(run.tuned),
        "seed": run.seed,
        "base": run.base_id,
        "data": f"{run.dataset}-{run.data_id}",
        "tokens": f"{run.dataset}-{run.tokens_id}",
        "train": run.method != "base",
    }
