"""The stage: files, report, limits and refusals, on words whose ids are known and on all of the demo's real pairs."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from finegrid.data.tokenising import CHUNK, tokenise
from finegrid.errors import UserError
from finegrid.settings import RunSettings
from word_tokenizer import chat, word_model, words

COLUMNS = ["id", "input_ids", "labels", "prompt_length", "truncated_prompt", "truncated_answer"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return word_model(tmp_path_factory.mktemp("models") / "words")


@pytest.fixture
def clean(tmp_path):
    """Write clean splits: a list of messages a row; a split that is not named is empty."""

    def write(**splits) -> Path:
        folder = tmp_path / "clean"
        folder.mkdir(exist_ok=True)
        for split in ("train", "validation", "test"):
            rows = [
                {"id": f"{split}-{i}", "messages": messages, "source": f"{split}.jsonl:{i + 1}", "meta": {}}
                for i, messages in enumerate(splits.get(split, []))
            ]
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return write


def recipe(max_input=20, max_output=20, num_proc=1, limits=None, **truncation) -> RunSettings:
    return RunSettings(
        model={"model_name_or_path": "data/models/words"},
        data_config={
            "train_file": "data/raw/tales/train.jsonl",
            "num_proc": num_proc,
            "truncation": truncation,
            "limits": limits or {},
        },
        max_input_length=max_input,
        max_output_length=max_output,
    )


def read(folder: Path, split: str = "train") -> list[dict]:
    return Dataset.from_file(str(folder / f"{split}.arrow")).to_list()


def pair(question: int, answer: int) -> list[dict]:
    """Return a conversation whose question and answer have so many words."""
    return chat(words(*range(question)), words(*range(answer)))


def test_rows_are_written_with_labels_and_read_memory_mapped(model, clean, tmp_path):
    source = clean(train=[chat(words(1, 2), words(3))], test=[chat(words(4), words(5, 6))])
    report = tokenise(recipe(), source, model, tmp_path / "tokens")
    data = Dataset.from_file(str(tmp_path / "tokens/train.arrow"))
    assert data.cache_files
    assert data.column_names == COLUMNS
    assert data.features["input_ids"].feature.dtype == "int32"
    assert data.features["labels"].feature.dtype == "int32"
    assert data.features["prompt_length"].dtype == "int32"
    assert data.to_list() == [
        {
            "id": "train-0",
            "input_ids": [0, 3, 11, 12, 1, 4, 13, 1],
            "labels": [-100] * 6 + [13, 1],
            "prompt_length": 6,
            "truncated_prompt": False,
            "truncated_answer": False,
        }
    ]
    assert read(tmp_path / "tokens", "test")[0]["labels"] == [-100] * 5 + [15, 16, 1]
    assert read(tmp_path / "tokens", "validation") == []
    assert json.loads((tmp_path / "tokens/report.json").read_text()) == report
    assert sorted(path.name for path in (tmp_path / "tokens").iterdir()) == [
        "dropped.jsonl",
        "report.json",
        "test.arrow",
        "train.arrow",
        "validation.arrow",
    ]


def test_the_report_counts_before_and_after_truncation(model, clean, tmp_path):
    rows = [pair(2, 3), pair(4, 3), pair(2, 9), chat(words(1))]
    source = clean(train=rows, test=rows)
    (source / "report.json").write_text('{"splits": "as cleaned"}')
    settings = recipe(max_input=7, max_output=5, limits={"truncated_answers": 0.5, "dropped": 0.5})
    report = tokenise(settings, source, model, tmp_path / "tokens")
    train = report["splits"]["train"]
    assert report["data"] == "tales"
    assert report["limits"] == {"max_input_length": 7, "max_output_length": 5}
    assert report["clean"] == {"splits": "as cleaned"}
    assert report["template"]["end_of_turn"] == "<end>"
    assert {key: train[key] for key in ("rows_in", "rows", "truncated_prompts", "truncated_answers", "end_lost")} == {
        "rows_in": 4,
        "rows": 3,
        "truncated_prompts": 1,
        "truncated_answers": 1,
        "end_lost": 1,
    }
    assert train["dropped"] == {"no_answer": 1}
    assert train["label_tokens"] == 4 + 4 + 4
    assert train["tokens"] == (6 + 4) + (7 + 4) + (6 + 5)
    assert train["answer_lengths"]["quantiles"] == {"50": 4, "90": 10, "99": 10, "max": 10}
    assert train["prompt_lengths"]["quantiles"] == {"50": 6, "90": 8, "99": 8, "max": 8}
    lengths = train["answer_lengths"]
    assert lengths["counts"] == np.histogram([4, 4, 10], bins=lengths["edges"])[0].tolist()
    assert sum(lengths["counts"]) == 3
    # The same rows in test come out the same, and what was lost there is said.
    assert report["splits"]["test"] == train
    assert [row["labels"] for row in read(tmp_path / "tokens", "test")] == [
        row["labels"] for row in read(tmp_path / "tokens")
    ]
    said = [f"{finding['place']}: {finding['message']}" for finding in report["findings"]]
    assert said == [
        "test split: 1 of 4 rows (25.0%) dropped (no_answer: 1)",
        "test split: 1 of 3 rows (33.3%) have a cut answer in the loss",
    ]


def test_rows_without_label_tokens_are_dropped_and_kept_aside(model, clean, tmp_path):
    silent = pair(2, 2)
    silent[1]["loss"] = False
    source = clean(train=[silent, pair(2, 2)], validation=[silent])
    report = tokenise(recipe(limits={"dropped": 0.5}), source, model, tmp_path / "tokens")
    assert [row["id"] for row in read(tmp_path / "tokens")] == ["train-1"]
    assert report["splits"]["train"]["dropped"] == {"no_label_tokens": 1}
    dropped = [json.loads(line) for line in (tmp_path / "tokens/dropped.jsonl").read_text().splitlines()]
    assert [(row["id"], row["split"], row["stage"], row["reason"]) for row in dropped] == [
        ("train-0", "train", "tokenise", "no_label_tokens"),
        ("validation-0", "validation", "tokenise", "no_label_tokens"),
    ]
    assert dropped[0]["row"]["messages"] == silent


def test_too_many_cut_answers_are_refused_with_what_would_be_enough(model, clean, tmp_path):
    source = clean(train=[pair(2, n) for n in range(1, 21)])
    output = tmp_path / "tokens"
    tokenise(recipe(max_output=21), source, model, output)
    with pytest.raises(UserError) as caught:
        tokenise(recipe(max_output=11), source, model, output)
    (problem,) = caught.value.problems
    assert problem.startswith(
        "max_output_length: 11 cuts the answer of 10 of 20 rows (50.0%) of train; "
        "data_config.limits.truncated_answers allows 5.0%; 20 would be within it, 21 is enough for all"
    )
    # No tokens are left to be trained on by mistake; the report is there, inside and beside.
    assert sorted(path.name for path in output.iterdir()) == ["dropped.jsonl", "report.json"]
    report = json.loads((output / "report.json").read_text())
    assert report["refused"] == [problem]
    assert report["splits"]["train"]["truncated_answers"] == 10
    assert json.loads((tmp_path / "tokens.refused.json").read_text()) == report
    # What it said is true, and a run that goes well takes the refusal away.
    assert "refused" not in tokenise(recipe(max_output=20), source, model, output)
    assert not (tmp_path / "tokens.refused.json").exists()
    assert len(read(output)) == 20
    assert not list(tmp_path.glob(".tokens*"))


def test_too_many_dropped_rows_are_refused_with_reasons_and_limits(model, clean, tmp_path):
    source = clean(train=[pair(n, 2) for n in range(1, 21)])
    with pytest.raises(UserError) as caught:
        tokenise(recipe(max_input=14, input="drop"), source, model, tmp_path / "tokens")
    (problem,) = caught.value.problems
    assert problem.startswith("train split: 10 of 20 rows (50.0%) were dropped (prompt_too_long: 10); ")
    assert "max_input_length is 14: 22 would be within it, 24 is enough for all" in problem
    assert (
        tokenise(recipe(max_input=22, input="drop"), source, model, tmp_path / "tokens")["splits"]["train"]["rows"]
        == 18
    )


def test_the_policy_error_names_rows_lengths_and_limit(model, clean, tmp_path):
    source = clean(train=[pair(2, 2), pair(2, 9)], test=[pair(30, 2)])
    with pytest.raises(UserError) as caught:
        tokenise(recipe(max_output=5, input="error", output="error"), source, model, tmp_path / "tokens")
    assert caught.value.problems == [
        "train split, row 'train-1' (train.jsonl:2): answer_too_long: prompt 6 tokens, answer 10 tokens; "
        "max_output_length is 5; truncation policy is 'error'",
        "test split, row 'test-0' (test.jsonl:1): prompt_too_long: prompt 34 tokens, answer 3 tokens; "
        "max_input_length is 20; truncation policy is 'error'",
    ]


def test_a_train_split_with_nothing_to_learn_is_refused(model, clean, tmp_path):
    with pytest.raises(UserError, match="train split: it has no rows"):
        tokenise(recipe(), clean(test=[pair(1, 1)]), model, tmp_path / "tokens")
    with pytest.raises(UserError, match=r"all 1 rows were dropped \(no_answer: 1\)"):
        tokenise(recipe(limits={"dropped": 1.0}), clean(train=[chat(words(1))]), model, tmp_path / "tokens")


def test_several_processes_write_the_same_bytes(model, clean, tmp_path):
    rng = np.random.default_rng(0)
    rows = [pair(*rng.integers(1, 30, 2)) for _ in range(2 * CHUNK + 17)]
    source = clean(train=rows, validation=rows[:40] + [chat(words(1))] * 3, test=rows[40:50])
    limits = {"truncated_answers": 1.0, "dropped": 1.0}
    for processes in (1, 3):
        settings = recipe(num_proc=processes, limits=limits, input="middle", output="drop")
        tokenise(settings, source, model, tmp_path / f"tokens{processes}")
    files = sorted(path.name for path in (tmp_path / "tokens1").iterdir())
    assert len(files) == 5
    for name in files:
        assert (tmp_path / "tokens1" / name).read_bytes() == (tmp_path / "tokens3" / name).read_bytes(), name


def test_memory_does_not_grow_with_the_text(model, clean, tmp_path, monkeypatch):
    monkeypatch.setattr("finegrid.data.tokenising.CHUNK", 50)
    tokenise(recipe(max_input=300, max_output=300), clean(train=[pair(100, 100)]), model, tmp_path / "tokens")
    peaks = []
    for count in (100, 500):
        source = clean(train=[pair(100, 100)] * count)
        tracemalloc.start()
        tokenise(recipe(max_input=300, max_output=300), source, model, tmp_path / "tokens")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / 400 < 60  # bytes; a row's tokens and labels have 1,600


def test_a_base_model_without_template_gets_the_plain_one_and_the_report_says_so(clean, tmp_path):
    folder = word_model(tmp_path / "base", template=None)
    report = tokenise(recipe(max_input=30), clean(train=[pair(2, 2)]), folder, tmp_path / "tokens")
    assert report["template"]["source"] == "plain"
    assert "no chat template" in report["findings"][0]["message"]
    (row,) = read(tmp_path / "tokens")
    assert row["labels"][row["prompt_length"] :] == [10, 11, 1]


def test_a_template_file_replaces_the_models_own(model, clean, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(
        "{% for m in messages %}<u>{{ m['content'] }}<end>{% endfor %}{% if add_generation_prompt %}<u>{% endif %}"
    )
    settings = recipe().model_copy(update={"model": recipe().model.model_copy(update={"chat_template": str(file)})})
    report = tokenise(settings, clean(train=[pair(1, 1)]), model, tmp_path / "tokens")
    assert report["template"]["source"] == "file"
    assert read(tmp_path / "tokens")[0]["input_ids"] == [3, 10, 1, 3, 10, 1]


def test_progress_is_told(model, clean, tmp_path):
    lines = []
    tokenise(recipe(), clean(train=[pair(1, 1)]), model, tmp_path / "tokens", lines.append)
    assert lines[-1].startswith("tokenise: 1 rows in ")


@pytest.mark.slow
def test_all_real_pairs_agree_with_the_known_lengths(smollm2_dir, insuranceqa_dir, tmp_path):
    """FACTS.md: answers with the SmolLM2 tokenizer have a median of 92 and a 90th percentile of 204 tokens."""
    source = tmp_path / "clean"
    source.mkdir()
    for split in ("train", "validation", "test"):
        with (
            gzip.open(insuranceqa_dir / f"{split}.jsonl.gz", "rt", encoding="utf-8") as raw,
            (source / f"{split}.jsonl").open("w", encoding="utf-8") as file,
        ):
            for row in map(json.loads, raw):
                messages = chat(" ".join(row["question"].split()), " ".join(row["answer"].split()))
                file.write(json.dumps({"id": row["id"], "messages": messages}) + "\n")
    settings = recipe(max_input=128, max_output=288, num_proc=2)
    report = tokenise(settings, source, smollm2_dir, tmp_path / "tokens")
    train = report["splits"]["train"]
    assert train["rows_in"] == train["rows"] == 21_325
    assert train["dropped"] == {}
    quantiles = train["answer_lengths"]["quantiles"]
    assert quantiles["50"] == 92 + 1
    assert abs(quantiles["90"] - (204 + 1)) <= 3
    data = Dataset.from_file(str(tmp_path / "tokens/train.arrow")).with_format("numpy")
    labels = np.concatenate(list(data["labels"]))
    assert len(labels) == train["tokens"]
    assert (labels != -100).sum() == train["label_tokens"]
    end = report["template"]["end_token_ids"]
    assert (labels == end[0]).sum() == train["rows"] - train["end_lost"]
    assert sum(data["truncated_answer"]) == train["truncated_answers"] == train["end_lost"] > 0
