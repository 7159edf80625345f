"""Clean splits become tokens with labels, cut to the recipe's limits, and a report that refuses what lost too much.

Reads ``clean/{train,validation,test}.jsonl`` and the tokenizer of a local model folder. Writes
``{train,validation,test}.arrow`` (an Arrow IPC stream, memory-mapped by ``datasets.Dataset.from_file``) with the
columns ``id``, ``input_ids``, ``labels`` (-100: no loss), ``prompt_length``, ``truncated_prompt`` and
``truncated_answer``; ``dropped.jsonl`` with every row left out and why; and ``report.json``.

All three splits go through one function, so that training and evaluation populations are built by the same policy.
What a template is and what is taught is in :mod:`finegrid.data.template`, what is cut in
:mod:`finegrid.data.truncation`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from finegrid.data.processes import in_order, workers
from finegrid.data.rows import SPLITS
from finegrid.data.template import ChatTemplate, RowRefused, Tokens, load_template
from finegrid.data.truncation import Cut, TooLong, truncate
from finegrid.errors import UserError
from finegrid.files import write_json

if TYPE_CHECKING:
    from finegrid.settings import RunSettings

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("prompt_length", pa.int32()),
        ("truncated_prompt", pa.bool_()),
        ("truncated_answer", pa.bool_()),
    ]
)
NO_LOSS = -100

# Rows are worked on in pieces of this size whatever the number of processes, and each piece is one record batch:
# the files are the same, byte for byte. A thousand is what `datasets` writes.
CHUNK = 1000
_BINS = 50
_SHOWN = 3  # rows that are named of those that stop the stage


@dataclass(frozen=True)
class _Job:
    """What a worker needs to know; small and hashable, so that each process loads its tokenizer once."""

    model: Path
    chat_template: str | None
    trust_remote_code: bool
    max_input: int
    max_output: int
    input_policy: str
    output_policy: str


@dataclass
class _Chunk:
    """What became of up to ``CHUNK`` rows."""

    rows: int
    batch: pa.RecordBatch
    dropped: list[tuple[str, str]]  # reason, the row's line
    stopped: list[str]  # problems under the policy `error`
    prompt_lengths: np.ndarray
    answer_lengths: np.ndarray
    label_tokens: int
    end_lost: int


@dataclass
class _Split:
    """Counts over the chunks of a split."""

    rows_in: int = 0
    rows: int = 0
    tokens: int = 0
    label_tokens: int = 0
    truncated_prompts: int = 0
    truncated_answers: int = 0
    end_lost: int = 0
    dropped: Counter = field(default_factory=Counter)
    stopped: list[str] = field(default_factory=list)  # the first few
    stopped_rows: int = 0
    prompt_lengths: list[np.ndarray] = field(default_factory=list)
    answer_lengths: list[np.ndarray] = field(default_factory=list)

    def add(self, chunk: _Chunk) -> None:
        self.rows_in += chunk.rows
        self.rows += chunk.batch.num_rows
        self.tokens += len(chunk.batch["input_ids"].flatten())
        self.label_tokens += chunk.label_tokens
        self.truncated_prompts += chunk.batch["truncated_prompt"].true_count
        self.truncated_answers += chunk.batch["truncated_answer"].true_count
        self.end_lost += chunk.end_lost
        self.dropped.update(reason for reason, _ in chunk.dropped)
        self.stopped = [*self.stopped, *chunk.stopped][:_SHOWN]
        self.stopped_rows += len(chunk.stopped)
        self.prompt_lengths.append(chunk.prompt_lengths)
        self.answer_lengths.append(chunk.answer_lengths)

    def report(self) -> dict[str, Any]:
        return {
            "rows_in": self.rows_in,
            "rows": self.rows,
            "truncated_prompts": self.truncated_prompts,
            "truncated_answers": self.truncated_answers,
            "end_lost": self.end_lost,
            "dropped": dict(sorted(self.dropped.items())),
            "label_tokens": self.label_tokens,
            "tokens": self.tokens,
            "prompt_lengths": _distribution(_joined(self.prompt_lengths)),
            "answer_lengths": _distribution(_joined(self.answer_lengths)),
        }


def tokenise(
    settings: RunSettings,
    clean: Path,
    model: Path,
    output: Path,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Tokenise the three splits of ``clean`` into ``output`` with the tokenizer of the folder ``model``.

    A run that is refused writes ``report.json`` (with the problems under ``refused``) and ``dropped.jsonl`` but no
    tokens, and the report once more beside the folder, as ``<output>.refused.json``, for a workflow deletes the
    outputs of a failed stage.

    Returns:
        The report, as written.

    Raises:
        UserError: a template or tokenizer that cannot be used; no train row left; a row over its limit under the
            policy ``error``; more rows cut or dropped than ``data_config.limits`` allows.
    """
    # One process is one core, `num_proc` is what asks for more; tokenizers would take all of them.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    started = time.monotonic()
    data, cutting = settings.data_config, settings.data_config.truncation
    job = _Job(
        model,
        settings.model.chat_template,
        settings.model.trust_remote_code,
        settings.max_input_length,
        settings.max_output_length,
        cutting.input,
        cutting.output,
    )
    template = _template(job.model, job.chat_template, job.trust_remote_code)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch:
        folder = Path(scratch)
        splits = _write_splits(job, clean, folder, data.num_proc, progress)
        report = _report(settings, clean, template, splits)
        problems = _problems(settings, splits)
        if problems:
            report["refused"] = problems
        write_json(folder / "report.json", report)
        _deliver(folder, output, refused=bool(problems))
    if problems:
        raise UserError(*problems)
    rows = sum(split.rows for split in splits.values())
    progress(f"tokenise: {rows:,} rows in {time.monotonic() - started:.1f} s")
    return report


