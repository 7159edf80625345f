"""`finegrid verify`: train and score one run again in a scratch folder, and hold its metrics to the recorded ones.

On the CPU they must be the same to the last bit. Elsewhere kernels add in any order they like: there the metrics may
differ by a stated tolerance.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finegrid import layout
from finegrid.errors import UserError

if TYPE_CHECKING:
    from finegrid.study import Run, Study

TOLERANCE = 0.02  # absolute, of losses and of scores between 0 and 1; 100 times that of scores between 0 and 100
OF_100 = ("corpus_bleu", "corpus_chrf")
COSTS = {"seconds", "tokens_per_second", "peak_memory_mb"}  # of the machine, not of the model
NEEDED = ("config", "data", "envs", "workflow", "pyproject.toml")


def verify(study: Study, run: Run | None, scratch: Path, tolerance: float | None, say: Callable = print) -> bool:
    """Train and score a run anew and say whether its metrics are those on record; return whether they are.

    Args:
        run: None for one drawn at random.
        scratch: folder for it, ``verify/<study>/<run>`` inside; it is removed when the metrics agree.
        tolerance: of every metric; None for none on the CPU, TOLERANCE elsewhere.

    Raises:
        UserError: the run was never scored, what it is trained from is not here, or training fails.
    """
    run = run or random.choice(study.runs)
    results = layout.RESULTS / study.name
    recorded = _read(results / "metrics" / f"{run.id}.json")
    device = _read(results / "training" / f"{run.id}.json")["device"] if run.method != "base" else "cpu"
    made = _read(results / "provenance" / f"{run.id}.json") if run.method != "base" else {}
    _check_inputs(run, made)
    folder = _workplace(scratch / "verify" / study.name / run.id)
    say(f"verify {study.name}: {run.id}, recorded on {device}; anew in {folder}")
    for command in ([] if run.method == "base" else ["train"]) + ["evaluate"]:
        _finegrid(folder, command, study.name, run.id)
    found = _read(folder / results / "metrics" / f"{run.id}.json")
    now = _read(folder / results / "training" / f"{run.id}.json")["device"] if run.method != "base" else "cpu"
    allowed = tolerance if tolerance is not None else 0.0 if device == now == "cpu" else TOLERANCE
    differing = list(_differences(recorded, found, allowed))
    weights = _same_weights(made, folder)
    for line in differing:
        say(f"verify {study.name}: {line}")
    how = "to the last bit" if allowed == 0 else f"within {allowed:g}"
    what = f"metrics of {run.id} {'differ' if differing else 'are the recorded ones'} ({how})"
    say(f"verify {study.name}: {what}{f'; weights are {weights}' if weights else ''}")
    for line in _versions(made) if differing else ():
        say(f"verify {study.name}: {line}")
    if not differing:
        shutil.rmtree(folder)
    return not differing


def _check_inputs(run: Run, made: dict[str, Any]) -> None:
    from finegrid.fingerprint import file_hash

    problems = []
    for name in ("train", "validation", "test"):
        path = layout.tokens_folder(run) / f"{name}.arrow"
        if not path.is_file():
            problems.append(f"{path}: no such file; expected the tokens that {run.id} was trained on (`make restore`)")
        elif (made.get("inputs") or {}).get(name, {}).get("sha256") not in (None, file_hash(path)):
            problems.append(f"{path}: not the tokens that {run.id} was trained on, by its provenance")
    if not (layout.model_folder(run.settings.model) / "config.json").is_file():
        problems.append(f"{layout.model_folder(run.settings.model)}: holds no model; expected the run's base model")
    if problems:
        raise UserError(*problems)


def _workplace(folder: Path) -> Path:
    """Make a project folder that shares everything with this one but the results."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in NEEDED:
        if Path(name).exists():
            (folder / name).symlink_to(Path(name).resolve())
    return folder


def _finegrid(folder: Path, command: str, study: str, run: str) -> None:
    log = f"logs/{command}.log"
    environment = os.environ | {"FINEGRID_SCRATCH": "scratch", "FINEGRID_STUDY": study}
    call = [sys.executable, "-m", "finegrid.cli", command, study, run, "--log", log]
    done = subprocess.run(call, cwd=folder, env=environment, check=False)
    if done.returncode:
        raise UserError(f"verify: `finegrid {command} {study} {run}` failed; its log is {folder / log}")


def _differences(recorded: dict[str, Any], found: dict[str, Any], tolerance: float) -> Iterator[str]:
    """Compare all that was measured of the model; costs are the machine's."""
    before, now = dict(_leaves(recorded)), dict(_leaves(found))
    for name in sorted(before.keys() | now.keys()):
        if COSTS & set(name.split(".")):
            continue
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        allowed = tolerance * (100 if name.endswith(OF_100) else 1)
        are_numbers = all(isinstance(value, float) for value in (old, new))
        if are_numbers and math.isfinite(old) and math.isfinite(new) and abs(old - new) <= allowed:
            continue
        yield f"{name}: {old} on record, {new} now"


def _leaves(content: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _leaves(value, f"{name}.{key}" if name else key)
    else:
        yield name, content


def _same_weights(made: dict[str, Any], folder: Path) -> str:
    """Say whether the weights have the same bytes, where the run's provenance has their hashes."""
    from finegrid.fingerprint import file_hash

    recorded = {path: digest for path, digest in (made.get("outputs") or {}).items() if path.endswith(".safetensors")}
    if not recorded:
        return ""
    same = all((folder / path).is_file() and file_hash(folder / path) == digest for path, digest in recorded.items())
    return "the same bytes" if same else "other bytes"


def _versions(made: dict[str, Any]) -> Iterator[str]:
    """What is not as it was when the run was made, as a first guess at why it differs."""
    from finegrid.fingerprint import code_fingerprint
    from finegrid.provenance import package_versions

    now = package_versions()
    for name, version in (made.get("packages") or {}).items():
        if now.get(name) != version:
            yield f"{name} is {now.get(name)} here and was {version}"
    if made.get("code") and made["code"] != code_fingerprint("finegrid.training.train"):
        yield "the training's code has changed since"


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a run that was trained and scored") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
