"""Import: every container and format gives the same rows; broken files are told with file and line; nothing is left."""

from __future__ import annotations

import csv
import gzip
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from finegrid.data.importing import import_data
from finegrid.errors import UserError
from finegrid.settings import RunSettings

QA = [{"question": f"Question {n}, “quoted”?", "answer": f"Answer\n{n}; é中"} for n in range(40)]


def run(folder: Path, **data_config) -> dict:
    settings = RunSettings.model_validate({"model": {"model_name_or_path": "m"}, "data_config": data_config})
    return import_data(settings, folder, folder / "out")


def problems(folder: Path, **data_config) -> list[str]:
    with pytest.raises(UserError) as caught:
        run(folder, **data_config)
    assert not (folder / "out").exists(), "a failed import leaves nothing"
    return caught.value.problems


def rows(folder: Path, split: str = "train") -> list[dict]:
    return [json.loads(line) for line in (folder / "out" / f"{split}.jsonl").read_text("utf-8").splitlines()]


def texts(imported: list[dict]) -> list[dict]:
    return [dict(zip(("question", "answer"), (m["content"] for m in row["messages"]), strict=True)) for row in imported]


def lines(values: list) -> bytes:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()


def write_csv(path: Path, delimiter: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, QA[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(QA)


CONTAINERS = {
    "a.jsonl": lambda path: path.write_bytes(lines(QA)),
    "b.json": lambda path: path.write_text(json.dumps(QA), "utf-8"),
    "c.json": lambda path: path.write_text(json.dumps({"data": QA, "version": 1}, indent=2), "utf-8"),
    "d.json": lambda path: path.write_bytes(lines(QA)),  # json lines under the wrong name
    "e.csv": write_csv,
    "f.tsv": lambda path: write_csv(path, "\t"),
    "g.csv": lambda path: write_csv(path, ";"),
    "h.parquet": lambda path: pq.write_table(pa.Table.from_pylist(QA), path),
    "i.data": lambda path: path.write_bytes(b"\xef\xbb\xbf" + lines(QA)),  # no known name, a byte order mark
}


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_gives_the_same_rows(tmp_path, name, zipped):
    path = tmp_path / name
    CONTAINERS[name](path)
    if zipped:
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
        name += ".gz"
    report = run(tmp_path, train_file=name)
    assert texts(rows(tmp_path)) == QA
    kind = {"jsonl": "jsonl", "json": "json", "csv": "csv", "tsv": "csv", "parquet": "parquet", "data": "jsonl"}
    expected = "jsonl" if name.startswith("d.") else kind[name.removesuffix(".gz").split(".")[1]]
    assert report["files"]["train"][0]["container"] == expected + (", gzip" if zipped else "")
    assert report["files"]["train"][0]["format"] == "columns (prompt: question, answer: answer)"


def test_a_row_says_where_it_came_from(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\n{"question": "q", "answer": "a", "kind": {"x": [1, null]}}\n')
    run(tmp_path, train_file="a.jsonl")
    assert rows(tmp_path) == [
        {
            "id": "train-1",
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
            "source": "a.jsonl:2",
            "meta": {"kind": {"x": [1, None]}},
        }
    ]


def test_sources_are_lines_in_json_lists_and_multi_line_csv(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(QA[:2], indent=1), "utf-8")
    (tmp_path / "b.csv").write_text('question,answer\n"one\ntwo",x\nq,y\n', "utf-8")
    run(tmp_path, train_file=["a.json", "b.csv"])
    assert [row["source"] for row in rows(tmp_path)] == ["a.json:2", "a.json:6", "b.csv:2", "b.csv:4"]
    assert [row["id"] for row in rows(tmp_path)] == ["train-1", "train-2", "train-3", "train-4"]


def test_all_three_splits_are_written_and_the_report_is_the_same_each_time(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(QA))
    (tmp_path / "b.jsonl").write_bytes(
        lines([{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}])
    )
    returned = run(tmp_path, train_file="a.jsonl", val_file="b.jsonl")
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    run(tmp_path, train_file="a.jsonl", val_file="b.jsonl")
    assert set(first) == {"train.jsonl", "validation.jsonl", "test.jsonl", "report.json", "timing.json"}
    assert all((tmp_path / "out" / name).read_bytes() == first[name] for name in first if name != "timing.json")
    assert returned["rows"] == {"train": 40, "validation": 1, "test": 0}
    assert returned["rows_per_second"] > 0
    assert "seconds" not in json.loads(first["report.json"])


def test_formats_are_told_file_by_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(QA))
    (tmp_path / "b.jsonl").write_bytes(lines([{"instruction": "i", "output": "o"}]))
    report = run(tmp_path, train_file=["a.jsonl", "b.jsonl"])
    assert [file["format"] for file in report["files"]["train"]] == [
        "columns (prompt: question, answer: answer)",
        "alpaca",
    ]


def test_other_encodings_are_read_when_named(tmp_path):
    for encoding in ("gb18030", "utf-16"):
        (tmp_path / "a.jsonl").write_bytes(lines(QA).decode().encode(encoding))
        assert run(tmp_path, train_file="a.jsonl", encoding=encoding)["encoding"] == encoding
        assert texts(rows(tmp_path)) == QA


def test_halves_of_surrogate_pairs_are_replaced_and_counted_and_nan_becomes_null(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"question": "a\\ud800", "answer": "\\ud83d\\ude00", "score": NaN}\n')
    assert run(tmp_path, train_file="a.jsonl")["lone_surrogates_replaced"] == 1
    assert texts(rows(tmp_path)) == [{"question": "a\ufffd", "answer": "😀"}]
    assert rows(tmp_path)[0]["meta"] == {"score": None}


# ---------------------------------------------------------------- ids


def test_ids_of_the_file_are_kept(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines([{"id": n * 10, **row} for n, row in enumerate(QA)]))
    run(tmp_path, train_file="a.jsonl")
    assert [row["id"] for row in rows(tmp_path)] == [str(n * 10) for n in range(40)]


def test_an_id_that_comes_twice_is_told_with_both_lines(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines([{"id": n % 3, **QA[n]} for n in range(4)]))
    assert problems(tmp_path, train_file="a.jsonl") == [
        "a.jsonl:4: the id '0' is that of a.jsonl:1 too; expected ids that are unique"
    ]


def test_ids_that_count_anew_in_each_file_get_their_split_before_them(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines([{"id": n, **QA[n]} for n in range(3)]))
    assert run(tmp_path, train_file="a.jsonl", test_file="b.jsonl")["ids_prefixed_by_split"]
    assert [row["id"] for row in rows(tmp_path)] == ["train-0", "train-1", "train-2"]
    assert [row["id"] for row in rows(tmp_path, "test")] == ["test-0", "test-1", "test-2"]


# ---------------------------------------------------------------- splitting off


def test_rows_split_off_train_are_disjoint_and_share_no_question(tmp_path):
    pairs = [{"question": f"Q {n // 3}" if n % 2 else f" q  {n // 3} ", "answer": str(n)} for n in range(90)]
    (tmp_path / "a.jsonl").write_bytes(lines(pairs))
    report = run(tmp_path, train_file="a.jsonl", validation_size=12, test_size=0.1)
    found = {split: rows(tmp_path, split) for split in ("train", "validation", "test")}
    assert report["rows"] == {split: len(rows) for split, rows in found.items()}
    assert report["rows"] == {"train": 69, "validation": 12, "test": 9}
    assert sorted(row["id"] for split in found.values() for row in split) == sorted(f"train-{n + 1}" for n in range(90))
    questions = [{" ".join(pair["question"].lower().split()) for pair in texts(found[split])} for split in found]
    assert not (questions[0] & questions[1] | questions[0] & questions[2] | questions[1] & questions[2])


def test_what_is_split_off_depends_on_the_seed_not_on_the_order(tmp_path):
    numbered = [{"id": f"r{n}", **row} for n, row in enumerate(QA)]
    drawn = {}
    for name, order, seed in (("one", numbered, 0), ("two", numbered[::-1], 0), ("three", numbered, 1)):
        (tmp_path / "a.jsonl").write_bytes(lines(order))
        run(tmp_path, train_file="a.jsonl", validation_size=10, sample_seed=seed)
        drawn[name] = {row["id"] for row in rows(tmp_path, "validation")}
    assert drawn["one"] == drawn["two"] != drawn["three"]


def test_a_file_wins_over_a_size(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(QA))
    (tmp_path / "b.jsonl").write_bytes(lines(QA[:2]))
    report = run(tmp_path, train_file="a.jsonl", val_file="b.jsonl", validation_size=5)
    assert report["rows"] == {"train": 40, "validation": 2, "test": 0}


@pytest.mark.parametrize("size", [40, 1.5, -1])
def test_a_size_that_is_impossible_is_told(tmp_path, size):
    (tmp_path / "a.jsonl").write_bytes(lines(QA))
    assert "validation_size" in problems(tmp_path, train_file="a.jsonl", validation_size=size)[0]


# ---------------------------------------------------------------- hub


@pytest.fixture
def hub_copy(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "copies" / "qa"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_bytes(lines(QA))
    (folder / "held.jsonl").write_bytes(lines(QA[:3]))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: train.jsonl\n"
        "- config_name: small\n  data_files:\n  - split: held\n    path: held.jsonl\n---\n"
    )
    return tmp_path


def test_parquet_splits_of_a_hub_copy_are_read(hub_copy):
    folder = hub_copy / "copies" / "chat"
    folder.mkdir()
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]
    pq.write_table(pa.Table.from_pylist([{"messages": talk}] * 3), folder / "train-00000.parquet")
    pq.write_table(pa.Table.from_pylist([{"messages": talk}]), folder / "test-00000.parquet")
    report = run(hub_copy, dataset={"path": "copies/chat", "test_split": "test"})
    assert report["rows"] == {"train": 3, "validation": 0, "test": 1}
    assert rows(hub_copy)[0]["messages"] == [talk[0], {"role": "assistant", "content": "a", "loss": False}]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_local_copy_of_a_hub_data_set_is_read(hub_copy, streaming):
    report = run(hub_copy, dataset={"path": "copies/qa"}, streaming=streaming)
    assert report["dataset"] == "qa"
    assert texts(rows(hub_copy)) == QA
    assert rows(hub_copy)[4]["source"] == "copies/qa[train]:5"


def test_a_configuration_and_its_split_are_read(hub_copy):
    run(hub_copy, dataset={"path": "copies/qa", "name": "small", "train_split": "held"})
    assert texts(rows(hub_copy)) == QA[:3]


def test_an_unknown_hub_split_is_told_with_the_nearest(hub_copy):
    (said,) = problems(hub_copy, dataset={"path": "copies/qa", "train_split": "trian"})
    assert said == "copies/qa[trian]: no split 'trian'; did you mean 'train'?; found train"


def test_a_hub_data_set_needs_a_revision(tmp_path):
    (said,) = problems(tmp_path, dataset={"path": "who/what"})
    assert "data_config.dataset.revision is not set; expected the commit" in said


# ---------------------------------------------------------------- broken input


def cut_line_17() -> bytes:
    good = lines(QA).splitlines(keepends=True)
    good[16] = good[16][:-3] + b"\n"
    return b"".join(good)


BROKEN = {
    "truncated.jsonl.gz": (gzip.compress(lines(QA * 500))[:-200], "truncated.jsonl.gz: the gzip file ends early"),
    "damaged.jsonl.gz": (gzip.compress(lines(QA))[:-8] + b"12345678", "damaged.jsonl.gz: the file is damaged"),
    "line17.jsonl": (cut_line_17(), "line17.jsonl:17: bad JSON"),
    "column.jsonl": (lines([*QA[:4], {"question": "q"}]), "column.jsonl:5: no column 'answer'"),
    "empty.jsonl": (b"", "empty.jsonl: the file is empty"),
    "blank.jsonl": (b" \n\n", "blank.jsonl: the file holds nothing but white space"),
    "none.json": (b"[]", "none.json: the file has no rows"),
    "empty.jsonl.gz": (gzip.compress(b""), "empty.jsonl.gz: the gzipped file is empty"),
    "gbk.jsonl": ('{"question": "你好吗", "answer": "好"}\n'.encode("gb18030"), "set data_config.encoding: gb18030"),
    "latin.jsonl": (
        lines(QA[:2]) + '{"question": "café", "answer": "b"}\n'.encode("cp1252"),
        "latin.jsonl:3: byte 0xe9 at column 18 is no utf-8",
    ),
    "utf16.jsonl": (lines(QA).decode().encode("utf-16"), "set data_config.encoding: utf-16"),
    "binary.jsonl": (b"\x00\x01\x02" * 50, "binary.jsonl: the file is binary"),
    "header.csv": (b"What is it?,A thing.\nAnd that?,Too.\n", "header.csv:1: columns 'What is it?', 'A thing.'"),
    "twice.csv": (b"question,question\na,b\n", "twice.csv:1: the column name 'question' twice"),
    "ragged.csv": (b"question,answer\na,b\na,b,c\n", "ragged.csv:3: the row's cells are 3; expected 2"),
    "quote.csv": (b'question,answer\na,b\n"open,b\nc,d\n', "quote.csv:3: bad csv (a quoted cell is never closed"),
    "cut.json": (json.dumps(QA, indent=1).encode()[:-20], "bad JSON (the file ends early)"),
    "comma.json": (b'[{"question": "a", "answer": "b"}\n {"question": "a"}]', "comma.json:2: bad JSON (Expecting ','"),
    "two.json": (b'[{"question": "a", "answer": "b"}]\n[]', "two.json:1: bad JSON behind the list's end"),
    "item.json": (b'[{"question": "a", "answer": "b"},\n 1]', "item.json:2: the item is a number"),
    "number.jsonl": (lines([{"question": "a", "answer": 5}]), "number.jsonl:1: column 'answer' is a number (5)"),
    "cut.parquet": (b"PAR1" + b"\x00" * 50, "cut.parquet: the parquet file is damaged"),
    "book.xlsx": (b"PK\x03\x04 and more", "book.xlsx: the file is a zip archive or an Excel file"),
    "deep.jsonl": (b"[" * 200_000, "deep.jsonl:1: bad JSON (nested too deep)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_told_with_its_place_and_nothing_is_left(tmp_path, name):
    content, said = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    (found,) = problems(tmp_path, train_file=name)
    assert found.startswith(name)
    assert said in found


def test_a_damaged_parquet_page_is_told(tmp_path):
    pq.write_table(pa.Table.from_pylist(QA), tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[:20] + b"\xff" * 40 + content[60:])
    assert problems(tmp_path, train_file="a.parquet")[0].startswith("a.parquet: the ")


def test_problems_of_all_files_are_collected(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(cut_line_17())
    (tmp_path / "b.csv").write_bytes(BROKEN["ragged.csv"][0])
    found = problems(tmp_path, train_file="a.jsonl", test_file="b.csv")
    assert [problem.split(": ")[0] for problem in found] == ["a.jsonl:17", "b.csv:3"]


def test_many_problems_are_counted_after_the_first_twenty(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines([{"question": "a", "answer": n} for n in range(300)]))
    found = problems(tmp_path, train_file="a.jsonl")
    assert len(found) == 21
    assert found[19].startswith("a.jsonl:20:")
    assert found[20] == "… and 280 more problems of these files"


@pytest.mark.parametrize(
    ("data_config", "said"),
    [
        ({"train_file": "a.json"}, "data_config.train_file: no file 'a.json'; did you mean 'a.jsonl'?"),
        ({"train_file": "x/a.jsonl"}, "the folder 'x' is not there; paths are relative to the project"),
        ({"train_file": "."}, "'.' is a folder; expected a file"),
        ({}, "neither train_file nor dataset is set"),
        ({"train_file": "a.jsonl", "dataset": {"path": "x"}}, "both train_file and dataset are set"),
        ({"train_file": "a.jsonl", "encoding": "utf-88"}, "'utf-88' is no known encoding"),
        (
            {"train_file": "a.jsonl", "columns": {"prompt": "qestion"}},
            "no column 'qestion' (data_config.columns.prompt)",
        ),
        ({"train_file": "a.jsonl", "columns": {"id": "uid"}}, "no column 'uid' (data_config.columns.id)"),
        ({"train_file": "a.jsonl", "format": "messages"}, "a.jsonl:1: no column 'messages'"),
    ],
)
def test_a_mistake_in_the_settings_is_told(tmp_path, data_config, said):
    (tmp_path / "a.jsonl").write_bytes(lines(QA))
    (found,) = problems(tmp_path, **data_config)
    assert said in found


def test_a_failed_import_leaves_an_earlier_one_as_it_was(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(QA))
    run(tmp_path, train_file="a.jsonl")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "a.jsonl").write_bytes(cut_line_17())
    with pytest.raises(UserError):
        run(tmp_path, train_file="a.jsonl")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_memory_does_not_grow_with_a_json_lines_file(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wb", compresslevel=1) as file:
        for _ in range(100):
            file.write(lines([{"question": "q" * 1000, "answer": "a" * 4000}]) * 40)  # 20 MB in all
    tracemalloc.start()
    run(tmp_path, train_file="a.jsonl.gz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6


def test_memory_grows_by_little_a_row_where_splits_are_drawn(tmp_path):
    peaks = []
    for count in (500, 4500):
        pairs = [{"id": f"row-{n}", "question": f"q{n}" * 20, "answer": "a" * 400} for n in range(count)]
        (tmp_path / "a.jsonl").write_bytes(lines(pairs))
        del pairs
        tracemalloc.start()
        run(tmp_path, train_file="a.jsonl", validation_size=0.1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / 4000 < 200  # bytes; a row's line has 600


def test_rows_split_off_keep_the_name_of_train_when_ids_are_prefixed(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines([{"id": n, **QA[n]} for n in range(10)]))
    (tmp_path / "b.jsonl").write_bytes(lines([{"id": n, **QA[n]} for n in range(10, 13)] + [{"id": 0, **QA[14]}]))
    run(tmp_path, train_file="a.jsonl", test_file="b.jsonl", validation_size=3)
    named = [row["id"] for split in ("train", "validation") for row in rows(tmp_path, split)]
    assert sorted(named) == sorted(f"train-{n}" for n in range(10))
    assert [row["id"] for row in rows(tmp_path, "test")] == ["test-10", "test-11", "test-12", "test-0"]
