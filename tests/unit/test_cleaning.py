"""Cleaning: each step on its own, what is rejected and why, leaks, draws, limits; and the real data's known dirt."""

from __future__ import annotations

import itertools
import json
import random
import re
import subprocess
import sys
import time
import tracemalloc
import unicodedata
from pathlib import Path

import psutil
import pytest
from finegrid.data.cleaning import clean
from finegrid.data.duplicates import jaccard, shingles
from finegrid.data.importing import import_data
from finegrid.data.texts import control_characters, fix_unicode, nfc, white_space
from finegrid.errors import UserError
from finegrid.settings import RunSettings

LOOSE = {"limits": {"dropped": 1.0, "leaked": 1000}}


def settings(**data_config) -> RunSettings:
    return RunSettings.model_validate({"model": {"model_name_or_path": "m"}, "data_config": LOOSE | data_config})


def write(folder: Path, name: str, rows: list) -> None:
    """Write rows: (question, answer) pairs, lists of contents (user first), or whole rows."""
    with (folder / name).open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows):
            if not isinstance(row, dict):
                turns = [
                    {"role": role, "content": text} for role, text in zip(itertools.cycle(("user", "assistant")), row)
                ]
                row = {"id": f"{name[:2]}{number}", "messages": turns}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def run(folder: Path, train: list, validation: list = (), test: list = (), **data_config) -> dict:
    files = {}
    for key, name, rows in (("train_file", "tr", train), ("val_file", "va", validation), ("test_file", "te", test)):
        if rows:
            write(folder, f"{name}.jsonl", list(rows))
            files[key] = f"{name}.jsonl"
    config = settings(**files, **data_config)
    import_data(config, folder, folder / "imported")
    return clean(config, folder / "imported", folder / "clean")


def rows(folder: Path, name: str = "train") -> list[dict]:
    return [json.loads(line) for line in (folder / "clean" / f"{name}.jsonl").read_text("utf-8").split("\n")[:-1]]


def ids(folder: Path, name: str = "train") -> list[str]:
    return [row["id"] for row in rows(folder, name)]


def reasons(folder: Path) -> dict[str, str]:
    return {row["id"]: row["reason"] for row in rows(folder, "rejects")}


# ---------------------------------------------------------------- texts


def test_mojibake_is_mended_and_nothing_else():
    assert fix_unicode("It doesnâ€™t; schÃ¶n") == "It doesn’t; schön"
    kept = "“quotes”, ﬁ, ＡＢＣ，全角！ &amp; <b> Ünïcode \t x"
    assert fix_unicode(kept) == kept


def test_nfc_puts_letters_and_accents_together():
    assert nfc("e\u0301 \u1112\u1161\u11ab ＡＢ") == "é 한 ＡＢ"


def test_control_characters_go_and_line_breaks_and_tabs_stay():
    assert control_characters("a\x00b\x1b\tc\r\nd\re\u2028f\x85g\ufeff\x9c") == "ab\tc\nd\ne\nf\ng"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  What  is   it? ", "What is it?"),
        ("a  \n   b\n\n\n  c", "a\nb\n\n\nc"),
        ("a\u00a0b\u3000c \u2009 d", "a b c d"),
        ("one\ttwo\t\tthree", "one\ttwo\t\tthree"),
        ("see:\n```py\ndef f():\n    return  1\n```\nso  there", "see:\n```py\ndef f():\n    return  1\n```\nso there"),
        ("an open ``` fence   stays text", "an open ``` fence stays text"),
    ],
)
def test_spaces_are_folded_and_lines_trimmed(text, expected):
    assert white_space(text) == expected


