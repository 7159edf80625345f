"""Statistics of a comparison: intervals of arms, paired differences, verdicts. Pure functions of arrays.

A study's scores cross two samples: the seeds that were trained and the examples that were asked. A mean over both
is uncertain for both reasons, and a study has few seeds: two or three, mostly. Resampling two seeds gives two
values and half their variance; a Satterthwaite t-test gives 10 to 13 % false positives at two seeds. Here the two
parts of the variance are kept apart (two-way random effects: seeds, examples, and their interaction), each with
its own degrees of freedom, and the error of the mean is their sum:

    sqrt(MS_seeds / (S E)) t[S-1]  +  sqrt((MS_examples - MS_rest) / (S E)) t[E-1]

the Behrens-Fisher distribution. Its false positives stay at or below the nominal 5 % for any size of the seeds'
effect (tests/unit/test_comparison.py simulates it), and with one seed it is scipy's paired t-test over examples.

Beside it stands the hierarchical bootstrap, which takes the shape of the scores as it is: each of 10,000 resamples
draws seeds, then examples. Its examples are drawn with replacement; its seeds are not, since S of them drawn from S
have (S-1)/S of the variance and none of the uncertainty about it: equal arms would be called different in up to 3 of
10 studies with two seeds, and still too often with ten (tests/benchmarks/README.md). The mean of the seeds is drawn
from its t distribution with S-1 degrees of freedom. Verdicts rest on the Behrens-Fisher test; the bootstrap agrees
with it but for skewed scores and few examples, and is printed beside it to show that.
Sources: Behrens 1929 and Fisher 1935 for the distribution; Westfall, Kenny and Judd 2014 (doi 10.1037/xge0000014)
for the crossed random effects.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from scipy import optimize, special, stats
from statsmodels.stats import contingency_tables
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

ALPHA = 0.05
POWER = 0.80
RNG_SEED = 20240601
RESAMPLES = 10_000
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
    error: Error | None = None


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
    return Difference(difference, difference - half, difference + half, p, equivalence, smallest, error)


def smallest_detectable(error: Error, tests: int) -> float:
    """Smallest true difference found with 80 % power at the level of `tests` comparisons at once (Holm's hardest)."""
    return error.quantile(ALPHA / 2 / tests) + error.quantile(1 - POWER)


def mcnemar(arm: np.ndarray, baseline: np.ndarray) -> dict[str, float]:
    """Exact McNemar test (statsmodels) of two runs that answered the same examples right (1) or wrong (0).

    Returns:
        Examples that `both`, `arm_only`, `other_only` and `neither` got right, and the two-sided `p`.
    """
    ours, theirs = arm > 0.5, baseline > 0.5
    both, ours_only = int((ours & theirs).sum()), int((ours & ~theirs).sum())
    theirs_only, neither = int((~ours & theirs).sum()), int((~ours & ~theirs).sum())
    p = contingency_tables.mcnemar([[both, ours_only], [theirs_only, neither]], exact=True).pvalue
    return {"both": both, "arm_only": ours_only, "other_only": theirs_only, "neither": neither, "p": float(p)}


def holm(p: list[float]) -> list[float]:
    """p-values of one family, adjusted by Holm's method (statsmodels)."""
    if not p:
        return []
    gc.freeze()  # statsmodels collects garbage at each call, a tenth of a second among many objects
    try:
        return multipletests(p, alpha=ALPHA, method="holm")[1].tolist()
    finally:
        gc.unfreeze()


def verdict(
    difference: Difference, p_adjusted: float, lower_is_better: bool = False, p_equivalence: float | None = None
) -> str:
    """`equivalent` if the difference is shown to be within the margin, whatever its sign; else `better` or `worse`
    if the adjusted p is below 5 %; else `not distinguishable`. `p_equivalence` is the adjusted one of the family."""
    if (difference.p_equivalence if p_equivalence is None else p_equivalence) < ALPHA:
        return "equivalent"
    if not p_adjusted < ALPHA:
        return "not distinguishable"
    return "better" if (difference.difference < 0) == lower_is_better else "worse"


def resampled_deviations(
    columns: np.ndarray,
    weights: list[np.ndarray | None],
    resamples: int = RESAMPLES,
    corpora: Sequence[tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]] = (),
) -> np.ndarray:
    """Redraw the examples with replacement, all columns with the same draw (a matrix product of weights).

    Args:
        columns: shape (examples, n): for each mean its values per example, averaged over seeds.
        weights: of each column, as in :func:`mean_and_error`.
        corpora: sufficient statistics (seeds, examples, counts) of further columns, and the corpus score of their
            sums; it is averaged over seeds.

    Returns:
        Shape (resamples, n + corpora): resampled minus found.
    """
    examples = columns.shape[0]
    rng = np.random.default_rng(RNG_SEED)
    divisors = np.column_stack([np.ones(examples) if w is None else w for w in weights])
    distinct, which = np.unique(divisors, axis=1, return_inverse=True)
    centre = columns.sum(axis=0) / divisors.sum(axis=0)
    counts = [_side_by_side(statistics) for statistics, _ in corpora]
    found = [score(statistics.sum(axis=1)).mean() for statistics, score in corpora]
    drawn = []
    for draw in _weights(rng, examples, resamples):
        parts = [(draw @ columns) / (draw @ distinct)[:, which.ravel()] - centre]
        narrow = draw.astype(np.float32)
        for (statistics, score), table, point in zip(corpora, counts, found, strict=True):
            sums = (narrow if table.dtype == np.float32 else draw) @ table
            sums = sums.reshape(len(draw), statistics.shape[0], statistics.shape[2])
            parts.append(score(sums).mean(axis=1, keepdims=True) - point)
        drawn.append(np.hstack(parts))
    return np.concatenate(drawn)


