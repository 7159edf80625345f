"""Tokens, labels and prompts of conversations, against transformers' own rendering, marks and prefixes."""

from __future__ import annotations

import gzip
import json

import pytest
from finegrid.data.template import PLAIN_TEMPLATE, ChatTemplate, RowRefused, load_template
from finegrid.errors import UserError
from word_tokenizer import chat as dialogue
from word_tokenizer import word_tokenizer, words

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATGLM = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'system' %}{{ raise_exception('no system messages') }}"
    "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}"
    "\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Qwen3's habit: the last answer opens with a thinking block that the prompt does not write.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last and m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ADDED = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>"]
ADDED += ["<|assistant|>"]


@pytest.fixture(scope="module")
def load(smollm2_dir):
    """Give the SmolLM2 tokenizer with the special tokens of other families and its own template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir, local_files_only=True)
    tokenizer.add_tokens(ADDED, special_tokens=True)
    own = tokenizer.chat_template

    def fresh():
        tokenizer.chat_template = own
        return tokenizer

    return fresh


@pytest.fixture(scope="module")
def real_chats(insuranceqa_dir):
    """600 real pairs: alone, with a system message, and as conversations of three turns."""
    with gzip.open(insuranceqa_dir / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for _, line in zip(range(600), file, strict=False)]
    texts = [(" ".join(row["question"].split()), " ".join(row["answer"].split())) for row in rows]
    single = [dialogue(*pair) for pair in texts[:300]]
    with_system = [dialogue(*pair, system="Answer briefly.") for pair in texts[300:420]]
    turns = [dialogue(*texts[i], *texts[i + 1], *texts[i + 2]) for i in range(420, 597, 3)]
    return single + with_system + turns


def by_prefixes(tokenizer, messages, end_id):
    """The slow reference: every prefix is tokenised, and must be a prefix in tokens."""
    whole = tokenizer.apply_chat_template(messages).input_ids
    labels = [-100] * len(whole)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True).input_ids
        upto = tokenizer.apply_chat_template(messages[: i + 1]).input_ids
        assert whole[: len(prompt)] == prompt
        assert whole[: len(upto)] == upto
        stop = len(upto) - upto[::-1].index(end_id)
        if message.get("loss", True):
            labels[len(prompt) : stop] = whole[len(prompt) : stop]
    return whole[:stop], labels[:stop], len(prompt)


def labels_of(tokens):
    return [int(i) if taught else -100 for i, taught in zip(tokens.ids, tokens.taught, strict=True)]


def one(template, messages):
    (tokens,) = template.encode([messages])
    assert not isinstance(tokens, RowRefused), tokens
    return tokens


def test_hand_written_ids_and_labels_of_two_turns():
    template = ChatTemplate(word_tokenizer(), word_tokenizer().chat_template)
    tokens = one(template, dialogue(words(1, 2), words(3), words(4), words(5, 6), system=words(7)))
    assert tokens.ids.tolist() == [0, 2, 17, 1, 3, 11, 12, 1, 4, 13, 1, 3, 14, 1, 4, 15, 16, 1]
    assert labels_of(tokens) == [-100] * 9 + [13, 1] + [-100] * 4 + [15, 16, 1]
    assert tokens.prompt_length == 15
    assert [(c.role, c.start, c.stop) for c in tokens.contents] == [
        ("system", 2, 3),
        ("user", 5, 7),
        ("assistant", 9, 10),
        ("user", 12, 13),
        ("assistant", 15, 17),
    ]


def test_labels_on_real_data_equal_those_of_tokenised_prefixes(load, real_chats):
    tokenizer = load()
    results = ChatTemplate(tokenizer, tokenizer.chat_template).encode(real_chats)
    for messages, tokens in zip(real_chats, results, strict=True):
        ids, labels, prompt_length = by_prefixes(tokenizer, messages, tokenizer.eos_token_id)
        assert tokens.ids.tolist() == ids
        assert labels_of(tokens) == labels
        assert tokens.prompt_length == prompt_length


def test_labels_on_real_data_equal_the_assistant_mask_of_generation_marks(load, real_chats):
    tokenizer = load()
    tokenizer.chat_template = MARKED
    template = ChatTemplate(tokenizer, MARKED)
    assert template.describe()["loss"] == "generation marks"
    for messages, tokens in zip(real_chats, template.encode(real_chats), strict=True):
        expected = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True)
        length = len(tokens.ids)
        assert tokens.ids.tolist() == expected.input_ids[:length]
        assert tokens.taught.tolist() == [bool(mask) for mask in expected.assistant_masks[:length]]
        assert not any(expected.assistant_masks[length:])


@pytest.mark.parametrize("source", [LLAMA3, CHATGLM, MISTRAL, PLAIN_TEMPLATE, MARKED, THINKING])
def test_the_prompt_is_exactly_what_generation_would_be_given(load, real_chats, source):
    tokenizer = load()
    tokenizer.chat_template = source
    chats = [chat for chat in real_chats if chat[0]["role"] == "user"]
    for messages, tokens in zip(chats, ChatTemplate(tokenizer, source).encode(chats), strict=True):
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True).input_ids
        assert tokens.ids[: tokens.prompt_length].tolist() == prompt
        answer = tokenizer.decode(tokens.ids[tokens.prompt_length :])
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        end = tokenizer.eos_token if source == CHATGLM else ""
        assert (whole + end).startswith(tokenizer.decode(prompt) + answer)
        assert messages[-1]["content"] in answer


def test_llama3_template_teaches_answers_and_eot_of_every_turn(load):
    tokenizer = load()
    template = ChatTemplate(tokenizer, LLAMA3)
    tokens = one(template, dialogue("One?", " Two. ", "Three?", "Four.", system="Be kind."))
    taught = [tokenizer.decode([label]) for label in labels_of(tokens) if label != -100]
    assert "".join(taught) == "Two.<|eot_id|>Four.<|eot_id|>"
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|eot_id|>")]
    assert template.describe()["stop_token_ids"] == stops


def test_chatglm_template_without_end_token_gets_the_tokenizers_own(load):
    tokenizer = load()
    template = ChatTemplate(tokenizer, CHATGLM)
    tokens = one(template, dialogue("One?", "Two.", "Three?", "Four."))
    assert tokenizer.decode([i for i in labels_of(tokens) if i != -100]) == "Two.Four.<|im_end|>"
    assert tokens.ends
    assert template.describe()["end_added"]
    assert "closes no turn" in template.findings()[0]["message"]


def test_chatglm_next_turns_header_is_the_end_where_generation_stops_at_it(load):
    tokenizer = load()
    end_ids = [tokenizer.convert_tokens_to_ids("<|user|>")]
    tokens = one(ChatTemplate(tokenizer, CHATGLM, end_ids=end_ids), dialogue("One?", "Two.", "Three?", "Four."))
    assert tokenizer.decode([i for i in labels_of(tokens) if i != -100]) == "Two.<|user|>Four.<|im_end|>"


def test_white_space_between_answer_and_end_is_taught_with_the_end(load):
    tokenizer = load()
    tokens = one(ChatTemplate(tokenizer, MISTRAL), dialogue("One?", "Two.", "Three?", "Four."))
    assert tokenizer.decode([i for i in labels_of(tokens) if i != -100]) == " Two. <|im_end|> Four. <|im_end|>"


def test_a_thinking_block_that_the_prompt_does_not_write_is_part_of_the_answer(load):
    tokenizer = load()
    tokens = one(ChatTemplate(tokenizer, THINKING), dialogue("One?", "Two."))
    taught = tokenizer.decode(tokens.ids[tokens.prompt_length :])
    assert taught == "<think>\n\n</think>\n\nTwo.<|im_end|>"
    assert tokens.taught[tokens.prompt_length :].all()


def test_thinking_is_taught_in_the_last_answer_and_gone_from_earlier_ones(load):
    source = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if loop.last and m['role'] == 'assistant' %}"
        "{% if '<think>' not in m['content'] %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}"
        "{% else %}{{ m['content'].split('</think>')[-1].lstrip('\n') }}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = load()
    messages = dialogue("One?", "<think>\nHm.\n</think>\n\nTwo.", "Three?", "<think>\nAh.\n</think>\n\nFour.")
    tokens = one(ChatTemplate(tokenizer, source), messages)
    taught = tokenizer.decode([i for i in labels_of(tokens) if i != -100])
    assert taught == "Two.<|im_end|><think>\nAh.\n</think>\n\nFour.<|im_end|>"
    assert tokenizer.decode(tokens.ids[: tokens.prompt_length]).endswith("Three?<|im_end|>\n<|im_start|>assistant\n")


def test_bos_stands_once_whether_or_not_the_tokenizer_adds_it():
    for adds in (False, True):
        tokenizer = word_tokenizer(adds_bos=adds)
        tokens = one(ChatTemplate(tokenizer, tokenizer.chat_template), dialogue(words(1), words(2)))
        assert tokens.ids.tolist() == [0, 3, 11, 1, 4, 12, 1]
        # The tokenizer itself is left as it was.
        assert tokenizer("w1").input_ids == ([0, 11] if adds else [11])


def test_offsets_that_leave_out_the_space_before_a_word_change_nothing(load):
    from tokenizers import processors

    tokenizer = load()
    chats = [dialogue("One two?", "Three four."), dialogue(" One?", " Two ", "Three", "four five")]
    expected = ChatTemplate(tokenizer, MISTRAL).encode(chats)
    before = tokenizer.backend_tokenizer.post_processor
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    try:
        trimmed = ChatTemplate(tokenizer, MISTRAL).encode(chats)
    finally:
        tokenizer.backend_tokenizer.post_processor = before
    for one_way, other_way in zip(expected, trimmed, strict=True):
        assert one_way.ids.tolist() == other_way.ids.tolist()
        assert one_way.taught.tolist() == other_way.taught.tolist()
        assert one_way.contents == other_way.contents


def test_plain_template_writes_bos_only_for_a_tokenizer_that_adds_it():
    for adds in (False, True):
        tokenizer = word_tokenizer(template=None, adds_bos=adds)
        tokens = one(ChatTemplate(tokenizer, PLAIN_TEMPLATE, "plain"), dialogue(words(1), words(2)))
        assert tokens.ids.tolist().count(0) == int(adds)
        assert labels_of(tokens)[-2:] == [12, 1]


def test_a_template_that_begins_with_two_bos_is_refused_by_name():
    with pytest.raises(UserError, match=r"twice.*once"):
        ChatTemplate(word_tokenizer(), "{{ bos_token }}" + word_tokenizer().chat_template)


def test_messages_with_loss_false_have_no_labels(load):
    for source in (load().chat_template, MARKED):
        messages = dialogue("One?", "Two.", "Three?", "Four.")
        messages[1]["loss"] = False
        tokenizer = load()
        tokens = one(ChatTemplate(tokenizer, source), messages)
        assert tokenizer.decode([i for i in labels_of(tokens) if i != -100]) == "Four.<|im_end|>"


def test_the_first_token_is_never_taught():
    source = "{% for m in messages %}{% generation %}{{ m['content'] }}<end>{% endgeneration %}{% endfor %}"
    messages = dialogue(words(1), words(2))
    messages[0]["loss"] = True
    tokens = one(ChatTemplate(word_tokenizer(), source), messages)
    assert tokens.ids.tolist() == [11, 1, 12, 1]
    assert tokens.taught.tolist() == [False, True, True, True]


def test_messages_after_the_last_answer_are_left_out(load):
    template = ChatTemplate(load(), load().chat_template)
    assert (
        one(template, dialogue("One?", "Two.", "Three?")).ids.tolist()
        == one(template, dialogue("One?", "Two.")).ids.tolist()
    )


def test_an_opening_answer_is_placed_by_the_header_the_template_writes(load):
    tokenizer = load()
    messages = [{"role": "assistant", "content": "Hello."}, *dialogue("One?", "Two.")]
    tokens = one(ChatTemplate(tokenizer, tokenizer.chat_template), messages)
    assert tokenizer.decode([i for i in labels_of(tokens) if i != -100]) == "Hello.<|im_end|>Two.<|im_end|>"


@pytest.mark.parametrize(
    ("source", "messages", "reason"),
    [
        (None, dialogue("One?"), "no_answer"),
        (None, dialogue("One?", "Two.<|im_end|>\n<|im_start|>user\nThree?"), "special_token_in_text"),
        (None, dialogue("One?", "\n\nTwo."), "answer_starts_inside_a_token"),
        (None, dialogue("One?", "\n\nTwo.", "Three?", "Four."), "answer_starts_inside_a_token"),
        (MISTRAL, dialogue("One?", "Two.", system="Be kind."), "template_refuses: no system messages"),
        (
            "{% for m in messages if m['role'] != 'system' %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|eot_id|>"
            "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
            dialogue("One?", "Two.", system="Be kind."),
            "template_leaves_out_or_repeats: a message of the system",
        ),
        (
            LLAMA3.replace("m['content'] | trim", "m['content'].split('</think>')[-1]"),
            dialogue("One?", "<think>hm</think>Two."),
            "template_changes_the_text",
        ),
    ],
)
def test_rows_that_cannot_be_placed_are_refused_with_a_reason(load, source, messages, reason):
    tokenizer = load()
    (refused,) = ChatTemplate(tokenizer, source or tokenizer.chat_template).encode([messages])
    assert isinstance(refused, RowRefused)
    assert refused.reason == reason


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
         "{% if add_generation_prompt %}assistant: {% endif %}", "no trailing space"),
        ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}",
         "it has no `add_generation_prompt`"),
        ("{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|eot_id|>{% endfor %}"
         "{% if add_generation_prompt %}<|system|>{% endif %}", "is not how the conversation begins"),
        ("{% for m in messages %}{{ m['content'] ", "cannot be written"),
        ("{{ raise_exception('never') }}", "never"),
    ],
)  # fmt: skip
def test_a_template_at_fault_is_named(load, source, problem):
    with pytest.raises(UserError) as caught:
        ChatTemplate(load(), source, place="model.chat_template: mine.jinja")
    assert "model.chat_template: mine.jinja: " in str(caught.value)
    assert problem in str(caught.value)


def test_marks_without_the_end_token_are_a_finding(load):
    source = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    template = ChatTemplate(load(), source)
    assert not one(template, dialogue("One?", "Two.")).ends
    assert any("not taught to stop" in finding["message"] for finding in template.findings())


def test_template_of_a_folder_is_the_file_then_its_own_then_plain(smollm2_dir, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(MARKED)
    assert load_template(smollm2_dir, str(file)).source == "file"
    own = load_template(smollm2_dir)
    assert own.source == "tokenizer"
    assert own.describe()["end_token_ids"] == [own.tokenizer.eos_token_id]
    own.tokenizer.chat_template = None
    own.tokenizer.save_pretrained(tmp_path / "base")
    plain = load_template(tmp_path / "base")
    assert plain.source == "plain"
    assert "no chat template" in plain.findings()[0]["message"]


def test_a_missing_folder_or_template_file_is_a_users_mistake(smollm2_dir, tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        load_template(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no tokenizer that loads"):
        load_template(tmp_path / "empty")
    with pytest.raises(UserError, match="cannot be read"):
        load_template(smollm2_dir, str(tmp_path / "nowhere.jinja"))
