"""Score one run: what it answers to every example, how likely it finds the references, and all metrics.

Reads the token rows and clean rows of test and validation, the base model and what the run trained; writes
``predictions.jsonl`` (one row an example) and ``metrics/<run>.json``. The untrained base model is scored by the same
function, without an adapter.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if not torch.cuda.is_available():
    # Else deepspeed, which transformers imports where it is installed, warns that it guesses.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import transformers
from datasets import Dataset

from finegrid.data.template import load_template
from finegrid.errors import UserError
from finegrid.evaluation.generation import generate_answers, generation_config
from finegrid.evaluation.likelihood import scoring
from finegrid.evaluation.metrics import METRICS_VERSION, SplitScores, score_split
from finegrid.files import write_json, write_text
from finegrid.training.history import peak_memory_mb
from finegrid.training.model import load_trained
from finegrid.training.validation import label_tokens

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from finegrid.settings import RunSettings

SPLITS = ("test", "validation")
SECONDS_BETWEEN_LINES = 5.0

Row = dict[str, Any]


def evaluate(
    settings: RunSettings,
    run: str,
    tokens: Path,
    clean: Path,
    model: Path,
    adapter: Path | None,
    predictions: Path,
    metrics: Path,
    progress: Callable[[str], None] = lambda line: None,
    load: Callable[..., Any] = load_trained,
    answers: Answers | None = None,
    validated: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Evaluate a run on test and validation; write and return its metrics, write its predictions.

    Every row of both splits gets its negative log-likelihood; answers are generated and scored for
    ``evaluation.split`` alone. The same inputs give the same predictions, byte for byte.

    Args:
        run: id of the run, for the metrics and messages.
        tokens: folder with ``test.arrow`` and ``validation.arrow``; generation starts from their prompts, which end
            before the answer.
        clean: folder with ``test.jsonl`` and ``validation.jsonl``, the uncut references.
        model: folder of the base model.
        adapter: folder of the adapter, or of the whole model for full fine-tuning; None evaluates the base.
        predictions: JSONL to write.
        metrics: JSON to write.
        load: gives the model, as ``load_trained`` does; with :class:`finegrid.training.resident.ResidentBase`
            several runs of a process share their base.
        answers: those of the split to evaluate, where they were generated together with other runs' ones; None
            generates them here.
        validated: negative log-likelihoods of the validation rows, where training has computed them with these weights
            and in batches of :func:`rows_at_a_time`; None computes them here.

    Raises:
        UserError: the split to evaluate is empty, tokens and clean rows do not belong together, a loss is not
            finite, or the model or the generation settings cannot be used.
    """
    transformers.utils.logging.disable_progress_bar()
    clock = Clock()
    rows = {split: read_rows(tokens, clean, split) for split in SPLITS}
    if not rows[settings.evaluation.split]:
        raise UserError(
            f"evaluation.split: '{settings.evaluation.split}' has no rows in {tokens.name}; expected some: name a file "
            "or size for it in data_config, or evaluate the other split"
        )
    with clock.measure("load"):
        device = device_of(settings)
        trained = load(settings, model, adapter, device)
    with clock.measure("likelihood"), scoring(trained) as nll:
        for split in SPLITS:
            say = paced(progress, split, rows[split])
            known = validated if split == "validation" else None
            _add_likelihood(nll, rows[split], rows_at_a_time(settings), known, say)
    _check_finite(run, rows)
    scored, new_tokens = {}, 0
    if settings.evaluation.generate:
        split = settings.evaluation.split
        if answers is None:
            with clock.measure("generation"):
                answers = _answers(settings, trained, model, rows[split], paced(progress, split, rows[split]))
        else:
            clock.spent["generation"] = answers.seconds
        new_tokens = answers.new_tokens
        for row, text in zip(rows[split], answers.texts, strict=True):
            row["prediction"] = text
        with clock.measure("scoring"):
            scored[split] = _add_scores(rows[split], settings.evaluation.language)
    report = {
        "run": run,
        "metrics_version": METRICS_VERSION,
        "signatures": scored[settings.evaluation.split].signatures if scored else {},
        "data": _content_hashes(rows, settings.evaluation.split),
        "splits": {split: _summary(rows[split], scored.get(split)) for split in SPLITS},
        "generation": _generation_facts(new_tokens, clock) if scored else None,
        "seconds": clock.seconds(),
        "peak_memory_mb": round(peak_memory_mb(device), 1),
        "device": device.type,
    }
    write_text(predictions, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _prediction_rows(rows)))
    write_json(metrics, report)
    return report


