"""The work of a pack: its runs trained, scored, or both, in one process and staged for their own jobs.

Which runs: those whose own job Snakemake will run (:mod:`finegrid.pack_jobs` writes them down); typed by hand, all.
What is staged and still true is kept, so a pack that was killed goes on where it was: a run in training from its
checkpoint. A run that fails is noted and the others go on; out of memory ends the pack, which is then tried again
with more. Each run is locked while the pack is at work, and shows its own live state.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finegrid import layout
from finegrid.files import printing_to, write_json
from finegrid.pack_jobs import NEEDED
from finegrid.packs import pack_of_name
from finegrid.run_records import evaluation_record, training_record
from finegrid.staging import (
    RECORD,
    Staging,
    evaluation_identity,
    evaluation_inputs,
    evaluation_places,
    training_identity,
    training_inputs,
    training_places,
)
from finegrid.startup import importing, leave_out_unused
from finegrid.training.state import live_state
from finegrid.training.stopping import Stop

if TYPE_CHECKING:
    from finegrid.evaluation.evaluate import Answers
    from finegrid.study import Run, Study
    from finegrid.training.joint import JointPass
    from finegrid.training.lockstep import Lane
    from finegrid.training.resident import ResidentBase
    from finegrid.training.trainer import BaseLosses

Progress = Callable[[str], None]
Validated = dict[str, list[float]]  # by run, each validation row's loss with what it trained
SECONDS_FOR_PLACING = 60.0  # in which a run's own job has moved its files, in truth in a moment


def needed(study: Study, pack: str, stage: str, scratch: Path) -> list[Run]:
    """Return the runs of a pack that are needed: all of them where Snakemake has said nothing of this pack.

    Raises:
        UserError: the study has no such pack.
    """
    runs, said = pack_of_name(study, pack).runs, _said(study, pack, stage, scratch)
    return [run for run in runs if not said or run.id in said["runs"]]


def _said(study: Study, pack: str, stage: str, scratch: Path) -> dict[str, Any]:
    """Return what Snakemake has said of a pack, see :func:`finegrid.pack_jobs.begin`; nothing if it has not."""
    try:
        return json.loads((scratch / study.name / NEEDED).read_text(encoding="utf-8"))[stage][pack]
    except (OSError, ValueError, KeyError):
        return {}


# ---------------------------------------------------------------- training


def train_pack(
    study: Study, pack: str, scratch: Path, say: Progress, together: int | None = None, rows: int | None = None
) -> None:
    """Train the needed runs of a pack and stage them; and score those whose scores are needed too, if asked for.

    Args:
        scratch: folder of all studies' checkpoints.
        together: how many runs make their steps together on a GPU; on the CPU one trains after the other, to the bits
            of a run alone. Default: what Snakemake has said, or 1.
        rows: those of :func:`evaluate_pack`, to score here what was trained, which saves a start. Default: what
            Snakemake has said; None doesn't score.

    Raises:
        UserError: the study has no such pack.
    """
    runs = needed(study, pack, "train", scratch)
    said = _said(study, pack, "train", scratch)
    together = said.get("together", 1) if together is None else together
    rows = said.get("rows") if rows is None else rows
    validated: Validated = {}
    with Stop() as stop, contextlib.ExitStack() as locks:
        _lock(runs, study, scratch, locks, say)
        places = {run.id: Staging.of(scratch, study.name, run.id, "train") for run in runs}
        identities = {run.id: training_identity(run) for run in runs}
        left = [run for run in runs if not places[run.id].is_whole(identities[run.id])]
        say(f"{len(left)} of {len(runs)} runs to train: {', '.join(run.id for run in left)}")
        if left:
            on_gpu = device_name(left[0]) != "cpu"
            at_once = together if on_gpu else 1
            _train_together(study, left, scratch, places, identities, at_once, stop, say, validated)
    if rows is not None:
        scored = _said(study, pack, "evaluate", scratch).get("runs", [])
        try:
            _score(study, [run for run in runs if run.id in scored], scratch, rows, say, validated)
        except Exception as error:  # what was trained is not lost, and the job for the scores tells what is wrong
            say(f"scores are left to a job of their own: {type(error).__name__}: {error}")


def _lock(runs: list[Run], study: Study, scratch: Path, locks: contextlib.ExitStack, say: Progress) -> None:
    from finegrid.training.lock import RunLock

    for run in runs:  # in the same order in every process, so that no two wait for each other
        locks.enter_context(RunLock(scratch / study.name, run.id, lambda line, run=run: say(f"{run.id}: {line}")))


def _train_together(
    study: Study,
    runs: list[Run],
    scratch: Path,
    places: Mapping[str, Staging],
    identities: Mapping[str, dict[str, Any]],
    together: int,
    stop: Stop,
    say: Progress,
    validated: Validated,
) -> None:
    """Train each run in a lane of its own, so many at once; one by one, none has to wait for another's batch."""
    leave_out_unused(run.settings for run in runs)
    with importing():
        import finegrid.training.train  # noqa: F401 - sets what must be set before transformers is imported
        from finegrid.training.joint import JointPass
        from finegrid.training.lockstep import Lane, run_together
        from finegrid.training.resident import ResidentBase

    base, losses = ResidentBase(), {}
    joint = JointPass(lambda trainer: base.base(runs[0].settings, _model(runs[0]), trainer.args.device))

    def work(run: Run) -> Callable[[Lane], None]:
        company = joint if together > 1 else None
        keep = functools.partial(validated.__setitem__, run.id)
        return lambda lane: _train(
            study, run, scratch, places[run.id], identities[run.id], stop, say, base, losses, keep, lane, company
        )

    for run in runs:
        places[run.id].begin()
    run_together([Lane(run.id, work(run), places[run.id].log) for run in runs], together, joint)