def _side_by_side(statistics: np.ndarray) -> np.ndarray:
    """Counts as (examples, seeds x counts), in single precision where every sum of a resample is exact in it."""
    table = np.concatenate(list(statistics), axis=1)
    return table.astype(np.float32) if table.max(initial=0) * len(table) < 2**24 else table


def hierarchical(deviations: np.ndarray, error: Error) -> np.ndarray:
    """Errors of a mean over seeds and examples, from the resampled deviations over examples, shape (resamples,).

    These are scaled to the examples' own part of the variance, since their interaction with the seeds is in the
    seeds' part already, and the seeds' part is added, drawn from its t distribution.
    """
    spread = deviations.std()
    errors = deviations * (math.sqrt(error.examples) / spread if spread > 0 else 0.0)
    if error.seeds > 0:
        errors = errors + math.sqrt(error.seeds) * _seed_draws(error.seed_df, len(deviations))
    return errors


@lru_cache(maxsize=8)
def _seed_draws(df: int, resamples: int) -> np.ndarray:
    return np.random.default_rng(RNG_SEED + 1).standard_t(df, resamples)


def bootstrap_interval(mean: float, errors: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of a mean from the errors that :func:`hierarchical` draws."""
    low, high = np.quantile(errors, [ALPHA / 2, 1 - ALPHA / 2])
    return float(mean + low), float(mean + high)


def bootstrap_p(difference: float, errors: np.ndarray) -> float:
    """Two-sided p of no difference: the share of errors as large as the difference, counting the study itself."""
    return float((1 + (np.abs(errors) >= abs(difference)).sum()) / (1 + len(errors)))


def bootstrap_intervals(
    columns: np.ndarray, errors: list[Error], weights: list[np.ndarray | None], resamples: int = RESAMPLES
) -> np.ndarray:
    """95 % intervals of means over seeds and examples by the hierarchical bootstrap, shape (n, 2).

    Args:
        columns, weights: as in :func:`resampled_deviations`.
        errors: of each column, from :func:`mean_and_error`.
    """
    divisors = [len(columns) if w is None else w.sum() for w in weights]
    deviations = resampled_deviations(columns, weights, resamples)
    return np.array(
        [
            bootstrap_interval(column.sum() / divisor, hierarchical(deviation, error))
            for column, divisor, deviation, error in zip(columns.T, divisors, deviations.T, errors, strict=True)
        ]
    )


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
