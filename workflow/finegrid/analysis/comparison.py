"""Statistics of a comparison: intervals of arms, paired differences, verdicts. Pure functions of arrays.

A study's scores cross two samples: the seeds that were trained and the examples that were asked. A mean over both
is uncertain for both reasons, and a study has few seeds: two or three, mostly. Resampling two seeds gives two
values and half their variance; a Satterthwaite t-test gives 10 to 13 % false positives at two seeds. Here the two
parts of the variance are kept apart (two-way random effects: seeds, examples, and their interaction), each with
its own degrees of freedom, and the error of the mean is their sum:

    sqrt(MS_seeds / (S E)) t[S-1]  +  sqrt((MS_examples - MS_rest) / (S E)) t[E-1]

the Behrens-Fisher distribution. Its false positives stay at or below the nominal 5 % for any size of the seeds'
effect (tests/unit/test_comparison.py simulates it), and with one seed it is scipy's paired t-test over examples.
Sources: Behrens 1929 and Fisher 1935 for the distribution; Westfall, Kenny and Judd 2014 (doi 10.1037/xge0000014)
for the crossed random effects.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import optimize, special, stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

ALPHA = 0.05
POWER = 0.80
RNG_SEED = 20240601
CHUNK = 1000  # resamples at a time: 1,000 x 2,000 weights are 16 MB
_GRID = np.linspace(-10, 10, 1601)  # where the examples' part is integrated over


@cache
def _density(df: int) -> np.ndarray:
    """Student's t on the grid, summing to 1."""
    density = stats.t.pdf(_GRID, df)
    return density / density.sum()


@dataclass(frozen=True)
class Error:
    """Distribution of the error of a mean over seeds and examples, symmetric around 0.

    `seeds` and `examples` are the two parts of its variance. `seeds` is 0 with no or one seed.
    """

    seeds: float
    seed_df: int
    examples: float
    example_df: int

    @property
    def variance(self) -> float:
        """Variance of the mean, both parts."""
        return self.seeds + self.examples

    def tail(self, value: float) -> float:
        """Probability that the error is above `value`."""
        a, b = np.sqrt(self.seeds), np.sqrt(self.examples)
        if a == 0 and b == 0:
            return 0.5 if value == 0 else float(value < 0)
        if a == 0:
            return float(special.stdtr(self.example_df, -value / b))
        if b == 0:
            return float(special.stdtr(self.seed_df, -value / a))
        return float(_density(self.example_df) @ special.stdtr(self.seed_df, (b * _GRID - value) / a))

    def quantile(self, upper: float) -> float:
        """The value that the error exceeds with probability `upper` (below 0.5)."""
        if self.variance == 0:
            return 0.0
        if self.seeds == 0:
            return float(np.sqrt(self.examples) * stats.t.isf(upper, self.example_df))
        # Half the probability for each part bounds their sum.
        bound = np.sqrt(self.seeds) * stats.t.isf(upper / 2, self.seed_df)
        bound += np.sqrt(self.examples) * stats.t.isf(upper / 2, self.example_df)
        return float(optimize.brentq(lambda value: self.tail(value) - upper, 0, bound * 1.001, rtol=1e-6))


@dataclass(frozen=True)
class Difference:
    """An arm's mean minus the baseline's, paired by seed and example."""

    difference: float
    low: float
    high: float
    p: float
    p_equivalence: float
    smallest_detectable: float


def mean_and_error(values: np.ndarray, weights: np.ndarray | None = None) -> tuple[float, Error]:
    """Mean of values over seeds and examples, and the distribution of its error.

    Args:
        values: shape (seeds, examples). One row: one seed, or a model without seeds; then the error covers the
            examples only.
        weights: shape (examples,). With them the mean is the ratio sum(values) / sum(weights) for each seed (nll
            over label tokens), and its error is linearised as for any ratio of two sums.

    Returns:
        The mean and its :class:`Error`.
    """
    seeds, examples = values.shape
    if weights is not None:
        scale = weights.mean()
        ratio = values.mean() / scale
        values = values / scale - ratio * (weights / scale - 1)
    mean = values.mean()
    by_seed, by_example = values.mean(axis=1), values.mean(axis=0)
    ms_examples = seeds * by_example.var(ddof=1)
    if seeds == 1:
        return float(mean), Error(0.0, 0, ms_examples / examples, examples - 1)
    ms_seeds = examples * by_seed.var(ddof=1)
    rest = values - by_seed[:, None] - by_example[None, :] + mean
    ms_rest = (rest**2).sum() / ((seeds - 1) * (examples - 1))
    # MS_rest is inside MS_seeds already: counted once, the whole is the unbiased variance of the mean.
    part = max(0.0, ms_examples - ms_rest)
    size = seeds * examples
    return float(mean), Error(ms_seeds / size, seeds - 1, part / size, examples - 1)


