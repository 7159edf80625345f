"""Figures: their tables hold what they show, every text can be read, the same numbers give the same bytes."""

from __future__ import annotations

import importlib
import itertools
import json
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from calls import counted_calls
from finegrid.analysis.scores import load_plan
from finegrid.errors import UserError
from finegrid.figures import FIGURES as ALL
from finegrid.figures import (
    cost,
    design,
    effects,
    fitting,
    heatmap,
    lengths,
    loss_curves,
    memory,
    quality,
    response,
    schedule,
    seeds,
    style,
)
from matplotlib.text import Text
from PIL import Image
from study_results import make_results

# Of every study; `many` has more of them.
FIGURES = ("loss_curves", "schedule", "quality", "cost", "lengths", "seeds", "memory")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return make_results(tmp_path_factory.mktemp("few"))


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return make_results(tmp_path_factory.mktemp("many"), arms=40, levels=0, examples=12)


@pytest.fixture(scope="module")
def one_at_a_time(tmp_path_factory):
    factors = {"text": ["mended", "as it came"], "rank": ["8", "2", "32", "128"], "schedule": ["cosine", "linear"]}
    folder = tmp_path_factory.mktemp("alone")
    return make_results(folder, factors=factors, one_at_a_time=True, seeds=3, levels=0, examples=60)


@pytest.fixture(scope="module")
def crossed(tmp_path_factory):
    factors = {"rank": ["4", "16", "8"], "target": ["all", "attention"]}
    return make_results(tmp_path_factory.mktemp("crossed"), factors=factors, levels=0, examples=24)


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    """1,008 runs: 84 arms, 4 learning rates, 3 seeds."""
    factors = {"rank": ["2", "4", "8", "16", "32", "64", "128"], "target": ["all", "attention", "query and value"]}
    factors["schedule"] = ["cosine", "linear", "constant", "polynomial"]
    return make_results(tmp_path_factory.mktemp("thousand"), factors=factors, seeds=3, levels=4, examples=3)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def plan_of(study):
    return json.loads((study / "plan.json").read_text("utf-8"))


def title(figure):
    return figure.get_suptitle().replace("\n", " ")


def module(name):
    return importlib.import_module(f"finegrid.figures.{name}")


def edit(path, change):
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), "utf-8")


def texts(figure):
    """Every text that is drawn, with its box in pixels. Ticks outside the limits exist but are not drawn."""
    figure.canvas.draw()
    hidden = set()
    for axes in figure.findobj(lambda artist: hasattr(artist, "_update_ticks")):
        drawn = {id(label) for tick in axes._update_ticks() for label in (tick.label1, tick.label2)}
        hidden |= {id(label) for tick in axes.get_major_ticks() for label in (tick.label1, tick.label2)} - drawn
        hidden |= {id(label) for tick in axes.get_minor_ticks() for label in (tick.label1, tick.label2)} - drawn
    found = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip() and id(t) not in hidden]
    return [(text.get_text(), text.get_window_extent()) for text in found]


def assert_readable(figure):
    boxes = texts(figure)
    assert boxes
    outside = [t for t, b in boxes if b.x0 < -1 or b.y0 < -1 or b.x1 > figure.bbox.x1 + 1 or b.y1 > figure.bbox.y1 + 1]
    assert not outside
    overlapping = [
        (a, b)
        for (a, one), (b, other) in itertools.combinations(boxes, 2)
        if min(one.x1, other.x1) - max(one.x0, other.x0) > 1 and min(one.y1, other.y1) - max(one.y0, other.y0) > 1.5
    ]
    assert not overlapping


@pytest.mark.parametrize("name", FIGURES)
def test_every_text_can_be_read(study, name):
    figure, _ = module(name).plot(study)
    assert_readable(figure)
    assert figure.get_figwidth() in (style.SINGLE, style.DOUBLE)
    assert figure.get_suptitle()


