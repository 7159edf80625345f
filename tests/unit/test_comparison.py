"""Statistics of a comparison: against scipy, against simulation, and on studies whose truth is known."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from finegrid.analysis import comparison
from finegrid.analysis.compare import compare
from finegrid.analysis.comparison import Difference, Error, bootstrap_intervals, mean_and_error, paired_difference
from finegrid.errors import UserError
from scipy import stats
from study_results import make_results


def simulated(rng, seeds, examples, *, seed_sd=0.0, effect=0.0, shared=1.0, own=1.0):
    """Scores (seeds, examples) of an arm and a baseline; seed_sd is each run's own shift."""
    hard = rng.normal(0, 1, examples)

    def scores(mean):
        runs = rng.normal(0, seed_sd, (seeds, 1))
        return mean + hard + rng.normal(0, shared, examples) + runs + rng.normal(0, own, (seeds, examples))

    return scores(effect), scores(0.0)


def test_one_seed_is_scipys_paired_t_test():
    arm, base = simulated(np.random.default_rng(0), 1, 60, effect=0.2)
    found = paired_difference(arm, base)
    reference = stats.ttest_rel(arm[0], base[0])
    low, high = reference.confidence_interval(0.95)
    assert found.p == pytest.approx(reference.pvalue, rel=1e-9)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9)


def test_seeds_alone_are_scipys_one_sample_t_test():
    """Where all examples agree, only the seeds are uncertain."""
    shifts = np.array([0.1, 0.3, 0.25, -0.02])
    found = paired_difference(np.repeat(shifts[:, None], 30, axis=1), np.zeros((1, 30)))
    reference = stats.ttest_1samp(shifts, 0)
    assert found.p == pytest.approx(reference.pvalue, rel=1e-6)
    assert found.low == pytest.approx(reference.confidence_interval(0.95).low, rel=1e-5)


def test_error_distribution_is_the_sum_of_its_two_parts():
    rng = np.random.default_rng(1)
    error = Error(0.5, 2, 1.5, 40)
    drawn = np.sqrt(0.5) * rng.standard_t(2, 2_000_000) + np.sqrt(1.5) * rng.standard_t(40, 2_000_000)
    for value in (0.5, 2.0, 5.0):
        assert error.tail(value) == pytest.approx((drawn > value).mean(), rel=0.02)
    assert error.tail(error.quantile(0.025)) == pytest.approx(0.025, rel=1e-4)
    assert error.tail(-1.0) == pytest.approx(1 - error.tail(1.0), rel=1e-9)


def test_variance_of_the_mean_is_unbiased_over_seeds_and_examples():
    rng = np.random.default_rng(2)
    means, variances = [], []
    for _ in range(2000):
        arm, base = simulated(rng, 3, 20, seed_sd=0.3)
        mean, error = mean_and_error(arm - base)
        means.append(mean)
        variances.append(error.variance)
    assert np.mean(variances) == pytest.approx(np.var(means), rel=0.08)


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("seed_sd", [0.0, 0.1, 0.5])
def test_equal_arms_are_called_different_at_most_five_times_in_a_hundred(seeds, seed_sd):
    """A/A studies: no effect; the seeds' own shifts from none to five times the examples' error."""
    rng = np.random.default_rng(seeds * 100 + round(seed_sd * 10))
    studies = 200
    wrong = sum(paired_difference(*simulated(rng, seeds, 200, seed_sd=seed_sd)).p < 0.05 for _ in range(studies))
    # At a true rate of 5 % more than 18 of 200 would happen once in 200 times.
    assert wrong <= stats.binom.ppf(0.995, studies, 0.05)


def test_intervals_cover_the_true_difference_and_are_not_needlessly_wide():
    rng = np.random.default_rng(4)
    found = [paired_difference(*simulated(rng, 5, 100, seed_sd=0.15, effect=0.3)) for _ in range(300)]
    covered = np.mean([d.low <= 0.3 <= d.high for d in found])
    assert 0.93 <= covered <= 0.99


def test_power_grows_with_seeds_and_reaches_it_at_the_smallest_detectable_difference():
    rng = np.random.default_rng(5)
    share = {}
    for seeds in (2, 4):
        found = [paired_difference(*simulated(rng, seeds, 100, effect=0.35)) for _ in range(120)]
        share[seeds] = np.mean([d.p < 0.05 for d in found])
    assert share[4] > share[2] + 0.15
    smallest = np.median([paired_difference(*simulated(rng, 4, 100)).smallest_detectable for _ in range(200)])
    hits = np.mean([paired_difference(*simulated(rng, 4, 100, effect=smallest)).p < 0.05 for _ in range(250)])
    assert 0.7 <= hits <= 0.9


