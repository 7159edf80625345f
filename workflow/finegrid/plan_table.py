"""The plan on a terminal: what each arm does, what it needs, what is wrong; at most 100 columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from finegrid.plan import finding_line

WIDTH = 100
SHOWN = 40  # rows of a table; the rest are in plan.tsv
SEARCHED = 6  # levels that are named
MEMORY = {
    "weights": "weights", "adapters": "adapter", "gradients": "grads", "optimiser": "optim", "activations": "activ",
    "logits": "logits", "quantisation": "quant", "runtime": "runtime", "total": "total", "host": "on host",
}  # fmt: skip
ARMS_NOTE = "effective batch = batch per device × GPUs × accumulation; memory: of a GPU, or of the CPU's process"
MEMORY_NOTE = "GB of a GPU, or of the CPU's process: each part's own most; total: the step's peak, below the sum"
COLOURS = {"error": "bold red", "warning": "yellow", "note": "cyan"}
MISFIT = " ✗"
UNITS = ("B", "kB", "MB", "GB", "TB")


def print_plan(plan: Mapping) -> None:
    """Print a plan: arms, memory by component, totals, notes and findings."""
    console = Console()
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    console.print(f"[bold]{escape(plan['study'])}[/]: {escape(plan['title'])}\n", highlight=False)
    rows = _groups(plan["runs"])
    shared = _searched_by_all(plan, rows)
    console.print(_arms_table(rows, bool(plan["tune"]) and not shared))
    console.print(ARMS_NOTE, style="dim", highlight=False)
    if shared:
        console.print(escape(f"searched in each arm: {shared}"), style="dim", highlight=False)
    if any(run.get("memory") for run in plan["runs"]):
        console.print()
        console.print(_memory_table(plan))
        console.print(MEMORY_NOTE, style="dim", highlight=False)
    console.print()
    for line in _summary(plan):
        console.print(line, markup=False, highlight=False)
    for note in plan["notes"]:
        console.print(f"note: {note}", markup=False, highlight=False, style="cyan")
    for finding in plan["findings"]:
        severity = finding["severity"]
        console.print(f"[{COLOURS[severity]}]{severity}[/]: {escape(finding_line(finding))}", highlight=False)


# ---------------------------------------------------------------- tables


def _arms_table(rows: list[tuple], searched: bool) -> Table:
    table = _table()
    table.add_column("arm", overflow="fold", min_width=14)
    if searched:
        table.add_column("searched", overflow="fold", min_width=10)
    for name in ("runs", "effective batch", "steps", "epochs", "label tokens", "memory", "a run"):
        table.add_column(name, justify="right", min_width=6)
    for arm, levels, *cells in rows[:SHOWN]:
        table.add_row(escape(arm), *([_few(levels, SEARCHED)] if searched else []), *cells)
    _more(table, len(rows) - SHOWN)
    return table


def _groups(runs: Iterable[Mapping]) -> list[tuple]:
    """Return a row for the runs of an arm that differ in seed and searched levels alone: arm, those levels, cells."""
    groups: dict[tuple, list[str]] = {}
    for run in runs:
        row = (run["arm"], *_numbers(run)) if run["train"] else ("untrained base", *[""] * 6)
        levels = (
            list(run["tuned"].values()) if len(run["tuned"]) == 1 else [f"{k} {v}" for k, v in run["tuned"].items()]
        )
        groups.setdefault(row, []).append(" ".join(levels))
    return [(arm, list(dict.fromkeys(tuned)), str(len(tuned)), *rest) for (arm, *rest), tuned in groups.items()]


def _searched_by_all(plan: Mapping, rows: list[tuple]) -> str:
    """Return what is searched, where it is the same in every row, so that no column need repeat it; else nothing."""
    searched = {tuple(levels) for _, levels, *_ in rows if any(levels)}
    if len(searched) != 1:
        return ""
    (levels,) = searched
    factor = f"{next(iter(plan['tune']))} " if len(plan["tune"]) == 1 else ""
    return factor + _few(list(levels), SEARCHED)


def _numbers(run: Mapping) -> tuple[str, ...]:
    nodes = run.get("nodes", 1)
    gpus = f"({nodes}·{run['gpus'] // nodes})" if nodes > 1 else run["gpus"]
    product = f"{{effective_batch_size}} = {{per_device_train_batch_size}}×{gpus}×{{gradient_accumulation_steps}}"
    about = "" if run["exact"] else "≈"
    memory = run["memory"]
    fits = MISFIT if run["fits"] is False else ""
    return (
        product.format(**run),
        _count(run["steps"], about if run["epochs"] is None or not run["exact"] else ""),
        "?" if run["epochs"] is None else f"{about}{run['epochs']:.3g}",
        _count(run["label_tokens"], about),
        f"{size(memory['total'])}{fits}" if memory else "?",
        duration(run["seconds"]),
    )


def _count(value: float | None, about: str) -> str:
    return "?" if value is None else f"{about}{value:,}"


def _memory_table(plan: Mapping) -> Table:
    memories = [(run, run["memory"]) for run in plan["runs"] if run.get("memory")]
    shown = [name for name in MEMORY if any(memory[name] for _, memory in memories)]
    table = _table()
    table.add_column("memory", overflow="fold", min_width=8)
    for name in shown:
        table.add_column(MEMORY[name], justify="right")
    table.add_column("of", justify="right", no_wrap=True)
    rows: dict[tuple, list[str]] = {}
    for run, memory in memories:
        cells = (
            *(_gigabytes(memory[name]) for name in shown),
            f"{run['device']}{MISFIT if run['fits'] is False else ''}",
        )
        rows.setdefault(cells, []).append(run["arm"])
    for cells, arms in list(rows.items())[:SHOWN]:
        table.add_row(escape(_few(list(dict.fromkeys(arms)))), *cells)
    _more(table, len(rows) - SHOWN)
    return table


def _table() -> Table:
    return Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)


def _more(table: Table, count: int) -> None:
    if count > 0:
        table.add_row(f"… {count:,} more rows", *([""] * (len(table.columns) - 2)), "plan.tsv")


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _few(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# ---------------------------------------------------------------- sentences


def _summary(plan: Mapping) -> list[str]:
    total = plan["totals"]
    trained = [run for run in plan["runs"] if run["train"]]
    lines = [f"{_many(total['runs'], 'run')} to train, {_many(total['base_runs'], 'untrained base model')} to score"]
    cards = _few(list(dict.fromkeys(run["device"] for run in trained)))
    hardware = plan["hardware"]
    if total["seconds"] is not None:
        kind = "CPU hours, one run after the other" if not total["gpu_hours"] else "GPU hours"
        hours = total["gpu_hours"] or total["seconds"] / 3600
        sources = _few(list(dict.fromkeys(run["time_source"] for run in trained)), 2)
        lines.append(f"training: {hours:,.1f} {kind} on {cards} ({hardware['source']}); time from {sources}")
    else:
        lines.append(f"training: time unknown; planned for {cards} ({hardware['source']})")
    lines += _packs(plan["packs"])
    if total["output_bytes"] is not None:
        checkpoints = max(run["disk_bytes"] for run in trained)
        lines.append(
            f"disk: {size(total['output_bytes'])} of products; checkpoints of one run take up to {size(checkpoints)} "
            "while it trains"
        )
    if any(not run["exact"] and run["train_rows"] is not None for run in trained):
        lines.append("≈ counted from the raw files, before cleaning: the data stage makes it exact before any training")
    return lines


def _packs(packs: Mapping) -> list[str]:
    """Return who trains in one process, what that saves, and who can't."""
    groups = packs["groups"]
    if not groups:
        return []
    runs = sum(len(group["runs"]) for group in groups)
    several = f"{len(groups)} packs" if len(groups) > 1 else "one pack"
    line = f"packs: {runs:,} runs share base and tokens with others and can be {several}, or parts of them side by side"
    if all(group["seconds"] is not None for group in groups):
        before, after = (sum(group[key] for group in groups) for key in ("seconds_alone", "seconds"))
        line += f"; one start each: {duration(after)} of work instead of {duration(before)}"
    reasons = [f"{count:,} alone: {why}" for why, count in packs["alone"].items()]
    return [line, *([f"not in packs: {'; '.join(reasons)}"] if reasons else [])]


def duration(seconds: float | None) -> str:
    """Return seconds as people say them: ``45 s``, ``12 min``, ``3.4 h``, ``2.1 d``; ``?`` for None."""
    if seconds is None:
        return "?"
    for unit, length, bound in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 48)):
        if seconds < bound * length:
            value = seconds / length
            return f"{value:.0f} {unit}" if unit != "h" else f"{value:.1f} {unit}"
    return f"{seconds / 86400:.1f} d"


def size(count: float | None) -> str:
    """Return bytes with a decimal unit: ``3.4 GB``; ``?`` for None."""
    if count is None:
        return "?"
    value = float(count)
    for unit in UNITS:
        if value < 1000 or unit == UNITS[-1]:
            return f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")


def _gigabytes(count: float) -> str:
    return "–" if not count else f"{count / 1e9:.{1 if count >= 10e9 else 2}f}"