@pytest.mark.parametrize("name", FIGURES)
def test_forty_arms_stay_readable(many, name):
    figure, table = module(name).plot(many)
    assert_readable(figure)
    assert figure.get_figheight() < 10.5  # a page
    if name != "lengths":
        trained = {run.arm for run in load_plan(many / "plan.json").runs if run.train}
        assert trained <= set(table["arm"])


def test_a_study_has_the_figures_that_fit_its_factors(study, one_at_a_time, crossed):
    always = {"quality", "loss_curves", "cost", "schedule", "memory", "lengths", "grid"}
    assert set(fitting(plan_of(study))) == always | {"response", "seeds"}  # one factor, a tuned learning rate
    assert set(fitting(plan_of(one_at_a_time))) == always | {"effects", "response", "seeds"}  # rank is a number
    assert set(fitting(plan_of(crossed))) == always | {"effects", "heatmap", "response", "seeds"}
    plain = plan_of(study) | {"tune": {}, "seeds": [0]}
    assert set(fitting(plain)) == always
    assert list(fitting(plan_of(crossed))) == [name for name in ALL if name in fitting(plan_of(crossed))]


@pytest.mark.parametrize("kind", ["one_at_a_time", "crossed"])
def test_figures_of_factors_can_be_read(request, kind):
    study = request.getfixturevalue(kind)
    for name in {"effects", "heatmap", "response"} & set(fitting(plan_of(study))):
        assert_readable(module(name).plot(study)[0])


def test_a_thousand_runs_stay_readable_and_are_drawn_without_much_work(thousand):
    assert len(plan_of(thousand)["runs"]) == 1010
    for name in fitting(plan_of(thousand)):
        with counted_calls() as calls:
            figure, table = module(name).plot(thousand)
        assert_readable(figure)
        assert figure.get_figheight() < 10.5
        assert len(table)
        assert calls[0] < 5_000_000, name  # at most 2.2 million where this was written


@pytest.mark.parametrize("name", FIGURES)
def test_long_names_stay_readable(tmp_path, name):
    study = make_results(tmp_path, levels=0, examples=12)
    long = "LoRA on all linear layers with rank-stabilised scaling and warm-up"

    def rename(plan):
        for index, arm in enumerate(plan["arms"]):
            arm["label"] = f"{long}, variant number {index}"

    edit(study / "plan.json", rename)
    assert_readable(module(name).plot(study)[0])


@pytest.mark.parametrize("name", FIGURES)
def test_the_same_numbers_give_the_same_bytes_with_fonts_embedded(study, tmp_path, name):
    for folder in ("first", "second"):
        module(name).draw(study, tmp_path / folder / name)
    for suffix in ("pdf", "png", "csv"):
        first, second = ((tmp_path / folder / f"{name}.{suffix}").read_bytes() for folder in ("first", "second"))
        assert first == second
        assert len(first) > 200
    assert sorted(p.name for p in (tmp_path / "first").iterdir()) == [f"{name}.{s}" for s in ("csv", "pdf", "png")]
    pdf = (tmp_path / "first" / f"{name}.pdf").read_bytes()
    assert b"/FontFile2" in pdf
    assert b"/Type3" not in pdf
    assert b"CreationDate" not in pdf
    with Image.open(tmp_path / "first" / f"{name}.png") as image:
        assert min(image.info["dpi"]) >= 200
        assert image.width >= 3 * 200


def test_an_arm_has_one_colour_in_all_figures_whatever_the_results(study, many):
    colours = style.arm_colours(load_plan(study / "plan.json"))
    assert len(set(colours.values())) == len(colours) == 5
    drawn = {}
    for name in ("loss_curves", "schedule", "cost", "response"):
        figure, _ = module(name).plot(study)
        handles = figure.legends[0].legend_handles
        drawn[name] = {handle.get_label(): handle.get_color() for handle in handles}
    for label, arm in (("Full", "full"), ("LoRA", "lora"), ("QLoRA (nf4)", "qlora")):
        assert {colours[arm]} == {found[label] for found in drawn.values()}
    assert len(set(style.arm_colours(load_plan(many / "plan.json")).values())) == 42