def test_the_quick_paths_of_the_text_steps_agree_with_their_definition():
    draw = random.Random(0)
    for _ in range(2000):
        text = "".join(draw.choices("ab  \t\n\r\x00\u00a0é\u2028", k=12))
        by_hand = re.sub("\r\n|[\r\u2028]", "\n", text).replace("\x00", "")
        assert control_characters(text) == by_hand
        folded = re.sub(r"[ \u00a0]{2,}|\u00a0", " ", by_hand)
        assert white_space(by_hand) == re.sub(r"[^\S\n]*\n[^\S\n]*", "\n", folded).strip()


def test_each_text_step_can_be_switched_off_and_counts_rows(tmp_path):
    dirty = [("a  b", "x\x00y"), ("cafe\u0301", "schÃ¶n"), ("clean", "clean too")]
    report = run(tmp_path, dirty)
    changed = {step: counts["changed"] for step, counts in report["steps"]["train"].items() if counts["changed"]}
    assert changed == {"fix_unicode": 1, "nfc": 1, "control_characters": 1, "white_space": 1}
    assert [[m["content"] for m in row["messages"]] for row in rows(tmp_path)] == [
        ["a b", "xy"],
        ["café", "schön"],
        ["clean", "clean too"],
    ]
    off = dict.fromkeys(("fix_unicode", "nfc", "control_characters", "white_space"), False)
    report = run(tmp_path, dirty, cleaning=off)
    assert not off.keys() & report["steps"]["train"].keys()
    assert [tuple(m["content"] for m in row["messages"]) for row in rows(tmp_path)] == dirty


def test_examples_show_the_text_before_and_after(tmp_path):
    report = run(tmp_path, [(f"q {n} " + "x" * 500 + "  y", "a") for n in range(5)])
    examples = report["examples"]["white_space"]
    assert len(examples) == 3
    assert examples[0]["id"] == "tr0"
    assert ("x  y" in examples[0]["before"], "x y" in examples[0]["after"]) == (True, True)
    assert len(examples[0]["before"]) <= 60


# ---------------------------------------------------------------- rejecting


def test_empty_rows_are_rejected_with_the_empty_side(tmp_path):
    run(tmp_path, [("q", "a"), (" ", "a"), ("q2", "\n"), ("q3", "a3", " ", "b")])
    assert ids(tmp_path) == ["tr0"]
    assert reasons(tmp_path) == {"tr1": "empty_prompt", "tr2": "empty_answer", "tr3": "empty_prompt"}


def test_length_bounds_count_characters_of_prompt_and_last_answer(tmp_path):
    bounds = {"min_prompt_chars": 2, "max_prompt_chars": 6, "min_answer_chars": 3, "max_answer_chars": 5}
    train = [
        ("qq", "aaa"),
        ("q", "aaa"),
        ("qqqqqqq", "aaa"),
        ("qqq", "aa"),
        ("qqq", "aaaaaa"),
        ("qq", "aaaa", "q", "aaaaa"),
    ]
    run(tmp_path, train, cleaning=bounds)
    assert reasons(tmp_path) == {
        "tr1": "min_prompt_chars: 1 characters",
        "tr2": "max_prompt_chars: 7 characters",
        "tr3": "min_answer_chars: 2 characters",
        "tr4": "max_answer_chars: 6 characters",
        "tr5": "max_prompt_chars: 7 characters",
    }


def test_of_rows_with_equal_messages_the_first_of_each_split_is_kept(tmp_path):
    train = [("Q", "a"), ("q ", "A"), ("Q", "b"), ("Q", "a")]
    report = run(tmp_path, train, [("v", "w"), ("V", "w")], [("v", "other")])
    assert ids(tmp_path) == ["tr0", "tr2"]
    assert ids(tmp_path, "validation") == ["va0"]
    assert reasons(tmp_path)["tr1"] == "exact_duplicate of tr0"
    assert reasons(tmp_path)["tr3"] == "exact_duplicate of tr0"
    assert report["duplicates"]["train"]["exact_duplicate_rows"] == 2
    report = run(tmp_path, train, cleaning={"exact_duplicates": False})
    assert (len(ids(tmp_path)), report["duplicates"]["train"]["exact_duplicate_rows"]) == (4, 2)


