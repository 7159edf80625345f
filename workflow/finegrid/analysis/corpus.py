"""Corpus BLEU and chrF of many samples at once, from the sufficient statistics that every prediction keeps.

sacrebleu scores one sample of examples at a time; a bootstrap asks for ten thousand of each run. The formulas are
sacrebleu's (BLEU-4 with exponential smoothing, chrF2), and a test holds them equal to it. A corpus score is no mean of
its examples' scores: what an example adds to it is told by leaving it out (:func:`values`, the jackknife), and then it
is compared by the same methods as every mean.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

ORDERS = 4
CHAR_ORDERS = 6
BETA_SQUARED = 4.0  # chrF2


def corpus_bleu(sums: np.ndarray) -> np.ndarray:
    """Return BLEU (0..100) of samples.

    Args:
        sums: shape (..., 10), the `bleu` statistics summed over each sample: prediction length, reference length,
            matches of 1- to 4-grams, 1- to 4-grams of the prediction.
    """
    sums = np.asarray(sums, float)
    length, expected = sums[..., 0], sums[..., 1]
    correct, total = sums[..., 2 : 2 + ORDERS], sums[..., 2 + ORDERS :]
    none = (correct <= 0) & (total > 0)
    # The k-th order without a match counts as 1 / 2^k matches.
    smoothed = np.where(none, 0.5 ** np.cumsum(none, axis=-1), correct)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(smoothed / total)
        brevity = np.minimum(0.0, 1 - expected / length)
        score = 100 * np.exp(brevity + logs.mean(axis=-1))
    # Without any match, or where no answer has four words, sacrebleu's score is 0.
    return np.where((correct > 0).any(axis=-1) & (total > 0).all(axis=-1), score, 0.0)


def corpus_chrf(sums: np.ndarray) -> np.ndarray:
    """Return chrF2 (0..100) of samples.

    Args:
        sums: shape (..., 18), the `chrf` statistics summed over each sample: character n-grams of the prediction, of
            the reference, and matches, for n = 1..6.
    """
    sums = np.asarray(sums, float)
    counts = sums.reshape(*sums.shape[:-1], CHAR_ORDERS, 3)
    found, expected, matches = (counts[..., part] for part in range(3))
    counted = (found > 0) & (expected > 0)
    orders = np.maximum(counted.sum(axis=-1), 1)
    precision = np.where(counted, matches / np.maximum(found, 1), 0).sum(axis=-1) / orders
    recall = np.where(counted, matches / np.maximum(expected, 1), 0).sum(axis=-1) / orders
    divisor = BETA_SQUARED * precision + recall
    score = 100 * (1 + BETA_SQUARED) * precision * recall / np.where(divisor > 0, divisor, 1)
    return np.where(divisor > 0, score, 0.0)


CORPUS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "corpus_bleu": ("bleu", corpus_bleu),
    "corpus_chrf": ("chrf", corpus_chrf),
}
"""Metric -> the statistics it is made of, and its function."""


def values(statistics: np.ndarray, score: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Return what each example adds to a run's corpus score: jackknife values, whose mean is the score.

    Args:
        statistics: shape (runs, examples, counts).
        score: :func:`corpus_bleu` or :func:`corpus_chrf`.

    Returns:
        Shape (runs, examples), in points of the score; their spread over examples is that of the score (Efron and
        Stein 1981).
    """
    total = statistics.sum(axis=1, dtype=float)
    whole = score(total)
    examples = statistics.shape[1]
    added = (examples - 1) * (whole[:, None] - score(total[:, None] - statistics))
    return whole[:, None] + added - added.mean(axis=1, keepdims=True)
