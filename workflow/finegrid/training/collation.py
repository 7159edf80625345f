"""Batches from token rows: padded on the right to the longest row, with the positions that predict a label.

Reads rows of ``tokens/<split>.arrow``; what it gives goes to :mod:`finegrid.training.trainer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

IGNORED = -100


@dataclass(frozen=True)
class Collator:
    """Collate token rows (``id``, ``input_ids``, ``labels`` aligned with ``input_ids``) into one batch.

    The batch has, for B rows of at most T tokens and N labels that can be predicted (a label in the first column has
    nothing before it):

    - ``input_ids``, ``attention_mask``, ``labels``: int64 of shape (B, T), padded on the right;
    - ``positions``: int64 (N,), index into the flattened (B * T) positions: the one **before** each label, whose
      output predicts it. Counted here, on the CPU, so that no step waits for the GPU to count;
    - ``targets``: int64 (N,), the labels themselves;
    - ``ids``: the rows' ids; ``tokens``: how many tokens are no padding.
    """

    pad_token_id: int = 0

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
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
            "ids": [str(row["id"]) for row in rows],
            "tokens": int(lengths.sum()),
        }

    @staticmethod
    def _pad(rows: list[Sequence[int]], value: int) -> torch.Tensor:
        padded = torch.full((len(rows), max(len(row) for row in rows)), value, dtype=torch.int64)
        for number, row in enumerate(rows):
            padded[number, : len(row)] = torch.as_tensor(row, dtype=torch.int64)
        return padded


def first_rows(batch: dict[str, Any], count: int) -> dict[str, Any]:
    """Return a batch in which only the first ``count`` rows carry loss and are counted; its shape stays."""
    kept = batch["positions"] < count * batch["input_ids"].shape[1]
    labels = batch["labels"].clone()
    labels[count:] = IGNORED
    return batch | {
        "labels": labels,
        "positions": batch["positions"][kept],
        "targets": batch["targets"][kept],
        "ids": batch["ids"][:count],
        "tokens": int(batch["attention_mask"][:count].sum()),
    }
