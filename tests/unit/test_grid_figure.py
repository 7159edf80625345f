"""The figure of the grid: drawn from the plan alone, every arm with its levels, runs and cost, readable at any size."""

from __future__ import annotations

import itertools
import json

import matplotlib.pyplot as plt
import pytest
from finegrid.analysis.scores import load_plan
from finegrid.figures import grid, style
from PIL import Image
from study_results import make_results
from test_figures import assert_readable, texts

METHODS = {"full": "Full fine-tuning", "lora": "LoRA", "qlora": "QLoRA (nf4)"}
SECONDS = {"full": 5760.0, "lora": 3600.0, "qlora": 7200.0}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def arm(factors, labels=None):
    names = [METHODS.get(level, f"{name.replace('_', ' ')} {level}") for name, level in factors.items()]
    return {
        "arm": "-".join(factors.values()) or "recipe",
        "label": ", ".join(labels or names) or "LoRA",
        "factors": factors,
        "base": "base-1",
    }


def product(**factors):
    return [arm(dict(zip(factors, levels, strict=True))) for levels in itertools.product(*factors.values())]


def planned(of, tuned, seed, device):
    method = of["factors"].get("method", "lora")
    seconds = SECONDS[method]
    return {
        "run": f"{method}-{of['arm']}-{'-'.join(tuned.values())}-{seed}",
        "arm": of["arm"],
        "method": method,
        "tuned": tuned,
        "seed": seed,
        "base": "base-1",
        "train": True,
        "steps": 600,
        "label_tokens": 1_000_000,
        "device": device,
        "seconds": seconds,
        "gpu_hours": 0.0 if device == "cpu" else seconds / 3600,
    }


def write(folder, arms, rates=(None,), seeds=(0, 1, 2), device="rtx-4090", baseline=None, **changes):
    base = {"arm": "base", "label": "Base model", "factors": {}, "base": "base-1"}
    runs = [{"run": "base-1", "arm": "base", "method": "base", "tuned": {}, "seed": None, "train": False}]
    for one, rate, seed in itertools.product(arms, rates, seeds):
        runs.append(planned(one, {"learning_rate": rate} if rate else {}, seed, device) | changes)
    plan = {
        "study": folder.name,
        "title": "Which?",
        "compare": {"baseline": baseline or arms[0]["arm"], "metric": "rougeL"},
        "seeds": list(seeds),
        "arms": [base, *arms],
        "runs": runs,
        "findings": [],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    return folder


def words(figure):
    return [text for text, _ in texts(figure)]


def two():
    return product(method=["full", "lora"])


SIZES = {
    "two": two,
    "twelve": lambda: product(method=METHODS, rank=["4", "16", "64", "256"]),
    "sixty": lambda: product(
        method=METHODS, learning_rate=["1e-05", "3e-05", "0.0001", "0.0003", "0.001"], schedule=["cosine", "linear"],
        warmup_steps=["0.0", "0.1"],
    ),
    "250": lambda: product(
        method=["lora", "qlora"], rank=["4", "8", "16", "32", "64"],
        learning_rate=["1e-05", "2e-05", "4e-05", "8e-05", "0.0001"], weight_decay=["0", "0.01", "0.1", "0.2", "0.3"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("rates", [(None,), ("0.0001", "0.0002", "0.0004")], ids=["untuned", "tuned"])
@pytest.mark.parametrize("size", SIZES)
def test_every_text_can_be_read_on_one_page(tmp_path, size, rates):
    arms = SIZES[size]()
    figure, table = grid.plot(write(tmp_path / "study", arms, rates))
    assert_readable(figure)
    assert figure.get_figwidth() == style.DOUBLE
    assert figure.get_figheight() < 10.5  # a page
    assert list(table["arm"]) == [one["arm"] for one in arms]
    assert set(table["runs"]) == {3 * len(rates)}


def test_each_arm_stands_with_its_levels(tmp_path):
    study = write(tmp_path / "study", SIZES["twelve"](), baseline="lora-16")
    figure, table = grid.plot(study)
    written = words(figure)
    assert {"method", "rank", "runs", "GPU hours"} <= set(written)
    for name in METHODS.values():
        assert written.count(name) == 4
    for rank in ("4", "16", "64", "256"):
        assert written.count(rank) == 3
    assert list(table.loc[table["baseline"], "arm"]) == ["lora-16"]
    bold = {text.get_text() for text in figure.axes[0].texts if text.get_fontweight() == "bold"}
    assert bold == {"LoRA", "16"}
    stars = [line for line in figure.axes[0].lines if line.get_marker() == "*"]
    assert [line.get_color() for line in stars] == [style.arm_colours(load_plan(study / "plan.json"))["lora-16"]]


def test_runs_are_dots_in_groups_of_tuned_levels(tmp_path):
    figure, table = grid.plot(write(tmp_path / "study", two(), rates=("0.1", "0.2"), seeds=(0, 1, 2)))
    dots = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    for line in dots:
        places = line.get_xdata()
        assert len(places) == 6
        assert places[3] - places[2] > places[2] - places[1] == pytest.approx(places[4] - places[3])
    assert list(table["tuned_levels"]) == [2, 2]
    many, _ = grid.plot(write(tmp_path / "many", two(), rates=[str(rate) for rate in range(9)], seeds=range(7)))
    assert words(many).count("9 × 7") == 2


def test_bars_are_what_an_arm_costs_and_the_title_counts_each_run_once(tmp_path):
    arms = product(method=METHODS)
    figure, table = grid.plot(write(tmp_path / "study", arms))
    assert list(table["gpu_hours"]) == pytest.approx([4.8, 3.0, 6.0])
    assert table["cpu_hours"].isna().all()
    bars = [patch for patch in figure.axes[0].patches if patch.get_facecolor()[:3] in colours(tmp_path / "study")]
    assert [bar.get_width() / bars[2].get_width() for bar in bars] == pytest.approx([0.8, 0.5, 1.0])
    assert "about 14 GPU hours; QLoRA (nf4) costs most, 2 times LoRA" in " ".join(figure.get_suptitle().split())
    plan = json.loads((tmp_path / "study/plan.json").read_text("utf-8"))
    twin = [{**run, "arm": "qlora"} for run in plan["runs"] if run["arm"] == "lora"]
    plan["runs"] = [run for run in plan["runs"] if run["arm"] != "qlora"] + twin
    (tmp_path / "study/plan.json").write_text(json.dumps(plan), "utf-8")
    assert "6 runs, about 7.8 GPU hours" in " ".join(grid.plot(tmp_path / "study")[0].get_suptitle().split())


def colours(study):
    return [tuple(colour) for colour in style.arm_colours(load_plan(study / "plan.json")).values()]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"device": "cpu", "gpu_hours": 0.0}, "CPU hours"),
        ({"gpu_hours": None, "seconds": None}, "Label tokens"),
        ({"gpu_hours": None, "seconds": None, "label_tokens": None}, "Optimiser steps"),
    ],
)
def test_cost_is_told_in_what_is_known(tmp_path, changes, name):
    figure, _ = grid.plot(write(tmp_path / "study", two(), **changes))
    assert name in words(figure)


