"""All pairs, corpus scores and exact matches of a comparison, against sacrebleu, statsmodels and known truths."""

from __future__ import annotations

import json
import re

import numpy as np
import pandas as pd
import pytest
from finegrid.analysis import comparison, corpus
from finegrid.analysis.compare import compare
from finegrid.errors import UserError
from finegrid.evaluation.metrics import score_split
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest
from study_results import make_results

TEXT = "the policy of a term life insurance covers your car home and each claim is paid by agent rule clause"
WORDS = TEXT.split()


def sentences(rng, count, length=14):
    return [" ".join(rng.choice(WORDS, length)) for _ in range(count)]


def mangled(rng, references, share):
    """Answers that keep each word of the reference but with some probability."""
    return [" ".join(w if rng.random() > share else rng.choice(WORDS) for w in text.split()) for text in references]


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    references = sentences(rng, 150)
    return references, mangled(rng, references, 0.45), mangled(rng, references, 0.5)


def counts(predictions, references, kind):
    return np.array([row[kind] for row in score_split(predictions, references, "en").statistics], float)


def test_corpus_scores_of_any_sample_are_sacrebleus(texts):
    references, answers, _ = texts
    rng = np.random.default_rng(1)
    bleu, chrf = counts(answers, references, "bleu"), counts(answers, references, "chrf")
    for size in (1, 2, 5, 150):  # few examples have no 4-gram in common: the smoothing counts
        for _ in range(5):
            rows = rng.integers(150, size=size)
            ours = [answers[row] for row in rows], [[references[row] for row in rows]]
            expected = BLEU(tokenize="13a", force=True).corpus_score(*ours).score
            assert corpus.corpus_bleu(bleu[rows].sum(0)) == pytest.approx(expected, rel=1e-9)
            assert corpus.corpus_chrf(chrf[rows].sum(0)) == pytest.approx(CHRF().corpus_score(*ours).score, rel=1e-9)
    assert corpus.corpus_bleu(np.zeros(10)) == corpus.corpus_chrf(np.zeros(18)) == 0


@pytest.mark.parametrize("share", [0.48, 0.52])
def test_corpus_differences_agree_with_sacrebleus_paired_bootstrap(texts, share):
    """sacrebleu counts resampled |differences| that exceed their own mean by the difference found: one-sided where the
    difference is clear, and no test of zero where it is not. Its count is made again from our resamples, and where
    the difference is clear half of our two-sided p is its p."""
    references, arm_answers, _ = texts
    answers = arm_answers, mangled(np.random.default_rng(9), references, share)
    named = [("base", answers[1]), ("arm", answers[0])]
    paired = PairedTest(named, {"BLEU": BLEU(force=True), "chrF": CHRF()}, [references], "bs", n_samples=2000)
    _, found = paired()
    for kind, name, key in (("bleu", "corpus_bleu", "BLEU"), ("chrf", "corpus_chrf", "chrF2")):
        score = corpus.CORPUS[name][1]
        statistics = [counts(predictions, references, kind)[None] for predictions in answers]
        ours = [corpus.values(table, score) for table in statistics]
        moved = comparison.resampled_deviations(np.ones((150, 1)), [None], 4000, [(s, score) for s in statistics])
        base, arm = found[key]
        assert [x.mean() for x in ours] == pytest.approx([arm.score, base.score], rel=1e-6)
        width = 1.96 * moved[:, 1:].std(axis=0)
        assert width == pytest.approx([arm.ci, base.ci], rel=0.1)
        difference = comparison.paired_difference(*ours)
        sizes = np.abs(difference.difference + moved[:, 1] - moved[:, 2])
        assert abs(np.mean(sizes - sizes.mean() > abs(difference.difference)) - arm.p_value) < 0.03
        errors = comparison.hierarchical(moved[:, 1] - moved[:, 2], difference.error)
        p = comparison.bootstrap_p(difference.difference, errors)
        assert abs(p - difference.p) < 0.02
        if difference.p < 0.1:
            assert abs(p / 2 - arm.p_value) < 0.02


