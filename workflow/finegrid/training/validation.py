"""Validation rows in batches, and the loss of each row; scoring uses the same, so that both find the same losses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from finegrid.training.collation import IGNORED
from finegrid.training.loss import LabelStates

# Logits of one batch are label tokens x vocabulary floats, twice: 1024 keep them under 1.3 GB for 150,000 words.
LABEL_TOKENS_PER_BATCH = 1024


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


def label_tokens(row: dict[str, Any]) -> int:
    """Return how many tokens of a row carry loss; the first token has nothing before it and never does."""
    return sum(label != IGNORED for label in row["labels"][1:])


def sums_of_rows(states: LabelStates, batch: dict[str, Any]) -> list[float]:
    """Return for each row of a batch the sum of its targets' losses."""
    losses = states.losses().double()
    sums = torch.zeros(len(batch["ids"]), dtype=torch.float64, device=losses.device)
    return sums.index_add_(0, _row_of_each_label(batch), losses).tolist()


def _row_of_each_label(batch: dict[str, Any]) -> torch.Tensor:
    if "starts" in batch:
        return torch.bucketize(batch["positions"], batch["starts"].long(), right=True) - 1
    return batch["positions"] // batch["input_ids"].shape[1]
