"""How each result was made, kept in git: what Snakemake must know of finished jobs after a clone or a checkout.

Snakemake remembers the parameters, command, inputs and input checksums of each job in ``.snakemake/metadata``, which
stays on one machine and knows of one commit. ``results/<study>/jobs.jsonl`` holds the same, a line a job, with the
SHA-256 of what came out. It is written at the end of every snakemake that did something, and put back into the
metadata by the next one that finds another version of it there: after a clone, a pull or a checkout. From then on
there is nothing to do, and an edit is seen as if the jobs had run here.

Put back is only what is true of the files at hand: a result that is not the one that was recorded stops snakemake.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finegrid import layout
from finegrid.errors import UserError
from finegrid.files import write_json, write_text
from finegrid.fingerprint import file_hash

NAME = "jobs.jsonl"
STATE = Path(".snakemake/finegrid")
HASHES = STATE / "hashes.json"
# What Snakemake compares, and what tells a person how a file was made. Times are not among them: the same results have
# the same lines.
KEPT = ("rule", "params", "code", "shellcmd", "log", "software_stack_hash", "container_img_url")
DECLARED = ("config/studies/", "config/recipes/")  # the ids of runs and data hold what matters of these files
FEW = 8


@dataclass(frozen=True)
class Job:
    """A finished job: ``outputs`` and ``inputs`` map paths to SHA-256 (None: a folder, or it was too large to hash)."""

    outputs: dict[str, str | None]
    inputs: dict[str, str | None]
    facts: dict[str, Any]

    @property
    def rule(self) -> str:
        """The rule that made it."""
        return self.facts["rule"]


@dataclass
class Found:
    """What differs from the records: results that are other files, and sources that have changed since."""

    results: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def records_file(study: str) -> Path:
    """Return the file with the records of a study."""
    return layout.RESULTS / study / NAME


# ---------------------------------------------------------------- writing


def write(study: str) -> None:
    """Write the records of all jobs whose results lie in the study's folder, and of those that these rest on.

    A study without a plan has none yet: nothing is written.
    """
    folder = layout.RESULTS / study
    if not (folder / "plan.json").is_file():
        return
    with Hashes() as hashes:
        lines = sorted(_line(job) for job in _finished_jobs(folder, hashes))
    if lines:
        write_text(records_file(study), "".join(f"{line}\n" for line in lines))
        _mark(study)


def _finished_jobs(folder: Path, hashes: Hashes) -> Iterator[Job]:
    """Group the results by what Snakemake remembers of them: the outputs of one job share it."""
    persistence = _persistence()
    waiting = [path.as_posix() for path in _results(folder)]
    seen, jobs = set(waiting), {}
    while waiting:
        path = waiting.pop()
        record = persistence._read_record(path)
        if record is None or record.rule is None:
            continue
        checksums = {name: _bare(value) for name, value in (record.input_checksums or {}).items()}
        inputs = {name: checksums.get(name) for name in record.input or []}
        facts = {name: getattr(record, name) for name in KEPT}
        key = json.dumps([facts, inputs])
        jobs.setdefault(key, Job({}, inputs, facts)).outputs[path] = hashes.of(path)
        new = [name for name in (*inputs, *_siblings(path, record, persistence)) if name not in seen]
        seen.update(new)
        waiting += new
    yield from jobs.values()


def _results(folder: Path) -> Iterator[Path]:
    """The study's files, and each folder of what a run trained."""
    runs = folder / "runs"
    for path in folder.rglob("*"):
        depth = len(path.relative_to(runs).parts) if path.is_relative_to(runs) else 0
        if (path.is_file() and depth <= 2) or (path.is_dir() and depth == 2):
            yield path


def _siblings(path: str, record: Any, persistence: Any) -> Iterator[str]:
    """What the same job made beside an output, such as rejected rows, which no other job reads.

    Snakemake takes a job's inputs for changed if it knows nothing of one of its outputs. Of a study's folder all files
    are looked at anyway.
    """
    if Path(path).is_relative_to(layout.RESULTS):
        return
    for beside in sorted(Path(path).parent.glob("*")):
        other = persistence._read_record(beside.as_posix())
        if other is not None and (other.rule, other.shellcmd) == (record.rule, record.shellcmd):
            yield beside.as_posix()


def _line(job: Job) -> str:
    content = {"outputs": dict(sorted(job.outputs.items())), **job.facts, "inputs": dict(sorted(job.inputs.items()))}
    return json.dumps(content, ensure_ascii=False)


def _bare(checksum: str | None) -> str | None:
    """Snakemake writes ``sha256:<hex>``; another algorithm can't be compared to ours."""
    if checksum is None or ":" not in checksum:
        return checksum
    name, digest = checksum.split(":", 1)
    return digest if name == "sha256" else None


# ---------------------------------------------------------------- reading and putting back