@dataclass(frozen=True)
class Answers:
    """Answers of one run to all prompts of a split, the tokens generated for them, and the seconds that took."""

    texts: list[str]
    new_tokens: int
    seconds: float


# ---------------------------------------------------------------- rows


def read_rows(tokens: Path, clean: Path, split: str) -> list[Row]:
    """Return the token rows of a split with the `prompt` and `reference` texts of their clean rows."""
    rows_file, texts_file = tokens / f"{split}.arrow", clean / f"{split}.jsonl"
    try:
        rows = Dataset.from_file(str(rows_file)).to_list()
    except (OSError, ValueError) as error:
        raise UserError(f"{rows_file}: can't be read ({error}); expected what `finegrid tokenise` writes") from error
    try:
        with texts_file.open(encoding="utf-8") as file:
            messages = {row["id"]: row["messages"] for row in map(json.loads, file)}
    except (OSError, ValueError) as error:
        raise UserError(f"{texts_file}: can't be read ({error}); expected what `finegrid clean` writes") from error
    strangers = [row["id"] for row in rows if row["id"] not in messages]
    if strangers:
        raise UserError(
            f"{rows_file}: {len(strangers)} rows (first: '{strangers[0]}') are not in {texts_file}; "
            "expected tokens made from these clean rows: run `finegrid tokenise` again"
        )
    return [row | _texts(messages[row["id"]]) for row in rows]


