"""What is cut and what is still taught, on tokens that stand for words (ids written by hand) and on real text."""

from __future__ import annotations

import numpy as np
import pytest
from finegrid.data.template import ChatTemplate, Content, Tokens
from finegrid.data.truncation import TooLong, truncate
from word_tokenizer import ASSISTANT, BOS, END, SYSTEM, USER, chat, word_tokenizer, words

TEMPLATE_IDS = {BOS, END, SYSTEM, USER, ASSISTANT}


@pytest.fixture(scope="module")
def template():
    tokenizer = word_tokenizer()
    return ChatTemplate(tokenizer, tokenizer.chat_template)


@pytest.fixture(scope="module")
def encode(template):
    return lambda messages: template.encode([messages])[0]


def labels(cut):
    return [int(i) if taught else -100 for i, taught in zip(cut.ids, cut.taught, strict=True)]


def test_a_row_within_its_limits_is_left_alone(encode):
    row = encode(chat(words(1, 2), words(3)))
    cut = truncate(row, row.prompt_length, len(row.ids) - row.prompt_length, "error", "error")
    assert cut.ids is row.ids
    assert (cut.truncated_prompt, cut.truncated_answer, cut.end_lost) == (False, False, False)


@pytest.mark.parametrize(
    ("policy", "kept"),
    [("left", [14, 15, 16]), ("right", [11, 12, 13]), ("middle", [11, 12, 16])],
)
def test_a_question_is_cut_and_its_template_stays(encode, policy, kept):
    row = encode(chat(words(1, 2, 3, 4, 5, 6), words(9)))
    cut = truncate(row, 7, 10, policy, "error")
    assert cut.ids.tolist() == [BOS, USER, *kept, END, ASSISTANT, 19, END]
    assert cut.prompt_length == 7
    assert labels(cut) == [-100] * 7 + [19, END]
    assert (cut.truncated_prompt, cut.truncated_answer, cut.end_lost) == (True, False, False)


def test_right_cuts_an_answer_and_its_end_is_not_taught(encode):
    row = encode(chat(words(1), words(2, 3, 4, 5)))
    cut = truncate(row, 10, 3, "error", "right")
    assert cut.ids[cut.prompt_length :].tolist() == [12, 13, END]
    assert labels(cut)[cut.prompt_length :] == [12, 13, -100]
    assert cut.truncated_answer
    assert cut.end_lost


@pytest.mark.parametrize(
    ("policy", "kept", "taught"),
    [("left", [14, 15, END], [-100, 15, END]), ("middle", [12, 15, END], [12, -100, END])],
)
def test_left_and_middle_keep_the_real_end_and_do_not_teach_the_seam(encode, policy, kept, taught):
    row = encode(chat(words(1), words(2, 3, 4, 5)))
    cut = truncate(row, 10, 3, "error", policy)
    assert cut.ids[cut.prompt_length :].tolist() == kept
    assert labels(cut)[cut.prompt_length :] == taught
    assert cut.truncated_answer
    assert not cut.end_lost


def test_left_cuts_the_oldest_messages_and_never_the_system_message(encode):
    row = encode(chat(words(1, 2), words(3, 4), words(5, 6), words(9), system=words(7, 8)))
    assert row.prompt_length == 18
    cut = truncate(row, 15, 10, "left", "error")
    assert cut.ids.tolist() == [0, 2, 17, 18, 1, 3, 1, 4, 14, 1, 3, 15, 16, 1, 4, 19, 1]
    # Word 3 of the first answer is gone: word 4 stands at the seam, its end is real.
    assert labels(cut) == [-100] * 9 + [1] + [-100] * 5 + [19, 1]
    deeper = truncate(row, 13, 10, "left", "error")
    assert deeper.ids.tolist() == [0, 2, 17, 18, 1, 3, 1, 4, 1, 3, 16, 1, 4, 19, 1]
    # Nothing of the first answer is left: its end is not taught either.
    assert labels(deeper) == [-100] * 13 + [19, 1]
    with pytest.raises(TooLong, match="template and system message take 12 tokens"):
        truncate(row, 12, 10, "left", "error")


def test_right_cuts_the_newest_messages_and_an_earlier_cut_answer_teaches_no_end(encode):
    row = encode(chat(words(1, 2), words(3, 4), words(5, 6), words(9)))
    cut = truncate(row, row.prompt_length - 3, 10, "right", "error")
    assert cut.ids.tolist() == [0, 3, 11, 12, 1, 4, 13, 1, 3, 1, 4, 19, 1]
    assert labels(cut) == [-100] * 6 + [13] + [-100] * 4 + [19, 1]