def _model(run: Run) -> Path:
    return layout.model_folder(run.settings.model)


def _train(
    study: Study,
    run: Run,
    scratch: Path,
    place: Staging,
    identity: dict[str, Any],
    stop: Stop,
    say: Progress,
    base: ResidentBase,
    losses: BaseLosses,
    keep: Callable[[list[float]], None],
    lane: Lane,
    joint: JointPass | None,
) -> None:
    from finegrid.provenance import commit

    made_at = commit(Path.cwd())
    checkpoints = scratch / study.name / run.id
    with _staged_failure(place, identity, run, say):
        with live_state(checkpoints / "state.json", run.id, place.log, stop=stop) as tell:
            from finegrid.training.train import train

            _forget_the_last()
            train(
                run.settings,
                tokens=layout.tokens_folder(run),
                model=_model(run),
                output=place.folder / "weights",
                history=place.folder / "history.csv",
                summary=place.folder / "summary.json",
                checkpoints=checkpoints,
                progress=_both(run, say),
                tell=tell,
                stop=stop,
                load=base.base,
                company=(lane, joint) if joint else None,
                base_losses=losses,
                validated=keep,
            )
        write_json(place.folder / "settings.json", run.settings.model_dump(mode="json"))
        write_json(place.folder / RECORD, training_record(study, run, made_at, "", place.folder))
        place.finish(identity, study, training_inputs(run), training_places(study, run))
    if joint is not None:
        joint.leave(lane)


# ---------------------------------------------------------------- evaluation


def evaluate_pack(study: Study, pack: str, scratch: Path, say: Progress, rows: int | None = None) -> None:
    """Score the needed runs of a pack and stage predictions and metrics.

    Args:
        rows: of all runs, in one batch of answers at most; 0 generates the answers run by run. Default: what
            Snakemake has said, or 0.

    Raises:
        UserError: the study has no such pack.
    """
    rows = _said(study, pack, "evaluate", scratch).get("rows", 0) if rows is None else rows
    _score(study, needed(study, pack, "evaluate", scratch), scratch, rows, say)


def _score(
    study: Study, runs: list[Run], scratch: Path, rows: int, say: Progress, validated: Validated | None = None
) -> None:
    left: dict[str, tuple[Run, Staging, dict[str, Any], Path, Path]] = {}
    for run in runs:
        place = Staging.of(scratch, study.name, run.id, "evaluate")
        trained = _trained(study, run, scratch, place)
        if trained is None:
            say(f"{run.id}: is not trained")
            continue
        weights, summary = trained
        identity = evaluation_identity(study, run, summary)
        if not place.is_whole(identity):
            left[run.id] = (run, place, identity, weights, summary)
    if not left:
        return
    leave_out_unused(run.settings for run, *_ in left.values())
    with importing():
        import finegrid.evaluation.evaluate  # noqa: F401 - sets what must be set before transformers is imported
        from finegrid.training.resident import ResidentBase

    base = ResidentBase()
    answers = _answers(left, base, rows, say) if rows and len(left) > 1 else {}
    for run, place, identity, weights, summary in left.values():
        known = _known(run, validated or {})
        _evaluate(study, run, scratch, place, identity, weights, summary, say, base, answers.get(run.id), known)


