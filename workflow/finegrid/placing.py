"""Where the command `finegrid` begins: what a pack has made for a run is put in place at once.

Each run of a pack has a job of its own for that. To import the command line and to read the study takes such a job a
third of a second, far more than to move files, and says nothing new where neither the study's files, nor the code,
nor data or model have changed since the pack looked at them. Everything else is the command line's.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from finegrid.staging import CODE, Staging

IN_PACK = {"train": "trained in its pack", "evaluate": "evaluated in its pack"}
OPTIONS = ("--log", "--gpus")  # with which a rule calls a stage


def main() -> None:
    """Run the command that was typed."""
    if not placed(sys.argv[1:]):
        from finegrid.cli import main as run

        run()


def placed(arguments: Sequence[str]) -> bool:
    """Put in place what a pack has made for the run of a `train` or `evaluate`; return whether there was anything.

    A run that failed, and one of which something has changed, are left to the command itself, which says so.

    Args:
        arguments: of the command, its name first.
    """
    if len(arguments) < 3 or arguments[0] not in CODE:
        return False
    stage, study, run, *rest = arguments
    if len(rest) % 2 or set(rest[::2]) - set(OPTIONS):
        return False
    place = Staging.of(Path(os.environ.get("FINEGRID_SCRATCH", "scratch")), study, run, stage)
    done = place.untouched()
    if done is None:
        return False
    options = dict(zip(rest[::2], rest[1::2], strict=True))
    lines = ["started\n", place.log.read_text(encoding="utf-8"), f"{IN_PACK[stage]}\n"]
    place.place(done["places"], shlex.join(["finegrid", *arguments]))
    if "--log" in options:
        log = Path(options["--log"])
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            file.writelines(lines)
    else:
        print(lines[1], end="")
    print(f"{stage} {run}: {IN_PACK[stage]}", file=sys.stderr if "--log" in options else sys.stdout, flush=True)
    return True
