"""Raw pairs to labelled tokens with ``datasets.map``, as one writes it by hand: what the stages are compared with.

    python tests/benchmarks/data_map.py RAW MODEL OUTPUT NUM_PROC

The same steps as Finegrid's: mend encodings, NFC, control characters, white space; empty rows; exact and near
duplicates of train; train rows whose question or answer is held out; chat template, tokens, cut to 256 and 512, labels
on the answer. Steps that look at one row run in ``NUM_PROC`` processes; those that look at all rows in one. It keeps no
rejects, checks no template and writes no report. It uses the libraries that Finegrid uses (ftfy, rensa).
"""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from collections import defaultdict
from pathlib import Path

import ftfy
from datasets import Dataset, DatasetDict, load_dataset
from rensa import RMinHash
from transformers import AutoTokenizer, PreTrainedTokenizerBase

SPLITS = ("train", "validation", "test")
MAX_INPUT, MAX_OUTPUT = 256, 512
THRESHOLD, PERMUTATIONS, ROWS_IN_BAND = 0.8, 128, 8
CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ufeff]")
WORD = re.compile(r"\w+")


def main() -> None:
    raw, model, output, num_proc = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    data = load_dataset("json", data_files={split: str(raw / f"{split}.jsonl.gz") for split in SPLITS})
    data = data.map(clean, batched=True, num_proc=num_proc)
    data = data.filter(filled, batched=True, num_proc=num_proc)
    data = DatasetDict({split: without_exact_duplicates(rows) for split, rows in data.items()})
    data["train"] = without_near_duplicates(data["train"], num_proc)
    data["train"] = without_leaks(data)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = data.map(
        tokenise,
        batched=True,
        num_proc=num_proc,
        remove_columns=["question", "answer", *(set(data["train"].column_names) - {"id", "question", "answer"})],
        fn_kwargs={"tokenizer": tokenizer},
    )
    tokens.save_to_disk(output)
    train = tokens["train"]
    labels = sum(sum(label != -100 for label in row) for row in train["labels"])
    print(json.dumps({"rows": train.num_rows, "label_tokens": labels}))


def clean(batch: dict) -> dict:
    return {column: [clean_text(text) for text in batch[column]] for column in ("question", "answer")}


def clean_text(text: str) -> str:
    text = unicodedata.normalize("NFC", ftfy.fix_text(text))
    text = CONTROL.sub("", text)
    return re.sub(r"[^\S\n]+", " ", text).strip()


def filled(batch: dict) -> list[bool]:
    return [bool(question and answer) for question, answer in zip(batch["question"], batch["answer"], strict=True)]


def normalise(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def without_exact_duplicates(rows: Dataset) -> Dataset:
    seen = set()

    def new(row: dict) -> bool:
        key = (normalise(row["question"]), normalise(row["answer"]))
        if key in seen:
            return False
        seen.add(key)
        return True

    return rows.filter(new)


def without_near_duplicates(rows: Dataset, num_proc: int) -> Dataset:
    rows = rows.map(bands, batched=True, num_proc=num_proc)
    buckets = defaultdict(list)
    kept = []
    for number, (keys, question, answer) in enumerate(
        zip(rows["bands"], rows["question"], rows["answer"], strict=True)
    ):
        candidates = {other for key in enumerate(keys) for other in buckets.get(key, ())}
        if candidates:
            mine = shingles(f"{question}\n{answer}")
            others = (shingles(f"{rows[other]['question']}\n{rows[other]['answer']}") for other in candidates)
            if any(len(mine & other) / len(mine | other) >= THRESHOLD for other in others):
                continue
        for key in enumerate(keys):
            buckets[key].append(number)
        kept.append(number)
    return rows.select(kept).remove_columns("bands")


def bands(batch: dict) -> dict:
    keys = []
    for question, answer in zip(batch["question"], batch["answer"], strict=True):
        sketch = RMinHash(num_perm=PERMUTATIONS, seed=1)
        sketch.update(list(shingles(f"{question}\n{answer}")))
        values = sketch.digest()
        keys.append([str(values[i : i + ROWS_IN_BAND]) for i in range(0, PERMUTATIONS, ROWS_IN_BAND)])
    return {"bands": keys}


def shingles(text: str) -> set[str]:
    words = WORD.findall(normalise(text))
    return {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


def without_leaks(data: DatasetDict) -> Dataset:
    held_out = {
        column: {normalise(text) for split in SPLITS[1:] for text in data[split][column]}
        for column in ("question", "answer")
    }
    return data["train"].filter(
        lambda row: all(normalise(row[column]) not in texts for column, texts in held_out.items())
    )


def tokenise(batch: dict, tokenizer: PreTrainedTokenizerBase) -> dict:
    texts, prompts = [], []
    for question, answer in zip(batch["question"], batch["answer"], strict=True):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        texts.append(tokenizer.apply_chat_template(messages, tokenize=False))
        prompts.append(tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True))
    whole = tokenizer(texts, add_special_tokens=False)["input_ids"]
    starts = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    rows, labels = [], []
    for ids, start in zip(whole, starts, strict=True):
        prompt, answer = ids[: len(start)][:MAX_INPUT], ids[len(start) : -1][:MAX_OUTPUT]
        rows.append(prompt + answer)
        labels.append([-100] * len(prompt) + answer)
    return {"input_ids": rows, "labels": labels}


if __name__ == "__main__":
    main()