def test_loss_curves_show_every_logged_loss_and_the_bases_level(study):
    figure, table = loss_curves.plot(study)
    selected = json.loads((study / "comparison/comparison.json").read_text("utf-8"))["selected"]
    for arm in ("full", "lora", "qlora"):
        for run in selected[arm]["runs"]:
            history = pd.read_csv(study / "history" / f"{run}.csv")
            shown = table[table["run"] == run]
            assert shown[shown["split"] == "training"]["loss"].tolist() == history["loss"].dropna().tolist()
            assert shown[shown["split"] == "validation"]["loss"].tolist() == history["eval_loss"].dropna().tolist()
    low, high = figure.axes[0].get_ylim()
    assert low < table["loss"].min()
    assert high > table["loss"].max()
    arms = pd.read_csv(study / "comparison/arms.tsv", sep="\t", index_col="arm")
    levels = {line.get_ydata()[0] for line in figure.axes[1].lines if line.get_linestyle() == "--"}
    assert levels == {arms.loc["base", "validation_loss"], arms.loc["base (nf4)", "validation_loss"]}
    assert "falls below the base model's in every arm" in figure.get_suptitle().replace("\n", " ")


def test_loss_curves_mark_where_a_run_diverged(tmp_path):
    study = make_results(tmp_path, levels=0, examples=12, diverged="lora")
    figure, table = loss_curves.plot(study)
    crosses = [line for line in figure.axes[0].lines if line.get_marker() == "x"]
    assert [line.get_xdata()[0] for line in crosses] == [10]
    assert "diverged" in [text.get_text() for text in figure.legends[0].get_texts()]
    assert table["loss"].isna().sum() == 1
    assert "does not fall below the base model's with LoRA" in figure.get_suptitle().replace("\n", " ")


def test_learning_rates_of_different_size_get_panels_that_show_each(tmp_path):
    study = make_results(tmp_path, levels=0, examples=12)
    for run in load_plan(study / "plan.json").runs_of("full"):
        path = study / "history" / f"{run.run}.csv"
        history = pd.read_csv(path)
        history["learning_rate"] /= 20
        history.to_csv(path, index=False)
    figure, table = schedule.plot(study)
    assert_readable(figure)
    assert len(figure.axes) == 2
    assert [axes.get_ylim()[1] for axes in figure.axes] == pytest.approx([1.08e-3, 5.4e-5])
    assert table[table["arm"] == "full"]["learning_rate"].max() == pytest.approx(5e-5)
    assert "5e-05 to 0.001, by arm" in figure.get_suptitle().replace("\n", " ")


def test_quality_shows_estimates_seeds_and_verdicts(study):
    figure, table = quality.plot(study)
    arms = pd.read_csv(study / "comparison/arms.tsv", sep="\t", index_col="arm")
    differences = pd.read_csv(study / "comparison/comparisons.tsv", sep="\t")
    differences = differences[differences["metric"] == "rougeL"].set_index("arm")
    for arm, rows in table.groupby("arm"):
        whole, seeds = rows[rows["seed"].isna()].iloc[0], rows[rows["seed"].notna()]
        assert (
            whole[["mean", "low", "high"]].tolist() == arms.loc[arm, ["rougeL", "rougeL_low", "rougeL_high"]].tolist()
        )
        assert len(seeds) == arms.loc[arm, "seeds"]
        if len(seeds):
            assert seeds["mean"].mean() == pytest.approx(whole["mean"], rel=1e-6)
        if arm != "full":
            assert whole["difference"] == differences.loc[arm, "difference"]
            assert whole["verdict"] == differences.loc[arm, "verdict"]
    left, right = figure.axes[:2]
    assert left.get_xlim()[0] < table["low"].min()
    assert left.get_xlim()[1] > table["high"].max()
    assert right.get_xlim()[0] < min(table["difference_low"].min(), -0.01)
    words = [text for text, _ in texts(figure)]
    assert "(baseline)" in words
    for arm in ("base", "lora"):
        assert any(word.startswith(differences.loc[arm, "verdict"]) for word in words)


