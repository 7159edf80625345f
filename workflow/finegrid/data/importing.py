"""Import: raw files of any accepted format, or a hub data set at a pinned revision, into one schema.

Reads ``data_config``'s files; writes ``train, validation, test .jsonl`` (rows as in :mod:`finegrid.data.rows`),
``report.json`` and ``timing.json``. The report depends on data and settings alone; seconds are kept apart in
``timing.json``, so that data made anew has the same bytes. Texts are taken as they are: cleaning comes next.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Container, Iterator
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finegrid.data.formats import MissingColumn, RowProblem, convert, recognise
from finegrid.data.hub import hub_rows
from finegrid.data.reading import FileProblem, read_rows
from finegrid.data.rows import (
    SPLITS,
    Problems,
    Progress,
    Row,
    digest,
    draw_order,
    every_few_seconds,
    has_surrogates,
    last_question,
    partial_folder,
    publish,
    quiet,
    read_lines,
    to_line,
)
from finegrid.errors import UserError, nearest
from finegrid.files import write_json
from finegrid.fingerprint import file_hash

if TYPE_CHECKING:
    from finegrid.settings import DataConfig, RunSettings

FILE_KEYS = {"train": "train_file", "validation": "val_file", "test": "test_file"}


def import_data(settings: RunSettings, project: Path, output: Path, progress: Progress = quiet) -> dict[str, Any]:
    """Import the data set of a run's settings and return its report, with ``seconds`` and ``rows_per_second``.

    Args:
        settings: only ``data_config`` is read.
        project: folder that relative paths start from.
        output: folder for ``{train,validation,test}.jsonl``, ``report.json`` and ``timing.json``; nothing is left
            in it on failure.
        progress: told about every 5 s how far it is.

    Raises:
        UserError: a file is missing, empty, damaged, of the wrong encoding or of no known format, rows can't be
            read, or ids come twice; with file and line, the first 20 problems and the number of the others.
    """
    started = time.perf_counter()
    config = settings.data_config
    sources = _sources(config, project)
    run = _Import(config, project, every_few_seconds(progress))
    with partial_folder(output) as partial:
        rows = {split: run.write_split(split, sources[split], partial / f"{split}.jsonl") for split in SPLITS}
        run.problems.stop()
        split_off = _split_off(config, sources, partial, rows)
        prefixed = _make_ids_unique(run.ids, partial, split_off)
        report = {
            "dataset": settings.dataset_name,
            "encoding": config.encoding,
            "files": run.files,
            "rows": rows,
            "split_off": split_off,
            "ids_prefixed_by_split": prefixed,
            "lone_surrogates_replaced": run.surrogates,
        }
        timing = _timing(started, sum(rows.values()))
        write_json(partial / "report.json", report)
        write_json(partial / "timing.json", timing)
        publish(partial, output, [*(f"{split}.jsonl" for split in SPLITS), "timing.json", "report.json"])
    return report | timing


class _Import:
    """What is gathered over the files of one import."""

    def __init__(self, config: DataConfig, project: Path, progress: Progress):
        self.config, self.project, self.progress = config, project, progress
        self.problems = Problems()
        self.files: dict[str, list[dict[str, Any]]] = {}
        # Of each id a number that stands for it: ids and places of a file larger than memory would not fit.
        self.ids = {split: array("Q") for split in SPLITS}
        self.surrogates = 0

    def write_split(self, split: str, sources: list[str], path: Path) -> int:
        """Write the rows of one split and return their number."""
        number = 0
        with path.open("wb") as file:
            for source in sources:
                before, self.files[split] = number, self.files.get(split, [])
                seen: dict[str, Any] = {"file": source}
                try:
                    for row in self._rows(split, source, seen):
                        number += 1
                        file.write(self._line(split, number, row))
                        self.progress(f"{split}: {number:,} rows imported")
                except FileProblem as problem:
                    self.problems.add(f"{source}{f':{problem.line}' if problem.line else ''}: {problem}")
                else:
                    if number == before and not self.problems.count:
                        self.problems.add(f"{source}: the file has no rows; expected some")
                self.files[split].append(seen | {"rows": number - before} | self._version(source))
        self._check_ids(split, path)
        return number

    def _check_ids(self, split: str, path: Path) -> None:
        """Tell of ids that come twice in a split, with both lines."""
        numbers = np.frombuffer(self.ids[split], np.uint64)
        distinct, counts = np.unique(numbers, return_counts=True)
        repeated = set(distinct[counts > 1].tolist())
        if not repeated:
            return
        first: dict[str, str] = {}
        for number, row in zip(self.ids[split], read_lines(path), strict=True):
            if number in repeated:
                known = first.setdefault(row["id"], row["source"])
                if known is not row["source"]:
                    said = f"the id '{row['id']}' is that of {known} too; expected ids that are unique"
                    self.problems.add(f"{row['source']}: {said}")

    def _rows(self, split: str, source: str, seen: dict[str, Any]) -> Iterator[Row]:
        """Yield the rows of one source in our schema, without a settled id."""
        config, form, first = self.config, None, None
        seen["container"], raw = self._read(split, source)
        for line, row in raw:
            place = f"{source}:{line}"
            try:
                if form is None:
                    form = recognise(row, config.format, config.columns)
                    seen["format"] = form.describe()
                    first = line
                messages, own, meta = convert(row, form, config.system_prompt)
            except RowProblem as problem:
                if form is None or (line == first and isinstance(problem, MissingColumn)):
                    raise _of_the_file(str(problem), line, seen["container"]) from None
                self.problems.add(f"{place}: {problem}")
                continue
            yield {"id": own, "messages": messages, "source": place, "meta": meta}

    def _read(self, split: str, source: str) -> tuple[str, Iterator[tuple[int, Row]]]:
        if self.config.dataset:
            return "datasets", hub_rows(self.config, split, self.project)

        def report(line: int, problem: str) -> None:
            self.problems.add(f"{source}:{line}: {problem}")

        return read_rows(self.project / source, self.config.encoding, report)

    def _version(self, source: str) -> dict[str, str]:
        """What names the version of a source for good: a file's content, or the hub's commit, which is in its name."""
        path = self.project / source
        return {"sha256": file_hash(path)} if not self.config.dataset and path.is_file() else {}

    def _line(self, split: str, number: int, row: Row) -> bytes:
        row["id"] = row["id"] or f"{split}-{number}"
        self.ids[split].append(int.from_bytes(digest(row["id"])[:8], "little"))
        try:
            return to_line(row)
        except UnicodeEncodeError:
            self.surrogates += 1
            return to_line(_without_surrogates(row))


# ---------------------------------------------------------------- sources


def _paths(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _sources(config: DataConfig, project: Path) -> dict[str, list[str]]:
    """Return what each split is read from: files as the settings name them, or a split of the hub data set."""
    if config.dataset and config.train_file:
        raise UserError("data_config: both train_file and dataset are set; expected one of them")
    if config.dataset:
        named = {split: getattr(config.dataset, f"{split}_split") for split in SPLITS}
        return {split: [f"{config.dataset.path}[{name}]"] if name else [] for split, name in named.items()}
    if not config.train_file:
        raise UserError("data_config: neither train_file nor dataset is set; expected the training data")
    sources = {split: _paths(getattr(config, key)) for split, key in FILE_KEYS.items()}
    problems = [
        f"data_config.{FILE_KEYS[split]}: {problem}"
        for split, files in sources.items()
        for problem in [_missing(project, file) for file in files]
        if problem
    ]
    if problems:
        raise UserError(*problems)
    return sources


def _missing(project: Path, file: str) -> str | None:
    path = project / file
    if path.is_file():
        return None
    if path.is_dir():
        return f"'{file}' is a folder; expected a file, or a list of files"
    folder = path.parent
    if not folder.is_dir():
        return f"no file '{file}': the folder '{Path(file).parent}' is not there; paths are relative to the project"
    return f"no file '{file}'{nearest(path.name, (found.name for found in folder.iterdir()))}"


def _of_the_file(problem: str, line: int, container: str) -> FileProblem:
    """Return a problem of the first row that is one of the whole file; the columns of csv stand in its header."""
    if container.startswith("csv"):
        return FileProblem(f"{problem}; or does the file lack its header line?", 1)
    return FileProblem(problem, line)


def _without_surrogates(value: Any) -> Any:
    """Replace halves of surrogate pairs, which no UTF-8 file can hold, by U+FFFD (at any depth)."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if has_surrogates(value) else value
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    return [_without_surrogates(item) for item in value] if isinstance(value, list) else value