def _texts(messages: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return the last assistant message as `reference` and what comes before it as `prompt`, both uncut.

    A single question stands as it is; the messages of a longer conversation are named by their roles.
    """
    last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    before = messages[:last]
    if len(before) == 1:
        prompt = before[0]["content"]
    else:
        prompt = "\n\n".join(f"{message['role']}: {message['content']}" for message in before)
    return {"prompt": prompt, "reference": messages[last]["content"]}


def _content_hashes(rows: dict[str, list[Row]], answered: str) -> dict[str, str]:
    """Return SHA-256 of what was asked and expected.

    `tokens` is equal for runs whose losses are comparable example by example; `examples` for runs whose answers in the
    split `answered` are, also where a limit or another tokenizer gave them other tokens, or cleaning other white space,
    which every metric folds.
    """
    wanted = {
        "tokens": (SPLITS, ("id", "input_ids", "labels", "prompt_length")),
        "examples": ((answered,), ("id", "prompt", "reference")),
    }
    hashes = {}
    for name, (splits, columns) in wanted.items():
        digest = hashlib.sha256()
        for split in splits:
            for row in rows[split]:
                facts = [split, *(_folded(row[column]) for column in columns)]
                digest.update(json.dumps(facts, ensure_ascii=False).encode() + b"\n")
        hashes[name] = digest.hexdigest()
    return hashes


def _folded(fact: Any) -> Any:
    return " ".join(fact.split()) if isinstance(fact, str) else fact


# ---------------------------------------------------------------- the steps; each adds its columns to the rows


def rows_at_a_time(settings: RunSettings) -> int:
    """Return how many rows' losses are computed in a batch: training's own, unless scoring is to take fewer."""
    return min(settings.evaluation.batch_size, settings.training_arg("per_device_eval_batch_size"))


def _add_likelihood(
    nll: Callable[..., list[float]],
    rows: list[Row],
    batch_size: int,
    known: Sequence[float] | None,
    progress: Callable[[int, str], None],
) -> None:
    if known is None:
        known = nll(rows, batch_size, lambda done: progress(done, "losses computed"))
    else:
        progress(len(rows), "losses known from training")
    for row, value in zip(rows, known, strict=True):
        row |= {"nll": value, "label_tokens": label_tokens(row)}


def _answers(
    settings: RunSettings, model, folder: Path, rows: list[Row], progress: Callable[[int, str], None]
) -> Answers:
    tokenizer, prompts, config = questions(settings, folder, rows)
    texts, new_tokens = generate_answers(
        model,
        tokenizer,
        prompts,
        config,
        settings.evaluation.batch_size,
        seed=settings.training_args.get("seed") or 0,
        progress=lambda done: progress(done, "answers generated"),
    )
    return Answers(texts, new_tokens, 0.0)


def questions(settings: RunSettings, folder: Path, rows: list[Row]) -> tuple[Any, list[list[int]], GenerationConfig]:
    """Return tokenizer, prompts and generation settings of a run."""
    template = load_template(folder, settings.model.chat_template, settings.model.trust_remote_code)
    # A model stops at the tokens it was told to stop at and at the one that its own answers were taught to end with.
    end_ids = {*template.end_ids, template.describe()["end_token_ids"][-1]}
    config = generation_config(
        settings.generation_config, settings.max_output_length, end_ids, template.tokenizer.pad_token_id
    )
    return template.tokenizer, [row["input_ids"][: row["prompt_length"]] for row in rows], config


def _add_scores(rows: list[Row], language: str) -> SplitScores:
    scored = score_split([row["prediction"] for row in rows], [row["reference"] for row in rows], language)
    for row, scores, statistics in zip(rows, scored.scores, scored.statistics, strict=True):
        row |= {"scores": scores, "statistics": statistics}
    return scored


def _check_finite(run: str, rows: dict[str, list[Row]]) -> None:
    broken = [row["id"] for split in SPLITS for row in rows[split] if not math.isfinite(row["nll"])]
    if broken:
        raise UserError(
            f"{run}: the loss of {len(broken)} examples (first: '{broken[0]}') is not finite; expected a number: the "
            "trained weights are broken, look at the run's history and lower its learning rate"
        )


# ---------------------------------------------------------------- what is written


def _prediction_rows(rows: dict[str, list[Row]]) -> list[Row]:
    fields = ("prompt", "reference", "prediction", "nll", "label_tokens", "scores", "statistics")
    return [
        {"id": row["id"], "split": split, **{field: row.get(field) for field in fields}}
        for split in SPLITS
        for row in rows[split]
    ]


def _summary(rows: list[Row], scored: SplitScores | None) -> dict[str, Any]:
    """Return a split's figures; loss is the mean over all label tokens, in nats; None without label tokens."""
    count = sum(row["label_tokens"] for row in rows)
    loss = math.fsum(row["nll"] for row in rows) / count if count else None
    summary = {"examples": len(rows), "label_tokens": count, "loss": loss}
    summary["perplexity"] = None if loss is None else math.exp(min(loss, 700))  # exp(710) is no float
    return summary | (scored.summary if scored else {})


def _generation_facts(new_tokens: int, clock: Clock) -> dict[str, float]:
    return {"new_tokens": new_tokens, "tokens_per_second": round(new_tokens / clock.spent["generation"], 1)}


# ---------------------------------------------------------------- device, time and progress


def device_of(settings: RunSettings) -> torch.device:
    use_gpu = torch.cuda.is_available() and not settings.training_args.get("use_cpu", False)
    return torch.device("cuda" if use_gpu else "cpu")


class Clock:
    """Wall-clock seconds of named parts."""

    def __init__(self):
        self.spent: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def measure(self, name: str):
        """Add the time of the block to ``name``."""
        start = time.perf_counter()
        yield
        self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each part and in total, rounded to milliseconds."""
        total = time.perf_counter() - self._start
        return {name: round(value, 3) for name, value in {**self.spent, "total": total}.items()}


def paced(progress: Callable[[str], None], split: str, rows: list[Row]) -> Callable[[int, str], None]:
    """Return a function that says how far a split is: at its end, and at most every few seconds before."""
    last = time.monotonic()

    def say(done: int, what: str) -> None:
        nonlocal last
        if done == len(rows) or time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            progress(f"{split}: {done}/{len(rows)} {what}")

    return say
