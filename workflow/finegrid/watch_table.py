"""What `finegrid watch` shows: a table that fits the terminal, and a summary at the end.

Draws what :mod:`finegrid.watch` found. Where the runs of a study don't all fit, those that run or failed come first and
the others are counted.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from finegrid import layout
from finegrid.times import duration
from finegrid.watch import Row, Sight, Watcher, clock

COLOURS = {
    "running": "cyan",
    "evaluating": "blue",
    "failed": "bold red",
    "done": "green",
    "queued": "yellow",
    "waiting": "dim",
}
GOING = ("running", "evaluating")
FIRST = ("running", "evaluating", "failed", "done", "queued", "waiting")
GAP = "  "
HEAD_LINES = 4  # study, totals, counts, names of the columns
WIDTH = 100  # without a terminal
NARROWEST_LABEL = 12
LEFT = 10  # columns of the time left: "3 h 05 min"
FAILED_SHOWN = 20  # in the summary


@dataclass(frozen=True)
class Column:
    """A column of fixed width; ``room`` is how wide the terminal must be for it."""

    title: str
    width: int
    text: Callable[[Row], str]
    right: bool = False
    room: int = 0


# ---------------------------------------------------------------- watching


def watch(watcher: Watcher, interval: float, once: bool) -> Sight:
    """Show the study until all its runs are done or failed and nothing goes on, or until Ctrl-C; return the end.

    Args:
        interval: seconds between two looks.
        once: show it once, as plain lines.
    """
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDTH
    if once:
        watcher.queue.ask(patience=5.0)
        sight = watcher.look()
        height = console.height - 1 if console.is_terminal else sys.maxsize
        console.print(draw(sight, console.width, height, footer=sight.is_idle))
        return sight
    watch_on = _watch_screen if console.is_terminal else _watch_lines
    return watch_on(watcher, interval, console)


def _watch_screen(watcher: Watcher, interval: float, console: Console) -> Sight:
    sight = watcher.look()
    try:
        with Live(console=console, screen=True, auto_refresh=False, transient=True) as live:
            while not sight.is_over:
                live.update(draw(sight, console.width, console.height), refresh=True)
                time.sleep(interval)
                sight = watcher.look()
    except KeyboardInterrupt:
        pass
    console.print(draw(sight, console.width, console.height - 1, footer=False))
    console.print(summary(sight))
    return sight


def _watch_lines(watcher: Watcher, interval: float, console: Console) -> Sight:
    """Without a terminal, print a line whenever a count changes."""
    said = None
    sight = watcher.look()
    try:
        while True:
            line = f"{sight.study}: {sight.trained} of {sight.to_train} trained · {_counts(sight).plain}"
            if line != said:
                console.print(f"{clock(sight.at)} {line}", soft_wrap=True)
                said = line
            if sight.is_over:
                break
            time.sleep(interval)
            sight = watcher.look()
    except KeyboardInterrupt:
        pass
    console.print(summary(sight), soft_wrap=True)
    return sight


# ---------------------------------------------------------------- the table


def draw(sight: Sight, width: int, height: int, footer: bool = True) -> Group:
    """Return the study as lines that fit a terminal of so many columns and rows."""
    columns = _columns(sight.rows, width)
    foot = [_footer(sight, width)] if footer else []
    shown, left = _choose(sight.rows, width, height - HEAD_LINES - len(foot))
    lines = [_title(sight, width), _totals(sight, width), _counts(sight), _names(columns)]
    for row in shown:
        lines += _lines(row, columns, width)
    lines += [_rest(left)] if left else []
    for line in lines + foot:
        line.no_wrap = True
        line.truncate(width, overflow="ellipsis")
    return Group(*lines, *foot)


def _title(sight: Sight, width: int) -> Text:
    line, now = Text.assemble((sight.study, "bold"), f"  {sight.title}"), clock(sight.at)
    line.truncate(max(1, width - len(now) - 2), overflow="ellipsis", pad=True)
    return line.append(f"  {now}", "dim")


def _totals(sight: Sight, width: int) -> Text:
    going = sum(
        (row.step or 0) / row.steps for row in sight.rows if row.planned.trains and row.state == "running" and row.steps
    )
    size = max(8, min(30, width // 4))
    full = round(size * (sight.trained + going) / sight.to_train) if sight.to_train else 0
    line = Text.assemble(("━" * full, "green"), ("━" * (size - full), "dim"))
    line.append(f"  {sight.trained} of {sight.to_train} trained", "bold")
    line.append(f" · {sight.evaluated} of {len(sight.rows)} evaluated")
    if sight.ends is not None:
        moment = clock(sight.ends)
        line.append(f" · ends about {moment[:-3] if moment.count(':') == 2 else moment}")
        left = f", in {duration(sight.ends - sight.at)}"
        line.append(left if len(line) + len(left) <= width else "")
    return line


def _counts(sight: Sight) -> Text:
    parts = [(f"{sight.count(state)} {state}", COLOURS[state]) for state in FIRST if sight.count(state)]
    nodes = _nodes(row for row in sight.rows if row.state in GOING)
    if len(nodes) == 1:
        parts.append((f"on {nodes[0]}", "dim"))
    elif nodes:
        parts.append((f"on {len(nodes)} nodes", "dim"))
    return Text(" · ").join(Text(text, style) for text, style in parts)


def _nodes(rows: Iterable[Row]) -> list[str]:
    return sorted({row.node for row in rows if row.node})


def _footer(sight: Sight, width: int) -> Text:
    if sight.is_idle:
        return Text("nothing is running here: `snakemake` starts what is waiting", "yellow")
    return Text("Ctrl-C ends the watching, not the runs", "dim")


def _columns(rows: Sequence[Row], width: int) -> list[Column]:
    steps = max((len(_step(row)) for row in rows), default=0)
    states = max((len(row.state) for row in rows), default=0)
    nodes = _nodes(rows)
    columns = [
        Column("run", max((len(row.run) for row in rows), default=3), lambda row: row.run),
        Column("state", max(states, 7), lambda row: row.state),
        Column("step", max(steps, 7), _step, right=True),
        Column("loss", 6, lambda row: _number(row.loss), right=True),
        Column("valid.", 6, lambda row: _number(row.eval_loss), right=True, room=96),
        Column("tok/s", 6, lambda row: _rate(row.tokens_per_second), right=True),
        Column("left", LEFT, _left, right=True),
    ]
    if nodes and (len(nodes) > 1 or width >= WIDTH):  # else it is told above
        columns.append(Column("node", max(4, min(max(map(len, nodes)), 16)), lambda row: row.node))
    columns = [column for column in columns if column.room <= width]
    rest = width - sum(column.width + len(GAP) for column in columns)
    if rest >= NARROWEST_LABEL:
        longest = max((len(_arm(row)) for row in rows), default=0)
        size = min(rest, max(longest, 3))
        columns.insert(1, Column("arm", size, lambda row: _arm(row, size)))
    return columns


def _names(columns: Sequence[Column]) -> Text:
    return Text(GAP.join(_fit(column.title, column) for column in columns).rstrip(), "bold dim")


def _lines(row: Row, columns: Sequence[Column], width: int) -> list[Text]:
    line = Text()
    for column in columns:
        text = _fit(column.text(row), column)
        style = COLOURS[row.state] if column.title == "state" or row.state == "waiting" else ""
        line.append(text, style).append(GAP)
    line.rstrip()
    return [line, *_details(row, width)]


def _details(row: Row, width: int) -> list[Text]:
    """The lines below a run's own: why it failed and where its log is, or why it doesn't go on.

    What a queued run waits for stands in its own line where it is short, since it can be hundreds.
    """
    if row.note and not (row.state == "queued" and len(row.note) <= LEFT):
        return [Text(f"  {row.note}", "yellow")]
    if not row.reason:
        return []
    if not row.log:
        return [Text(f"  {row.reason}", "red")]
    if len(row.reason) + len(row.log) + 5 <= width:
        return [Text.assemble((f"  {row.reason}", "red"), (f" · {row.log}", "dim"))]
    return [Text(f"  {row.reason}", "red"), Text(f"  {row.log}", "dim")]


def _choose(rows: Sequence[Row], width: int, room: int) -> tuple[list[Row], list[Row]]:
    """Return the runs to show, and those left out: all in the plan's order if there is room."""
    cost = {row.run: 1 + len(_details(row, width)) for row in rows}
    if sum(cost.values()) <= room:
        return list(rows), []
    order = sorted(rows, key=lambda row: (FIRST.index(row.state), -row.changed))
    going = sum(cost[row.run] for row in rows if row.state in GOING)
    failed = sum(cost[row.run] for row in rows if row.state == "failed")
    room -= 1  # the line that counts the rest
    budget = {"going": room, "failed": room}
    if going + failed > room:  # each gets half, or what the other leaves
        budget = {"going": max(room // 2, room - failed), "failed": max(room - room // 2, room - going)}
    shown, left = [], []
    for row in order:
        kind = "failed" if row.state == "failed" else "going" if row.state in GOING else None
        if cost[row.run] <= min(room, budget.get(kind, room)):
            room -= cost[row.run]
            if kind:
                budget[kind] -= cost[row.run]
            shown.append(row)
        else:
            left.append(row)
    return shown, left


def _rest(left: Sequence[Row]) -> Text:
    counts = [(state, sum(row.state == state for row in left)) for state in FIRST]
    return Text("… and " + ", ".join(f"{count} {state}" for state, count in counts if count) + " more", "dim")


# ---------------------------------------------------------------- cells


def _fit(text: str, column: Column) -> str:
    if len(text) > column.width:
        text = text[: column.width - 1] + "…"
    return text.rjust(column.width) if column.right else text.ljust(column.width)


def _arm(row: Row, width: int = sys.maxsize) -> str:
    """The arm with levels and seed, which are never cut while the arm's name can be."""
    arm, levels = row.planned.arm, f" · {row.planned.levels}" if row.planned.levels else ""
    room = max(4, width - len(levels))
    return (arm if len(arm) <= room else arm[: room - 1] + "…") + levels


def _step(row: Row) -> str:
    if row.state in GOING and row.step is None:
        return row.doing if row.doing != row.state else ""
    if row.step is None:
        return f"{row.steps}" if row.steps else ""
    return f"{row.step}/{row.steps}" if row.steps else f"{row.step}"


def _left(row: Row) -> str:
    if row.state == "queued":
        return row.note if len(row.note) <= LEFT else ""
    if row.state == "done":
        return f"in {duration(row.seconds)}" if row.seconds is not None else ""
    if row.state == "running" and row.step and row.doing in ("evaluating", "saving") and not row.seconds_left:
        return row.doing
    return duration(row.seconds_left) if row.seconds_left is not None else ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if abs(value) < 100 else f"{value:.3g}"


def _rate(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if value < 10 else f"{value:.0f}"


# ---------------------------------------------------------------- the end


def summary(sight: Sight) -> Text:
    """Return what came out: counts, why each failed run failed and where its log is, and what to do next."""
    text = Text.assemble(
        (f"\n{sight.study}: {sight.trained} of {sight.to_train} runs trained", "bold"),
        f", {sight.evaluated} of {len(sight.rows)} evaluated",
    )
    failed = [row for row in sight.rows if row.state == "failed"]
    if failed:
        text.append(f", {len(failed)} failed", "bold red")
    going = sight.count(*GOING)
    if going:
        text.append(f"; {going} go on")
    for row in failed[:FAILED_SHOWN]:
        text.append(f"\n  {row.run}  {_arm(row)}")
        text.append(f"\n    {row.reason}", "red")
        text.append(f"\n    {row.log}" if row.log else "", "dim")
    if len(failed) > FAILED_SHOWN:
        text.append(f"\n  and {len(failed) - FAILED_SHOWN} more", "dim")
    if sight.is_over and failed:
        text.append("\n`snakemake` tries the failed ones again, from their last checkpoints")
    elif sight.is_over and sight.evaluated < len(sight.rows):
        text.append("\n`snakemake` evaluates the others")
    report = layout.RESULTS / sight.study / "report.html"
    if sight.is_over and not failed and report.is_file():
        text.append(f"\nreport: {report}")
    return text