def read(study: str) -> list[Job]:
    """Return the recorded jobs of a study.

    Raises:
        UserError: there are none, or a line is damaged, such as by a merge.
    """
    path = records_file(study)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected the records of a study that snakemake has run (and git has)")
    jobs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            content = json.loads(line)
            outputs, inputs = content.pop("outputs"), content.pop("inputs")
            jobs.append(Job(outputs, inputs, {name: content[name] for name in KEPT}))
        except (ValueError, KeyError, AttributeError):
            raise UserError(
                f"{path}:{number}: not a record of a job; after a merge, take one side of it "
                f"(`git checkout --ours {path}`) and run snakemake"
            ) from None
    return jobs


def is_put_back(study: str) -> bool:
    """Return whether Snakemake's metadata is that of the records which lie there, or there are none."""
    path = records_file(study)
    marker = STATE / "jobs" / study
    return not path.is_file() or (marker.is_file() and marker.read_text() == file_hash(path))


def put_back(study: str) -> list[str]:
    """Make Snakemake know the finished jobs of a study, if it doesn't yet; return what a person should hear of it.

    A source that is not the recorded one, such as an edited raw file, gets today's date: Snakemake then compares its
    content and reruns what rests on it.

    Raises:
        UserError: results at hand are not the recorded ones, or the records are damaged.
    """
    if is_put_back(study):
        return []
    jobs = read(study)
    found = compare(jobs)
    if found.results:
        raise UserError(
            *(
                f"{path}: not the file that {records_file(study)} tells of; expected it as this commit has it"
                for path in some(found.results)
            ),
            f"`dvc checkout` (or `make restore STUDY={study}`) brings what belongs to this commit; "
            "what is deleted is made anew when it is needed",
        )
    for path in found.sources:
        os.utime(path)
    persistence = _persistence()
    differing = set(found.sources)
    for job in jobs:
        for path in job.outputs:
            if path not in differing:
                persistence._write_record(path, _metadata(job))
    _mark(study)
    notes = [f"study {study}: took over {len(jobs)} finished jobs from {records_file(study)}"]
    return notes + [f"{path}: not the version that study {study} was made from" for path in found.sources]


def compare(jobs: Iterable[Job]) -> Found:
    """Compare the files at hand with the records, by content: results, and sources that no recorded job made.

    Clean rows and tokens are shared between studies and may be newer than this study's records: they count as sources.
    Folders (what a run trained) have their hashes in the run's provenance and in dvc.lock.
    """
    jobs = list(jobs)
    made = {path: digest for job in jobs for path, digest in job.outputs.items()}
    sources = {path: digest for job in jobs for path, digest in job.inputs.items() if path not in made}
    sources = {path: digest for path, digest in sources.items() if not path.startswith(DECLARED)}
    own = {path: digest for path, digest in made.items() if Path(path).is_relative_to(layout.RESULTS)}
    shared = {path: digest for path, digest in made.items() if path not in own}
    found = Found()
    with Hashes() as hashes:
        for expected, differing in ((own, found.results), (sources | shared, found.sources)):
            for path, digest in sorted(expected.items()):
                if not os.path.exists(path):
                    found.missing.append(path)
                elif digest is not None and hashes.of(path) != digest:
                    differing.append(path)
    return found


def some(names: list[str]) -> list[str]:
    """Return the first few of many names."""
    return names if len(names) <= FEW else [*names[: FEW - 1], f"{names[FEW - 1]} and {len(names) - FEW} more files"]


def _metadata(job: Job) -> Any:
    from snakemake.persistence import RECORD_FORMAT_VERSION, MetadataRecord

    checksums = {path: f"sha256:{digest}" for path, digest in job.inputs.items() if digest}
    return MetadataRecord(
        input=sorted(job.inputs),
        input_checksums=checksums,
        record_format_version=RECORD_FORMAT_VERSION,
        incomplete=False,
        **job.facts,
    )


def _persistence() -> Any:
    """Snakemake's own store of metadata, without its lock: the workflow that runs has that."""
    from snakemake.persistence.file import FilePersistence

    return FilePersistence(nolock=True)


def _mark(study: str) -> None:
    write_text(STATE / "jobs" / study, file_hash(records_file(study)))


# ---------------------------------------------------------------- hashes


class Hashes:
    """SHA-256 of files, remembered while size and date stay the same; to be used in a ``with``."""

    def __init__(self) -> None:
        try:
            self._known = json.loads(HASHES.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._known = {}
        self._is_new = False

    def __enter__(self) -> Hashes:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_new:
            write_json(HASHES, self._known)

    def of(self, path: str | Path) -> str | None:
        """Return a file's SHA-256; None for a folder and for what is not there."""
        name = os.fspath(path)
        try:
            seen = os.stat(name)
        except OSError:
            return None
        if not os.path.isfile(name):
            return None
        key = [seen.st_size, seen.st_mtime_ns, seen.st_ino]
        known = self._known.get(name)
        if known is None or known[:3] != key:
            known = [*key, file_hash(Path(name))]
            self._known[name] = known
            self._is_new = True
        return known[3]