def test_jackknife_error_of_a_corpus_score_is_that_of_the_bootstrap(texts):
    references, answers, _ = texts
    statistics = counts(answers, references, "bleu")[None]
    _, error = comparison.mean_and_error(corpus.values(statistics, corpus.corpus_bleu))
    moved = comparison.resampled_deviations(np.ones((150, 1)), [None], 4000, [(statistics, corpus.corpus_bleu)])
    assert moved[:, 1].std() == pytest.approx(error.variance**0.5, rel=0.06)


def test_mcnemar_is_the_exact_binomial_test_of_the_discordant_pairs():
    from scipy.stats import binomtest

    arm, other = np.repeat([1, 1, 0, 0], [20, 12, 3, 5]).astype(float), np.repeat([1, 0, 1, 0], [20, 12, 3, 5])
    found = comparison.mcnemar(arm, other.astype(float))
    assert [found[key] for key in ("both", "arm_only", "other_only", "neither")] == [20, 12, 3, 5]
    assert found["p"] == pytest.approx(binomtest(3, 15).pvalue, rel=1e-12)


# ------------------------------------------------------------------------------------------------ the stage


def inputs(study):
    runs = list(dict.fromkeys(run["run"] for run in json.loads((study / "plan.json").read_text("utf-8"))["runs"]))
    return {
        "plan": study / "plan.json",
        "metrics": [study / "metrics" / f"{run}.json" for run in runs],
        "predictions": [study / "runs" / run / "predictions.jsonl" for run in runs],
        "output": study / "comparison",
        "resamples": 500,
    }


def read(study, name):
    return pd.read_csv(study / "comparison" / f"{name}.tsv", sep="\t")


