"""Every number has one macro, named by letters alone, with the value of the file it comes from."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from finegrid.errors import UserError
from finegrid.publication.numbers import macro_name, write_numbers
from study_results import make_results


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    return make_results(tmp_path_factory.mktemp("numbers"))


def macros(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("%")]
    found = [re.fullmatch(r"\\newcommand\{\\(.+?)\}\{(.*)\}", line) for line in lines]
    assert all(found)
    return {match[1]: match[2] for match in found}


def plain_number(latex: str) -> float:
    return float(latex.removeprefix(r"\ensuremath{").removesuffix("}").replace(r"\,", ""))


def test_macros_carry_the_numbers_of_the_comparison(study: Path, tmp_path: Path):
    write_numbers(study, tmp_path / "numbers.tex")

    found = macros(tmp_path / "numbers.tex")
    arms = pd.read_csv(study / "comparison/arms.tsv", sep="\t").set_index("arm")
    for arm, name in (("full", "Full"), ("lora", "Lora"), ("base (nf4)", "BaseNfFour")):
        for column, quantity in (("rougeL", "RougeL"), ("rougeL_low", "RougeLLow"), ("loss_high", "LossHigh")):
            assert plain_number(found[f"synthetic{name}{quantity}"]) == round(arms.loc[arm, column], 3)
    assert plain_number(found["syntheticLoraTrainableParameters"]) == 2_442_240
    assert plain_number(found["syntheticLoraTrainSeconds"]) == round(arms.loc["lora", "train_seconds"])
    differences = pd.read_csv(study / "comparison/comparisons.tsv", sep="\t").query("metric == 'rougeL'")
    for row in differences.query("arm == 'qlora'").to_dict("records"):
        assert plain_number(found["syntheticQloraDifference"]) == round(row["difference"], 3)
        assert plain_number(found["syntheticQloraDifferenceLow"]) == round(row["low"], 3)
        assert found["syntheticQloraDifferenceVerdict"] == row["verdict"]
    assert found["syntheticSeeds"] == "2"
    assert found["syntheticExamples"] == "48"
    assert found["syntheticLoraSteps"] == "40"
    assert found["syntheticLoraBestLearningRate"] == "0.001"


def test_names_are_letters_and_unique(study: Path, tmp_path: Path):
    write_numbers(study, tmp_path / "numbers.tex")

    text = (tmp_path / "numbers.tex").read_text(encoding="utf-8")
    names = re.findall(r"\\newcommand\{\\(.+?)\}", text)
    assert all(re.fullmatch("[A-Za-z]+", name) for name in names)
    assert len(set(names)) == len(names)


def test_what_was_not_measured_has_no_macro(study: Path, tmp_path: Path):
    write_numbers(study, tmp_path / "numbers.tex")

    found = macros(tmp_path / "numbers.tex")
    assert "syntheticBasePeakMemoryGib" not in found
    assert "syntheticFullDifference" not in found  # the baseline
    assert not any("nan" in value.lower() for value in found.values())


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("lora-r16", "LoraROneSix"),
        ("base (nf4)", "BaseNfFour"),
        ("lr_1e-4", "LrOneEMinusFour"),
        ("lr_1e4", "LrOneEFour"),
        ("dropout=0.1", "DropoutZeroPointOne"),
        ("rougeL_low", "RougeLLow"),
        ("Übung", "Ubung"),
    ],
)
def test_names_are_readable(text: str, name: str):
    assert macro_name(text) == name


def test_near_levels_keep_different_names():
    levels = ["1e-4", "1e4", "1.5", "15", "-1", "1", "0.01", "0.1", "低", "高"]

    assert len({macro_name(level) for level in levels}) == len(levels)


def test_equal_names_are_an_error_that_names_both_arms(tmp_path: Path):
    study = make_results(tmp_path)
    for path in (study / "plan.json", study / "comparison/comparison.json"):
        path.write_text(path.read_text().replace('"qlora"', '"l o_ra"').replace('"lora"', '"l-o ra"'))
    for path in study.glob("comparison/*.tsv"):
        path.write_text(path.read_text().replace("qlora\t", "l o_ra\t").replace("lora\t", "l-o ra\t"))
    assert json.loads((study / "plan.json").read_text())["arms"][3]["arm"] == "l-o ra"

    with pytest.raises(UserError, match=r"LORa.* of arm 'l o_ra' and of arm 'l-o ra'"):
        write_numbers(study, tmp_path / "numbers.tex")
    assert not (tmp_path / "numbers.tex").exists()
