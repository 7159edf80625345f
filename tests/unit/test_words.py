"""Tokens word by word are those of the tokenizer itself: ids and places, for the patterns of the field's models."""

from __future__ import annotations

import json
import random
import string

import pytest
from finegrid.data.words import AsciiEncoding, WordEncoder
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

# Of Llama 3 and of Qwen 2 (their tokenizer.json).
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
PRE_TOKENIZERS = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm2": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama3": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), BYTES]),
    "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN2), "removed", invert=True), BYTES]),
}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|im|>"]


def tokenizer(pre_tokenizer, normalizer=None, **flags) -> Tokenizer:
    """Return a byte-level BPE tokenizer that was trained on random texts."""
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    built.train_from_iterator(
        texts(300), trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    )
    built.add_special_tokens([AddedToken(token, **flags) for token in SPECIAL])
    if normalizer is not None:
        built.normalizer = normalizer
    return built


def texts(count: int, seed: int = 0) -> list[str]:
    """Return texts of words, numbers, apostrophes, all of ASCII's white space and control characters, and tokens."""
    draw = random.Random(seed)
    parts = [
        "the",
        "The",
        " insurance",
        "'s",
        "'LL",
        "don't",
        " 12345",
        "3.5",
        "  ",
        " \n",
        "\n\n",
        "\t",
        "\r\n",
        "...",
    ]
    parts += [*SPECIAL, "<|im", "|>", "\x00", "\x1c", "\x1f ", "\x0b", "\x7f", *string.printable]
    return ["".join(draw.choices(parts, k=draw.randrange(30))) for _ in range(count)]


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_ids_and_places_of_ascii_texts_are_the_tokenizers_own(name):
    backend = tokenizer(PRE_TOKENIZERS[name])
    checked = [text for text in texts(400, seed=1) if text]
    encodings = WordEncoder(backend).encode_batch(checked)
    expected = backend.encode_batch(checked, add_special_tokens=False)
    for text, found, wanted in zip(checked, encodings, expected, strict=True):
        assert isinstance(found, AsciiEncoding), text
        assert found.ids.tolist() == wanted.ids, text
        assert len(found) == len(wanted)
        assert [found.token_to_chars(i) for i in range(len(found))] == wanted.offsets
        assert [found.char_to_token(i) for i in range(len(text))] == [wanted.char_to_token(i) for i in range(len(text))]


def test_other_texts_go_to_the_tokenizer_in_their_places():
    backend = tokenizer(PRE_TOKENIZERS["gpt2"])
    mixed = ["plain", "schön", "", "你好 <|im_end|>", "two words"]
    found = WordEncoder(backend).encode_batch(mixed)
    assert [list(encoding.ids) for encoding in found] == [encoding.ids for encoding in backend.encode_batch(mixed)]
    assert [isinstance(encoding, AsciiEncoding) for encoding in found] == [True, False, True, False, True]


@pytest.mark.parametrize(
    "unusual",
    [
        tokenizer(PRE_TOKENIZERS["gpt2"], normalizer=normalizers.Lowercase()),
        tokenizer(PRE_TOKENIZERS["gpt2"], lstrip=True),
        tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        tokenizer(pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"(a)\s"), "isolated"), BYTES])),
        tokenizer(pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\p{Lu}+"), "isolated"), BYTES])),
        tokenizer(pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "merged_with_next"), BYTES])),
        tokenizer(pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"[a-z]+"), "isolated"), BYTES])),
    ],
    ids=["normaliser", "stripping token", "prefix space", "groups", "other classes", "other splits", "gaps"],
)
def test_a_tokenizer_that_does_more_is_asked_itself(unusual):
    checked = texts(100, seed=2)
    found = WordEncoder(unusual).encode_batch(checked)
    assert [list(encoding.ids) for encoding in found] == [
        encoding.ids for encoding in unusual.encode_batch(checked, add_special_tokens=False)
    ]
    gaps = "[a-z]" in json.dumps(json.loads(unusual.to_str())["pre_tokenizer"])
    assert gaps or not any(isinstance(encoding, AsciiEncoding) for encoding in found)


def test_words_that_are_kept_are_bounded(monkeypatch):
    monkeypatch.setattr("finegrid.data.words._KEPT_WORDS", 5)
    backend = tokenizer(PRE_TOKENIZERS["gpt2"])
    encoder = WordEncoder(backend)
    checked = texts(50, seed=3)
    assert [list(encoding.ids) for encoding in encoder.encode_batch(checked)] == [
        encoding.ids for encoding in backend.encode_batch(checked)
    ]
    assert len(encoder._words) <= 5