# ---- rows ------------------------------------------------------------------------------------------------------------


def _write_splits(
    job: _Job, clean: Path, folder: Path, processes: int, progress: Callable[[str], None]
) -> dict[str, _Split]:
    splits = {}
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(workers(processes))
        dropped = stack.enter_context((folder / "dropped.jsonl").open("w", encoding="utf-8"))
        for name in SPLITS:
            splits[name] = _write_split(name, job, clean / f"{name}.jsonl", folder, dropped, pool, processes, progress)
    return splits


def _write_split(name, job, source: Path, folder: Path, dropped, pool, processes: int, progress) -> _Split:
    split = _Split()
    started = reported = time.monotonic()
    with (
        source.open(encoding="utf-8") as lines,
        pa.OSFile(str(folder / f"{name}.arrow"), "wb") as file,
        pa.ipc.new_stream(file, SCHEMA) as writer,
    ):
        for chunk in in_order(pool, functools.partial(_work, job), _chunks(lines), ahead=2 * processes):
            split.add(chunk)
            writer.write_batch(chunk.batch)
            dropped.writelines(_dropped_line(name, reason, line) for reason, line in chunk.dropped)
            if time.monotonic() - reported > 5:
                reported = time.monotonic()
                rate = split.rows_in / (reported - started)
                progress(f"tokenise {name}: {split.rows_in:,} rows, {rate:,.0f} rows/s")
    return split


def _chunks(lines: Iterable[str]) -> Iterator[list[str]]:
    lines = (line for line in lines if line.strip())
    while chunk := list(islice(lines, CHUNK)):
        yield chunk


def _work(job: _Job, lines: list[str]) -> _Chunk:
    """Tokenise, cut and label some rows: the one function that every split goes through."""
    rows = [json.loads(line) for line in lines]
    template = _template(job.model, job.chat_template, job.trust_remote_code)
    kept: list[tuple[str, Cut]] = []
    dropped, stopped, lengths = [], [], []
    for row, line, tokens in zip(rows, lines, template.encode([row["messages"] for row in rows]), strict=True):
        if isinstance(tokens, RowRefused):
            dropped.append((tokens.reason, line))
            continue
        lengths.append((tokens.prompt_length, len(tokens.ids) - tokens.prompt_length))
        try:
            cut = _cut(job, tokens)
        except RowRefused as refused:
            dropped.append((refused.reason, line))
        except TooLong as long:
            if long.stops:
                stopped.append(f"row '{row['id']}' ({row.get('source', 'no source')}): {long}")
            dropped.append((long.reason, line))
        else:
            kept.append((row["id"], cut))
    lengths = np.array(lengths, dtype=np.int32).reshape(-1, 2)
    return _Chunk(
        rows=len(rows),
        batch=_batch(kept),
        dropped=dropped,
        stopped=stopped,
        prompt_lengths=lengths[:, 0],
        answer_lengths=lengths[:, 1],
        label_tokens=sum(int(cut.taught.sum()) for _, cut in kept),
        end_lost=sum(cut.end_lost for _, cut in kept),
    )


