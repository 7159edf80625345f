"""Formats: what a row of each looks like, what becomes of it, and what is said of a row that can't be read."""

from __future__ import annotations

import json

import pytest
from finegrid.data.formats import MissingColumn, RowProblem, convert, recognise


def talk(*turns: tuple[str, str]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in turns]


CHATGLM = {"conversations": talk(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))}
OPENAI = {"messages": talk(("user", "a"), ("assistant", "b"))}
SHAREGPT = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"}
ALPACA = {"instruction": "do", "input": "this", "output": "done"}
COMPLETION = {"prompt": "a", "completion": "b"}
COLUMNS = {"question": "a", "answer": "b", "domain": "x"}


@pytest.mark.parametrize(
    ("row", "name", "messages"),
    [
        (CHATGLM, "conversations", CHATGLM["conversations"]),
        (OPENAI, "messages", OPENAI["messages"]),
        (SHAREGPT, "sharegpt", talk(("system", "s"), ("user", "a"), ("assistant", "b"))),
        (ALPACA, "alpaca", talk(("user", "do\nthis"), ("assistant", "done"))),
        (COMPLETION, "prompt_completion", talk(("user", "a"), ("assistant", "b"))),
        (COLUMNS, "columns", talk(("user", "a"), ("assistant", "b"))),
    ],
)
def test_each_format_is_recognised_by_its_columns_and_becomes_messages(row, name, messages):
    form = recognise(row)
    assert form.name == name
    assert convert(row, form)[0] == messages


def test_columns_that_are_no_messages_are_kept_as_meta_and_the_id_apart():
    row = {"id": 7, "question": "a", "answer": "b", "domain": "x", "year": 2024}
    _, own_id, meta = convert(row, recognise(row))
    assert own_id == "7"
    assert meta == {"domain": "x", "year": 2024}


def test_a_mapping_names_prompt_answer_system_and_id():
    row = {"q": "a", "a": "b", "s": "be kind", "key": "k1", "rest": 1}
    columns = {"prompt": "q", "answer": "a", "system": "s", "id": "key"}
    messages, own_id, meta = convert(row, recognise(row, "auto", columns))
    assert messages == talk(("system", "be kind"), ("user", "a"), ("assistant", "b"))
    assert (own_id, meta) == ("k1", {"rest": 1})


def test_alpaca_history_and_system_come_before_the_question():
    row = {"instruction": "c", "input": "", "output": "d", "history": [["a", "b"]], "system": "s"}
    expected = talk(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    assert convert(row, recognise(row))[0] == expected


def test_prompt_and_completion_may_be_lists_of_messages():
    row = {"prompt": talk(("system", "s"), ("user", "a")), "completion": talk(("assistant", "b"))}
    assert convert(row, recognise(row))[0] == talk(("system", "s"), ("user", "a"), ("assistant", "b"))


def test_messages_may_be_json_text_as_in_a_csv_cell():
    row = {"messages": json.dumps(OPENAI["messages"])}
    assert recognise(row).name == "messages"
    assert convert(row, recognise(row))[0] == OPENAI["messages"]


def test_a_prompt_that_looks_like_a_json_list_stays_text():
    row = {"prompt": "[[1, 2], [3, 4]]", "completion": "[1]"}
    assert [message["content"] for message in convert(row, recognise(row))[0]] == ["[[1, 2], [3, 4]]", "[1]"]


def test_the_system_prompt_is_for_rows_that_have_none():
    assert convert(OPENAI, recognise(OPENAI), "default")[0][0] == {"role": "system", "content": "default"}
    assert convert(SHAREGPT, recognise(SHAREGPT), "default")[0][0]["content"] == "s"


@pytest.mark.parametrize(("flag", "loss"), [({"loss": False}, False), ({"weight": 0}, False), ({"weight": 1}, True)])
def test_loss_and_openai_weight_become_the_loss_flag_of_an_answer(flag, loss):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"} | flag]}
    assert convert(row, recognise(row))[0][1]["loss"] is loss


def test_nulls_that_parquet_adds_for_absent_keys_change_nothing():
    absent = {"loss": None, "weight": None, "tool_calls": None}
    row = {"messages": [message | absent for message in OPENAI["messages"]], "system": None}
    assert convert(row, recognise(row))[0] == OPENAI["messages"]


def test_content_in_text_parts_is_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    row = {
        "messages": [
            {"role": "developer", "content": "s"},
            {"role": "user", "content": parts},
            *talk(("assistant", "c")),
        ]
    }
    assert [message["content"] for message in convert(row, recognise(row))[0]] == ["s", "ab", "c"]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (talk(("user", "a"), ("user", "b")), "message 2 is from 'user'; expected 'assistant'"),
        (talk(("assistant", "a")), "message 1 is from 'assistant'; expected 'user'"),
        (talk(("user", "a"), ("assistant", "b"), ("system", "c"), ("assistant", "d")), "message 3 is from 'system'"),
        (talk(("user", "a")), "the last message is from 'user'; expected an answer"),
        (talk(("system", "a")), "the last message is from 'system'"),
        ([], "an empty list"),
        (talk(("user", "a"), ("observation", "b")), "tool conversations are not supported"),
        (talk(("user", "a"), ("asistant", "b")), "the role \"asistant\"; expected one of 'system'"),
        ([{"role": "user", "content": 5}], "the content is a number (5); expected text"),
        ([{"role": "user", "contents": "a"}], "no 'content'; did you mean 'contents'?"),
        (["a"], 'a text ("a"); expected an object'),
        ([{"role": ["user"], "content": "a"}], 'the role ["user"]'),
        ([{"role": "user", "content": "a", "loss": True}, *talk(("assistant", "b"))], "loss on a user message"),
        ([*talk(("user", "a")), {"role": "assistant", "content": "b", "weight": 2}], "weight: 2; expected 0 or 1"),
        ([*talk(("user", "a")), {"role": "assistant", "content": "", "tool_calls": [{}]}], "calls a tool"),
    ],
)
def test_a_message_that_cannot_be_used_is_named(messages, said):
    row = {"messages": messages}
    with pytest.raises(RowProblem) as caught:
        convert(row, recognise(row))
    assert said in str(caught.value)


def test_unknown_columns_are_listed_with_what_is_expected():
    with pytest.raises(MissingColumn, match="'query', 'reply' are no known format; expected 'conversations'"):
        recognise({"query": "a", "reply": "b"})


def test_a_missing_column_is_told_with_the_nearest_one():
    row = {"qestion": "a", "answer": "b"}
    with pytest.raises(MissingColumn, match=r"no column 'question'.*did you mean 'qestion'"):
        convert(row, recognise(row, "columns"))


def test_a_mapping_beside_another_format_is_a_contradiction():
    with pytest.raises(RowProblem, match=r"data_config\.format is 'alpaca'"):
        recognise(ALPACA, "alpaca", {"prompt": "instruction"})


def test_a_content_that_is_no_text_is_refused_in_every_format():
    for row in ({"question": "a", "answer": 1}, ALPACA | {"output": None}, COMPLETION | {"completion": 1.5}):
        with pytest.raises(RowProblem, match="expected text"):
            convert(row, recognise(row))
