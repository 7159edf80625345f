"""Batches from token rows: end to end or padded to the longest row, with the positions that predict a label.

Reads rows of ``tokens/<split>.arrow``; what it gives goes to :mod:`finegrid.training.trainer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

IGNORED = -100


@dataclass
class Collator:
    """Collate token rows (``id``, ``input_ids``, ``labels`` aligned with ``input_ids``) into one batch.

    For B rows of at most T tokens, S tokens in all, and N labels that can be predicted (a label in the first column
    has nothing before it), a padded batch has

    - ``input_ids``, ``attention_mask``, ``labels``: int64 of shape (B, T), padded on the right;
    - ``positions``: int64 (N,), index into the flattened (B * T) positions: the one **before** each label, whose
      output predicts it. Counted here, on the CPU, so that no step waits for the GPU to count;
    - ``targets``: int64 (N,), the labels themselves;
    - ``ids``: the rows' ids; ``tokens``: how many tokens are no padding.

    A flat one has ``input_ids``, ``position_ids`` and ``labels`` of shape (1, S), the rows one after the other;
    ``positions`` are indices into S. Besides, for :mod:`finegrid.training.flat`, ``cells``: int64 (S,), where each
    token would stand in a padded batch's flattened (B * T); ``starts``: int32 (B + 1,), where each row begins, and S;
    and ``grid``: (B, T).

    Attributes:
        flat: whether to lay the rows end to end.
    """

    pad_token_id: int = 0
    flat: bool = False

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = self._flat(rows) if self.flat else self._padded(rows)
        return batch | {"ids": [str(row["id"]) for row in rows], "tokens": sum(len(row["input_ids"]) for row in rows)}

    def _padded(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        input_ids = self._pad([row["input_ids"] for row in rows], self.pad_token_id)
        labels = self._pad([row["labels"] for row in rows], IGNORED)
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        columns = input_ids.shape[1]
        row, column = torch.nonzero(labels[:, 1:] != IGNORED, as_tuple=True)
        return {
            "input_ids": input_ids,
            "attention_mask": (torch.arange(columns) < lengths[:, None]).long(),
            "labels": labels,
            "positions": row * columns + column,
            "targets": labels[row, column + 1],
        }

    @staticmethod
    def _flat(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        input_ids = torch.tensor([token for row in rows for token in row["input_ids"]])
        labels = torch.tensor([label for row in rows for label in row["labels"]])
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        longest = int(lengths.max())
        column = torch.arange(len(input_ids)) - starts[:-1].repeat_interleave(lengths)
        predicted = torch.nonzero((labels != IGNORED) & (column > 0)).flatten()
        return {
            "input_ids": input_ids[None],
            "position_ids": column[None],
            "labels": labels[None],
            "positions": predicted - 1,
            "targets": labels[predicted],
            "cells": column + (torch.arange(len(rows)) * longest).repeat_interleave(lengths),
            "starts": starts.int(),
            "grid": (len(rows), longest),
        }

    @staticmethod
    def _pad(rows: list[Sequence[int]], value: int) -> torch.Tensor:
        padded = torch.full((len(rows), max(len(row) for row in rows)), value, dtype=torch.int64)
        for number, row in enumerate(rows):
            padded[number, : len(row)] = torch.as_tensor(row, dtype=torch.int64)
        return padded


def first_rows(batch: dict[str, Any], count: int) -> dict[str, Any]:
    """Return a batch in which only the first ``count`` rows carry loss and are counted; its shape stays."""
    labels = batch["labels"].clone()
    if "starts" in batch:
        tokens = end = int(batch["starts"][count])
        labels[:, end:] = IGNORED
    else:
        tokens, end = int(batch["attention_mask"][:count].sum()), count * batch["input_ids"].shape[1]
        labels[count:] = IGNORED
    kept = batch["positions"] < end
    return batch | {
        "labels": labels,
        "positions": batch["positions"][kept],
        "targets": batch["targets"][kept],
        "ids": batch["ids"][:count],
        "tokens": tokens,
    }
