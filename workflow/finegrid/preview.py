"""Rows and tokens of data that has not been through the data stage yet: a look at the raw files, no model needed.

Reads ``data_config``'s raw files: lines are counted, some thousand rows spread over each file are read, and their
characters are turned into tokens by a stated number of characters a token. What comes out is close enough to plan
with and says how it came about; as soon as the data stage has run, its token report takes this place.

Known and taken into account: bounds on characters, empty texts, both length limits with their policies, splits made
by size, fractions and subsets. Not known: duplicates and leaks, so that rows are an upper bound.
"""

from __future__ import annotations

import copy
import gzip
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finegrid.settings import DataConfig
from finegrid.shapes import model_config

if TYPE_CHECKING:
    from finegrid.data.formats import Format
    from finegrid.data.rows import Message
    from finegrid.settings import ModelSettings, RunSettings

SAMPLE = 1000  # rows read of a file at least, if it has them; twice as many at most
READ = 64 << 20  # bytes of text that are looked through; what lies behind them is taken to be like it
CHARACTERS = 4.5  # a token, alphabetic scripts: English prose has 4.9 (SmolLM2, Qwen), Markdown and code 3.4 to 4.1
WIDE_CHARACTERS = 1.6  # a token, Chinese, Japanese, Korean, with a large vocabulary: Qwen has 1.7
WIDE_CHARACTERS_SMALL = 0.6  # the same with a vocabulary made for English (SmolLM2: 0.59)
SMALL_VOCABULARY = 65_536
TURN = 5  # tokens of the chat template around a message (ChatML)
GENERATION = 3  # tokens that open an answer
END = 1  # the end of turn, which is taught
DEFAULT_SYSTEM = 15  # tokens that many templates put into a system message of their own; its TURN comes on top

_WIDE = re.compile("[\u1100-\u11ff\u2e80-\u9fff\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef]")
_SPLITS = {"train": "train_file", "validation": "val_file", "test": "test_file"}


def data_preview(settings: RunSettings, project: Path, vocabulary: int | None = None) -> dict[str, Any]:
    """Return what the data stage's token report will hold, as far as the raw files tell.

    Args:
        settings: the run's settings; its data, its length limits and its model's name are read.
        project: the folder that paths are relative to.
        vocabulary: the tokenizer's tokens; None looks into the base model's config.json, and where there is none it is
            taken as a large one. It decides what Chinese costs.

    Returns:
        ``splits``: of ``train, validation, test`` the ``rows`` that are left, their ``label_tokens`` and ``tokens``
        (of one pass), the longest ``prompt_max`` and ``answer_max`` (tokens, after the limits, of the rows that were
        read), and the rows whose ``truncated_prompts`` and ``truncated_answers`` are cut or ``dropped`` for their
        length; all None where it can't be known, 0 where there is no such split. ``source``: how the numbers came
        about. ``unknown``: why some are None, else None.
    """
    config = settings.data_config
    files = [name for key in _SPLITS.values() for name in _paths(getattr(config, key))]
    found = tuple(_version(project / name) for name in files)
    vocabulary = vocabulary or _vocabulary(settings.model, project)
    cached = _preview(
        config.model_dump_json(exclude={"limits", "num_proc", "name"}),
        (settings.max_input_length, settings.max_output_length),
        vocabulary,
        project,
        found,
    )
    return copy.deepcopy(cached)


@lru_cache(maxsize=4096)
def _preview(config_json: str, limits: tuple[int, int], vocabulary: int | None, project: Path, _files: tuple) -> dict:
    config = DataConfig.model_validate_json(config_json)
    if config.dataset:
        return _unknown(f"{config.dataset.path}: a data set for `datasets` is not looked into before the data stage")
    tables, reasons = {}, []
    for split, key in _SPLITS.items():
        try:  # a split without a file has no rows, unless they are split off train below
            tables[split] = [_read(project, name, config) for name in _paths(getattr(config, key))]
        except _Unreadable as problem:
            tables[split] = None
            reasons.append(str(problem))
    if tables["train"] is None or not tables["train"]:
        return _unknown("; ".join(reasons) or "data_config.train_file is not set")
    tokens = _TokenCount(vocabulary, *limits)
    splits = _split_off({split: _measure(files, config, tokens) for split, files in tables.items()}, config)
    read = sum(len(file.rows) for files in tables.values() for file in files or ())
    total = sum(file.total for files in tables.values() for file in files or ())
    exact = all(file.counted for files in tables.values() for file in files or ())
    return {
        "splits": {split: _drawn(measure, split, config) for split, measure in splits.items()},
        "source": (
            f"estimated from the raw files: {read:,} of {'' if exact else 'about '}{total:,} rows read, "
            f"{tokens.describe()}; duplicates and leaks are not known, so rows are at most"
        ),
        "unknown": "; ".join(reasons) or None,
    }