def test_loss_is_a_ratio_of_sums_and_its_interval_agrees_with_scipys_bootstrap():
    rng = np.random.default_rng(6)
    tokens = rng.integers(5, 200, 150).astype(float)
    nll = tokens * (3 + rng.normal(0, 0.5, 150)) + 8  # short answers are harder: mean of ratios is another number
    mean, error = mean_and_error(nll[None], tokens)
    assert mean == pytest.approx(nll.sum() / tokens.sum(), rel=1e-12)
    found = bootstrap_intervals(nll[:, None], [error], [tokens], 5000)[0]
    reference = stats.bootstrap(
        (nll, tokens),
        lambda n, t, axis: n.sum(axis) / t.sum(axis),
        paired=True,
        method="percentile",
        n_resamples=5000,
        rng=np.random.default_rng(0),
    ).confidence_interval
    width = reference.high - reference.low
    assert abs(found - [reference.low, reference.high]).max() < 0.05 * width
    half = error.quantile(0.025)
    assert abs(found - [mean - half, mean + half]).max() < 0.06 * width


def test_bootstrap_over_examples_agrees_with_scipys_on_skewed_scores():
    scores = np.random.default_rng(7).exponential(0.1, 120)
    mean, error = mean_and_error(scores[None])
    found = bootstrap_intervals(scores[:, None], [error], [None], 10_000)[0]
    reference = stats.bootstrap((scores,), np.mean, method="percentile", rng=np.random.default_rng(0))
    width = reference.confidence_interval.high - reference.confidence_interval.low
    assert abs(found - reference.confidence_interval).max() < 0.05 * width
    assert found[1] - mean > mean - found[0]  # skewed as the scores are


def test_intervals_of_arms_hold_the_seeds_too():
    rng = np.random.default_rng(8)
    covered = 0
    for _ in range(100):
        scores = simulated(rng, 2, 60, seed_sd=0.3)[0]
        _, error = mean_and_error(scores)
        low, high = bootstrap_intervals(scores.mean(0)[:, None], [error], [None], 400)[0]
        covered += low <= 0 <= high
    assert covered >= 93


def test_same_numbers_give_the_same_intervals_each_time():
    scores = np.random.default_rng(9).normal(size=(3, 50))
    _, error = mean_and_error(scores)
    first, second = (bootstrap_intervals(scores.mean(0)[:, None], [error], [None], 1500) for _ in range(2))
    assert (first == second).all()


@pytest.mark.parametrize(
    ("difference", "p_equivalence", "p_adjusted", "lower", "expected"),
    [
        (0.2, 0.9, 0.01, False, "better"),
        (0.2, 0.9, 0.01, True, "worse"),
        (-0.2, 0.9, 0.01, False, "worse"),
        (-0.2, float("nan"), 0.01, True, "better"),
        (0.001, 0.01, 0.8, False, "equivalent"),
        (0.001, 0.01, 0.001, False, "equivalent"),  # real but too small to matter
        (0.05, 0.2, 0.2, False, "not distinguishable"),
    ],
)
def test_verdict(difference, p_equivalence, p_adjusted, lower, expected):
    found = Difference(difference, 0, 0, 0, p_equivalence, 0)
    assert comparison.verdict(found, p_adjusted, lower) == expected


def test_equivalence_is_shown_exactly_where_the_ninety_percent_interval_is_within_the_margin():
    rng = np.random.default_rng(10)
    seen = set()
    for _ in range(40):
        arm, base = simulated(rng, 3, 400, effect=0.02)
        difference, error = mean_and_error(arm - base)
        half = error.quantile(0.05)
        within = difference - half > -0.2 and difference + half < 0.2
        seen.add(within)
        assert (paired_difference(arm, base, margin=0.2).p_equivalence < 0.05) == within
    assert seen == {True, False}


def test_equal_scores_have_no_difference_and_no_error():
    scores = np.random.default_rng(11).normal(size=(2, 30))
    found = paired_difference(scores, scores, margin=0.01)
    assert (found.difference, found.low, found.high, found.p, found.smallest_detectable) == (0, 0, 0, 1, 0)
    assert comparison.verdict(found, 1.0) == "equivalent"


def test_holm_keeps_the_family_error():
    assert comparison.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert comparison.holm([]) == []


# ------------------------------------------------------------------------------------------------ the stage