def test_rejected_rows_are_kept_whole(tmp_path):
    run(tmp_path, [{"id": "a", "question": "q  q", "answer": "", "domain": "x"}, {"question": "q", "answer": "a"}])
    (reject,) = rows(tmp_path, "rejects")
    assert reject == {
        "id": "a",
        "split": "train",
        "stage": "clean",
        "step": "empty",
        "reason": "empty_answer",
        "row": {
            "id": "a",
            "messages": [{"role": "user", "content": "q q"}, {"role": "assistant", "content": ""}],
            "source": "tr.jsonl:1",
            "meta": {"domain": "x"},
        },
    }


def near_texts(count: int) -> list[tuple[str, str]]:
    """Return answers of 60 words, each in several versions with more and more words exchanged."""
    draw, texts = random.Random(1), []
    for _ in range(count):
        words = [f"w{draw.randrange(2000)}" for _ in range(60)]
        texts.append(" ".join(words))
        for exchanged in (1, 2, 3, 4, 6, 10):
            changed = list(words)
            for place in draw.sample(range(60), exchanged):
                changed[place] = f"w{draw.randrange(2000)}"
            texts.append(" ".join(changed))
    return [(f"question {n}", text) for n, text in enumerate(texts)]


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9])
def test_near_duplicates_are_those_of_exact_jaccard(tmp_path, threshold):
    train = near_texts(40)
    run(tmp_path, train, cleaning={"near_duplicates": True, "near_duplicate_threshold": threshold})
    kept, expected = [], {}
    for number, (question, answer) in enumerate(train):
        words = f"{question} {answer}".split()
        grams = {tuple(words[i : i + 3]) for i in range(len(words) - 2)}
        twin = next((n for n, other in kept if len(grams & other) / len(grams | other) >= threshold), None)
        if twin is None:
            kept.append((number, grams))
        else:
            expected[f"tr{number}"] = f"tr{twin}"
    assert expected, "the texts have near-duplicates"
    assert {key: reason.split()[2] for key, reason in reasons(tmp_path).items()} == expected


def test_chinese_characters_count_as_words_and_short_texts_as_one():
    assert shingles("你好吗，朋友") == {"你 好 吗", "好 吗 朋", "吗 朋 友"}
    assert shingles("Two words") == {"two words"}
    assert jaccard(shingles(""), shingles("...")) == 0.0


# ---------------------------------------------------------------- leaks


def test_rows_of_train_with_a_held_out_question_or_answer_are_rejected(tmp_path):
    train = [("What IS it?", "x"), ("other", "An  ANSWER"), ("fine", "fine too"), ("ｗｈａｔ is it?", "an answer")]
    report = run(tmp_path, train, [("what is  it?", "v")], [("unasked", "an answer")])
    assert ids(tmp_path) == ["tr2"]
    assert reasons(tmp_path) == {
        "tr0": "leak: question in validation (va0)",
        "tr1": "leak: answer in test (te0)",
        "tr3": "leak: question in validation (va0)",
    }
    found = report["leaks"]["found"]
    assert found["question"]["validation"] == {"train_rows": 2, "distinct": 1}
    assert found["answer"]["test"] == {"train_rows": 2, "distinct": 1}
    assert report["leaks"]["rows_left"] == 0
    assert report["steps"]["train"]["leaked_questions"]["rejected"] == 2
    assert report["steps"]["train"]["leaked_answers"]["rejected"] == 1


def test_every_taught_turn_of_a_conversation_is_looked_at(tmp_path):
    unheard = {"messages": [
        {"role": "user", "content": "held out?"},
        {"role": "assistant", "content": "secret", "loss": False},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "m"},
    ]}  # fmt: skip
    train = [("held out?", "mine", "and?", "so"), ("x", "secret", "y", "z"), ("first", "1", "held out?", "3"), unheard]
    run(tmp_path, train, test=[("held out?", "secret")])
    assert reasons(tmp_path) == {
        "tr0": "leak: question in test (te0)",
        "tr1": "leak: answer in test (te0)",
    }
    assert len(ids(tmp_path)) == 2  # the question in another context, and the turns that are not taught, are no leak


