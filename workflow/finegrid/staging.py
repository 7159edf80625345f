"""What a pack has made for one of its runs, until the run's own job puts it in place.

``scratch/<study>/packed/<run>/<stage>/`` holds the artefacts, ``log`` (what was printed for this run) and, written
last, ``done.json``: the identity of what was made (settings, code, data and model by content), where everything
belongs, and for a run that failed its problems. Nothing is placed whose identity is another than today's.
"""

from __future__ import annotations

import json
import os
import shutil
import traceback
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finegrid import layout
from finegrid.errors import UserError
from finegrid.files import write_json
from finegrid.fingerprint import code_fingerprint, file_hash, short_hash

if TYPE_CHECKING:
    from finegrid.study import Run, Study

DONE = "done.json"
RECORD = "provenance.json"
CODE = {"train": "finegrid.training.train", "evaluate": "finegrid.evaluation.evaluate"}


class Failed(Exception):
    """A run failed in its pack, by no mistake of the user's; the traceback is in its log."""


# ---------------------------------------------------------------- identity


def training_inputs(run: Run) -> dict[str, Path]:
    """Return the files that a run's weights hang on, by name."""
    tokens = layout.tokens_folder(run)
    inputs = {
        "model": layout.MODELS / f"{layout.model_name(run.settings.model)}.json",
        "report": tokens / "report.json",
    }
    return inputs | {split: tokens / f"{split}.arrow" for split in ("train", "validation", "test")}


def training_facts(run: Run) -> dict[str, str]:
    """Return hashes of the settings and of the code that a run's weights hang on."""
    return {
        "settings_hash": short_hash(run.settings.canonical()),
        "code": code_fingerprint(CODE["train"]),
    }


def training_identity(run: Run) -> dict[str, Any]:
    """Return what must be the same for a training to be the same, as plain data."""
    return training_facts(run) | {"inputs": _hashes(training_inputs(run))}


def evaluation_inputs(study: Study, run: Run) -> dict[str, Path]:
    """Return the files that a run's scores hang on, by name."""
    clean, tokens = layout.clean_folder(run), layout.tokens_folder(run)
    inputs = {f"tokens/{split}": tokens / f"{split}.arrow" for split in ("validation", "test")}
    inputs |= {f"clean/{split}": clean / f"{split}.jsonl" for split in ("validation", "test")}
    return inputs | {
        "model": layout.MODELS / f"{layout.model_name(run.settings.model)}.json",
        "training": layout.RESULTS / study.name / "training" / f"{run.id}.json",
    }


def evaluation_identity(study: Study, run: Run, summary: Path | None = None) -> dict[str, Any]:
    """Return what must be the same for a run's scores to be the same, as plain data.

    Args:
        summary: of the training whose weights are scored; default: the one in place.
    """
    inputs = evaluation_inputs(study, run)
    return {
        "settings_hash": short_hash(run.settings.evaluation_settings()),
        "code": code_fingerprint(CODE["evaluate"]),
        "inputs": _hashes(inputs | {"training": summary or inputs["training"]}),
    }


def _hashes(files: Mapping[str, Path]) -> dict[str, str | None]:
    return {name: file_hash(path) if path.is_file() else None for name, path in files.items()}


# ---------------------------------------------------------------- where everything belongs


def training_places(study: Study, run: Run) -> dict[str, Path]:
    """Return the paths of what a training makes, by the names it is staged under."""
    results = layout.RESULTS / study.name
    return {
        "weights": layout.weights_folder(study.name, run),
        "history.csv": results / "history" / f"{run.id}.csv",
        "summary.json": results / "training" / f"{run.id}.json",
        "settings.json": results / "settings" / f"{run.id}.json",
        RECORD: results / "provenance" / f"{run.id}.json",
    }


def evaluation_places(study: Study, run: Run) -> dict[str, Path]:
    """Return the paths of what a scoring makes, by the names it is staged under."""
    results = layout.RESULTS / study.name
    return {
        "predictions.jsonl": results / "runs" / run.id / "predictions.jsonl",
        "metrics.json": results / "metrics" / f"{run.id}.json",
        RECORD: results / "provenance/evaluation" / f"{run.id}.json",
    }


# ---------------------------------------------------------------- one run's artefacts of one stage