# ---------------------------------------------------------------- splits and ids


def _split_off(
    config: DataConfig, sources: dict[str, list[str]], partial: Path, rows: dict[str, int]
) -> dict[str, dict[str, Any]]:
    """Move rows of train into the splits that have no file but a size; change ``rows``; return what was moved.

    Rows with the same question go together, in an order drawn by ``sample_seed``: no question ends on both sides.

    Raises:
        UserError: a size is out of range or leaves nothing to train on.
    """
    total = rows["train"]
    sizes = {split: _size(config, split, total) for split in ("test", "validation") if not sources[split]}
    if not any(sizes.values()):
        return {}
    if sum(sizes.values()) >= total:
        raise UserError(
            f"data_config.validation_size, data_config.test_size: {sum(sizes.values()):,} rows of {total:,} are to be "
            "split off train; expected to leave rows to train on"
        )
    questions, raw = _questions(partial / "train.jsonl")
    distinct, first, of_row, counts = np.unique(questions, return_index=True, return_inverse=True, return_counts=True)
    target = np.zeros(len(distinct), dtype=np.int8)  # of each question, a place in SPLITS: train, if nothing else
    for split, size in sizes.items():
        left = np.flatnonzero(target == 0)
        places = bytearray()
        for place in first[left].tolist():
            places += draw_order(config.sample_seed, split, raw[16 * place : 16 * place + 16].hex())
        order = left[np.frombuffer(places, "S16").argsort(kind="stable")]
        target[_groups(order, counts, size)] = SPLITS.index(split)
    targets = target[of_row]
    with (
        (partial / "train.jsonl").open("rb") as whole,
        (partial / "left.jsonl").open("wb") as train,
        (partial / "test.jsonl").open("ab") as test,
        (partial / "validation.jsonl").open("ab") as validation,
    ):
        files = {"train": train, "validation": validation, "test": test}
        for line, place in zip(whole, targets, strict=True):
            files[SPLITS[place]].write(line)
    (partial / "left.jsonl").replace(partial / "train.jsonl")
    moved = dict(zip(SPLITS, np.bincount(targets, minlength=len(SPLITS)).tolist(), strict=True))
    rows.update({split: moved[split] for split in ("train", *sizes) if split == "train" or sizes[split]})
    if not rows["train"]:
        raise UserError(
            f"data_config.validation_size, data_config.test_size: all {total:,} rows of train are split off, for rows "
            "with the same question go together; expected smaller sizes"
        )
    return {split: {"asked": size, "rows": moved[split]} for split, size in sizes.items() if size}