def test_the_question_of_a_held_out_conversation_is_all_that_comes_before_the_answer(tmp_path):
    held = [("hello", "hi", "thanks", "welcome, friend")]
    run(tmp_path, [("hello", "other"), ("thanks", "b"), ("Hello", "HI", "Thanks", "c")], test=held)
    assert reasons(tmp_path) == {"tr2": "leak: question in test (te0)"}


def test_near_duplicates_of_held_out_rows_are_rejected_when_asked(tmp_path):
    words = " ".join(f"word{n}" for n in range(50))
    train = [("a question", f"{words} more"), ("quite another", "text with nothing in common")]
    run(
        tmp_path,
        train,
        [("a question", words.replace("word9 ", ""))],
        cleaning={"leaked_near": True, "leaked_questions": False},
    )
    assert re.fullmatch(r"leak: near duplicate in validation \(va0, Jaccard 0\.\d\d\)", reasons(tmp_path)["tr0"])
    assert ids(tmp_path) == ["tr1"]


def test_held_out_rows_that_are_not_sampled_leak_all_the_same(tmp_path):
    held = [(f"q{n}", f"a{n}") for n in range(10)]
    run(tmp_path, [*held, ("own", "own")], test=held, max_test_samples=1)
    assert ids(tmp_path) == ["tr10"]
    assert len(ids(tmp_path, "test")) == 1


def test_validation_rows_that_are_in_test_are_counted_and_stay(tmp_path):
    report = run(tmp_path, [("t", "t")], [("Q", "a"), ("q", "b"), ("r", "z")], [("q ", "c"), ("s", "Z")])
    assert report["leaks"]["validation_in_test"] == {
        "question": {"validation_rows": 2, "distinct": 1},
        "answer": {"validation_rows": 1, "distinct": 1},
    }
    assert len(ids(tmp_path, "validation")) == 3


def test_empty_texts_are_no_leak(tmp_path):
    run(tmp_path, [("q", ""), ("r", "s")], test=[("x", ""), ("y", "z")], cleaning={"empty": False})
    assert len(ids(tmp_path)) == 2


# ---------------------------------------------------------------- draws


def test_a_larger_sample_contains_the_smaller_and_order_does_not_matter(tmp_path):
    train = [{"id": f"id{n}", "question": f"q{n}", "answer": f"a{n}"} for n in range(200)]
    run(tmp_path, train, max_train_samples=20)
    small = set(ids(tmp_path))
    run(tmp_path, train[::-1], max_train_samples=20)
    assert set(ids(tmp_path)) == small
    report = run(tmp_path, train, train_fraction=0.3)
    large = ids(tmp_path)
    assert len(small) == 20
    assert len(large) == 60
    assert small < set(large)
    assert large == sorted(large, key=lambda name: int(name[2:])), "rows stay in the file's order"
    assert report["rows"]["train"] == {"in": 200, "out": 60, "rejected": 0, "not_sampled": 140}
    assert set(reasons(tmp_path).values()) == {"not_sampled"}
    run(tmp_path, train, max_train_samples=20, sample_seed=1)
    assert set(ids(tmp_path)) != small


def test_validation_and_test_are_drawn_too_and_the_smaller_of_two_bounds_holds(tmp_path):
    many = [[(f"{name}{n}", f"{name}-{n}") for n in range(30)] for name in "abc"]
    run(tmp_path, *many, train_fraction=0.5, max_train_samples=4, max_validation_samples=7, max_test_samples=100)
    assert [len(ids(tmp_path, split)) for split in ("train", "validation", "test")] == [4, 7, 30]


# ---------------------------------------------------------------- limits