@dataclass(frozen=True)
class Staging:
    """The folder of one run and stage (`train` or `evaluate`)."""

    folder: Path

    @classmethod
    def of(cls, scratch: Path, study: str, run: str, stage: str) -> Staging:
        """Return the place, which need not exist; ``scratch`` is that of all studies."""
        return cls(scratch / study / "packed" / run / stage)

    @property
    def log(self) -> Path:
        """What was printed for this run."""
        return self.folder / "log"

    def begin(self) -> None:
        """Make the folder anew."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def done(self, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return what is said of a finished run of this identity, failed ones too; None if there is none."""
        try:
            content = json.loads((self.folder / DONE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return content if content.get("identity") == identity else None

    def is_whole(self, identity: Mapping[str, Any]) -> bool:
        """Return whether artefacts of this identity lie here, all of them."""
        done = self.done(identity)
        return done is not None and "failed" not in done and self.has_all(done)

    def has_all(self, done: Mapping[str, Any]) -> bool:
        """Return whether all is here that is said to be; after a placing that was interrupted some of it is not."""
        return all((self.folder / name).exists() for name in done.get("places", ()))

    def finish(
        self, identity: Mapping[str, Any], study: Study, inputs: Mapping[str, Path], places: Mapping[str, Path]
    ) -> None:
        """Say that all artefacts are there, what they hang on and where they belong."""
        content = {
            "identity": identity,
            "declared": {"files": study.sources, "code": code_fingerprint("finegrid.study")},
            "inputs": {name: path.as_posix() for name, path in inputs.items()},
            "places": {name: path.as_posix() for name, path in places.items()},
        }
        write_json(self.folder / DONE, content)

    def untouched(self) -> dict[str, Any] | None:
        """Return what is said of a finished run, if nothing that it was made of has changed; else None.

        The same as :meth:`done` with today's identity, or None where that has to look at the study: its settings are
        the same if its files and the code that reads them are.
        """
        try:
            content = json.loads((self.folder / DONE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not content.get("places"):
            return None
        identity, declared = content["identity"], content["declared"]
        files = {name: Path(name) for name in declared["files"]}
        inputs = {name: Path(path) for name, path in content["inputs"].items()}
        same = (
            code_fingerprint("finegrid.study") == declared["code"]
            and code_fingerprint(CODE[self.folder.name]) == identity["code"]
            and _hashes(files) == declared["files"]
            and _hashes(inputs) == identity["inputs"]
            and self.has_all(content)
        )
        return content if same else None

    def fail(self, identity: Mapping[str, Any], error: Exception) -> None:
        """Keep why the run failed, for its own job to say."""
        if isinstance(error, UserError):
            failed = {"problems": error.problems}
        else:
            with self.log.open("a", encoding="utf-8") as file:
                traceback.print_exception(error, file=file)
            failed = {"error": f"{type(error).__name__}: {error}"}
        write_json(self.folder / DONE, {"identity": identity, "failed": failed})

    def place(self, places: Mapping[str, str], command: str) -> None:
        """Move artefacts to where they belong, the folder's names to paths, and remove the folder.

        Args:
            places: those of :meth:`done`.
            command: of the run's own job, for its provenance.
        """
        record = json.loads((self.folder / RECORD).read_text(encoding="utf-8"))
        write_json(self.folder / RECORD, record | {"command": command})
        for name, path in places.items():
            _move(self.folder / name, Path(path))
        shutil.rmtree(self.folder)
        if self.folder.name == "evaluate":
            shutil.rmtree(self.folder.with_name("weights"), ignore_errors=True)
        for folder in (self.folder.parent, self.folder.parent.parent):
            try:
                folder.rmdir()
            except OSError:  # something else is in it
                return


def tidy(scratch: Path, study: str, runs: Container[str]) -> None:
    """Remove what is staged for runs that a study has no more."""
    for folder in (scratch / study / "packed").glob("*"):
        if folder.name not in runs:
            shutil.rmtree(folder, ignore_errors=True)


def raise_failure(done: Mapping[str, Any]) -> None:
    """Raise what a run failed with, if it did.

    Raises:
        UserError: a mistake of the user's, or a loss that is no number.
        Failed: anything else.
    """
    failed = done.get("failed")
    if failed and "problems" in failed:
        raise UserError(*failed["problems"])
    if failed:
        raise Failed(failed["error"])


def _move(source: Path, target: Path) -> None:
    """Move a file or folder, from another disk too; the target changes as a whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        shutil.rmtree(target)
    try:
        os.replace(source, target)
    except OSError:
        half = target.with_name(f".{target.name}.half")
        if source.is_dir():
            shutil.rmtree(half, ignore_errors=True)
            shutil.copytree(source, half)
        else:
            shutil.copyfile(source, half)
        os.replace(half, target)