def _questions(path: Path) -> tuple[np.ndarray, bytearray]:
    """Return a digest of each row's question, as a column and as bytes."""
    raw = bytearray()
    for row in read_lines(path):
        raw += digest(last_question(row["messages"]))
    return np.frombuffer(raw, "S16"), raw


def _groups(order: np.ndarray, counts: np.ndarray, size: int) -> list[int]:
    """Return the first groups of an order whose rows fit into a size; at least one if anything is asked."""
    chosen, room = [], size
    for group in order.tolist():
        if counts[group] <= room:
            chosen.append(group)
            room -= counts[group]
        if not room:
            break
    return chosen or order[: 1 if size else 0].tolist()


def _size(config: DataConfig, split: str, total: int) -> int:
    size = getattr(config, f"{split}_size") or 0
    if isinstance(size, float) and not size.is_integer():
        if not 0 < size < 1:
            raise UserError(f"data_config.{split}_size: {size} found; expected a share below 1 or a number of rows")
        return max(1, round(size * total))
    if size < 0 or (isinstance(size, float) and size == 1):
        raise UserError(f"data_config.{split}_size: {size} found; expected a share below 1 or a number of rows")
    return int(size)


def _make_ids_unique(ids: dict[str, array], partial: Path, split_off: Container[str]) -> bool:
    """Put the split before every id if files of different splits use the same ids; return whether it was needed."""
    numbers = [np.frombuffer(ids[split], np.uint64) for split in SPLITS]
    if not any(len(np.intersect1d(one, other)) for one, other in combinations(numbers, 2)):
        return False
    for split in SPLITS:
        # By the file it came from: rows split off train keep the name that they have there.
        origin = "train" if split in split_off else split
        path, renamed = partial / f"{split}.jsonl", partial / "renamed.jsonl"
        with renamed.open("wb") as file:
            for row in read_lines(path):
                file.write(to_line(row | {"id": f"{origin}-{row['id']}"}))
        renamed.replace(path)
    return True


def _timing(started: float, rows: int) -> dict[str, float]:
    seconds = time.perf_counter() - started
    return {"seconds": round(seconds, 3), "rows_per_second": round(rows / seconds, 1)}
