"""Which runs of a study train in one process, as a pack, and why others don't.

A process start costs seconds and loading the base more, for every run. Runs that adapt one base on the same tokens can
share both: a *pack* is a part of such a *share group*, trained (and evaluated) by one job. The name of a pack,
``<hash of what is shared>-<k>of<n>``, says which runs it has: every n-th of the group in the plan's order, from the
k-th on. So each process that knows the study finds the same members. Which of them really train is decided by
Snakemake, see :mod:`finegrid.pack_jobs`.

How many packs: on this machine as many as trainings may run side by side, cores by threads; on a cluster so many that
a pack has at most eight runs and is not expected to take over an hour. ``pack`` of config.yaml: ``auto`` (this),
``off``, or the most runs that a pack may have. Pure functions; read by the rules, the plan and the command line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finegrid.errors import UserError, nearest
from finegrid.fingerprint import short_hash

if TYPE_CHECKING:
    from finegrid.memory import Memory
    from finegrid.settings import RunSettings
    from finegrid.study import Run, Study

NAME = re.compile(r"([0-9a-f]{8})-(\d+)of(\d+)")
AUTO, OFF = "auto", "off"
EXPECTED = "'auto', 'off', or the most runs of a pack (2 or more)"
CLUSTER_RUNS = 8
CLUSTER_SECONDS = 3600.0
COMPUTED = ("bf16", "fp16", "tf32", "use_cpu")  # arguments that say in which numbers, and where, is computed
STARTS = ("gaussian", "orthogonal", "eva")  # of an adapter, that leave the base as it is
GPU_SHARE = 0.95  # of a card's memory: what several runs at once may fill
ROWS_TOGETHER = 64  # of all runs of a pack in one batch of answers


# ---------------------------------------------------------------- the key `pack`


def most_runs(value: Any) -> int | None:
    """Return the most runs of a pack that config.yaml's ``pack`` asks for: 0 for ``off``, None for ``auto``.

    Raises:
        UserError: it is something else.
    """
    if value is None or value == AUTO:
        return None
    if value is False or value == OFF:  # YAML reads a bare `off` as false
        return 0
    if isinstance(value, str) and value.isdigit():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 2:
        return value
    hint = nearest(value, (AUTO, OFF)) if isinstance(value, str) else ""
    raise UserError(f"config.yaml: pack: {value!r}; expected {EXPECTED}{hint}")


# ---------------------------------------------------------------- who shares what


def why_alone(settings: RunSettings) -> str | None:
    """Return why a run can't be in a pack; None if it can."""
    peft, arguments = settings.peft_config, settings.training_args
    if peft is None:
        return "full fine-tuning changes the base"
    if str(peft.get("peft_type", "LORA")) != "LORA":
        return f"{peft['peft_type']} is not packed"
    if peft.get("use_dora"):
        return "DoRA is not packed"
    for key in ("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication"):
        if peft.get(key):
            return f"peft_config.{key} changes the base"
    start = peft.get("init_lora_weights", True)
    if isinstance(start, str) and start not in STARTS:
        return f"peft_config.init_lora_weights: {start} changes the base"
    if str(peft.get("bias", "none")) != "none":
        return "peft_config.bias trains a part of the base"
    if settings.processes > 1:
        return f"{settings.processes} processes train it"
    for key in ("deepspeed", "fsdp", "auto_find_batch_size", "torch_compile", "neftune_noise_alpha"):
        if arguments.get(key):
            return f"training_args.{key}"
    trackers = arguments.get("report_to") or "none"
    trackers = [trackers] if isinstance(trackers, str) else trackers
    if set(trackers) - {"none", "tensorboard"}:
        return f"training_args.report_to: {', '.join(trackers)}"
    return None


def share(run: Run) -> str:
    """Return a hash of what the runs of a share group have in common: base, tokens, and how is computed."""
    settings = run.settings
    return short_hash(
        {
            "model": settings.model.model_dump(mode="json"),
            "quantization_config": settings.quantization_config,
            "tokens": [run.dataset, run.tokens_id],
            "computed": {key: settings.training_args.get(key) for key in COMPUTED},
        }
    )


def groups(study: Study) -> dict[str, list[Run]]:
    """Return the share groups of a study, by hash: packable runs in the plan's order."""
    found: dict[str, list[Run]] = {}
    for run in study.runs:
        if why_alone(run.settings) is None:
            found.setdefault(share(run), []).append(run)
    return found