def test_the_p_of_several_verdicts_is_told_to_be_adjusted(tmp_path, one_at_a_time):
    alone = make_results(tmp_path, arms=2, levels=0, examples=12)
    path = alone / "comparison/comparisons.tsv"
    pd.read_csv(path, sep="\t").query("arm == 'lora'").to_csv(path, sep="\t", index=False)
    for name, study, told in (("quality", one_at_a_time, 1), ("effects", one_at_a_time, 1), ("quality", alone, 0)):
        legend = [text.get_text() for text in module(name).plot(study)[0].legends[0].get_texts()]
        assert legend.count("p adjusted (Holm)") == told


def test_more_arms_than_a_page_holds_are_cut_to_the_best_and_told(tmp_path):
    study = make_results(tmp_path, arms=60, levels=0, seeds=1, examples=4)
    figure, table = quality.plot(study)
    assert table["arm"].nunique() == quality.ROWS
    assert {"full", "base", "base (nf4)"} <= set(table["arm"])
    assert any(text.startswith("42 of 62 arms") for text, _ in texts(figure))
    assert_readable(figure)


def test_cost_starts_at_nothing_and_draws_each_arm_at_its_cost(study):
    figure, table = cost.plot(study)
    summary = json.loads(next((study / "training").glob("full-*.json")).read_text("utf-8"))
    full = table.set_index("arm").loc["full"]
    assert full["peak_memory_gib"] == pytest.approx(summary["peak_memory_mb"] / 1024, rel=0.05)
    parameters, memory, minutes = figure.axes
    assert parameters.get_xscale() == "log"  # full fine-tuning trains 55 times as many
    assert memory.get_xlim()[0] == minutes.get_xlim()[0] == 0
    assert memory.get_xlim()[1] > table["peak_memory_gib"].max()
    assert table.set_index("arm").loc["base", ["peak_memory_gib", "train_minutes"]].isna().all()


def test_the_pareto_front_has_the_arms_that_no_other_beats_at_no_more_cost(tmp_path):
    # By memory: QLoRA needs least, LoRA is better and needs more, full fine-tuning needs most and is no better.
    study = make_results(tmp_path, levels=0, examples=24, effects={"full": 0.02, "lora": 0.08, "qlora": 0.0})
    table = cost.plot(study)[1].set_index("arm")
    for column in ("peak_memory_gib", "train_minutes", "trainable_millions"):
        known = table[table[column].notna()]
        front = {
            arm
            for arm, own in known.iterrows()
            if not any(
                (other["mean"] >= own["mean"]) & (other[column] <= own[column])
                and ((other["mean"] > own["mean"]) | (other[column] < own[column]))
                for _, other in known.iterrows()
            )
        }
        assert set(table.index[table[f"front_{column}"]]) == front
    assert set(table.index[table["front_peak_memory_gib"]]) == {"lora", "qlora"}
    pairs = pd.DataFrame([{"metric": "rougeL", "arm": "qlora", "other": "lora", "verdict": "not distinguishable"}])
    pairs.to_csv(study / "comparison/pairs.tsv", sep="\t", index=False)
    assert title(cost.plot(study)[0]).endswith("QLoRA (nf4) needs less memory and is not shown to be worse")
    pairs.assign(verdict="worse").to_csv(study / "comparison/pairs.tsv", sep="\t", index=False)
    assert title(cost.plot(study)[0]).endswith("QLoRA (nf4) needs less memory")


def test_one_at_a_time_effects_are_the_comparisons_with_the_baseline(one_at_a_time):
    figure, table = effects.plot(one_at_a_time)
    compared = pd.read_csv(one_at_a_time / "comparison/comparisons.tsv", sep="\t")
    compared = compared[compared["metric"] == "rougeL"].set_index("arm")
    assert len(table) == 5
    for row in table.to_dict("records"):
        assert row["difference"] == compared.loc[row["arm"], "difference"]
        assert row["verdict"] == compared.loc[row["arm"], "verdict"]
    words = [text for text, _ in texts(figure)]
    assert words.index("text, from mended") < words.index("to as it came")  # the largest effect comes first
    assert "rank, from 8" in words