def _known(run: Run, validated: Validated) -> list[float] | None:
    """Return the validation rows' losses that a run's training has computed, if its batches are those of scoring."""
    from finegrid.evaluation.evaluate import rows_at_a_time

    alike = rows_at_a_time(run.settings) == run.settings.training_arg("per_device_eval_batch_size")
    return validated.get(run.id) if alike else None


def _answers(
    left: Mapping[str, tuple[Run, Staging, dict[str, Any], Path, Path]], base: ResidentBase, rows: int, say: Progress
) -> dict[str, Answers]:
    """Return the answers that can be made together; none if that fails, for each run then tells what is wrong."""
    from finegrid.evaluation.together import answers_of_all

    first = next(iter(left.values()))[0]
    try:
        return answers_of_all(
            {name: (run.settings, weights) for name, (run, _, _, weights, _) in left.items()},
            layout.tokens_folder(first),
            layout.clean_folder(first),
            _model(first),
            base,
            rows,
            say,
        )
    except Exception as error:
        say(f"answers are made run by run: {type(error).__name__}: {error}")
        return {}


def _trained(study: Study, run: Run, scratch: Path, place: Staging) -> tuple[Path, Path] | None:
    """Return where a run's weights and the summary of its training are; None if it is not trained.

    What its pack has just trained is copied, since its own job moves it at any moment.
    """
    training, identity = Staging.of(scratch, study.name, run.id, "train"), training_identity(run)
    placed = (
        layout.weights_folder(study.name, run),
        layout.RESULTS / study.name / "training" / f"{run.id}.json",
    )
    copy, end = place.folder.with_name("weights"), time.monotonic() + SECONDS_FOR_PLACING
    while time.monotonic() < end:
        done = training.done(identity)
        if done is None or "failed" in done:
            return placed if done is None and all(path.exists() for path in placed) else None
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(training.folder / "weights", copy)
            shutil.copyfile(training.folder / "summary.json", copy / "summary.json")
            return copy, copy / "summary.json"
        time.sleep(0.1)
    return None


def _evaluate(
    study: Study,
    run: Run,
    scratch: Path,
    place: Staging,
    identity: dict[str, Any],
    weights: Path,
    summary: Path,
    say: Progress,
    base: ResidentBase,
    answers: Answers | None,
    validated: list[float] | None,
) -> None:
    from finegrid.provenance import commit

    made_at = commit(Path.cwd())
    place.begin()
    state = scratch / study.name / run.id / "evaluation.json"
    with printing_to(place.log), _staged_failure(place, identity, run, say):
        with live_state(state, run.id, place.log) as tell:
            from finegrid.evaluation.evaluate import evaluate

            _forget_the_last()
            both = _both(run, say)

            def progress(line: str) -> None:
                tell(state="evaluating", line=line)
                both(line)

            evaluate(
                run.settings,
                run.id,
                tokens=layout.tokens_folder(run),
                clean=layout.clean_folder(run),
                model=_model(run),
                adapter=weights,
                predictions=place.folder / "predictions.jsonl",
                metrics=place.folder / "metrics.json",
                progress=progress,
                load=base.load,
                answers=answers,
                validated=validated,
            )
        device = device_name(run)
        write_json(place.folder / RECORD, evaluation_record(study, run, made_at, device, "", place.folder, summary))
        place.finish(identity, study, evaluation_inputs(study, run), evaluation_places(study, run))


def device_name(run: Run) -> str:
    """Return the name of the device that this process trains or scores a run on."""
    with importing():
        import torch

    uses_gpu = torch.cuda.is_available() and not run.settings.training_args.get("use_cpu", False)
    return torch.cuda.get_device_name() if uses_gpu else "cpu"


# ---------------------------------------------------------------- helpers


def _both(run: Run, say: Progress) -> Progress:
    """Return a function that says a line with the run's name, and prints it, which goes to the run's own log."""

    def progress(line: str) -> None:
        say(f"{run.id}: {line}")
        print(line, flush=True)

    return progress


def _forget_the_last() -> None:
    """Give back what the run before had, and let its peak of memory be no other run's."""
    from finegrid.training.history import forget_peak  # imports transformers: only after the stage, which prepares that

    gc.collect()  # a trainer and its callbacks know each other
    forget_peak()


@contextlib.contextmanager
def _staged_failure(place: Staging, identity: dict[str, Any], run: Run, say: Progress) -> Iterator[None]:
    """Keep an error of one run from ending the pack; out of memory does, for then there is none for the next."""
    from finegrid.training.state import reason_of

    try:
        yield
    except Exception as error:
        reason = reason_of(error)
        say(f"{run.id}: failed: {reason}")
        if reason == "out of memory":
            raise
        place.fail(identity, error)