def test_middle_cuts_the_middle_of_all_contents_together(encode):
    row = encode(chat(words(1, 2), words(3, 4), words(5, 6), words(9)))
    cut = truncate(row, row.prompt_length - 2, 10, "middle", "error")
    assert [i for i in cut.ids.tolist() if i >= 10] == [11, 12, 15, 16, 19]


def test_the_prompt_limit_does_not_touch_the_answer_nor_the_other_way_round(encode):
    row = encode(chat(words(*range(10)), words(*range(10, 20))))
    both = truncate(row, 8, 5, "left", "right")
    assert both.prompt_length == 8
    assert len(both.ids) == 13
    assert (both.truncated_prompt, both.truncated_answer) == (True, True)


@pytest.mark.parametrize(
    ("max_input", "max_output", "policies", "reason", "stops"),
    [
        (6, 10, ("drop", "right"), "prompt_too_long", False),
        (6, 10, ("error", "right"), "prompt_too_long", True),
        (50, 3, ("left", "drop"), "answer_too_long", False),
        (50, 3, ("left", "error"), "answer_too_long", True),
        (4, 10, ("left", "right"), "prompt_limit_leaves_no_content", False),
        (3, 10, ("middle", "right"), "prompt_limit_leaves_no_content", False),
        (50, 1, ("left", "right"), "answer_limit_leaves_no_content", False),
    ],
)
def test_rows_over_a_limit_are_dropped_or_stop_with_lengths_and_limit(
    encode, max_input, max_output, policies, reason, stops
):
    row = encode(chat(words(1, 2, 3), words(4, 5, 6)))
    with pytest.raises(TooLong) as caught:
        truncate(row, max_input, max_output, *policies)
    assert caught.value.reason == reason
    assert caught.value.stops == stops
    assert str(max_input if reason.startswith("prompt") else max_output) in caught.value.detail


def test_random_cuts_keep_the_template_the_limits_and_only_true_labels(encode):
    rng = np.random.default_rng(0)
    for _ in range(300):
        texts = [words(*rng.integers(0, 60, rng.integers(1, 9))) for _ in range(2 * rng.integers(1, 4))]
        row = encode(chat(*texts, system=words(*rng.integers(0, 60, 2)) if rng.random() < 0.5 else None))
        turns = sum(c.stop - c.start for c in row.contents[:-1] if c.role != "system")
        fixed = row.prompt_length - turns
        max_input = int(rng.integers(fixed + 1, row.prompt_length + 2))
        max_output = int(rng.integers(2, len(row.ids) - row.prompt_length + 2))
        policies = rng.choice(["left", "right", "middle"], 2)
        cut = truncate(row, max_input, max_output, *policies)
        assert cut.prompt_length <= max_input
        assert len(cut.ids) - cut.prompt_length <= max_output
        assert cut.prompt_length == min(row.prompt_length, max_input)
        assert [i for i in cut.ids if i in TEMPLATE_IDS] == [i for i in row.ids if i in TEMPLATE_IDS]
        assert set(zip(*true_pairs(cut), strict=True)) <= set(zip(*true_pairs(row), strict=True))


def true_pairs(row):
    """What is taught: a label together with the token that it is predicted after."""
    at = np.flatnonzero(row.taught)
    return row.ids[at - 1].tolist(), row.ids[at].tolist()


@pytest.mark.parametrize("policy", ["left", "right", "middle"])
def test_no_cut_goes_through_a_character(smollm2_dir, policy):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir, local_files_only=True)
    template = ChatTemplate(tokenizer, tokenizer.chat_template)
    answer = "保险公司在合同约定的条件下承担赔偿责任🙂。" * 3
    (row,) = template.encode([chat("什么是人寿保险？请详细说明其条款。", answer)])
    prompt_content = row.contents[0]
    fixed = row.prompt_length - (prompt_content.stop - prompt_content.start)
    for limit in range(4, 40):
        cut = truncate(row, fixed + limit, limit, policy, policy)
        assert "\ufffd" not in tokenizer.decode(cut.ids)
        assert cut.prompt_length <= fixed + limit
        assert len(cut.ids) - cut.prompt_length <= limit


def test_uncut_parts_keep_their_tokens(smollm2_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir, local_files_only=True)
    template = ChatTemplate(tokenizer, tokenizer.chat_template)
    (row,) = template.encode([chat("What does unemployment insurance cover?", "It replaces a part of lost wages.")])
    cut = truncate(row, row.prompt_length - 3, 5, "left", "right")
    question, answer = row.contents
    expected = [*row.ids[: question.start], *row.ids[question.start + 3 : answer.start + 4], row.ids[-1]]
    assert cut.ids.tolist() == [int(i) for i in expected]


def test_an_untaught_answer_loses_no_end():
    row = Tokens(np.arange(6), np.zeros(6, bool), (Content("assistant", 2, 5),), 2, False, lambda i: False)
    assert not truncate(row, 5, 3, "left", "right").end_lost
