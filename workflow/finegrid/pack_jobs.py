"""Packs in Snakemake: a pack's job runs if, and only if, Snakemake runs the own job of one of its runs.

A pack is *prefetch*: the rules ``train_adapter`` and ``evaluate`` keep one job a run, with outputs, parameters and
code of their own, and Snakemake decides by these alone what reruns. A pack's job makes a temporary marker, which is an
input of its runs' own jobs; these find their artefacts staged (:mod:`finegrid.staging`) and put them in place.

Snakemake by itself would take the marker for a reason to rerun: ``ancient()`` holds only for files that exist, and a
temporary one is gone. So two of its methods are led past the packs, here and nowhere else:

- ``DAG.update_needrun`` looks at all other jobs first; then each pack is added that an own job needs.
- ``Persistence._input`` leaves markers out of what is remembered of a job's inputs: another number of cores, or
  ``pack: off``, makes other markers and reruns nothing.

Beside that, ``DAG.update_needrun`` overlooks jobs that wait for a new plan alone, see :func:`_past_plans`.

An own job with a pack does next to nothing, so on a cluster it runs where snakemake runs (``Job.is_local``).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import Any

from finegrid.files import write_json

MARKERS = ".snakemake/finegrid/packs"
RULES = {"train_pack": "train", "evaluate_pack": "evaluate"}
PLAN = "study_plan"
TRAININGS = ("train_adapter", "train_model")
NEEDED = "needed.json"
# Stage, study and run of the own jobs that do their work themselves although a pack has the run: none of its others
# is needed.
by_themselves: set[tuple[str, str, str]] = set()


def marker(stage: str, study: str, pack: str) -> str:
    """Return the file that a pack's job makes; ``stage`` is `train` or `evaluate`."""
    return f"{MARKERS}/{stage}/{study}/{pack}"


def install() -> None:
    """Make this process's Snakemake know packs."""
    from snakemake.dag import DAG
    from snakemake.jobs import Job
    from snakemake.persistence import PersistenceBase

    if getattr(DAG, "knows_packs", False):
        return
    DAG.knows_packs = True
    DAG.update_needrun = _with_packs(_past_plans(DAG.update_needrun))
    recorded, is_local = PersistenceBase._input, Job.is_local.fget
    PersistenceBase._input = lambda self, job: [path for path in recorded(self, job) if not _is_marker(path)]
    Job.is_local = property(lambda job: is_local(job) or _has_pack(job))


def begin(dag: Any, scratch: Path, planned: Callable[[str, str, str], dict[str, Any]]) -> None:
    """Write for each study which runs of each pack have an own job that will run: ``scratch/<study>/needed.json``.

    To be called when the work starts. Snakemake waits for all inputs of a job, so the markers of packs that are not
    needed are made here.

    Args:
        planned: ``planned(stage, study, pack)`` is what else a pack is told. Not by parameters of its rule: Snakemake
            works these out for all jobs, also when there is nothing to do, and the plan's take a tenth of that time.
    """
    needed: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for pack, jobs in _wanted(dag).items():
        if not dag.needrun(pack):
            for path in map(Path, pack.output):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            continue
        study, name, stage = pack.wildcards.study, pack.wildcards.pack, RULES[pack.rule.name]
        runs = sorted(job.wildcards.run for job in jobs if _key(job) not in by_themselves)
        stages = needed.setdefault(study, {each: {} for each in RULES.values()})
        stages[stage][name] = {"runs": runs, **planned(stage, study, name)}
    for study, content in needed.items():
        write_json(scratch / study / NEEDED, content)


def _is_marker(path: str) -> bool:
    return path.startswith(f"{MARKERS}/")


def _has_pack(job: Any) -> bool:
    if _is_pack(job) or not any(map(_is_marker, job.input)):
        return False
    return _key(job) not in by_themselves


def _is_pack(job: Any) -> bool:
    return job.rule.name in RULES