def inputs(study):
    plan = json.loads((study / "plan.json").read_text("utf-8"))
    runs = list(dict.fromkeys(run["run"] for run in plan["runs"]))
    return {
        "plan": study / "plan.json",
        "metrics": [study / "metrics" / f"{run}.json" for run in runs],
        "predictions": [study / "runs" / run / "predictions.jsonl" for run in runs],
        "training": sorted((study / "training").glob("*.json")),
        "output": study / "comparison",
        "resamples": 500,
    }


def edit(path, change):
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), "utf-8")


def tables(study):
    return (pd.read_csv(study / "comparison" / f"{name}.tsv", sep="\t") for name in ("arms", "comparisons"))


def test_arms_hold_the_means_of_the_metrics_files(tmp_path):
    study = make_results(tmp_path)
    arms, _ = tables(study)
    selected = json.loads((study / "comparison/comparison.json").read_text("utf-8"))["selected"]
    for row in arms.to_dict("records"):
        splits = [
            json.loads((study / "metrics" / f"{run}.json").read_text("utf-8"))["splits"]
            for run in selected[row["arm"]]["runs"]
        ]
        for metric in ("loss", "exact_match", "f1", "rouge1", "rouge2", "rougeL", "bleu", "chrf"):
            assert row[metric] == pytest.approx(np.mean([s["test"][metric] for s in splits]), rel=1e-6)
            assert row[f"{metric}_low"] <= row[metric] <= row[f"{metric}_high"]
        assert row["validation_loss"] == pytest.approx(np.mean([s["validation"]["loss"] for s in splits]), rel=1e-6)
    full = arms[arms["arm"] == "full"].iloc[0]
    assert 4000 < full["peak_memory_mb"] < 4400
    assert full["base_validation_loss"] > full["validation_loss"]
    assert arms[arms["arm"] == "base"]["peak_memory_mb"].isna().all()


def test_the_level_is_chosen_on_validation_and_an_edge_is_told(tmp_path):
    study = make_results(tmp_path, levels=3)
    found = compare(**inputs(study))
    assert {found["selected"][arm]["tuned"]["learning_rate"] for arm in ("full", "lora", "qlora")} == {"0.001"}
    assert not [f for f in found["findings"] if "tune.learning_rate" in f["place"]]
    found = compare(**inputs(make_results(tmp_path / "two", levels=2)))
    edge = [f for f in found["findings"] if f["place"] == "arm lora: tune.learning_rate"]
    assert "largest that was tried" in edge[0]["message"]
    assert "0.002" in edge[0]["mend"]


def test_comparison_names_the_content_of_all_that_figures_are_drawn_from(tmp_path):
    study = make_results(tmp_path)
    given = inputs(study) | {"histories": sorted(study.glob("history/*.csv"))}
    seen = [compare(**given)["inputs"]]
    for kind in ("metrics", "predictions", "training", "histories"):
        path = given[kind][-1]
        path.write_text(path.read_text("utf-8").replace("\n", " \n", 1), "utf-8")
        seen.append(compare(**given)["inputs"])
    assert len(set(seen)) == 5


def test_selection_does_not_read_the_test_split(tmp_path):
    study = make_results(tmp_path, levels=2)
    before = compare(**inputs(study))["selected"]
    for path in study.glob("runs/*/predictions.jsonl"):
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for row in rows:
            if row["split"] == "test":
                row["nll"] *= 0.5 if path.parent.name in before["lora"]["levels"][0]["runs"] else 1
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    assert compare(**inputs(study))["selected"] == before


def test_true_effects_get_their_verdicts(tmp_path):
    effects = {"full": 0.03, "lora": 0.12, "qlora": 0.045}  # QLoRA starts 0.015 lower
    study = make_results(tmp_path, seeds=5, examples=300, levels=0, effects=effects)
    _, differences = tables(study)
    verdicts = differences[differences["metric"] == "rougeL"].set_index("arm")["verdict"]
    assert verdicts["lora"] == "better"
    assert verdicts["base"] == verdicts["base (nf4)"] == "worse"
    assert verdicts["qlora"] in ("equivalent", "not distinguishable")
    losses = differences[differences["metric"] == "loss"].set_index("arm")
    assert losses.loc["base", "verdict"] == "worse"
    assert losses.loc["base", "difference"] > 0


def test_one_seed_is_compared_and_told(tmp_path):
    study = make_results(tmp_path, seeds=1, levels=0)
    found = compare(**inputs(study))
    assert any("can't claim" in finding["message"] for finding in found["findings"])
    _, differences = tables(study)
    assert differences["p"].notna().all()