def rewrite(study, change, runs="*"):
    for path in study.glob(f"runs/{runs}/predictions.jsonl"):
        rows = [change(json.loads(line)) for line in path.read_text("utf-8").splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    effects = {"full": 0.03, "lora": 0.12, "qlora": 0.12}
    folder = tmp_path_factory.mktemp("pairs")
    return make_results(folder, seeds=4, examples=120, levels=0, effects=effects)


def test_every_pair_stands_once_and_those_of_the_baseline_say_what_the_comparison_says(study):
    pairs, differences = read(study, "pairs"), read(study, "comparisons")
    arms = ["base", "base (nf4)", "full", "lora", "qlora"]
    primary = pairs[pairs["metric"] == "rougeL"]
    assert {frozenset(pair) for pair in zip(primary["arm"], primary["other"], strict=True)} == {
        frozenset((a, b)) for a in arms for b in arms if a < b
    }
    ours = primary[primary["other"] == "full"].set_index("arm")
    theirs = differences[differences["metric"] == "rougeL"].set_index("arm")
    for column in ("difference", "low", "high", "p", "bootstrap_low", "p_bootstrap", "smallest_detectable_difference"):
        assert ours[column].to_dict() == pytest.approx(theirs[column].to_dict())
    assert (ours["p_adjusted"] >= theirs["p_adjusted"] - 1e-12).loc[["lora", "qlora"]].all()


def test_pairs_find_who_differs_and_who_does_not(study):
    primary = read(study, "pairs").query("metric == 'rougeL'").set_index(["arm", "other"])
    assert primary.loc[("lora", "full"), "verdict"] == "better"
    assert primary.loc[("qlora", "lora"), "verdict"] != "better"  # QLoRA starts 0.015 lower


def test_untrained_models_are_a_family_of_their_own(study):
    differences = read(study, "comparisons").query("metric == 'rougeL'")
    for family, arms in (("arms", {"lora", "qlora"}), ("untrained", {"base", "base (nf4)"})):
        rows = differences[differences["family"] == family]
        assert set(rows["arm"]) == arms
        assert rows["p_adjusted"].tolist() == pytest.approx(comparison.holm(rows["p"].tolist()))
        assert rows["p_equivalence_adjusted"].tolist() == pytest.approx(comparison.holm(rows["p_equivalence"].tolist()))


def test_the_bootstrap_beside_a_difference_agrees_with_its_test(tmp_path):
    study = make_results(tmp_path, seeds=4, examples=120, levels=0)
    compare(**inputs(study) | {"resamples": 10_000})
    rows = read(study, "comparisons")
    width = rows["high"] - rows["low"]
    assert ((rows["bootstrap_low"] - rows["low"]).abs() < 0.06 * width).all()
    assert ((rows["bootstrap_high"] - rows["high"]).abs() < 0.06 * width).all()
    assert ((rows["p_bootstrap"] - rows["p"]).abs() < 0.03).all()
    assert (rows["smallest_detectable_adjusted"] > rows["smallest_detectable_difference"]).all()


def test_exact_matches_of_one_seed_are_tested_by_mcnemar_and_of_several_run_against_run(tmp_path, study):
    several = read(study, "mcnemar")
    assert set(several["seed"].dropna()) == {0, 1, 2, 3}
    assert (read(study, "pairs").query("metric == 'exact_match' and seeds > 0")["test"] == "random effects").all()
    one = make_results(tmp_path, seeds=1, levels=0, examples=60)
    matches = read(one, "mcnemar").set_index(["arm", "other"])
    pairs = read(one, "pairs").query("metric == 'exact_match'").set_index(["arm", "other"])
    assert pairs["p"].to_dict() == pytest.approx(matches["p"].to_dict())
    assert set(pairs["test"]) == {"McNemar"}
    assert set(pairs["covers"]) == {"examples"}


def test_a_study_says_what_it_can_not_claim(tmp_path):
    study = make_results(tmp_path, seeds=1, levels=0)
    claims = compare(**inputs(study))["cannot_claim"]
    assert any("each arm was trained once" in claim for claim in claims)
    assert any(re.fullmatch(r"that Full does as well as .*LoRA.*: .* in ROUGE-L would not be seen", c) for c in claims)
    plan = json.loads((study / "plan.json").read_text("utf-8"))
    plan["compare"]["margin"] = 0.0
    (study / "plan.json").write_text(json.dumps(plan), "utf-8")
    assert any("no margin" in claim for claim in compare(**inputs(study))["cannot_claim"])
    assert read(study, "comparisons")["p_equivalence"].isna().all()


def with_statistics(row):
    rng = np.random.default_rng([len(row["id"]), row["label_tokens"]])
    if row["scores"] is None:
        return row | {"statistics": None}
    answer, reference = sentences(rng, 1)[0], sentences(rng, 1)[0]
    return row | {"statistics": score_split([answer], [reference], "en").statistics[0]}


def test_corpus_scores_are_compared_where_predictions_keep_their_statistics(tmp_path):
    study = make_results(tmp_path, levels=0, examples=20)
    assert read(study, "arms")["corpus_bleu"].isna().all()
    rewrite(study, with_statistics)
    compare(**inputs(study))
    arms, pairs = read(study, "arms"), read(study, "pairs")
    for name, (kind, score) in corpus.CORPUS.items():
        rows = [
            json.loads(line)
            for line in next(study.glob("runs/full-*/predictions.jsonl")).read_text("utf-8").splitlines()
        ]
        total = np.sum([row["statistics"][kind] for row in rows if row["split"] == "test"], axis=0)
        assert arms.set_index("arm").loc["full", name] == pytest.approx(float(score(total)))
        assert (arms[f"{name}_low"] <= arms[name]).all()
        assert (arms[name] <= arms[f"{name}_high"]).all()
        assert len(pairs[pairs["metric"] == name]) == 10


def test_statistics_that_only_some_runs_keep_are_refused(tmp_path):
    study = make_results(tmp_path, levels=0, examples=12)
    rewrite(study, with_statistics, runs="full-*")
    with pytest.raises(UserError, match=r"run lora-\w+: its predictions lack the statistics of BLEU and chrF"):
        compare(**inputs(study))


def test_of_many_arms_the_best_is_paired_with_each_and_pays_for_all_pairs(tmp_path, monkeypatch):
    from finegrid.analysis import pairs

    study = make_results(tmp_path, levels=0, examples=30)
    full = read(study, "pairs").query("metric == 'rougeL'")
    monkeypatch.setattr(pairs, "MOST_PAIRED", 4)
    compare(**inputs(study))
    found = read(study, "pairs").query("metric == 'rougeL'")
    best = read(study, "arms").set_index("arm")["rougeL"].idxmax()
    assert set(found["arm"]) == {best}
    assert len(found) == 4
    assert (found["p_adjusted"] == np.minimum(1, 10 * found["p"])).all()
    assert len(full) == 10