def _cut(job: _Job, tokens: Tokens) -> Cut:
    cut = truncate(tokens, job.max_input, job.max_output, job.input_policy, job.output_policy)
    if not cut.taught.any():
        raise RowRefused("no_label_tokens")
    return cut


def _batch(kept: list[tuple[str, Cut]]) -> pa.RecordBatch:
    cuts = [cut for _, cut in kept]
    ids = _joined([cut.ids for cut in cuts])
    labels = np.where(_joined([cut.taught for cut in cuts]).astype(bool), ids, np.int32(NO_LOSS))
    offsets = pa.array(np.cumsum([0] + [len(cut.ids) for cut in cuts]), pa.int32())
    columns = [
        pa.array([key for key, _ in kept], pa.string()),
        pa.ListArray.from_arrays(offsets, pa.array(ids, pa.int32())),
        pa.ListArray.from_arrays(offsets, pa.array(labels, pa.int32())),
        pa.array([cut.prompt_length for cut in cuts], pa.int32()),
        pa.array([cut.truncated_prompt for cut in cuts], pa.bool_()),
        pa.array([cut.truncated_answer for cut in cuts], pa.bool_()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=np.int32), *arrays])


@functools.lru_cache(maxsize=1)
def _template(model: Path, chat_template: str | None, trust_remote_code: bool) -> ChatTemplate:
    """The template, loaded once in each process (it costs a second, and cannot travel between processes)."""
    return load_template(model, chat_template, trust_remote_code)


def _dropped_line(split: str, reason: str, line: str) -> str:
    row = json.loads(line)
    entry = {"id": row["id"], "split": split, "stage": "tokenise", "reason": reason, "row": row}
    return json.dumps(entry, ensure_ascii=False) + "\n"


# ---- report ----------------------------------------------------------------------------------------------------------


def _report(settings: RunSettings, clean: Path, template: ChatTemplate, splits: dict[str, _Split]) -> dict[str, Any]:
    cleaning = clean / "report.json"
    clean_report = json.loads(cleaning.read_text(encoding="utf-8")) if cleaning.exists() else None
    return {
        "data": settings.dataset_name,
        "limits": {"max_input_length": settings.max_input_length, "max_output_length": settings.max_output_length},
        "truncation": settings.data_config.truncation.model_dump(),
        "template": template.describe() | {"sha256": hashlib.sha256(template.template.encode()).hexdigest()},
        "splits": {name: split.report() for name, split in splits.items()},
        "clean": clean_report,
        "findings": template.findings() + _held_out_findings(splits),
    }


def _held_out_findings(splits: dict[str, _Split]) -> list[dict[str, str]]:
    """Say where held-out rows were lost or cut: the limits hold for train alone."""
    found = []
    for name in SPLITS[1:]:
        split = splits[name]
        place = f"{name} split"
        if dropped := sum(split.dropped.values()):
            found.append(
                {
                    "severity": "warning",
                    "place": place,
                    "message": f"{_share(dropped, split.rows_in)} dropped ({_reasons(split.dropped)})",
                    "mend": "every arm is scored without them; see dropped.jsonl",
                }
            )
        if split.truncated_answers:
            found.append(
                {
                    "severity": "warning",
                    "place": place,
                    "message": f"{_share(split.truncated_answers, split.rows)} have a cut answer in the loss",
                    "mend": "a larger max_output_length; generated answers are scored against the whole one",
                }
            )
    return found


def _distribution(lengths: np.ndarray) -> dict[str, Any]:
    """Return histogram and quantiles of lengths in tokens; a quantile is a length that occurs."""
    if not len(lengths):
        return {"counts": [], "edges": [], "quantiles": dict.fromkeys(("50", "90", "99", "max"))}
    width = int(lengths.max()) // _BINS + 1
    edges = np.arange(0, int(lengths.max()) + width + 1, width)
    counts, _ = np.histogram(lengths, bins=edges)
    quantiles = {str(q): _quantile(lengths, q / 100) for q in (50, 90, 99)}
    return {
        "counts": counts.tolist(),
        "edges": edges.tolist(),
        "quantiles": {**quantiles, "max": int(lengths.max())},
    }


