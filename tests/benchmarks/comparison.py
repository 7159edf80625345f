"""Proof of the comparison: false claims, coverage, power, agreement with other libraries, time.

    python tests/benchmarks/comparison.py                 1,000 studies a row, about 8 minutes of one core
    python tests/benchmarks/comparison.py --studies 200

Each simulated study has a baseline and three arms, scored between 0 and 1 on 300 examples. Examples are hard or easy
for all arms, each arm is better at some than at others, every training has its own luck (the seed effect), and every
answer some more. The study goes through the functions that write `comparisons.tsv`, Holm and all.
(Not called statistics.py: every script in this folder would import that in place of Python's own module.)
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from finegrid.analysis import comparison, corpus, pairs
from finegrid.analysis.compare import compare
from finegrid.analysis.scores import Scores
from scipy import special, stats
from statsmodels.stats.power import TTestPower

ARMS = ("baseline", "one", "two", "three")
EXAMPLES = 300
EFFECT = 0.01
# Standard deviation of a training's own luck, in the logit of the score: none, a third, one and three times the error
# that the examples leave.
SEED_EFFECTS = {"none": 0.0, "small": 0.03, "as the examples'": 0.09, "large": 0.27}


def simulated(rng: np.random.Generator, seeds: int, seed_effect: float, effect: float = 0.0, arms=ARMS) -> Scores:
    """A study's scores; every arm but the first is better by `effect`."""
    hard = rng.normal(-1.5, 0.8, EXAMPLES)
    rows = []
    for number, _ in enumerate(arms):
        own = rng.normal(0, 0.5, EXAMPLES)
        luck = rng.normal(0, seed_effect, (seeds, 1))
        rows.append(special.expit(hard + own + luck + rng.normal(0, 0.7, (seeds, EXAMPLES))) + effect * (number > 0))
    values = np.concatenate(rows)
    runs = [f"{arm}-{seed}" for arm in arms for seed in range(seeds)]
    metrics = {run: {"data": {"tokens": "0"}} for run in runs}
    ids = [str(number) for number in range(EXAMPLES)]
    return Scores("test", ids, runs, {"rougeL": values}, np.ones_like(values), np.ones_like(values), metrics)


def compared(scores: Scores, seeds: int, resamples: int = 300, arms=ARMS) -> pd.DataFrame:
    """The rows of `comparisons.tsv` in rougeL."""
    runs = {arm: [f"{arm}-{seed}" for seed in range(seeds)] for arm in arms}
    table = pairs.measure(scores, runs, resamples)
    return pairs.against_baseline(table, list(arms), arms[0], ["rougeL"], {}, set())


def plain_bootstrap_p(rng: np.random.Generator, difference: np.ndarray, resamples: int = 300) -> float:
    """Seeds and examples both drawn with replacement: what is done elsewhere."""
    seeds, examples = difference.shape
    by_seed = rng.multinomial(seeds, np.full(seeds, 1 / seeds), resamples) @ difference / seeds
    means = (rng.multinomial(examples, np.full(examples, 1 / examples), resamples) * by_seed).sum(axis=1) / examples
    below = (means <= 0).mean()
    return 2 * min(below, 1 - below)


def false_claims(studies: int, seeds: int, seed_effect: float) -> dict[str, float]:
    """Shares over A/A studies: with any false claim, of single p below 5 %, and of intervals that hold the truth."""
    rng = np.random.default_rng([seeds, round(seed_effect * 100)])
    claimed, single, bootstrapped, plain, covered, bootstrap_covered, exact = [], [], [], [], [], [], []
    for _ in range(studies):
        scores = simulated(rng, seeds, seed_effect)
        rows = compared(scores, seeds)
        claimed.append(rows["verdict"].isin(["better", "worse"]).any())
        single += (rows["p"] < 0.05).tolist()
        bootstrapped += (rows["p_bootstrap"] < 0.05).tolist()
        values = scores.values["rougeL"].reshape(len(ARMS), seeds, EXAMPLES)
        plain.append(plain_bootstrap_p(rng, values[1] - values[0]) < 0.05)
        # The truth is 0 in all these studies; an effect would move interval and truth alike.
        covered += ((rows["low"] <= 0) & (rows["high"] >= 0)).tolist()
        bootstrap_covered += ((rows["bootstrap_low"] <= 0) & (rows["bootstrap_high"] >= 0)).tolist()
        exact.append(rows["smallest_detectable_difference"].mean())
    lists = (claimed, single, bootstrapped, plain, covered, bootstrap_covered, exact)
    names = ("claimed", "single", "bootstrap", "plain", "covered", "bootstrap_covered", "smallest")
    return {name: float(np.mean(values)) for name, values in zip(names, lists, strict=True)}