def _wanted(dag: Any) -> dict[Any, list[Any]]:
    """Return the packs' jobs with those own jobs of their runs that will run."""
    found = {pack: _own_jobs(dag, pack) for pack in dag.jobs if _is_pack(pack)}
    return {pack: jobs for pack, jobs in found.items() if jobs}


def _past_plans(update: Callable) -> Callable:
    """Let jobs be found that have reasons of their own behind a plan that is made anew.

    Snakemake doesn't look at what is downstream of a job that will run, since that will run as well; but not what
    takes the job's file as ``ancient()``, as trainings and evaluations take the plan: missing results were not made.
    """

    async def update_needrun(dag: Any, *args: Any, **keywords: Any) -> None:
        await update(dag, *args, **keywords)
        plans = {job for job in dag._needrun if job.rule.name == PLAN}
        if not plans or not dag.workflow.is_main_process:
            return
        needed = set(dag._needrun)
        dag._finished |= plans
        try:
            await update(dag, *args, **keywords)
        finally:
            dag._finished -= plans
        dag._needrun |= needed
        _count(dag, dag._needrun)

    return update_needrun


def _count(dag: Any, jobs: Iterable[Any]) -> None:
    for job in jobs:
        dag._n_until_ready[job] = sum(before in dag._needrun for before in dag._dependencies[job])
    dag._len = len(dag._finished | dag._needrun)


def _with_packs(update: Callable) -> Callable:
    async def update_needrun(dag: Any, *args: Any, **keywords: Any) -> None:
        packs = {job for job in dag.jobs if _is_pack(job)} - dag._finished
        if not dag.workflow.is_main_process or not packs:  # a job of a cluster runs what it was sent for
            await update(dag, *args, **keywords)
            return
        dag._finished |= packs  # which are then no candidates, and no reason for others to run
        try:
            await update(dag, *args, **keywords)
        finally:
            dag._finished -= packs
        _add_packs(dag)

    return update_needrun


def _add_packs(dag: Any) -> None:
    by_themselves.clear()
    wanted = _wanted(dag)
    packs = sorted(wanted, key=lambda pack: pack.rule.name, reverse=True)  # trainings first
    for pack in packs:
        packed = [job for job in wanted[pack] if not _waits_for_a_training_alone(dag, job, wanted)]
        if len(packed) < 2:  # a pack of one would cost a process and save none
            packed = []
            del wanted[pack]
        by_themselves.update(_key(job) for job in _own_jobs(dag, pack) if job not in packed)
    for pack in wanted:
        dag._needrun.add(pack)
        dag.reason(pack).missing_output.update(pack.output)
    for pack in wanted:
        _wait_for_trainings(dag, pack)
    _count(dag, [*wanted, *(job for pack in packs for job in _own_jobs(dag, pack))])


def _waits_for_a_training_alone(dag: Any, job: Any, packs: Container[Any]) -> bool:
    """Return whether a scoring's run is about to be trained without a pack: its scores would come too late for one."""
    trainings = [before for before in dag._dependencies[job] if before in dag._needrun and _trains(before)]
    return any(not any(pack in packs for pack in filter(_is_pack, dag._dependencies[each])) for each in trainings)


def _wait_for_trainings(dag: Any, pack: Any) -> None:
    """Let scores wait for the packs that train what is scored.

    Not for each run's own job: one that fails, since its run has failed, would keep the others from being scored.
    """
    for evaluation in _own_jobs(dag, pack):
        for training in filter(_trains, dag._dependencies[evaluation]):
            for before in filter(_is_pack, dag._dependencies[training]):
                if training in dag._needrun and before in dag._needrun:
                    dag._dependencies[pack][before].update(before.output)
                    dag.depending[before][pack].update(before.output)


def _own_jobs(dag: Any, pack: Any) -> list[Any]:
    """Return the own jobs of a pack's runs that will run."""
    return [job for job in dag.depending[pack] if job in dag._needrun and not _is_pack(job)]


def _key(job: Any) -> tuple[str, str, str]:
    return "train" if _trains(job) else "evaluate", job.wildcards.study, job.wildcards.run


def _trains(job: Any) -> bool:
    return job.rule.name in TRAININGS