def _quantile(lengths: np.ndarray, share: float) -> int:
    """Return the smallest occurring length that at least ``share`` of the lengths do not exceed."""
    return int(np.quantile(lengths, share, method="inverted_cdf"))


# ---- limits ----------------------------------------------------------------------------------------------------------


def _problems(settings: RunSettings, splits: dict[str, _Split]) -> list[str]:
    """Return why the tokens are refused, with numbers and what to change; an empty list: they are not."""
    train, limits = splits["train"], settings.data_config.limits
    problems = []
    for name, split in splits.items():
        if split.stopped:
            more = split.stopped_rows - _SHOWN
            problems += [f"{name} split, {problem}; truncation policy is 'error'" for problem in split.stopped]
            problems += [f"{name} split: {more:,} more rows are over a limit"] if more > 0 else []
    if problems:
        return problems
    if train.rows and train.truncated_answers > limits.truncated_answers * train.rows:
        problems.append(
            f"max_output_length: {settings.max_output_length} cuts the answer of "
            f"{_share(train.truncated_answers, train.rows)} of train; data_config.limits.truncated_answers allows "
            f"{limits.truncated_answers:.1%}; {_enough(train.answer_lengths, limits.truncated_answers)}; or leave the "
            "long ones out with data_config.truncation.output: drop"
        )
    dropped = sum(train.dropped.values())
    if train.rows_in and dropped > limits.dropped * train.rows_in:
        problems.append(
            f"train split: {_share(dropped, train.rows_in)} were dropped ({_reasons(train.dropped)}); "
            f"data_config.limits.dropped allows {limits.dropped:.1%}; {_mend(settings, train, limits.dropped)}"
        )
    if not train.rows:
        what = f"all {train.rows_in:,} rows were dropped ({_reasons(train.dropped)})" if dropped else "it has no rows"
        problems.append(f"train split: {what}; expected at least one row with tokens to learn")
    return problems


def _mend(settings: RunSettings, train: _Split, allowed: float) -> str:
    """Say what would bring the dropped rows of train under their limit."""
    advice = []
    if {"prompt_too_long", "prompt_limit_leaves_no_content"} & set(train.dropped):
        advice.append(f"max_input_length is {settings.max_input_length}: {_enough(train.prompt_lengths, allowed)}")
    if {"answer_too_long", "answer_limit_leaves_no_content"} & set(train.dropped):
        advice.append(f"max_output_length is {settings.max_output_length}: {_enough(train.answer_lengths, allowed)}")
    if "answer_starts_inside_a_token" in train.dropped:
        advice.append("white space before an answer melts into the prompt: data_config.cleaning.white_space removes it")
    return "; ".join([*advice, "see dropped.jsonl"])


def _enough(lengths: list[np.ndarray], allowed: float) -> str:
    every = _joined(lengths)
    within, most = _quantile(every, 1 - allowed), int(every.max())
    return f"{most} is enough for all" if within == most else f"{within} would be within it, {most} is enough for all"


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} rows ({part / whole:.1%})"


def _reasons(dropped: Counter) -> str:
    return ", ".join(f"{reason}: {count:,}" for reason, count in dropped.most_common(5))


# ---- files -----------------------------------------------------------------------------------------------------------


def _deliver(folder: Path, output: Path, refused: bool) -> None:
    """Move the finished files into ``output``, the report last; a refused run leaves no tokens there."""
    output.mkdir(parents=True, exist_ok=True)
    beside = output.with_name(f"{output.name}.refused.json")
    beside.unlink(missing_ok=True)
    (output / "report.json").unlink(missing_ok=True)
    for name in SPLITS:
        if refused:
            (output / f"{name}.arrow").unlink(missing_ok=True)
        else:
            os.replace(folder / f"{name}.arrow", output / f"{name}.arrow")
    os.replace(folder / "dropped.jsonl", output / "dropped.jsonl")
    if refused:
        shutil.copyfile(folder / "report.json", beside)
    os.replace(folder / "report.json", output / "report.json")