def failed(folder: Path, *args, **data_config) -> str:
    with pytest.raises(UserError) as caught:
        run(folder, *args, **data_config)
    assert sorted(path.name for path in (folder / "clean").iterdir()) == ["failed-rejects.jsonl", "failed-report.json"]
    return "\n".join(caught.value.problems)


def test_too_many_rejected_rows_stop_with_numbers_and_keep_the_report(tmp_path):
    train = [("q", "a"), ("q2", ""), *[(f"x{n}", "y") for n in range(8)]]
    said = failed(tmp_path, train, limits={"dropped": 0.05})
    assert "1 of 10 imported rows (10.0%) are rejected (empty 1); data_config.limits.dropped allows 5.0%" in said
    assert "clean/failed-report.json" in said
    report = json.loads((tmp_path / "clean" / "failed-report.json").read_text())
    assert report["rows"]["train"]["rejected"] == 1
    run(tmp_path, train)
    assert not list((tmp_path / "clean").glob("failed-*")), "the next good run takes the failed report away"


def test_rows_that_are_not_sampled_do_not_count_as_dropped(tmp_path):
    run(tmp_path, [(f"q{n}", "a") for n in range(100)], max_train_samples=1, limits={"dropped": 0.0})


def test_leaks_that_are_left_stop_and_name_the_switch(tmp_path):
    said = failed(
        tmp_path,
        [("q", "a"), ("r", "b")],
        (),
        [("q", "z")],
        limits={"dropped": 1},
        cleaning={"leaked_questions": False},
    )
    assert "1 rows that are left leak held-out rows (1 a question that is in test)" in said
    assert "limits.leaked allows 0: switch on data_config.cleaning.leaked_questions, or raise the limit" in said


def test_nothing_left_to_train_on_is_an_error_whatever_the_limits(tmp_path):
    assert "all 1 imported rows are rejected (empty 1)" in failed(tmp_path, [("", "a")])


# ---------------------------------------------------------------- processes


def dirty_rows(count: int) -> list[tuple[str, str]]:
    draw = random.Random(2)
    words = ["schÃ¶n", "cafe\u0301", "two  spaces", "plain", "\x00", "你好", " "]
    return [(f"q{draw.randrange(count)}", " ".join(draw.choices(words, k=draw.randrange(40)))) for _ in range(count)]


def test_the_number_of_processes_changes_no_byte(tmp_path, monkeypatch):
    monkeypatch.setattr("finegrid.data.mending.PIECE_BYTES", 10_000)
    train = dirty_rows(2000)
    steps = {"near_duplicates": True, "leaked_near": True}
    contents = []
    for num_proc in (1, 3):
        run(tmp_path, train, train[:20], train[30:40], cleaning=steps, num_proc=num_proc, max_train_samples=500)
        files = [path for path in (tmp_path / "clean").iterdir() if path.name != "timing.json"]
        contents.append({path.name: path.read_bytes() for path in files})
    assert set(contents[0]) == {"train.jsonl", "validation.jsonl", "test.jsonl", "rejects.jsonl", "report.json"}
    assert contents[0] == contents[1]


def test_every_row_is_kept_or_rejected_once(tmp_path):
    train = dirty_rows(500)
    report = run(tmp_path, train, train[:10], train_fraction=0.5, num_proc=2)
    kept, rejected = ids(tmp_path), [row["id"] for row in rows(tmp_path, "rejects") if row["split"] == "train"]
    assert sorted(kept + rejected) == sorted(f"tr{n}" for n in range(500))
    counts = report["rows"]["train"]
    assert (counts["out"], counts["rejected"] + counts["not_sampled"]) == (len(kept), len(rejected))
    assert sum(step["rejected"] for step in report["steps"]["train"].values()) == counts["rejected"]


