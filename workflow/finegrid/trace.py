"""From a figure, a table or a number back to the raw data, with every hash checked on the way.

The links are the records of the jobs (``jobs.jsonl``): what each made, of which files, with their SHA-256. Beside them
stand what a run's and a figure's provenance and the base models' manifests say of the same files, and DVC's hashes of
raw data. A file that differs from any of these is a broken link; one that is not here is held to what they agree on.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finegrid import layout, records
from finegrid.errors import UserError, nearest
from finegrid.figures import FIGURES
from finegrid.records import Hashes, Job

MACRO = re.compile(r"\\newcommand\{\\(\w+)\}\{(.*)\}$")
KINDS = (".pdf", ".png", ".csv")  # of a figure
SHOWN = 3  # jobs of a rule that are printed; the others are checked and counted


@dataclass
class Chain:
    """What a file rests on: jobs from the last to the first, and what each hash on the way came to."""

    jobs: list[Job]
    claims: dict[str, list[tuple[str, str]]]  # path -> (SHA-256, who says so)
    checked: int = 0
    absent: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


def trace(target: str, study: str | None, say=print) -> bool:
    """Print the chain from a figure, table or number back to raw data; return whether every hash holds.

    Raises:
        UserError: there is no such figure, table or number, or no record of how it was made.
    """
    name, path, number = _find(target, study)
    chain = _chain(name, path)
    with Hashes() as hashes:
        _check(chain, hashes)
    if number:
        say(f"\\{target.lstrip(chr(92))} = {number}")
    _print(chain, path, say)
    for problem in chain.broken:
        say(f"BROKEN  {problem}")
    if chain.absent:
        shown = ", ".join(records.some(chain.absent))
        say(f"not here, so not read: {shown}; `make restore STUDY={name}` brings them")
    held = "every hash holds" if not chain.broken else f"{len(chain.broken)} broken"
    absent = f"; {len(chain.absent)} files are not here" if chain.absent else ""
    say(f"{path}: {chain.checked} files read, {held}{absent}")
    return not chain.broken


def _find(target: str, study: str | None) -> tuple[str, str, str | None]:
    """Return study, path and (of a number) value of what is traced."""
    path = Path(target)
    parts = path.parts
    if len(parts) > 2 and parts[0] == layout.RESULTS.name:
        if not path.is_file():
            raise UserError(f"trace: there is no {target}; expected a file of {layout.RESULTS}")
        return parts[1], path.as_posix(), None
    names = [study] if study else sorted(found.parent.name for found in layout.RESULTS.glob("*/plan.json"))
    if not names:
        raise UserError(f"trace: no study has results in {layout.RESULTS}; expected one that snakemake has run")
    if path.stem in FIGURES and path.suffix in ("", *KINDS):
        file = target if path.suffix else f"{target}.pdf"
        return _only(target, [(name, layout.RESULTS / name / "figures" / file) for name in names])
    files = [(name, layout.RESULTS / name / place / target) for name in names for place in ("tables", "")]
    if any(file.is_file() for _, file in files):
        return _only(target, files)
    return _number(target.lstrip("\\"), names)


def _only(target: str, found: list[tuple[str, Path]]) -> tuple[str, str, None]:
    found = [(name, path) for name, path in found if path.is_file()]
    if len(found) != 1:
        there = ", ".join(path.as_posix() for _, path in found) or "none"
        raise UserError(f"trace: '{target}': there is {there}; expected one: name the study (--study NAME)")
    return found[0][0], found[0][1].as_posix(), None


def _number(macro: str, names: list[str]) -> tuple[str, str, str]:
    known: dict[str, str] = {}
    for name in names:
        path = layout.RESULTS / name / "tables/numbers.tex"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        values = dict(match.groups() for line in lines if (match := MACRO.match(line)))
        if macro in values:
            return name, path.as_posix(), values[macro]
        known |= values
    raise UserError(
        f"trace: '{macro}' is no figure ({', '.join(FIGURES)}), table or number of {', '.join(names)}"
        f"{nearest(macro, [*known, *FIGURES])}"
    )


# ---------------------------------------------------------------- the chain


def _chain(study: str, path: str) -> Chain:
    jobs = {output: job for job in records.read(study) for output in job.outputs}
    if path not in jobs:
        raise UserError(
            f"trace: {path} is not in {records.records_file(study)}; expected a file that snakemake made in this study"
        )
    chain = Chain([], {})
    waiting, seen = [path], {path}
    while waiting:
        job = jobs.get(waiting.pop(0))
        if job is None or job in chain.jobs:
            continue
        chain.jobs.append(job)
        for output, digest in job.outputs.items():
            _claim(chain, output, digest, f"the record of {job.rule}")
        for name, digest in job.inputs.items():
            _claim(chain, name, digest, f"{job.rule} of {_short(job)}")
            if name not in seen:
                seen.add(name)
                waiting.append(name)
    for output in [output for job in chain.jobs for output in job.outputs]:
        for record in (output, *_beside(output)):
            for file, digest in _provenance(record):
                _claim(chain, file, digest, record)
    for name in list(chain.claims):
        for file, digest in _manifest(name):
            _claim(chain, file, digest, name)
    return chain


def _claim(chain: Chain, path: str, digest: str | None, who: str) -> None:
    claims = chain.claims.setdefault(path, [])
    if digest and (digest, who) not in claims:
        claims.append((digest, who))


def _beside(path: str) -> list[str]:
    """The provenance of a scoring, which is no output of its rule: beside those of the trainings."""
    parts = Path(path).parts
    return [f"{'/'.join(parts[:-2])}/provenance/evaluation/{parts[-1]}"] if parts[-2:-1] == ("metrics",) else []


def _provenance(path: str) -> Iterator[tuple[str, str]]:
    """What a provenance file says of the files that were read and, of a run, of the weights that came out."""
    if ("/provenance" not in path and "/figures/" not in path) or not path.endswith(".json"):
        return
    record = _json(path)
    for entry in (record.get("inputs") or {}).values():
        if entry.get("sha256"):
            yield entry["file"], entry["sha256"]
    yield from (record.get("outputs") or {}).items()


def _manifest(path: str) -> Iterator[tuple[str, str]]:
    """What a base model's manifest says of its files; a hub model's folder has the manifest's name."""
    if Path(path).parent != layout.MODELS or not path.endswith(".json"):
        return
    record = _json(path)
    folder = Path(path).with_suffix("") if record.get("revision") else Path(record.get("model_name_or_path", ""))
    for name, entry in (record.get("files") or {}).items():
        yield (folder / name).as_posix(), entry["sha256"]


