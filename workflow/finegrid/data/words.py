"""Tokens of ASCII texts, word by word: the same as the tokenizer's own, three to four times faster.

A byte-level BPE tokenizer (GPT-2, Llama 3, Qwen, SmolLM2, …) cuts a text into words by a pattern and then each word
into tokens, whatever stands around it. Words come again and again, so the tokens of each are asked for once and kept.
Only tokenizers whose settings say that this is all they do are taken, and only ASCII texts, in which a pattern means
the same to Python as to the tokenizer and a byte is a character; everything else goes to the tokenizer itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers

# How the pre-tokenizer ByteLevel finds words unless it is told not to (tokenizers, src/pre_tokenizers/byte_level.rs).
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CLASSES = {r"\p{L}": "A-Za-z", r"\p{N}": "0-9"}
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_KEPT_WORDS = 1 << 18


class AsciiEncoding:
    """Token ids of one text and where each stands in it: what is needed here of ``tokenizers.Encoding``."""

    def __init__(self, ids: np.ndarray, stops: np.ndarray):
        self.ids, self._stops = ids, stops

    def __len__(self) -> int:
        return len(self.ids)

    def char_to_token(self, place: int) -> int:
        """Return the token that holds a character."""
        return int(self._stops.searchsorted(place, side="right"))

    def token_to_chars(self, token: int) -> tuple[int, int]:
        """Return where a token begins and ends, in characters."""
        return int(self._stops[token - 1]) if token else 0, int(self._stops[token])


class WordEncoder:
    """Encodes texts without adding special tokens.

    Args:
        backend: of a fast tokenizer; it neither truncates nor pads.
    """

    def __init__(self, backend: Tokenizer):
        self._backend = backend
        settings = json.loads(backend.to_str())
        self._patterns = _word_patterns(settings)
        self._words: dict[str, tuple[int, ...]] = {}
        if self._patterns is None:
            return
        added = {token["content"]: token["id"] for token in settings["added_tokens"]}
        self._added = {content: (number,) for content, number in added.items()}
        longest_first = sorted(map(re.escape, added), key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(longest_first)})").split if added else lambda text: [text]
        # In the vocabulary a byte is a character.
        self._lengths = np.zeros(backend.get_vocab_size() + 1, dtype=np.int32)
        for content, number in backend.get_vocab().items():
            self._lengths[number] = len(content)

    def encode_batch(self, texts: Sequence[str]) -> list[Any]:
        """Return an encoding of each text: ids, and the characters that each token covers."""
        found = [self._encode(text) if self._patterns and text.isascii() else None for text in texts]
        left = [text for text, encoding in zip(texts, found, strict=True) if encoding is None]
        others = iter(self._backend.encode_batch(left, add_special_tokens=False) if left else ())
        return [next(others) if encoding is None else encoding for encoding in found]

    def _encode(self, text: str) -> AsciiEncoding | None:
        pieces = [self._piece(piece) for piece in self._split(text) if piece]
        ids = np.fromiter(chain.from_iterable(chain.from_iterable(pieces)), np.int32)
        stops = self._lengths[ids].cumsum()
        # A pattern that leaves out something of the text, or an unknown token, would show here.
        return AsciiEncoding(ids, stops) if (stops[-1] if len(ids) else 0) == len(text) else None

    def _piece(self, piece: str) -> list[tuple[int, ...]]:
        """Return the ids of each word of a piece without added tokens, or of an added token."""
        if piece in self._added:
            return [self._added[piece]]
        words: Iterable[str] = (piece,)
        for pattern in self._patterns:
            words = chain.from_iterable(map(pattern.findall, words))
        words = list(words)
        try:
            return [self._words[word] for word in words]
        except KeyError:
            return [self._words.get(word) or self._learn(word) for word in words]

    def _learn(self, word: str) -> tuple[int, ...]:
        ((as_bytes, _),) = _BYTES.pre_tokenize_str(word)
        ids = tuple(token.id for token in self._backend.model.tokenize(as_bytes))
        if len(self._words) >= _KEPT_WORDS:
            self._words.clear()
        self._words[word] = ids
        return ids


def _word_patterns(settings: dict[str, Any]) -> list[re.Pattern] | None:
    """Return the patterns that cut an ASCII text into words, one after the other; None: this tokenizer does more.

    Args:
        settings: the tokenizer's, as in ``tokenizer.json``.
    """
    model, added = settings["model"], settings["added_tokens"]
    plain = (
        model["type"] == "BPE"
        and not (model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"))
        and settings["normalizer"] is None
        and not any(token[flag] for token in added for flag in ("lstrip", "rstrip", "single_word"))
        and all(token["content"].isascii() and token["content"] for token in added)
    )
    steps = settings["pre_tokenizer"] or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    # Byte-level comes last: it writes the bytes in another alphabet, in which a pattern means something else.
    if not plain or steps[-1].get("type") != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    try:
        return [re.compile(_in_ascii(pattern), re.ASCII) for step in steps for pattern in _patterns(step)]
    except (re.error, ValueError):
        return None


def _patterns(step: dict[str, Any]) -> Iterator[str]:
    """Yield the pattern whose matches are the words of a step, if it has one.

    Raises:
        ValueError: it is of another kind.
    """
    kind = step["type"]
    if kind == "ByteLevel":
        yield from [_GPT2] if step.get("use_regex", True) else []
    elif kind == "Digits":
        yield r"\p{N}|[^\p{N}]+" if step["individual_digits"] else r"\p{N}+|[^\p{N}]+"
    elif kind == "Split" and (step["behavior"], step["invert"]) in (("Isolated", False), ("Removed", True)):
        pattern = step["pattern"].get("Regex")
        if pattern is None:
            raise ValueError("a text to split at, no pattern")
        yield pattern
    else:
        raise ValueError(kind)


def _in_ascii(pattern: str) -> str:
    """Return a pattern in Python's syntax: what ``\\p{L}`` and ``\\p{N}`` are among ASCII characters.

    Raises:
        ValueError: it has groups, with which Python would find them in place of the words.
    """
    pattern = re.sub(r"\[[^\]]*\]", lambda found: _replace_classes(found[0], "{}"), pattern)
    pattern = _replace_classes(pattern, "[{}]")
    if re.compile(pattern).groups:
        raise ValueError("groups")
    return pattern


def _replace_classes(text: str, form: str) -> str:
    for name, characters in _CLASSES.items():
        text = text.replace(name, form.format(characters))
    return text