def test_effects_of_a_grid_are_means_over_pairs_that_differ_in_one_factor(crossed):
    figure, table = effects.plot(crossed)
    arms = pd.read_csv(crossed / "comparison/arms.tsv", sep="\t", dtype={"rank": str}).set_index(["rank", "target"])[
        "rougeL"
    ]
    wide = table[(table["factor"] == "rank") & (table["level"] == "16")]
    expected = [arms["16", target] - arms["4", target] for target in ("all", "attention")]
    assert sorted(wide["difference"]) == pytest.approx(sorted(expected))
    narrow = table[table["factor"] == "target"]
    assert len(narrow) == 3
    drawn = [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_marker() == "D"]
    assert float(np.mean(expected)) in [pytest.approx(value) for value in drawn]


def test_contrasts_leave_out_arms_that_differ_in_two_factors():
    arms = {"a": {"x": "1", "y": "p"}, "b": {"x": "2", "y": "p"}, "c": {"x": "2", "y": "q"}, "d": {"x": "3"}}
    assert design.contrasts(arms, "a") == {"x": {"2": [("b", "a")]}, "y": {"q": [("c", "b")]}}


def test_heat_map_has_a_cell_for_each_arm_numbers_in_order(crossed):
    figure, table = heatmap.plot(crossed)
    panel = figure.axes[0]
    assert [label.get_text() for label in panel.get_xticklabels()] == ["4", "8", "16"]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["all", "attention"]
    shown = panel.images[0].get_array()
    means = table.set_index(["target", "rank"])["mean"]
    for down, target in enumerate(["all", "attention"]):
        for across, rank in enumerate(["4", "8", "16"]):
            assert shown[down, across] == means[target, rank]
    best = table.loc[table["mean"].idxmax()]
    assert title(figure).startswith(f"Highest mean ROUGE-L: {best['target']}, rank {best['rank']}")


def test_a_cell_of_a_heat_map_says_its_verdict(tmp_path):
    study = make_results(tmp_path, factors={"rank": ["4", "8"], "target": ["all", "some"]}, levels=0, examples=12)
    path = study / "comparison/comparisons.tsv"
    table = pd.read_csv(path, sep="\t")
    table.loc[(table["arm"] == "8-some") & (table["metric"] == "rougeL"), "verdict"] = "better"
    table.to_csv(path, sep="\t", index=False)
    figure, _ = heatmap.plot(study)
    signs = [text for text, _ in texts(figure) if "▲" in text]
    assert len(signs) == 1
    assert title(figure).endswith("better than the baseline")


def test_response_shows_what_levels_were_chosen_by_and_flags_the_edge(tmp_path):
    study = make_results(tmp_path, levels=3, examples=24)
    figure, table = response.plot(study)
    selected = json.loads((study / "comparison/comparison.json").read_text("utf-8"))["selected"]
    means = table[table["seed"].isna()]
    for arm in ("full", "lora", "qlora"):
        rows = means[means["arm"] == arm].set_index("level")
        tried = {level["tuned"]["learning_rate"]: level["validation"] for level in selected[arm]["levels"]}
        assert rows["value"].to_dict() == pytest.approx(tried)
        assert rows.index[rows["best"]].tolist() == [selected[arm]["tuned"]["learning_rate"]]
    assert not means["edge"].any()  # the best of three is the second
    assert title(figure).endswith("inside the range that was tried")
    two = make_results(tmp_path / "edge", levels=2, examples=24)
    figure, table = response.plot(two)
    assert table.loc[table["best"] & table["seed"].isna(), "edge"].all()
    assert "a better one may lie beyond" in title(figure)
    assert "on the edge of its range" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_response_of_arms_far_apart_is_drawn_from_their_best(tmp_path):
    study = make_results(tmp_path, levels=3, examples=24)  # nf4 costs the base a fifth of a nat, a level a fiftieth
    figure, table = response.plot(study)
    assert "minus that of" in figure.axes[0].get_ylabel().replace("\n", " ")
    assert table.loc[table["best"] & table["seed"].isna(), "above_best"].tolist() == [0, 0, 0]
    assert figure.axes[0].get_ylim()[1] < 0.2