def test_a_plan_without_costs_is_drawn_without_bars(tmp_path):
    nothing = dict.fromkeys(("gpu_hours", "seconds", "label_tokens", "steps"))
    figure, table = grid.plot(write(tmp_path / "study", two(), **nothing))
    assert_readable(figure)
    assert "not known yet" in figure.get_suptitle()
    assert table["steps"].isna().all()


def test_factors_that_an_arm_does_not_set_are_as_in_the_recipe(tmp_path):
    arms = [arm({}), arm({"max_output_length": "256"}), arm({"train_fraction": "0.1"})]
    figure, table = grid.plot(write(tmp_path / "study", arms))
    assert_readable(figure)
    assert words(figure).count(grid.AS_IN_RECIPE) == 4
    assert f"{grid.AS_IN_RECIPE} as in the recipe" in words(figure)
    assert "factor.max_output_length" in table


def test_more_arms_than_a_page_holds_are_summed_up_by_level(tmp_path):
    figure, table = grid.plot(write(tmp_path / "study", SIZES["250"](), seeds=(0, 1)))
    written = words(figure)
    assert len(table) == 250
    assert any("250 arms are too many to list" in text.replace("\n", " ") for text in written)
    assert written.count("125") == 2  # arms of each method
    assert written.count("50") == 15  # and of each level of the three other factors
    many = product(method=["lora"], rank=[str(rank) for rank in range(90)])
    figure, _ = grid.plot(write(tmp_path / "many", many))
    assert_readable(figure)
    assert any("31 levels are not shown" in text.replace("\n", " ") for text in words(figure))


def test_long_names_are_cut_so_that_levels_stay_apart(tmp_path):
    long = "LoRA on all linear layers with rank-stabilised scaling and warm-up, variant"
    arms = []
    for number in range(4):
        factors = {"adapter_configuration": str(number), "gradient_accumulation_steps": "8", "deepspeed": "zero3"}
        arms.append(
            arm(factors, [long.replace(",", "") + f" {number}", "8", "ZeRO 3 with offloading to the host " * 2])
        )
    figure, _ = grid.plot(write(tmp_path / "study", arms))
    assert_readable(figure)
    shown = [text for text in words(figure) if text.startswith("LoRA on")]
    assert len(set(shown)) == 4


def test_chinese_is_drawn_where_a_font_has_it(tmp_path):
    study = make_results(tmp_path, chinese=True, levels=0, examples=12)
    figure, _ = grid.plot(study)
    assert_readable(figure)
    if style.cjk_font():
        assert "全参数微调 0" in words(figure)


def test_the_same_plan_gives_the_same_bytes(tmp_path):
    study = write(tmp_path / "study", product(method=METHODS))
    for folder in ("first", "second"):
        grid.draw(study, tmp_path / folder / "grid")
    for suffix in ("pdf", "png", "csv"):
        first, second = ((tmp_path / folder / f"grid.{suffix}").read_bytes() for folder in ("first", "second"))
        assert first == second
    with Image.open(tmp_path / "first" / "grid.png") as image:
        assert image.width == pytest.approx(style.DOUBLE * style.DPI, abs=2)
