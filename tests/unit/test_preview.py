"""The preview of raw data: near what the data stage then counts, quick, and honest about what it can't know."""

from __future__ import annotations

import csv
import gzip
import json
import random
import subprocess
import sys

import pytest
from calls import counted_calls
from finegrid import preview
from finegrid.preview import data_preview
from finegrid.settings import DataConfig, ModelSettings, RunSettings

LARGE = 150_000  # tokens of a vocabulary


def settings(max_input=10_000, max_output=10_000, model="no/model", **data) -> RunSettings:
    data.setdefault("train_file", "train.jsonl")
    return RunSettings(
        model=ModelSettings(model_name_or_path=model),
        data_config=DataConfig(**data),
        max_input_length=max_input,
        max_output_length=max_output,
    )


def look(project, **options):
    return data_preview(settings(**options), project, LARGE)


def write(path, rows):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def pairs(count, question="What is it?", answer="It is good."):
    return [{"question": f"{question} {number}", "answer": f"{answer} {number}"} for number in range(count)]


# ---------------------------------------------------------------- against the data stage


def stage_report(run, project, model, folder):
    from finegrid.data.cleaning import clean
    from finegrid.data.importing import import_data
    from finegrid.data.tokenising import tokenise

    import_data(run, project, folder / "imported")
    clean(run, folder / "imported", folder / "clean")
    return tokenise(run, folder / "clean", model, folder / "tokens")["splits"]


@pytest.fixture(scope="module")
def insurance(insuranceqa_dir, tmp_path_factory):
    """Every tenth row of the demo's train file, and its validation file cut to 300 rows."""
    folder = tmp_path_factory.mktemp("insurance")
    with gzip.open(insuranceqa_dir / "train.jsonl.gz", "rb") as file:
        (folder / "train.jsonl").write_bytes(b"".join(list(file)[::10]))
    with gzip.open(insuranceqa_dir / "validation.jsonl.gz", "rb") as file:
        (folder / "validation.jsonl").write_bytes(b"".join(list(file)[:300]))
    return folder


@pytest.mark.parametrize("limits", [{}, {"max_input": 40, "max_output": 60}])
def test_rows_and_tokens_are_near_what_the_data_stage_counts(insurance, tiny_model_dir, tmp_path, limits):
    allowed = {"truncated_answers": 1.0, "dropped": 1.0}
    run = settings(**limits, val_file="validation.jsonl", limits=allowed, model=str(tiny_model_dir))
    report = stage_report(run, insurance, tiny_model_dir, tmp_path)
    splits = data_preview(run, insurance)["splits"]
    for split in ("train", "validation"):
        found, real = splits[split], report[split]
        assert real["rows"] <= found["rows"] <= 1.1 * real["rows"]
        for key in ("label_tokens", "tokens"):
            assert found[key] / found["rows"] == pytest.approx(real[key] / real["rows"], rel=0.12)
        assert found["truncated_answers"] == pytest.approx(real["truncated_answers"], rel=0.15, abs=3)


def test_chinese_costs_what_the_vocabulary_makes_of_it(tmp_path, smollm2_dir):
    from finegrid.data.demo import _read, package_folder
    from tokenizers import Tokenizer

    answers = list(_read(package_folder("insuranceqa_data") / "answers.json.gz").values())[:200]
    write(tmp_path / "train.jsonl", [{"question": "为什么?", "answer": answer["zh"]} for answer in answers])
    tokenizer = Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))
    real = sum(len(tokenizer.encode(answer["zh"], add_special_tokens=False).ids) for answer in answers)
    small = data_preview(settings(model=str(smollm2_dir)), tmp_path)["splits"]["train"]["label_tokens"]
    assert small == pytest.approx(real, rel=0.1)
    assert look(tmp_path)["splits"]["train"]["label_tokens"] < 0.5 * small


