"""Batches: padding, positions and labels."""

from __future__ import annotations

import torch
from finegrid.training.collation import Collator
from token_rows import random_rows

ROWS = [
    {"id": "a", "input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
    {"id": "b", "input_ids": [9, 4], "labels": [-100, 4]},
]


def test_rows_are_padded_on_the_right_and_padding_is_masked():
    batch = Collator(pad_token_id=3)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 4, 3, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 8], [-100, 4, -100, -100]]
    assert batch["ids"] == ["a", "b"]
    assert batch["tokens"] == 6


def test_positions_are_those_before_the_labels():
    batch = Collator()(ROWS)
    assert batch["positions"].tolist() == [1, 2, 4]
    assert batch["targets"].tolist() == [7, 8, 4]


def test_a_label_in_the_first_column_has_nothing_that_predicts_it():
    batch = Collator()([{"id": "a", "input_ids": [5, 6], "labels": [5, 6]}])
    assert batch["positions"].tolist() == [0]
    assert batch["targets"].tolist() == [6]


def test_positions_agree_with_shifted_labels_on_rows_of_mixed_lengths():
    batch = Collator()(random_rows(13))
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100).flatten()
    expected = (shifted != -100).nonzero().flatten()
    assert batch["positions"].tolist() == expected.tolist()
    assert batch["targets"].tolist() == shifted[expected].tolist()


def test_a_padding_id_that_is_also_a_real_token_masks_no_real_token():
    batch = Collator(pad_token_id=6)(ROWS)
    assert batch["attention_mask"].sum().item() == 6