def print_false_claims(studies: int) -> None:
    limit = stats.binom.ppf(0.975, studies, 0.05) / studies
    print(f"\n{studies:,} A/A studies a row; at a true 5 % at most {limit:.1%} of them in 39 of 40 tries")
    columns = ["studies with a false claim", "p < 5 %", "by bootstrap", "by a plain bootstrap"]
    columns += ["intervals hold the truth", "by bootstrap"]
    print("| seeds | seed effect | " + " | ".join(columns) + " |\n|---|---|" + "---|" * len(columns))
    for seeds in (2, 3, 5, 10):
        for name, effect in SEED_EFFECTS.items():
            found = false_claims(studies, seeds, effect)
            shares = ("claimed", "single", "bootstrap", "plain", "covered", "bootstrap_covered")
            print(f"| {seeds} | {name} | " + " | ".join(f"{found[key]:.1%}" for key in shares) + " |", flush=True)


def power(studies: int, seeds: int, seed_effect: float, effect: float) -> float:
    """Share of two-armed studies in which a true effect is found."""
    rng = np.random.default_rng([7, seeds, round(seed_effect * 100)])
    arms = ARMS[:2]
    found = 0
    for _ in range(studies):
        scores = simulated(rng, seeds, seed_effect, effect, arms)
        values = scores.values["rougeL"].reshape(2, seeds, EXAMPLES)
        found += comparison.paired_difference(values[1], values[0]).p < 0.05
    return found / studies


def spread(seed_effect: float) -> tuple[float, float]:
    """Variances of a difference: of what a seed adds to the mean, and of what an example adds at every seed."""
    rng = np.random.default_rng(3)
    by_seed, by_example = [], []
    for _ in range(100):
        values = simulated(rng, 20, seed_effect, 0, ARMS[:2]).values["rougeL"].reshape(2, 20, EXAMPLES)
        _, error = comparison.mean_and_error(values[1] - values[0])
        by_seed.append(error.seeds * 20)
        by_example.append(error.examples * EXAMPLES)
    return float(np.mean(by_seed)), float(np.mean(by_example))


def print_power(studies: int) -> None:
    """Against the t-test on the seeds' means (statsmodels), which is right where seeds are nearly all of the error."""
    effect, name = 0.06, "large"
    by_seed, by_example = spread(SEED_EFFECTS[name])
    print(f"\npower at a true difference of {effect}, seed effect {name}, {studies:,} studies a row")
    print("| seeds | found | theory |\n|---|---|---|")
    for seeds in (2, 3, 4, 6, 8):
        size = effect / math.sqrt(by_seed + seeds * by_example / EXAMPLES)
        theory = TTestPower().power(effect_size=size, nobs=seeds, alpha=0.05)
        print(f"| {seeds} | {power(studies, seeds, SEED_EFFECTS[name], effect):.1%} | {theory:.1%} |", flush=True)
    smallest = false_claims(50, 5, SEED_EFFECTS["small"])["smallest"]
    hits = power(studies, 5, SEED_EFFECTS["small"], smallest)
    print(f"at the smallest detectable difference (5 seeds, {smallest:.4f}): {hits:.1%} found; 80 % are promised")


def print_agreement() -> None:
    rng = np.random.default_rng(5)
    values = simulated(rng, 1, 0.0, 0.01, ARMS[:2]).values["rougeL"]
    found, reference = comparison.paired_difference(values[1:], values[:1]), stats.ttest_rel(values[1], values[0])
    print("\n| case | here | there |\n|---|---|---|")
    print(f"| one seed, p: scipy's ttest_rel | {found.p:.6f} | {reference.pvalue:.6f} |")
    low, high = comparison.bootstrap_interval(
        found.difference,
        comparison.resampled_deviations((values[1] - values[0])[:, None], [None], 10_000)[:, 0],
    )
    there = stats.bootstrap((values[1] - values[0],), np.mean, method="percentile", n_resamples=10_000, rng=rng)
    ends = there.confidence_interval
    print(f"| one seed, interval: scipy's bootstrap | {low:.5f}, {high:.5f} | {ends.low:.5f}, {ends.high:.5f} |")
    matches = (rng.random((2, 200)) < [[0.6], [0.5]]).astype(float)
    counts = comparison.mcnemar(*matches)
    binomial = stats.binomtest(counts["arm_only"], counts["arm_only"] + counts["other_only"]).pvalue
    print(f"| exact match, p: scipy's binomtest | {counts['p']:.6f} | {binomial:.6f} |")
    _print_sacrebleu()