def test_a_level_that_diverged_has_a_cross_and_is_not_the_best(tmp_path):
    study = make_results(tmp_path, levels=3, examples=12)

    def diverge(comparison):
        # Of another level than the one chosen.
        selected = comparison["selected"]["lora"]
        level = next(level for level in selected["levels"] if level["tuned"] != selected["tuned"])
        level.update(validation=None, diverged=level["runs"][:1])

    edit(study / "comparison/comparison.json", diverge)
    figure, table = response.plot(study)
    rows = table[(table["arm"] == "lora") & table["seed"].isna()].set_index("level")
    assert rows["value"].isna().sum() == 1
    assert rows.loc[rows["value"].isna(), "best"].tolist() == [False]
    assert "diverged" in [text.get_text() for text in figure.legends[0].get_texts()]
    assert_readable(figure)


def test_seed_spread_is_the_pooled_standard_deviation(study):
    figure, table = seeds.plot(study)
    pooled = np.sqrt(table.groupby("arm")["value"].var(ddof=1).mean())
    assert f"±{pooled:.2g}" in " ".join(text.get_text().replace("\n", " ") for text in figure.legends[0].get_texts())
    assert table.groupby("arm")["deviation"].sum().abs().max() < 1e-12


def test_memory_holds_the_plan_against_what_training_took(study):
    figure, table = memory.plot(study)
    runs = {run["run"]: run for run in plan_of(study)["runs"]}
    for row in table.to_dict("records"):
        summary = json.loads((study / "training" / f"{row['run']}.json").read_text("utf-8"))
        assert row["measured_gib"] == pytest.approx(summary["peak_memory_mb"] / 1024)
        assert row["predicted_gib"] == pytest.approx(runs[row["run"]]["memory"]["total"] / 2**30)
    took = f"{table['ratio'].min():.0%} to {table['ratio'].max():.0%}".replace("%", " %")
    assert title(figure) == f"12 runs took {took} of the memory that was predicted"
    assert 1.04 < table["ratio"].min() < table["ratio"].max() < 1.09


def test_memory_of_a_gpu_is_held_against_what_torch_allocates(tmp_path):
    study = make_results(tmp_path, levels=0, examples=8)
    for path in (study / "training").glob("*.json"):
        edit(path, lambda summary: summary.update(device="cuda:0"))
    table = memory.plot(study)[1].set_index("run")
    for run in plan_of(study)["runs"]:
        if run["train"]:
            wanted = (run["memory"]["total"] - run["memory"]["runtime"]) / 2**30
            assert table.loc[run["run"], "predicted_gib"] == pytest.approx(wanted)


def test_memory_says_where_nothing_was_predicted(tmp_path):
    study = make_results(tmp_path, levels=0, examples=8)
    edit(study / "plan.json", lambda plan: [run.update(memory=None) for run in plan["runs"]])
    figure, _ = memory.plot(study)
    assert title(figure) == "Peak memory by run: none was predicted"
    assert_readable(figure)


def test_lengths_state_the_share_cut_and_draw_the_limits(study):
    figure, table = lengths.plot(study)
    report = json.loads(next((study / "data").glob("*.json")).read_text("utf-8"))
    for side in ("prompt", "answer"):
        for split, content in report["splits"].items():
            rows = table[(table["side"] == side) & (table["split"] == split)]
            assert rows["rows"].sum() == sum(content[f"{side}_lengths"]["counts"])
            assert (rows["share_per_token"] * (rows["high"] - rows["low"])).sum() == pytest.approx(1)
    limits = [[line.get_xdata()[0] for line in axes.lines] for axes in figure.axes]
    assert limits == [[64], [96]]
    assert figure.axes[1].get_title() == "Answers: 5.0 % cut at 96 tokens"
    assert figure.axes[0].get_title() == "Prompts: none cut at 64 tokens"


