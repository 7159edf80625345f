"""Random token rows of mixed lengths, and token files as `finegrid tokenise` writes them, for tests of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def random_rows(count: int, seed: int = 0, split: str = "train") -> list[dict[str, Any]]:
    """Return rows with 3 to 19 prompt tokens and 1 to 14 answer tokens, the answer alone being labelled."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, size: int = 1) -> list[int]:
        return torch.randint(low, high, (size,), generator=generator).tolist()

    rows = []
    for number in range(count):
        (prompt,), (answer,) = draw(3, 20), draw(1, 15)
        input_ids = draw(10, 200, prompt + answer)
        rows.append(
            {
                "id": f"{split}-{number}",
                "input_ids": input_ids,
                "labels": [-100] * prompt + input_ids[prompt:],
                "prompt_length": prompt,
                "truncated_prompt": False,
                "truncated_answer": False,
            }
        )
    return rows


def with_system_message(rows: list[dict[str, Any]], tokens: int = 12) -> list[dict[str, Any]]:
    """Return the rows with so many tokens more in front, the same ones, without labels."""
    message = list(range(100, 100 + tokens))
    return [row | {"input_ids": message + row["input_ids"], "labels": [-100] * tokens + row["labels"]} for row in rows]


def write_tokens(folder: Path, **splits: list[dict[str, Any]]) -> Path:
    """Write ``<split>.arrow`` for each split and return the folder."""
    from datasets import Features, Sequence, Value
    from datasets.arrow_writer import ArrowWriter

    features = Features(
        {
            "id": Value("string"),
            "input_ids": Sequence(Value("int32")),
            "labels": Sequence(Value("int32")),
            "prompt_length": Value("int32"),
            "truncated_prompt": Value("bool"),
            "truncated_answer": Value("bool"),
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        with ArrowWriter(path=str(folder / f"{split}.arrow"), features=features) as writer:
            for row in rows:
                writer.write(row)
            writer.finalize()
    return folder


def plain_loss(model: torch.nn.Module, rows: list[dict[str, Any]]) -> tuple[float, int]:
    """Return the sum of the rows' losses and their label tokens, one row at a time and by hand: the reference."""
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
            logits = logits[-len(row["labels"]) :]  # without the virtual tokens of prompt tuning
            for column in range(1, len(row["labels"])):
                if row["labels"][column] != -100:
                    total -= logits[column - 1].log_softmax(-1)[row["labels"][column]].item()
                    count += 1
    return total, count
