"""How likely a model finds the reference answers: the negative log-likelihood of each row's label tokens.

Used by :mod:`finegrid.evaluation.evaluate` and, while a run trains, by its validation; reads token rows, writes no
files. Batches, their form and the way a layer is computed are the same in both, so that on the CPU a run's last
validation and the losses scored with its saved weights are the same to the bit.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from finegrid.training.collation import IGNORED, Collator
from finegrid.training.flat import make_flat
from finegrid.training.loss import LabelStates, find_head, label_logits, label_states
from finegrid.training.low_rank import written_out

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
    with scoring(model) as nll:
        return nll(rows, batch_size, progress)


@contextlib.contextmanager
def scoring(model: PreTrainedModel | PeftModel) -> Iterator[Callable[..., list[float]]]:
    """Give :func:`label_nll` of a model for any number of calls; find out but once what its architecture allows."""
    head, _ = find_head(model)
    own = model.config._attn_implementation
    collate = Collator(flat=make_flat(model, lambda batch: label_logits(model, head, batch)[0]) is None)
    with written_out(model):
        try:
            yield functools.partial(_nll, model, head, collate)
        finally:
            if collate.flat:
                model.set_attn_implementation(own)  # generation has batches of its own kind


@torch.no_grad()
def _nll(
    model, head, collate: Collator, rows, batch_size: int, progress: Callable[[int], None] = lambda done: None
) -> list[float]:
    found = [0.0] * len(rows)
    done = 0
    for indices in batches(rows, batch_size):
        batch = collate([rows[index] for index in indices])
        if len(batch["targets"]):
            batch = {key: value.to(model.device) if torch.is_tensor(value) else value for key, value in batch.items()}
            for index, nll in zip(indices, sums_of_rows(label_states(model, head, batch), batch), strict=True):
                found[index] = nll
        done += len(indices)
        progress(done)
    return found


def sums_of_rows(states: LabelStates, batch: dict[str, Any]) -> list[float]:
    """Return for each row of a batch the sum of its targets' losses."""
    losses = states.losses().double()
    sums = torch.zeros(len(batch["ids"]), dtype=torch.float64, device=losses.device)
    return sums.index_add_(0, _row_of_each_label(batch), losses).tolist()


def _row_of_each_label(batch: dict[str, Any]) -> torch.Tensor:
    if "starts" in batch:
        return torch.bucketize(batch["positions"], batch["starts"].long(), right=True) - 1
    return batch["positions"] // batch["input_ids"].shape[1]


def label_tokens(row: dict[str, Any]) -> int:
    """Return how many tokens of a row carry loss; the first token has nothing before it and never does."""
    return sum(label != IGNORED for label in row["labels"][1:])


def batches(rows: Iterable[dict[str, Any]], batch_size: int) -> Iterator[list[int]]:
    """Yield the rows' indices, longest rows first, in batches bounded by rows and by label tokens."""
    sizes = [(len(row["input_ids"]), label_tokens(row)) for row in rows]
    batch, tokens = [], 0
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index][0]):
        count = sizes[index][1]
        if batch and (len(batch) == batch_size or tokens + count > LABEL_TOKENS_PER_BATCH):
            yield batch
            batch, tokens = [], 0
        batch.append(index)
        tokens += count
    if batch:
        yield batch