def test_a_long_tail_of_lengths_is_shown_whole(tmp_path):
    study = make_results(tmp_path, levels=0, examples=12)

    def stretch(report):
        for content in report["splits"].values():
            lengths = content["answer_lengths"]
            lengths["counts"], lengths["edges"] = [300, 90, 9, 0, 1], [1, 60, 200, 900, 3000, 5000]
            lengths["quantiles"] = {"50": 50, "90": 150, "99": 800, "max": 5000}

    edit(next((study / "data").glob("*.json")), stretch)
    figure, _ = lengths.plot(study)
    assert figure.axes[1].get_xscale() == "log"
    assert figure.axes[1].get_xlim()[1] >= 5000
    assert_readable(figure)


def test_several_data_sets_get_a_row_each(tmp_path):
    study = make_results(tmp_path, levels=0, examples=12)
    report = next((study / "data").glob("*.json"))
    for index in range(2):
        (report.parent / f"other-data-set-with-a-long-name-{index}aaaaaaa.json").write_bytes(report.read_bytes())
    figure, table = lengths.plot(study)
    assert len(figure.axes) == 6
    assert table["tokens"].nunique() == 3
    assert_readable(figure)


@pytest.mark.parametrize("name", [name for name in FIGURES if name != "seeds"])
def test_one_seed_and_one_arm_are_drawn(tmp_path, name):
    study = make_results(tmp_path, arms=1, seeds=1, levels=0, examples=8)
    figure, _ = module(name).plot(study)
    assert_readable(figure)
    if name == "quality":
        assert "mean, 95 % interval over examples alone (one seed)" in [label for label, _ in texts(figure)]


def test_chinese_labels_fall_back_and_say_so_where_no_font_has_them(tmp_path, monkeypatch):
    study = make_results(tmp_path, levels=0, examples=12, chinese=True)
    monkeypatch.setattr(style, "cjk_font", lambda: None)
    with pytest.warns(UserWarning, match=r"no font with Chinese characters is installed.*fonts-noto-cjk"):
        figure, _ = quality.plot(study)
    drawn = "".join(text for text, _ in texts(figure))
    assert not re.search("[一-鿿]", drawn)
    assert "lora" in drawn


@pytest.mark.skipif(style.cjk_font() is None, reason="no font with Chinese characters is installed")
@pytest.mark.filterwarnings("error:.*missing from font.*")
def test_chinese_labels_render(tmp_path):
    study = make_results(tmp_path, levels=0, examples=12, chinese=True)
    figure, _ = quality.plot(study)
    assert "全参数微调 0" in [text for text, _ in texts(figure)]
    assert_readable(figure)
    style.save(figure, pd.DataFrame(), tmp_path / "quality")
    assert b"/Type3" not in (tmp_path / "quality.pdf").read_bytes()


def test_figures_say_what_is_missing(tmp_path):
    study = make_results(tmp_path, levels=0, examples=8)
    (study / "comparison/arms.tsv").unlink()
    with pytest.raises(UserError, match=r"comparison/arms\.tsv: no such file"):
        loss_curves.plot(study)


def test_names_with_commas_are_quoted_in_lists():
    assert style.listed(["a", "b", "c"]) == "a, b and c"
    assert style.listed(["a, x"]) == "a, x"
    assert style.listed(["a, x", "b, x"]) == "“a, x” and “b, x”"
    assert style.signed(-0.0001) == "0.000"
    assert style.signed(-0.02) == "−0.020"


def test_wrapped_lines_have_like_lengths_and_chinese_counts_double():
    lines = style.wrapped("one two three four five six seven", 30).split("\n")
    assert len(lines) == 2
    assert np.ptp([len(line) for line in lines]) < 8
    assert style.wrapped("微调微调微调", 4) == "微调\n微调\n微调"
    assert style.wrapped("微调 needs less memory", 14) == "微调 needs\nless memory"
