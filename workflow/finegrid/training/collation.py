"""Batches from token rows: end to end or padded to the longest row, with the positions that predict a label.

Reads rows of ``tokens/<split>.arrow``; what it gives goes to :mod:`finegrid.training.trainer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

IGNORED = -100
# On a CPU oneDNN makes its kernels of 16 bits anew for each number of rows, which takes longer than small products do.
ROWS_OF_A_KERNEL = 32
WORTH_SHARING = 8  # tokens; fewer are not worth the copies that put rows together for attention


@dataclass
class Collator:
    """Collate token rows (``id``, ``input_ids``, ``labels`` aligned with ``input_ids``) into one batch.

    For B rows of at most T tokens, S tokens in all, and N labels that can be predicted (a label in the first column
    has nothing before it), a padded batch has

    - ``input_ids``, ``attention_mask``, ``labels``: int64 of shape (B, T), padded on the right;
    - ``positions``: int64 (N,), index into the flattened (B * T) positions: the one **before** each label, whose
      output predicts it. Counted here, on the CPU, so that no step waits for the GPU to count;
    - ``targets``: int64 (N,), the labels themselves;
    - ``ids``: the rows' ids; ``lengths``: their tokens; ``tokens``: the sum of these.

    A flat one has ``input_ids`` and ``position_ids`` of shape (1, S), the rows one after the other, and ``positions``
    are indices into S. Besides, for :mod:`finegrid.training.flat`, ``cells``: int64 (S,), where each token would stand
    in a padded batch's flattened (B * T); ``starts``: int32 (B + 1,), where each row begins, and S; ``grid``: (B, T);
    and ``shared``: triples (row, rows, tokens): so many rows, from that one on, begin with the same tokens, which the
    first alone has in the batch, and the others' part of S begins behind them.

    Attributes:
        flat: whether to lay the rows end to end.
        shares: whether tokens with which all rows begin, such as a chat template's system message, are in a flat batch
            once. What they make of themselves hangs on nothing behind them, so it is the same in all rows, as long as
            nothing is drawn for them (dropout).
        cuts: whether a row in a flat batch ends where its last label is predicted: no loss hangs on what is behind.
        multiple: a flat batch's tokens are made a multiple of it, with padding behind the last row's labels; see
            :data:`ROWS_OF_A_KERNEL`.
    """

    pad_token_id: int = 0
    flat: bool = False
    shares: bool = False
    cuts: bool = False
    multiple: int = 1

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = self._flat(rows) if self.flat else self._padded(rows)
        lengths = [len(row["input_ids"]) for row in rows]
        return batch | {"ids": [str(row["id"]) for row in rows], "lengths": lengths, "tokens": sum(lengths)}

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

    def _flat(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        shared = _shared(rows) if self.shares else 0
        begins = [0] + [shared] * (len(rows) - 1)  # what of each row is in the batch
        ends = [max(_last_label(row), shared + 1) if self.cuts else None for row in rows]
        parts = [slice(begin, end) for begin, end in zip(begins, ends, strict=True)]
        own = [row["input_ids"][part] for row, part in zip(rows, parts, strict=True)]
        filling = -sum(map(len, own)) % self.multiple
        own[-1] = [*own[-1], *[self.pad_token_id] * filling]
        input_ids = torch.tensor([token for row in own for token in row])
        following = torch.tensor(
            [each for row, part in zip(rows, parts, strict=True) for each in _following(row)[part]]
            + [IGNORED] * filling
        )
        lengths = torch.tensor([len(row) for row in own])
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        longest = max(part.start + len(row) for part, row in zip(parts, own, strict=True))
        column = torch.arange(len(input_ids)) - (starts[:-1] - torch.tensor(begins)).repeat_interleave(lengths)
        positions = torch.nonzero(following != IGNORED).flatten()
        last = max(len(row["input_ids"]) for row in rows) - 1  # a model need not have a position for padding
        return {
            "input_ids": input_ids[None],
            "position_ids": column.clamp(max=last)[None],
            "positions": positions,
            "targets": following[positions],
            "cells": column + (torch.arange(len(rows)) * longest).repeat_interleave(lengths),
            "starts": starts.int(),
            "grid": (len(rows), longest),
            "shared": ((0, len(rows), shared),) if shared else (),
        }

    @staticmethod
    def _pad(rows: list[Sequence[int]], value: int) -> torch.Tensor:
        padded = torch.full((len(rows), max(len(row) for row in rows)), value, dtype=torch.int64)
        for number, row in enumerate(rows):
            padded[number, : len(row)] = torch.as_tensor(row, dtype=torch.int64)
        return padded


def _shared(rows: Sequence[dict[str, Any]]) -> int:
    """Return how many tokens, in front of what predicts a label, all rows begin with; 0 if that is not worth it."""
    first, last = min(row["input_ids"] for row in rows), max(row["input_ids"] for row in rows)
    alike = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    # A row has a token of its own, and a position that predicts a label is its row's own.
    most = min(min(len(row["input_ids"]), _first_label(row)) - 1 for row in rows)
    count = min(alike, most)
    return count if len(rows) > 1 and count >= WORTH_SHARING else 0


def _first_label(row: dict[str, Any]) -> int:
    return next((n for n, label in enumerate(_following(row), 1) if label != IGNORED), len(row["labels"]))


def _last_label(row: dict[str, Any]) -> int:
    labels = row["labels"]
    return next((n for n in range(len(labels) - 1, 0, -1) if labels[n] != IGNORED), 0)


def _following(row: dict[str, Any]) -> list[int]:
    """Return for each token the label that it predicts."""
    return [*row["labels"][1:], IGNORED]


def first_rows(batch: dict[str, Any], count: int) -> dict[str, Any]:
    """Return a batch in which only the first ``count`` rows carry loss and are counted; its shape stays."""
    if "starts" in batch:
        end = int(batch["starts"][count])
    else:
        end = count * batch["input_ids"].shape[1]
        batch = batch | {"labels": batch["labels"].clone()}
        batch["labels"][count:] = IGNORED
    kept = batch["positions"] < end
    return batch | {
        "positions": batch["positions"][kept],
        "targets": batch["targets"][kept],
        "ids": batch["ids"][:count],
        "lengths": batch["lengths"][:count],
        "tokens": sum(batch["lengths"][:count]),
    }