def test_every_taught_answer_of_a_conversation_counts(tmp_path):
    turn = [{"role": "user", "content": "x" * 90}, {"role": "assistant", "content": "y" * 450}]
    write(tmp_path / "train.jsonl", [{"messages": turn + turn}] * 3)
    train = look(tmp_path)["splits"]["train"]
    assert train["label_tokens"] == pytest.approx(3 * 2 * 450 / preview.CHARACTERS, rel=0.02)
    silent = [turn[0], turn[1] | {"loss": False}]
    write(tmp_path / "train.jsonl", [{"messages": silent + turn}] * 3)
    assert look(tmp_path)["splits"]["train"]["label_tokens"] == pytest.approx(300, rel=0.02)


# ---------------------------------------------------------------- counting rows


def make_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows(rows)


def make_parquet(path, rows):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize("count", [7, 5_000])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("train.jsonl", write),
        ("train.jsonl.gz", write),
        ("train.csv", make_csv),
        ("train.json", lambda path, rows: path.write_text(json.dumps(rows, indent=1), encoding="utf-8")),
        ("train.parquet", make_parquet),
    ],
)
def test_rows_are_counted_in_every_format(tmp_path, name, make, count):
    make(tmp_path / name, pairs(count, answer='Two lines,\n"quoted":'))
    assert look(tmp_path, train_file=name)["splits"]["train"]["rows"] == count


def test_rows_of_another_encoding_are_counted(tmp_path):
    rows = "".join(json.dumps(row) + "\n" for row in pairs(5_000))
    (tmp_path / "train.jsonl").write_text(rows, encoding="utf-16-le")
    assert look(tmp_path, encoding="utf-16-le")["splits"]["train"]["rows"] == 5_000


def test_a_file_too_large_to_count_is_taken_to_go_on_as_it_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(preview, "READ", 100_000)
    write(tmp_path / "train.jsonl", pairs(10_000))
    found = look(tmp_path)
    assert found["splits"]["train"]["rows"] == pytest.approx(10_000, rel=0.05)
    assert "about" in found["source"]


