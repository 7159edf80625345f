"""Near-duplicate rows: MinHash finds candidates (rensa), exact Jaccard similarity decides.

The similarity of two texts is that of their sets of word 3-grams; a Chinese or Japanese character counts as a word.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from rensa import RMinHash

from finegrid.data.rows import normalise

WORDS_IN_SHINGLE = 3
PERMUTATIONS = 128
SEED = 1
# A pair at the threshold is missed with at most this probability.
MISSED = 1e-6
_MIX = np.uint64(0x9E3779B97F4A7C15)  # an odd number without structure (2^64 / golden ratio), to mix hashes with

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


def band_keys(found: Iterable[frozenset[str]], threshold: float) -> np.ndarray:
    """Return a key of each band of the MinHash signatures of sets of shingles, uint64, shape (sets, bands).

    Sets that are as similar as the threshold have, all but surely, the same key in some band.
    """
    rows = rows_in_band(threshold)
    # One set at a time: those of a whole piece take many times the room of its text.
    digests = [np.array(_digest(one), dtype=np.uint64) for one in found]
    values = np.array(digests, dtype=np.uint64).reshape(len(digests), PERMUTATIONS // rows, rows)
    keys = np.zeros(values.shape[:2], dtype=np.uint64)
    for place in range(rows):
        keys = (keys ^ values[:, :, place]) * _MIX
        keys ^= keys >> np.uint64(29)
    return keys


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    """Return the share of shingles that two sets have in common, 0..1; two empty sets have nothing in common."""
    common = len(first & second)
    return common / (len(first) + len(second) - common) if common else 0.0


def _digest(found: frozenset[str]) -> list[int]:
    sketch = RMinHash(num_perm=PERMUTATIONS, seed=SEED)
    sketch.update(list(found))
    return sketch.digest()


class BandKeys:
    """The keys of many rows, kept in files, one a band: they take more room than all else that is kept of a row.

    Args:
        threshold: Jaccard similarity, 0..1.
        folder: an empty folder, to be made.
    """

    def __init__(self, threshold: float, folder: Path):
        self.threshold, self.rows = threshold, 0
        folder.mkdir()
        self._paths = [folder / f"{band}.keys" for band in range(PERMUTATIONS // rows_in_band(threshold))]

    def add(self, keys: np.ndarray) -> None:
        """Add rows: what :func:`band_keys` returned for them."""
        self.rows += len(keys)
        for path, band in zip(self._paths, keys.T, strict=True):
            with path.open("ab") as file:
                file.write(band.tobytes())

    def bands(self) -> Iterator[np.ndarray]:
        """Yield the keys of all rows, a band at a time."""
        for path in self._paths:
            yield np.fromfile(path, np.uint64) if self.rows else np.zeros(0, np.uint64)


class Index:
    """Rows by similarity: add rows, then ask for one that is at least as similar as the threshold.

    Args:
        threshold: Jaccard similarity, 0..1.
        bands: the keys of all rows that will be added or asked for, a band at a time.
        read: returns the text of a row by its number, its place among the keys.
    """

    def __init__(self, threshold: float, bands: Iterable[np.ndarray], read: Callable[[int], str]):
        self.threshold = threshold
        self._begins, self._buckets = _shared_buckets(bands)
        self._rows: dict[int, list[int]] = {}
        self._shingles = lru_cache(maxsize=1024)(lambda number: shingles(read(number)))

    def add(self, number: int) -> None:
        """Add a row."""
        for bucket in self._buckets_of(number):
            self._rows.setdefault(bucket, []).append(number)

    def find(self, number: int) -> tuple[int, float] | None:
        """Return the first added row (by number) that is similar enough to a row, and how similar it is."""
        candidates = {row for bucket in self._buckets_of(number) for row in self._rows.get(bucket, ())}
        for candidate in sorted(candidates):
            similarity = jaccard(self._shingles(number), self._shingles(candidate))
            if similarity >= self.threshold:
                return candidate, similarity
        return None

    def _buckets_of(self, number: int) -> list[int]:
        return self._buckets[self._begins[number] : self._begins[number + 1]].tolist()


def _shared_buckets(bands: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the buckets of rows that are not alone in them, row by row, and where each row's begin.

    A bucket is a key of a band. Most rows are alone in all of theirs.
    """
    rows, buckets, count, number = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0, 0
    for keys in bands:
        order = keys.argsort(kind="stable")
        ordered = keys[order]
        first = np.ones(len(keys), dtype=bool)
        first[1:] = ordered[1:] != ordered[:-1]
        shared = ~(first & np.append(first[1:], True))
        rows.append(order[shared])
        buckets.append(number + first.cumsum()[shared])
        count, number = len(keys), number + len(keys)
    of_row = np.concatenate(rows)
    order = of_row.argsort(kind="stable")
    return of_row[order].searchsorted(np.arange(count + 1)), np.concatenate(buckets)[order]


def rows_in_band(threshold: float) -> int:
    """Return how many of the 128 values a band holds: the most that misses hardly a pair at the threshold."""
    sizes = (16, 8, 4, 2)
    return next((size for size in sizes if (1 - threshold**size) ** (PERMUTATIONS // size) <= MISSED), 1)