def _print_sacrebleu() -> None:
    from finegrid.evaluation.metrics import score_split
    from sacrebleu.metrics import BLEU, CHRF
    from sacrebleu.significance import PairedTest

    rng = np.random.default_rng(6)
    text = "the policy of a term life insurance covers your car home and each claim is paid by agent rule clause"
    words = text.split()
    references = [" ".join(rng.choice(words, 14)) for _ in range(300)]
    answers = {
        name: [" ".join(w if rng.random() > share else rng.choice(words) for w in text.split()) for text in references]
        for name, share in (("baseline", 0.48), ("arm", 0.45))
    }
    paired = PairedTest(
        list(answers.items()), {"BLEU": BLEU(force=True), "chrF": CHRF()}, [references], "bs", n_samples=2000
    )
    _, there = paired()
    rows = {name: score_split(texts, references, "en").statistics for name, texts in answers.items()}
    for metric, key in (("corpus_bleu", "BLEU"), ("corpus_chrf", "chrF2")):
        kind, score = corpus.CORPUS[metric]
        counts = [np.array([row[kind] for row in rows[name]], float)[None] for name in ("arm", "baseline")]
        ours = [corpus.values(table, score) for table in counts]
        moved = comparison.resampled_deviations(np.ones((300, 1)), [None], 10_000, [(each, score) for each in counts])
        result = there[key][1]
        half = np.diff(np.quantile(moved[:, 1], [0.025, 0.975]))[0] / 2
        print(f"| {metric} ± half its interval: sacrebleu's paired_bs | {ours[0].mean():.3f} ± {half:.3f} |", end="")
        print(f" {result.score:.3f} ± {result.ci:.3f} |")
        difference = comparison.paired_difference(*ours)
        p = comparison.bootstrap_p(
            difference.difference, comparison.hierarchical(moved[:, 1] - moved[:, 2], difference.error)
        )
        print(f"| {metric}, p (ours is two-sided, sacrebleu's one-sided): bootstrap, jackknife |", end="")
        print(f" {p:.4f}, {difference.p:.4f} | {result.p_value:.4f} |")


def print_time() -> None:
    """The stage itself, on files: 4 arms x 3 seeds = 12 runs and 2 untrained models, 2,000 examples each."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
    from study_results import make_results

    with tempfile.TemporaryDirectory() as folder:
        study = make_results(Path(folder), arms=4, seeds=3, examples=2000, levels=0)
        runs = list(dict.fromkeys(run["run"] for run in json.loads((study / "plan.json").read_text())["runs"]))
        for run in runs:
            _add_statistics(study / "runs" / run / "predictions.jsonl")
        wall, cpu = time.perf_counter(), time.process_time()
        compare(
            study / "plan.json",
            [study / "metrics" / f"{run}.json" for run in runs],
            [study / "runs" / run / "predictions.jsonl" for run in runs],
            study / "comparison",
        )
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    print(f"\n{len(runs)} runs x 2,000 examples, 10,000 resamples: {cpu:.2f} s of CPU time, {wall:.2f} s of wall time")


def _add_statistics(path: Path) -> None:
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    for row in rows:
        count = row["label_tokens"]
        matches = [round(count * row["nll"] % 1 * 0.4**order) for order in range(4)]
        row["statistics"] = {
            "bleu": [count, count + 3, *matches, *(count - order for order in range(4))],
            "chrf": [number for order in range(6) for number in (5 * count - order, 5 * count, 2 * count - 9 * order)],
        }
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def main() -> None:
    """Print every table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=1000)
    studies = parser.parse_args().studies
    print_time()
    print_agreement()
    print_power(studies)
    print_false_claims(studies)


if __name__ == "__main__":
    main()