def test_rows_are_looked_at_all_over_the_file(tmp_path):
    rows = [{"question": "Why?", "answer": "z" * 45 * (1 + number // 5_000)} for number in range(20_000)]
    write(tmp_path / "train.jsonl", rows)
    train = look(tmp_path)["splits"]["train"]
    assert train["label_tokens"] / train["rows"] == pytest.approx(25 + preview.END, rel=0.02)
    assert train["answer_max"] == 40 + preview.END


def test_several_files_count_by_their_rows(tmp_path):
    write(tmp_path / "a.jsonl", pairs(30))
    write(tmp_path / "b.jsonl", pairs(12))
    assert look(tmp_path, train_file=["a.jsonl", "b.jsonl"])["splits"]["train"]["rows"] == 42


# ---------------------------------------------------------------- settings that bound rows and tokens


def test_cleaning_bounds_limits_and_policies_leave_rows_out(tmp_path):
    lengths = [100] * 50 + [1000] * 50
    write(tmp_path / "train.jsonl", [{"question": "Why?", "answer": "z" * length} for length in lengths])
    assert look(tmp_path, cleaning={"max_answer_chars": 500})["splits"]["train"]["rows"] == 50
    assert look(tmp_path, cleaning={"min_answer_chars": 500})["splits"]["train"]["rows"] == 50
    cut = look(tmp_path, max_output=100)["splits"]["train"]
    assert (cut["rows"], cut["answer_max"], cut["truncated_answers"]) == (100, 100, 50)
    dropped = look(tmp_path, max_output=100, truncation={"output": "drop"})["splits"]["train"]
    assert (dropped["rows"], dropped["dropped"]) == (50, 50)
    assert dropped["label_tokens"] < 50 * 24


def test_empty_rows_are_left_out(tmp_path):
    write(tmp_path / "train.jsonl", [*pairs(10), {"question": "Why?", "answer": " "}])
    assert look(tmp_path)["splits"]["train"]["rows"] == 10
    assert look(tmp_path, cleaning={"empty": False})["splits"]["train"]["rows"] == 11


def test_splits_made_by_size_come_out_of_train_before_its_fraction_is_drawn(tmp_path):
    write(tmp_path / "train.jsonl", pairs(1000))
    splits = look(tmp_path, validation_size=0.1, test_size=100, train_fraction=0.5)["splits"]
    assert {split: part["rows"] for split, part in splits.items()} == {"train": 400, "validation": 100, "test": 100}
    few = look(tmp_path, max_train_samples=120)["splits"]["train"]
    every = look(tmp_path)["splits"]["train"]
    assert few["rows"] == 120
    assert few["tokens"] == pytest.approx(0.12 * every["tokens"], rel=0.01)
    assert look(tmp_path, max_train_samples=5000)["splits"]["train"]["rows"] == 1000


def test_a_split_without_file_or_size_has_no_rows(tmp_path):
    write(tmp_path / "train.jsonl", pairs(10))
    assert look(tmp_path)["splits"]["test"] == dict.fromkeys(preview._Measure.__dataclass_fields__, 0)


# ---------------------------------------------------------------- what can't be known


def test_files_that_are_not_there_yet_are_unknown_with_the_reason(tmp_path):
    missing = look(tmp_path)
    assert missing["splits"]["train"]["rows"] is None
    assert missing["unknown"] == "train.jsonl: the file is not there yet"
    write(tmp_path / "train.jsonl", pairs(10))
    half = look(tmp_path, val_file="validation.jsonl")
    assert half["splits"]["train"]["rows"] == 10
    assert half["splits"]["validation"]["tokens"] is None
    assert "validation.jsonl" in half["unknown"]


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04zip", b"\xff\xfe{\x00", b"[1, 2", b'{"a": 1}\n', b"\x1f\x8b\x08\x00broken", b"{{{\n"]
)
def test_a_broken_file_is_left_to_the_data_stage(tmp_path, content):
    (tmp_path / "train.jsonl").write_bytes(content)
    found = look(tmp_path)
    assert found["splits"]["train"]["rows"] is None
    assert found["unknown"].startswith("train.jsonl: can't be looked into")


def test_rows_that_cant_be_read_are_left_to_the_data_stage(tmp_path):
    write(tmp_path / "train.jsonl", [*pairs(9), {"question": "Why?"}])
    assert look(tmp_path)["splits"]["train"]["rows"] == 10


def test_a_hub_data_set_is_unknown(tmp_path):
    found = look(tmp_path, train_file=None, dataset={"path": "someone/data", "revision": "0" * 40})
    assert found["splits"]["train"]["rows"] is None
    assert "someone/data" in found["unknown"]


# ---------------------------------------------------------------- many runs


def test_a_thousand_runs_over_ten_data_settings_look_ten_times(tmp_path):
    rng = random.Random(0)
    write(tmp_path / "train.jsonl", [{"question": "Why?", "answer": "z" * rng.randrange(900)} for _ in range(20_000)])
    runs = [settings(max_output=100 + number % 10) for number in range(1000)]
    with counted_calls() as calls:
        tokens = {data_preview(run, tmp_path, LARGE)["splits"]["train"]["label_tokens"] for run in runs}
    assert calls[0] < 2_500_000  # 1.0 million where this was written: five a row for each of ten looks
    assert len(tokens) == 10


def test_a_changed_file_is_looked_at_anew(tmp_path):
    write(tmp_path / "train.jsonl", pairs(10))
    first = look(tmp_path)
    first["splits"]["train"]["rows"] = -1  # a caller's change stays with the caller
    assert look(tmp_path)["splits"]["train"]["rows"] == 10
    write(tmp_path / "train.jsonl", pairs(11))
    assert look(tmp_path)["splits"]["train"]["rows"] == 11


def test_nothing_heavy_is_imported(tmp_path):
    write(tmp_path / "train.jsonl", pairs(10))
    code = (
        "import sys, pathlib; from finegrid.preview import data_preview; from finegrid.settings import *;"
        "data = DataConfig(train_file='train.jsonl');"
        "run = RunSettings(model=ModelSettings(model_name_or_path='m'), data_config=data);"
        "data_preview(run, pathlib.Path('.'), 1);"
        "print({name.split('.')[0] for name in sys.modules} & {'torch', 'transformers', 'pandas', 'numpy', 'datasets'})"
    )
    printed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "set()"