def alone(study: Study) -> dict[str, str]:
    """Return the runs that can't be in a pack, with the reason."""
    return {run.id: why for run in study.runs if (why := why_alone(run.settings))}


# ---------------------------------------------------------------- packs


@dataclass(frozen=True)
class Pack:
    """Runs that one job trains."""

    name: str
    runs: tuple[Run, ...]


def pack_of_name(study: Study, name: str) -> Pack:
    """Return a pack with its runs, from its name alone.

    Raises:
        UserError: it is no name of a pack, or the study has no such runs.
    """
    found = NAME.fullmatch(name)
    if not found:
        raise UserError(f"pack '{name}': no name of a pack; expected such as 1a2b3c4d-1of2")
    group = groups(study).get(found[1], [])
    number, count = int(found[2]), int(found[3])
    runs = group[number - 1 :: count] if 1 <= number <= count else []
    if not runs:
        known = [pack.name for each in groups(study).items() for pack in divided(*each, count)]
        raise UserError(f"pack '{name}': study {study.name} has no runs for it{nearest(name, known)}")
    return Pack(name, tuple(runs))


def divided(hashed: str, group: Sequence[Run], count: int) -> list[Pack]:
    """Return a share group as so many packs; a run that would be alone in one is in none."""
    packs = [Pack(f"{hashed}-{k + 1}of{count}", tuple(group[k::count])) for k in range(count)]
    return [pack for pack in packs if len(pack.runs) > 1]


def packs_here(study: Study, side_by_side: int, most: int | None = None) -> list[Pack]:
    """Return the packs of a study on one machine: together about as many as may run side by side.

    Where each run can have a core to itself there are none: a pack would do one after the other.

    Args:
        side_by_side: trainings at a time.
        most: runs of a pack, see :func:`most_runs`.
    """
    found = groups(study)
    total = sum(map(len, found.values()))
    packs = []
    for hashed, group in found.items():
        fair = math.ceil(side_by_side * len(group) / total)
        packs += divided(hashed, group, _at_most(most, len(group), fair))
    return packs


def packs_on_cluster(study: Study, seconds: Mapping[str, float | None], most: int | None = None) -> list[Pack]:
    """Return the packs of a study on a cluster: small ones, so that many run side by side and none runs for long.

    Args:
        seconds: forecast of each run's training; None where there is none.
        most: runs of a pack, see :func:`most_runs`.
    """
    packs = []
    for hashed, group in groups(study).items():
        longest = max((seconds.get(run.id) or 0 for run in group), default=0)
        size = CLUSTER_RUNS if not longest else min(CLUSTER_RUNS, int(CLUSTER_SECONDS // longest))
        if most is not None:
            size = most
        if size > 1:
            packs += divided(hashed, group, math.ceil(len(group) / size))
    return packs


def _at_most(most: int | None, runs: int, count: int) -> int:
    if most == 0:
        return runs
    return count if most is None else max(count, math.ceil(runs / most))


def at_once(memory: Memory | None, card: int | None) -> int:
    """Return how many runs of a pack make their steps together.

    On a GPU, which a small batch leaves idle between kernels, as many as its memory holds beside one base. On the CPU
    one: there a step takes what its tokens take (12 runs of a model of 1 M parameters took no less CPU
    time together), and run after run has the very bits of a run alone.

    Args:
        memory: what one of the runs needs; None if that is not known.
        card: bytes of the GPU; None is the CPU.
    """
    if memory is None or card is None:
        return 1
    shared, own = _shares(memory)
    return max(1, int((card * GPU_SHARE - shared) // max(own, 1)))


def pack_memory(memory: Memory, runs: int, together: int) -> int:
    """Return the bytes that a pack takes where ``memory.total`` is taken by one run: the base once, what belongs to
    a run as often as it is in the process."""
    shared, own = _shares(memory)
    resident = memory.adapters + memory.gradients + memory.optimiser
    return shared + own * together + resident * max(0, runs - together)


def _shares(memory: Memory) -> tuple[int, int]:
    shared = memory.weights + memory.runtime + memory.quantisation
    return shared, max(memory.total - shared, memory.adapters + memory.gradients + memory.optimiser)