def paired_difference(
    arm: np.ndarray, baseline: np.ndarray, margin: float | None = None, weights: np.ndarray | None = None
) -> Difference:
    """Compare an arm with the baseline, paired by seed (rows) and example (columns).

    Args:
        arm, baseline: shape (seeds, examples); a model without seeds has one row, the same for every seed.
        margin: differences smaller than this do not matter (in the metric's unit); None tests no equivalence.
        weights: as in :func:`mean_and_error`.

    Returns:
        Difference with its 95 % interval, two-sided p, p of the two one-sided tests (NaN without a margin) and the
        smallest true difference that a test at 5 % finds with 80 % power.
    """
    difference, error = mean_and_error(arm - baseline, weights)
    if not math.isfinite(difference):  # a diverged run
        return Difference(*[math.nan] * 6)
    half = error.quantile(ALPHA / 2)
    p = 1.0 if error.variance == 0 and difference == 0 else min(1.0, 2 * error.tail(abs(difference)))
    equivalence = float("nan")
    if margin is not None:
        equivalence = max(error.tail(margin - difference), error.tail(margin + difference))
    smallest = half + error.quantile(1 - POWER)
    return Difference(difference, difference - half, difference + half, p, equivalence, smallest)


def holm(p: list[float]) -> list[float]:
    """p-values of one family, adjusted by Holm's method (statsmodels)."""
    return multipletests(p, alpha=ALPHA, method="holm")[1].tolist() if p else []


def verdict(difference: Difference, p_adjusted: float, lower_is_better: bool = False) -> str:
    """`equivalent` if the difference is shown to be within the margin, whatever its sign; else `better` or `worse`
    if the adjusted p is below 5 %; else `not distinguishable`."""
    if difference.p_equivalence < ALPHA:
        return "equivalent"
    if p_adjusted >= ALPHA:
        return "not distinguishable"
    return "better" if (difference.difference < 0) == lower_is_better else "worse"


def bootstrap_intervals(
    columns: np.ndarray, errors: list[Error], weights: list[np.ndarray | None], resamples: int = 10_000
) -> np.ndarray:
    """95 % intervals of means over seeds and examples by a hierarchical bootstrap.

    Each resample draws the seeds, then the examples. Examples are drawn with replacement, all columns with the same
    draw (a matrix product of multinomial weights). Two or three seeds can't be drawn so: their mean is drawn from
    its t distribution with S-1 degrees of freedom. The resampled deviation over examples is scaled to the examples'
    own part of the variance, since their interaction with the seeds is in the seeds' part already.

    Args:
        columns: shape (examples, n): for each mean its values per example, averaged over seeds.
        errors: of each column, from :func:`mean_and_error`.
        weights: of each column, as in :func:`mean_and_error`.

    Returns:
        Shape (n, 2): lower and upper ends.
    """
    examples, n = columns.shape
    rng = np.random.default_rng(RNG_SEED)
    divisors = np.column_stack([np.ones(examples) if w is None else w for w in weights])
    distinct, which = np.unique(divisors, axis=1, return_inverse=True)
    centre = columns.sum(axis=0) / divisors.sum(axis=0)
    drawn = [(w @ columns) / (w @ distinct)[:, which.ravel()] - centre for w in _weights(rng, examples, resamples)]
    deviations = np.concatenate(drawn)
    spread = deviations.std(axis=0)
    wanted = np.sqrt([error.examples for error in errors])
    deviations *= np.divide(wanted, spread, out=np.zeros(n), where=spread > 0)
    for column, error in enumerate(errors):
        if error.seeds > 0:
            deviations[:, column] += np.sqrt(error.seeds) * rng.standard_t(error.seed_df, resamples)
    return (centre + np.quantile(deviations, [ALPHA / 2, 1 - ALPHA / 2], axis=0)).T


def proportion_interval(share: float, examples: int) -> tuple[float, float]:
    """Clopper-Pearson interval (statsmodels) of a share of 0 or 1, where no resample can differ from the sample."""
    low, high = proportion_confint(round(share * examples), examples, alpha=ALPHA, method="beta")
    return float(low), float(high)


def _weights(rng: np.random.Generator, examples: int, resamples: int) -> Iterator[np.ndarray]:
    """How often each example is drawn, (up to CHUNK, examples) at a time."""
    for start in range(0, resamples, CHUNK):
        size = min(CHUNK, resamples - start)
        picks = rng.integers(examples, size=(size, examples)) + examples * np.arange(size)[:, None]
        yield np.bincount(picks.ravel(), minlength=size * examples).reshape(size, examples).astype(float)