def _unknown(reason: str) -> dict[str, Any]:
    splits = {split: dict.fromkeys(_Measure.__dataclass_fields__) for split in _SPLITS}
    return {"splits": splits, "source": "not known before the data stage", "unknown": reason}


def _paths(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _version(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _vocabulary(model: ModelSettings, project: Path) -> int | None:
    found = model_config(model, project)
    if found is None:
        return None
    return found[0].get("vocab_size") or found[0].get("padded_vocab_size")


# ---------------------------------------------------------------- reading


class _Unreadable(Exception):
    """Why a file tells nothing; the data stage says what to do about it."""


@dataclass(frozen=True)
class _Row:
    """Characters of a row, (alphabetic, wide) each: ``earlier`` are answers before the last that are taught too."""

    prompt: tuple[int, int]
    answer: tuple[int, int]
    earlier: tuple[int, int]
    messages: int
    system: bool
    empty: bool


@dataclass(frozen=True)
class _File:
    """A file's sampled rows and how many it has; ``counted`` tells whether that number was counted to the end."""

    rows: tuple[_Row, ...]
    total: int
    counted: bool


def _read(project: Path, name: str, config: DataConfig) -> _File:
    path = project / name
    version = _version(path)
    if version is None:
        raise _Unreadable(f"{name}: the file is not there yet")
    columns = tuple(sorted((config.columns or {}).items()))
    fold = config.cleaning.white_space
    try:
        return _sample(path, version, config.encoding, config.format, columns, config.system_prompt, fold)
    except _Unreadable as problem:
        raise _Unreadable(f"{name}: {problem}") from None


@lru_cache(maxsize=1024)
def _sample(
    path: Path, _version: tuple, encoding: str, wanted: str, columns: tuple, system_prompt: str | None, fold: bool
) -> _File:
    from finegrid.data.formats import RowProblem, convert, recognise
    from finegrid.data.reading import FileProblem

    try:
        raw, total, counted = _raw_rows(path, encoding)
        form: Format = recognise(raw[0], wanted, dict(columns) or None)
    except (FileProblem, RowProblem, OSError, EOFError, UnicodeError, IndexError) as problem:
        raise _Unreadable(f"can't be looked into ({problem})") from None
    rows = []
    for row in raw:
        try:
            rows.append(_characters(convert(row, form, system_prompt)[0], fold))
        except RowProblem:
            continue  # the data stage names them all
    if not rows:
        raise _Unreadable("can't be looked into (no row could be read)")
    return _File(tuple(rows), total, counted)


def _raw_rows(path: Path, encoding: str) -> tuple[list[dict], int, bool]:
    """Return some rows of a file, how many it has, and whether that number was counted to the end."""
    from finegrid.data.reading import read_rows

    kind, rows = read_rows(path, encoding, lambda line, problem: None)
    zipped = kind.endswith("gzip")
    if kind.startswith("jsonl") and "a\n".encode(encoding).endswith(b"a\n"):
        return _spread(path, zipped, encoding)
    first = [row for _, row in _first(rows, 2 * SAMPLE)]
    if len(first) < 2 * SAMPLE:
        return first, len(first), True
    if kind.startswith("parquet") and not zipped:
        from pyarrow import parquet

        return first, parquet.read_metadata(path).num_rows, True
    return first, _count(path, zipped, encoding, kind, first), False


def _first(rows: Iterator, count: int) -> Iterator:
    for _, row in zip(range(count), rows, strict=False):
        yield row


def _spread(path: Path, zipped: bool, encoding: str) -> tuple[list[dict], int, bool]:
    """Return rows from all over a file of one JSON object a line: every n-th line, n doubling as it gets longer."""
    kept: list[bytes] = []
    lines, step, seen = 0, 1, 0
    with path.open("rb") as file:
        text = gzip.GzipFile(fileobj=file) if zipped else file
        for line in text:
            seen += len(line)
            if not line.isspace():
                if lines % step == 0:
                    kept.append(line)
                    if len(kept) > 2 * SAMPLE:
                        kept, step = kept[::2], step * 2
                lines += 1
            if seen > READ:
                break
        else:
            return _objects(kept, encoding), lines, True
        share = file.tell() / path.stat().st_size
    return _objects(kept, encoding), round(lines / share), False


def _objects(lines: list[bytes], encoding: str) -> list[dict]:
    rows = []
    for line in lines:
        try:
            row = json.loads(line.decode(encoding).removeprefix("\ufeff"))
        except (ValueError, RecursionError):
            continue
        rows += [row] if isinstance(row, dict) else []
    return rows


def _count(path: Path, zipped: bool, encoding: str, kind: str, first: Sequence[dict]) -> int:
    """Return about how many rows a csv or json file has: by its text's length and that of its first rows."""
    with path.open("rb") as file:
        data = gzip.GzipFile(fileobj=file).read(READ) if zipped else file.read(READ)
        share = file.tell() / path.stat().st_size
    text = data.decode(encoding, "ignore")
    if kind.startswith("json"):
        key = json.dumps(next(iter(first[0])), ensure_ascii=False)
        return round(len(re.findall(re.escape(key) + r"\s*:", text)) / share)
    lines = sum(1 + sum(str(cell).count("\n") for cell in row.values()) for row in first)
    return round((text.count("\n") - 1) * len(first) / lines / share)


def _characters(messages: list[Message], fold: bool) -> _Row:
    counts = [_count_characters(message["content"], fold) for message in messages]
    *before, answer = counts
    taught = [
        count
        for count, message in zip(before, messages, strict=False)
        if message["role"] == "assistant" and message.get("loss", True)
    ]
    roles = {message["role"] for message, (narrow, wide) in zip(messages, counts, strict=True) if not narrow + wide}
    return _Row(
        prompt=_sum(before),
        answer=answer,
        earlier=_sum(taught),
        messages=len(messages),
        system=messages[0]["role"] == "system",
        empty=bool(roles & {"user", "assistant"}),
    )


def _count_characters(text: str, fold: bool) -> tuple[int, int]:
    if fold:
        text = re.sub("  +", " ", text).strip() if "  " in text else text.strip()
    wide = 0 if text.isascii() else len(_WIDE.findall(text))
    return len(text) - wide, wide


def _sum(counts: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return sum(narrow for narrow, _ in counts), sum(wide for _, wide in counts)


# ---------------------------------------------------------------- tokens


@dataclass(frozen=True)
class _TokenCount:
    """Turns characters into tokens, and holds them against the length limits."""

    vocabulary: int | None
    max_input: int
    max_output: int

    @property
    def wide(self) -> float:
        small = self.vocabulary is not None and self.vocabulary < SMALL_VOCABULARY
        return WIDE_CHARACTERS_SMALL if small else WIDE_CHARACTERS

    def content(self, count: tuple[int, int]) -> float:
        return count[0] / CHARACTERS + count[1] / self.wide

    def prompt(self, row: _Row) -> float:
        system = 0 if row.system else TURN + DEFAULT_SYSTEM
        return self.content(row.prompt) + TURN * (row.messages - 1) + system + GENERATION

    def answer(self, row: _Row) -> float:
        return self.content(row.answer) + END

    def describe(self) -> str:
        return (
            f"{CHARACTERS} characters a token ({self.wide} of Chinese, Japanese, Korean), "
            f"{TURN} tokens of template a message"
        )


@dataclass(frozen=True)
class _Measure:
    """Rows and tokens of a split, as floats; ``*_max`` of a row, the others of all rows together."""

    rows: float = 0.0
    label_tokens: float = 0.0
    tokens: float = 0.0
    prompt_max: float = 0.0
    answer_max: float = 0.0
    truncated_prompts: float = 0.0
    truncated_answers: float = 0.0
    dropped: float = 0.0

    def plus(self, other: _Measure) -> _Measure:
        sums = {key: getattr(self, key) + getattr(other, key) for key in self.__dataclass_fields__}
        sums |= {key: max(getattr(self, key), getattr(other, key)) for key in ("prompt_max", "answer_max")}
        return _Measure(**sums)

    def times(self, share: float) -> _Measure:
        scaled = {key: getattr(self, key) * share for key in self.__dataclass_fields__}
        return _Measure(**scaled | {"prompt_max": self.prompt_max, "answer_max": self.answer_max})


def _measure(files: list[_File] | None, config: DataConfig, tokens: _TokenCount) -> _Measure | None:
    if files is None:
        return None
    total = _Measure()
    for file in files:
        kept = [row for row in file.rows if _passes(row, config)]
        measured = _Measure()
        for row in kept:
            measured = measured.plus(_measure_row(row, config, tokens))
        total = total.plus(measured.times(file.total / len(file.rows)))
    return total


def _passes(row: _Row, config: DataConfig) -> bool:
    """Return whether cleaning's bounds keep the row; its duplicates and leaks are another matter."""
    cleaning, prompt, answer = config.cleaning, sum(row.prompt), sum(row.answer)
    return (
        not (cleaning.empty and row.empty)
        and cleaning.min_prompt_chars <= prompt <= (cleaning.max_prompt_chars or prompt)
        and cleaning.min_answer_chars <= answer <= (cleaning.max_answer_chars or answer)
    )


def _measure_row(row: _Row, config: DataConfig, tokens: _TokenCount) -> _Measure:
    prompt, answer = tokens.prompt(row), tokens.answer(row)
    cut_prompt, cut_answer = prompt > tokens.max_input, answer > tokens.max_output
    if (cut_prompt and config.truncation.input == "drop") or (cut_answer and config.truncation.output == "drop"):
        return _Measure(dropped=1)
    kept_prompt, kept_answer = min(prompt, tokens.max_input), min(answer, tokens.max_output)
    # What is cut from a prompt takes its earlier answers along, in proportion.
    earlier = tokens.content(row.earlier) * kept_prompt / prompt
    return _Measure(
        rows=1,
        label_tokens=kept_answer + earlier,
        tokens=kept_prompt + kept_answer,
        prompt_max=kept_prompt,
        answer_max=kept_answer,
        truncated_prompts=float(cut_prompt),
        truncated_answers=float(cut_answer),
    )


# ---------------------------------------------------------------- splits and subsets


def _split_off(measures: dict[str, _Measure | None], config: DataConfig) -> dict[str, _Measure | None]:
    """Take validation and test rows out of train where they are made by size; they are like train's."""
    train = measures["train"]
    rows = train.rows + train.dropped
    if not rows:
        return measures
    left = train
    for split in ("test", "validation"):
        size = getattr(config, f"{split}_size")
        if size and not getattr(config, _SPLITS[split]):
            share = min(1.0, size if isinstance(size, float) and size < 1 else size / rows)
            measures[split] = train.times(share)
            left = left.plus(train.times(-share))
    return measures | {"train": left}


def _drawn(measure: _Measure | None, split: str, config: DataConfig) -> dict[str, int | None]:
    """Return a split's numbers after its subset is drawn: whole rows and tokens."""
    if measure is None:
        return dict.fromkeys(_Measure.__dataclass_fields__)
    rows = wanted = measure.rows + measure.dropped
    if split == "train" and config.train_fraction is not None:
        wanted = max(1.0, config.train_fraction * rows)
    wanted = min(wanted, getattr(config, f"max_{split}_samples") or wanted)
    drawn = measure.times(wanted / rows if rows else 0)
    return {key: round(getattr(drawn, key)) for key in _Measure.__dataclass_fields__}
