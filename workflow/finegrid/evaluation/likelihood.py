"""How likely a model finds the reference answers: the negative log-likelihood of each row's label tokens.

Used by :mod:`finegrid.evaluation.evaluate`; reads token rows, writes no files. Batches and logits are training's own,
so that a run's last evaluation loss and the loss reported here are one definition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from finegrid.training.collation import IGNORED, Collator
from finegrid.training.flat import make_flat
from finegrid.training.loss import find_head, label_logits, label_states

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# Logits of one batch are label tokens x vocabulary floats, twice: 1024 keep them under 1.3 GB for 150,000 words.
LABEL_TOKENS_PER_BATCH = 1024


@torch.no_grad()
def label_nll(
    model: PreTrainedModel | PeftModel,
    rows: Sequence[dict[str, Any]],
    batch_size: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[float]:
    """Return for each row the sum over its label tokens of -ln p(token | all before it), in nats, in the rows' order.

    Divided by :func:`label_tokens` it is transformers' own loss of that row. Batches are sorted by length and start
    with the longest, so that a lack of memory shows at once.

    Args:
        model: in evaluation mode.
        rows: token rows with `id`, `input_ids` and `labels`, aligned; label -100 is no loss.
        batch_size: at most so many rows a batch; changes results by rounding only.
        progress: called after each batch with the number of rows done.
    """
    head, _ = find_head(model)
    own = model.config._attn_implementation
    collate = Collator(flat=make_flat(model, lambda batch: label_logits(model, head, batch)[0]) is None)
    try:
        return _nll(model, head, collate, rows, batch_size, progress)
    finally:
        if collate.flat:
            model.set_attn_implementation(own)  # generation has batches of its own kind


def _nll(model, head, collate: Collator, rows, batch_size: int, progress: Callable[[int], None]) -> list[float]:
    found = [0.0] * len(rows)
    done = 0
    for indices in _batches(rows, batch_size):
        batch = collate([rows[index] for index in indices])
        if len(batch["targets"]):
            batch = {key: value.to(model.device) if torch.is_tensor(value) else value for key, value in batch.items()}
            losses = label_states(model, head, batch).losses().double()
            row = _row_of_each_label(batch)
            sums = torch.zeros(len(indices), dtype=torch.float64, device=losses.device).index_add_(0, row, losses)
            for index, nll in zip(indices, sums.tolist(), strict=True):
                found[index] = nll
        done += len(indices)
        progress(done)
    return found


def _row_of_each_label(batch: dict[str, Any]) -> torch.Tensor:
    if "starts" in batch:
        return torch.bucketize(batch["positions"], batch["starts"].long(), right=True) - 1
    return batch["positions"] // batch["input_ids"].shape[1]


def label_tokens(row: dict[str, Any]) -> int:
    """Return how many tokens of a row carry loss; the first token has nothing before it and never does."""
    return sum(label != IGNORED for label in row["labels"][1:])


def _batches(rows: Sequence[dict[str, Any]], batch_size: int) -> Iterator[list[int]]:
    """Yield the rows' indices, longest rows first, in batches bounded by rows and by label tokens."""
    batch, tokens = [], 0
    for index in sorted(range(len(rows)), key=lambda index: -len(rows[index]["input_ids"])):
        count = label_tokens(rows[index])
        if batch and (len(batch) == batch_size or tokens + count > LABEL_TOKENS_PER_BATCH):
            yield batch
            batch, tokens = [], 0
        batch.append(index)
        tokens += count
    if batch:
        yield batch