def _json(path: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


# ---------------------------------------------------------------- checking


def _check(chain: Chain, hashes: Hashes) -> None:
    for path, claims in chain.claims.items():
        if path.startswith(records.DECLARED):
            continue  # comments may change in them: a run's id holds its settings
        here = hashes.of(path)
        if here is None and not Path(path).is_dir():
            chain.absent.append(path)
        elif here is not None:
            chain.checked += 1
            claims = [(here, "here"), *claims]
        chain.broken += _differences(path, claims)
        version = _dvc_hash(path)
        if version and here is not None and _md5(path) != version[0]:
            chain.broken.append(f"{path}: its MD5 is not that of {version[1]}")


def _differences(path: str, claims: list[tuple[str, str]]) -> list[str]:
    """Compare what is said of a file with the first that was said: what it is here, if it is here."""
    if not claims:
        return []
    digest, who = claims[0]
    return [
        f"{path}: {digest[:12]}… {'here' if who == 'here' else f'by {who}'}, but {other[:12]}… by {source}"
        for other, source in claims[1:]
        if other != digest
    ]


def _dvc_hash(path: str) -> tuple[str, str] | None:
    """Return the MD5 of a file that was put under DVC by itself, and the file that says so."""
    import yaml

    file = Path(f"{path}.dvc")
    if not file.is_file():
        return None
    try:
        out = yaml.safe_load(file.read_text(encoding="utf-8"))["outs"][0]
        return out["md5"], file.as_posix()
    except (yaml.YAMLError, KeyError, TypeError, IndexError):
        raise UserError(f"{file}: not a file of DVC's; expected `outs` with an `md5`") from None


def _md5(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


# ---------------------------------------------------------------- printing


def _print(chain: Chain, path: str, say) -> None:
    broken = {problem.split(":", 1)[0] for problem in chain.broken}
    count: Counter[str] = Counter()
    for job in chain.jobs:
        count[job.rule] += 1
        is_broken = bool(broken & {*job.outputs, *job.inputs})
        if count[job.rule] <= SHOWN or is_broken:
            say(f"{job.rule:<14} {_short(job)}{_about(job)}")
    for rule, number in count.items():
        if number > SHOWN:
            say(f"{rule:<14} … {number} in all")
    made = {output for job in chain.jobs for output in job.outputs}
    for name in sorted(set(chain.claims) - made):
        if not name.startswith(records.DECLARED) and any(name in job.inputs for job in chain.jobs):
            version = _dvc_hash(name)
            said = f", DVC version {version[0][:12]}" if version else ""
            digest = chain.claims[name][0][0][:12] if chain.claims[name] else "no hash"
            say(f"{'source':<14} {name}  {digest}{said}")


def _short(job: Job) -> str:
    first, *others = sorted(job.outputs)
    return f"{first}{f' + {len(others)}' if others else ''}"


def _about(job: Job) -> str:
    """What the provenance beside a job's results says in a few words."""
    for output in job.outputs:
        if "/provenance" in output or ("/figures/" in output and output.endswith(".json")):
            record = _json(output)
            words = [f"commit {record['commit'][:12]}" if record.get("commit") else "no commit"]
            words += ["dirty"] if record.get("dirty") else []
            words += [f"code {record['code'][:8]}"] if isinstance(record.get("code"), str) else []
            words += [f"seed {record['seed']}"] if record.get("seed") is not None else []
            words += [str(record["device"])] if record.get("device") else []
            return f"  ({', '.join(words)})"
    return ""