def test_an_arm_that_did_not_learn_is_told(tmp_path):
    study = make_results(tmp_path, levels=0)
    base = json.loads((study / "plan.json").read_text("utf-8"))["arms"][0]["base"]
    edit(study / f"metrics/{base}.json", lambda m: m["splits"]["validation"].update(loss=1.0))
    messages = [f["message"] for f in compare(**inputs(study))["findings"] if f["place"] == "arm lora"]
    assert any("not below its base model's 1.000" in message for message in messages)


def test_a_diverged_level_is_never_chosen(tmp_path):
    study = make_results(tmp_path, levels=2)
    chosen = compare(**inputs(study))["selected"]["lora"]["runs"][0]
    edit(study / f"metrics/{chosen}.json", lambda m: m["splits"]["validation"].update(loss=None))
    found = compare(**inputs(study))
    assert chosen not in found["selected"]["lora"]["runs"]
    assert any(chosen in f["message"] and "diverged" in f["message"] for f in found["findings"])


def test_a_study_goes_on_where_one_arm_diverged_wholly(tmp_path):
    study = make_results(tmp_path, levels=0)
    for run in json.loads((study / "plan.json").read_text("utf-8"))["runs"]:
        if run["arm"] == "lora":
            path = study / "runs" / run["run"] / "predictions.jsonl"
            rows = [json.loads(line) | {"nll": float("nan")} for line in path.read_text("utf-8").splitlines()]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    found = compare(**inputs(study))
    assert {f["severity"] for f in found["findings"] if f["place"] == "arm lora"} == {"error"}
    arms, differences = tables(study)
    assert arms.set_index("arm")["loss"].isna().to_dict()["lora"]
    loss = differences[differences["metric"] == "loss"].set_index("arm")
    assert loss.loc["lora", "verdict"] == "not distinguishable"
    assert np.isfinite(loss.loc["qlora", "p_adjusted"])


def test_arms_with_other_seeds_are_refused(tmp_path):
    study = make_results(tmp_path, levels=0, seeds=3)

    def drop(plan):
        plan["runs"] = [run for run in plan["runs"] if not (run["arm"] == "lora" and run["seed"] == 2)]

    edit(study / "plan.json", drop)
    with pytest.raises(UserError, match=r"arm lora has seeds \[0, 1\]; expected \[0, 1, 2\]"):
        compare(**inputs(study))


def test_the_stage_writes_the_same_bytes_each_time(tmp_path):
    study = make_results(tmp_path)
    names = ("arms.tsv", "comparisons.tsv", "comparison.json")
    first = [(study / "comparison" / name).read_bytes() for name in names]
    arguments = inputs(study)
    arguments["metrics"].reverse()
    compare(**arguments)
    assert [(study / "comparison" / name).read_bytes() for name in names] == first


def test_a_metric_without_generated_answers_is_refused(tmp_path):
    study = make_results(tmp_path, levels=0)
    for path in study.glob("runs/*/predictions.jsonl"):
        rows = [
            json.loads(line) | {"scores": None, "prediction": None} for line in path.read_text("utf-8").splitlines()
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    with pytest.raises(UserError, match=r"no run has rougeL on test"):
        compare(**inputs(study))
    edit(study / "plan.json", lambda plan: plan["compare"].update(metric="loss", margin=0.02))
    compare(**inputs(study))
    arms, differences = tables(study)
    assert arms["rougeL"].isna().all()
    assert set(differences["metric"]) == {"loss"}


def test_losses_over_other_tokens_are_not_compared_but_answers_are(tmp_path):
    study = make_results(tmp_path, levels=0)
    plan = json.loads((study / "plan.json").read_text())
    for run in (run["run"] for run in plan["runs"] if run["arm"] == "lora"):
        edit(study / "metrics" / f"{run}.json", lambda content: content["data"].update(tokens="ffff"))
    found = compare(**inputs(study))
    compared = pd.read_csv(study / "comparison/comparisons.tsv", sep="\t")
    assert set(compared["metric"]) == {"rougeL"}
    assert any("losses are not compared" in finding["message"] for finding in found["findings"])
    edit(study / "plan.json", lambda content: content["compare"].update(metric="loss"))
    with pytest.raises(UserError, match="loss can't be compared between runs with other length limits"):
        compare(**inputs(study))


def test_levels_with_other_tokens_can_not_be_tuned_by_their_losses(tmp_path):
    study = make_results(tmp_path, levels=2)
    plan = json.loads((study / "plan.json").read_text())
    run = next(run["run"] for run in plan["runs"] if run["arm"] == "lora")
    edit(study / "metrics" / f"{run}.json", lambda content: content["data"].update(tokens="ffff"))
    with pytest.raises(UserError, match="arm lora: its tuned levels have other length limits"):
        compare(**inputs(study))