def test_memory_grows_by_little_a_row_and_not_with_its_text(tmp_path, monkeypatch):
    monkeypatch.setattr("finegrid.data.mending.PIECE_BYTES", 50_000)
    draw, peaks = random.Random(3), []
    for count in (250, 1500):
        folder = tmp_path / str(count)
        folder.mkdir()
        words = [str(number) for number in draw.choices(range(10**6), k=120 * count)]
        write(folder, "tr.jsonl", [(f"q{n}?", " ".join(words[120 * n : 120 * n + 120])) for n in range(count)])
        config = settings(train_file="tr.jsonl", cleaning={"near_duplicates": True, "leaked_near": True})
        import_data(config, folder, folder / "imported")
        tracemalloc.start()
        clean(config, folder / "imported", folder / "clean")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / 1250 < 300  # bytes; a row's line has 900


KILLED = """
import sys
from pathlib import Path
from finegrid.data import mending
from finegrid.data.cleaning import clean
from finegrid.settings import RunSettings

mending.PIECE_BYTES = 2_000
settings = RunSettings.model_validate(
    {"model": {"model_name_or_path": "m"}, "data_config": {"num_proc": 2, "limits": {"dropped": 1.0, "leaked": 1000}}}
)
folder = Path(sys.argv[1])
clean(settings, folder / "imported", folder / "killed")
"""


def test_a_killed_run_leaves_no_process_and_nothing_half_written(tmp_path):
    run(tmp_path, dirty_rows(4_000))
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)])
    parent, deadline = psutil.Process(process.pid), time.monotonic() + 60
    while len(parent.children()) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = parent.children()
    process.kill()
    process.wait()
    assert len(workers) == 2
    assert psutil.wait_procs(workers, timeout=20)[1] == []
    assert [path.name for path in (tmp_path / "killed").iterdir()] == [".partial"]
    clean(settings(), tmp_path / "imported", tmp_path / "killed")
    for path in (tmp_path / "clean").iterdir():
        assert path.name == "timing.json" or path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes()
    assert not (tmp_path / "killed" / ".partial").exists()


# ---------------------------------------------------------------- the real data


@pytest.fixture(scope="module")
def insuranceqa(insuranceqa_dir, tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("insuranceqa")
    names = {"train_file": "train", "val_file": "validation", "test_file": "test"}
    config = settings(**{key: str(insuranceqa_dir / f"{name}.jsonl.gz") for key, name in names.items()}, num_proc=2)
    import_data(config, folder, folder / "imported")
    return folder, clean(config, folder / "imported", folder / "clean")


def test_the_dirt_of_insuranceqa_is_found(insuranceqa):
    _, report = insuranceqa
    assert [report["rows"][split]["in"] for split in ("train", "validation", "test")] == [21325, 3354, 3308]
    assert report["steps"]["train"]["white_space"]["changed"] == 21325  # doubled spaces in every question
    assert report["duplicates"]["train"]["duplicate_questions"] == 14
    assert report["duplicates"]["test"]["distinct_answers"] == 3302
    assert report["leaks"]["found"]["question"]["test"]["distinct"] == 6
    assert report["leaks"]["found"]["answer"]["test"]["distinct"] == 98


def test_clean_insuranceqa_has_no_leak_and_no_doubled_space(insuranceqa):
    folder, report = insuranceqa

    def plain(text: str) -> str:
        return " ".join(unicodedata.normalize("NFKC", text).casefold().split())

    texts = {
        split: [[message["content"] for message in row["messages"]] for row in rows(folder, split)]
        for split in ("train", "validation", "test")
    }
    held_out = texts["validation"] + texts["test"]
    for part in (0, 1):
        assert not {plain(row[part]) for row in texts["train"]} & {plain(row[part]) for row in held_out}
    assert not any("  " in text for row in texts["train"] for text in row)
    assert report["rows"]["train"]["out"] == len(texts["train"])
    assert len(texts["train"]) + report["rows"]["train"]["rejected"] == 21325
    assert report["leaks"]["rows_left"] == 0
