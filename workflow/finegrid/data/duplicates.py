"""Near-duplicate rows: MinHash finds candidates (rensa), exact Jaccard similarity decides.

The similarity of two texts is that of their sets of word 3-grams; a Chinese or Japanese character counts as a word.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

from rensa import RMinHash, RMinHashLSH

from finegrid.data.rows import normalise

WORDS_IN_SHINGLE = 3
PERMUTATIONS = 128
SEED = 1
# A pair at the threshold is missed with at most this probability.
MISSED = 1e-6

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_WORDS = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")
_ASCII_WORDS = re.compile(r"\w+", re.ASCII)  # the same for ASCII texts, three times faster


def shingles(text: str) -> frozenset[str]:
    """Return the set of a text's word 3-grams; a text of fewer words is one of its own, without words it has none."""
    return shingles_of_normalised(normalise(text))


def shingles_of_normalised(text: str) -> frozenset[str]:
    """Return :func:`shingles` of a text that is normalised already."""
    words = (_ASCII_WORDS if text.isascii() else _WORDS).findall(text)
    if len(words) < WORDS_IN_SHINGLE:
        return frozenset([" ".join(words)] if words else [])
    triples = zip(words, words[1:], words[2:], strict=False)
    return frozenset(map(" ".join, triples))


def signature(found: frozenset[str]) -> RMinHash:
    """Return the MinHash signature of a set of shingles."""
    sketch = RMinHash(num_perm=PERMUTATIONS, seed=SEED)
    sketch.update(list(found))
    return sketch


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    """Return the share of shingles that two sets have in common, 0..1; two empty sets have nothing in common."""
    common = len(first & second)
    return common / (len(first) + len(second) - common) if common else 0.0


class Index:
    """Rows by similarity: add rows, then ask for one that is at least as similar as the threshold.

    Args:
        threshold: Jaccard similarity, 0..1.
        read: returns the text of a row by its number.
    """

    def __init__(self, threshold: float, read: Callable[[int], str]):
        self.threshold = threshold
        self._lsh = RMinHashLSH(threshold, PERMUTATIONS, PERMUTATIONS // rows_in_band(threshold))
        self._shingles = lru_cache(maxsize=8192)(lambda number: shingles(read(number)))

    def add(self, number: int, sketch: RMinHash) -> None:
        """Add a row."""
        self._lsh.insert(number, sketch)

    def find(self, number: int, sketch: RMinHash) -> tuple[int, float] | None:
        """Return the first added row (by number) that is similar enough to a row, and how similar it is."""
        for candidate in sorted(set(self._lsh.query(sketch))):
            similarity = jaccard(self._shingles(number), self._shingles(candidate))
            if similarity >= self.threshold:
                return candidate, similarity
        return None


def rows_in_band(threshold: float) -> int:
    """Return how many of the 128 values a band holds: the most that misses hardly a pair at the threshold."""
    sizes = (16, 8, 4, 2)
    return next((size for size in sizes if (1 - threshold**size) ** (PERMUTATIONS // size) <= MISSED), 1)
