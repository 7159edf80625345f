"""How small a difference a comparison will be able to see, before anything has run.

Agrees with :mod:`finegrid.analysis.comparison`, which computes the same number from a study's own scores: two-sided
5 %, power 80 %, paired by seed and example, seeds and examples each with its own degrees of freedom. Before there are
scores their spread is an assumption, :data:`SPREAD`. Pure Python, since every plan asks for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

ALPHA = 0.05
POWER = 0.80
MANY = 400  # degrees of freedom from which Student's t is taken as normal: its quantile differs by 0.3 %
MOST_EXAMPLES = 1_000_000


class Spread(NamedTuple):
    """Standard deviations of a paired difference between two arms, in the metric's unit.

    `examples`: of what an example's difference is at every seed; `rest`: of what it is at one seed alone.
    """

    examples: float
    rest: float


# Measured on the demo (config/studies/insurance.yaml: SmolLM2-135M-Instruct, 40 test examples, 2 seeds; full, LoRA and
# QLoRA against each other, the mean of the three pairs' variances): results/insurance/runs/*/predictions.jsonl, and
# tests/unit/test_findings.py measures it again where they lie. Scores run from 0 to 1, loss is nats a label token.
# What the seed does to all examples alike was too small to be measured with two seeds, and is taken as 0: a study can
# see no less than this says, and possibly only more.
SPREAD = {
    "rougeL": Spread(0.035, 0.046),
    "rouge1": Spread(0.043, 0.072),
    "rouge2": Spread(0.033, 0.034),
    "f1": Spread(0.039, 0.067),
    "bleu": Spread(0.015, 0.024),
    "chrf": Spread(0.0, 0.052),
    "loss": Spread(0.066, 0.019),
    # No answer of the demo is an exact match. Assumed: two arms differ on every tenth example.
    "exact_match": Spread(0.22, 0.22),
}


@lru_cache(maxsize=1024)
def smallest_detectable_difference(metric: str, examples: int, seeds: int) -> float:
    """Return the smallest true difference between two arms that a study finds with 80 % power.

    Args:
        metric: a key of :data:`SPREAD`.
        examples: test examples, at least 2.
        seeds: at least 1; with one, the luck of the seed is in no part of the answer.
    """
    spread = SPREAD[metric]
    if seeds == 1:
        scale = math.sqrt((spread.examples**2 + spread.rest**2) / examples)
        return scale * (_t_quantile(ALPHA / 2, examples - 1) + _t_quantile(1 - POWER, examples - 1))
    by_seeds = spread.rest / math.sqrt(seeds * examples)
    by_examples = spread.examples / math.sqrt(examples)
    return sum(_sum_quantile(upper, by_seeds, seeds - 1, by_examples, examples - 1) for upper in (ALPHA / 2, 1 - POWER))


def examples_needed(metric: str, margin: float, seeds: int) -> int | None:
    """Return how many test examples make the smallest detectable difference the margin; None above a million."""
    examples = 30
    for _ in range(20):  # the difference falls with the root of the examples, but for a few degrees of freedom
        smallest = smallest_detectable_difference(metric, examples, seeds)
        wanted = max(2, math.ceil(examples * (smallest / margin) ** 2))
        if wanted > MOST_EXAMPLES:
            return None
        if abs(wanted - examples) <= 1:
            break
        examples = wanted
    return examples


def _t_quantile(upper: float, df: int) -> float:
    """Return what Student's t exceeds with probability `upper`, below 0.5."""
    if df >= MANY:
        return NormalDist().inv_cdf(1 - upper)
    return _root(lambda value: _t_tail(value, df) - upper, 1 / upper**2)


def _sum_quantile(upper: float, a: float, a_df: int, b: float, b_df: int) -> float:
    """Return what a t[a_df] + b t[b_df] exceeds with probability `upper`."""
    if b == 0:
        return a * _t_quantile(upper, a_df)
    grid = [step * 0.05 for step in range(-180, 181)]
    weights = [_t_density(z, b_df) for z in grid]
    total = sum(weights)

    def excess(value: float) -> float:
        tails = (weight * _t_tail((value - b * z) / a, a_df) for z, weight in zip(grid, weights, strict=True))
        return sum(tails) / total - upper

    # Half the probability for each part bounds their sum.
    return _root(excess, a * _t_quantile(upper / 2, a_df) + b * _t_quantile(upper / 2, b_df))


def _root(falling: Callable[[float], float], above: float) -> float:
    below = 0.0
    while above - below > 1e-5 * above:
        middle = (below + above) / 2
        below, above = (middle, above) if falling(middle) > 0 else (below, middle)
    return (below + above) / 2


def _t_tail(value: float, df: int) -> float:
    """Return P(t > value), by the finite series for whole degrees of freedom (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    if df >= MANY:
        return NormalDist().cdf(-value)
    angle = math.atan2(abs(value), math.sqrt(df))
    cosine = math.cos(angle)
    term = cosine if df % 2 else 1.0
    series = term if df > 1 else 0.0
    for k in range(2 if df % 2 else 1, df - 2, 2):
        term *= cosine * cosine * k / (k + 1)
        series += term
    inside = 2 / math.pi * (angle + math.sin(angle) * series) if df % 2 else math.sin(angle) * series
    return (1 - inside) / 2 if value >= 0 else (1 + inside) / 2


def _t_density(value: float, df: int) -> float:
    """Student's t density, but for a constant factor."""
    return (1 + value * value / df) ** (-(df + 1) / 2)
