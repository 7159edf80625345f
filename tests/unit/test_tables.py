"""The LaTeX tables compile whatever the arms are called, and say what the comparison says."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from finegrid.errors import UserError
from finegrid.publication.results import batch_product, load_results, setting_table
from finegrid.publication.tables import escape, write_tables
from study_results import make_results

AWKWARD = {"full": "[a] 100 % & more_less", "lora": "lr_1e-4 {r=8} $x^2$ ~ #1", "qlora": r"a\b <nf4> | c"}


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    return make_results(tmp_path_factory.mktemp("tables"))


def relabel(study: Path, labels: dict[str, str]) -> None:
    """Give arms other labels, in the plan and in the comparison."""
    plan = json.loads((study / "plan.json").read_text())
    for arm in plan["arms"]:
        arm["label"] = labels.get(arm["arm"], arm["label"])
    (study / "plan.json").write_text(json.dumps(plan))
    arms = pd.read_csv(study / "comparison/arms.tsv", sep="\t", dtype=str, keep_default_na=False)
    arms["label"] = [labels.get(arm, label) for arm, label in zip(arms["arm"], arms["label"], strict=True)]
    arms.to_csv(study / "comparison/arms.tsv", sep="\t", index=False)


def set_verdicts(study: Path, metric: str, verdicts: dict[str, str]) -> None:
    path = study / "comparison/comparisons.tsv"
    table = pd.read_csv(path, sep="\t")
    for arm, verdict in verdicts.items():
        table.loc[(table["arm"] == arm) & (table["metric"] == metric), "verdict"] = verdict
    table.to_csv(path, sep="\t", index=False)


def set_arms(study: Path, values: dict[str, dict[str, float]]) -> None:
    path = study / "comparison/arms.tsv"
    table = pd.read_csv(path, sep="\t").set_index("arm", drop=False)
    for arm, row in values.items():
        for column, value in row.items():
            table.loc[arm, column] = value
    table.to_csv(path, sep="\t", index=False)


def test_every_arm_metric_verdict_and_cost_is_in_the_tables(study: Path, tmp_path: Path):
    write_tables(study, tmp_path)

    latex, markdown = (tmp_path / "arms.tex").read_text(), (tmp_path / "arms.md").read_text()
    arms = pd.read_csv(study / "comparison/arms.tsv", sep="\t")
    for row in arms.to_dict("records"):
        assert f"{{{row['label']}}} &" in latex
        assert f"| {row['label']} |" in markdown
        for metric in ("rougeL", "loss", "chrf", "bleu"):
            assert f"{row[metric]:.3f}" in latex
            assert f"{row[metric]:.3f}" in markdown
            assert f"^{{+{row[f'{metric}_high'] - row[metric]:.3f}}}" in latex
    verdicts = pd.read_csv(study / "comparison/comparisons.tsv", sep="\t").query("metric == 'rougeL'")["verdict"]
    assert latex.count("not distinguishable") == verdicts.tolist().count("not distinguishable") > 0
    assert "Trainable (M)" in latex
    assert "134.52" in latex


def test_csv_twin_keeps_full_precision_and_the_difference(study: Path, tmp_path: Path):
    write_tables(study, tmp_path)

    written = pd.read_csv(tmp_path / "arms.csv").set_index("arm")
    arms = pd.read_csv(study / "comparison/arms.tsv", sep="\t").set_index("arm")
    differences = pd.read_csv(study / "comparison/comparisons.tsv", sep="\t").query("metric == 'rougeL'")
    pd.testing.assert_frame_equal(written[arms.columns], arms)
    for row in differences.to_dict("records"):
        assert written.loc[row["arm"], "difference"] == row["difference"]
        assert written.loc[row["arm"], "verdict"] == row["verdict"]


def test_bold_is_the_best_and_what_the_verdict_does_not_set_apart_from_it(tmp_path: Path):
    study = make_results(tmp_path)
    set_arms(study, {"full": {"rougeL": 0.9, "rougeL_low": 0.8, "rougeL_high": 1.0}})
    verdicts = {"base": "worse", "base (nf4)": "worse", "lora": "equivalent", "qlora": "not distinguishable"}
    set_verdicts(study, "rougeL", verdicts)

    assert load_results(study).leaders["rougeL"] == {"full", "lora", "qlora"}


def test_bold_falls_back_to_intervals_where_no_verdict_pairs_the_two(tmp_path: Path):
    study = make_results(tmp_path)
    far, near = {"rougeL_low": 0.1, "rougeL_high": 0.2}, {"rougeL_low": 0.85, "rougeL_high": 0.95}
    set_arms(study, {"lora": {"rougeL": 0.9, "rougeL_low": 0.8, "rougeL_high": 1.0}, "qlora": far, "base": near})
    set_verdicts(study, "rougeL", {"lora": "better"})

    leaders = load_results(study).leaders["rougeL"]

    assert "lora" in leaders
    assert "base" in leaders
    assert "qlora" not in leaders
    assert "full" not in leaders  # the baseline: the verdict says that lora is better


def test_an_arm_worse_than_the_baseline_is_never_bold(tmp_path: Path):
    study = make_results(tmp_path)
    (study / "comparison/pairs.tsv").unlink()
    wide = {"rougeL_low": 0.1, "rougeL_high": 1.0}
    set_arms(study, {"lora": {"rougeL": 0.9, **wide}, "base": wide, "qlora": wide})
    set_verdicts(study, "rougeL", {"lora": "not distinguishable", "qlora": "not distinguishable", "base": "worse"})

    leaders = load_results(study).leaders["rougeL"]

    assert {"lora", "qlora"} <= leaders
    assert "base" not in leaders


def test_the_verdict_of_a_pair_decides_before_overlapping_intervals(tmp_path: Path):
    study = make_results(tmp_path)
    (study / "comparison/pairs.tsv").unlink()
    wide = {"rougeL_low": 0.1, "rougeL_high": 1.0}
    set_arms(study, {"lora": {"rougeL": 0.9, **wide}, "qlora": {"rougeL": 0.8, **wide}})
    pair = {"metric": "rougeL", "arm": "qlora", "other": "lora", "verdict": "worse"}
    path = study / "comparison/pairs.tsv"
    pd.DataFrame([pair | {"verdict": "not distinguishable"}]).to_csv(path, sep="\t", index=False)
    assert {"lora", "qlora"} <= load_results(study).leaders["rougeL"]

    pd.DataFrame([pair]).to_csv(
        path, sep="\t", index=False
    )  # intervals overlap, but the two differ on the same examples

    leaders = load_results(study).leaders["rougeL"]
    assert "lora" in leaders
    assert "qlora" not in leaders


def test_a_table_of_more_arms_than_a_page_holds_has_the_best_and_says_so(tmp_path: Path):
    study = make_results(tmp_path, arms=60, seeds=1, levels=0, examples=4)
    write_tables(study, tmp_path / "tables")

    latex = (tmp_path / "tables/arms.tex").read_text()
    first = latex.split(r"\end{table*}")[0]
    assert first.count("\n{") == 40
    assert "40 of 62 arms" in first
    assert len(pd.read_csv(tmp_path / "tables/arms.csv")) == 62
    assert len((tmp_path / "tables/arms.md").read_text().splitlines()) > 62


def test_one_seed_is_said_to_hold_for_these_models_alone(tmp_path: Path):
    study = make_results(tmp_path, seeds=1, levels=0, examples=12)
    write_tables(study, tmp_path / "tables")

    for name in ("arms.tex", "arms.md"):
        content = (tmp_path / "tables" / name).read_text()
        assert "with one seed they hold for these trained models" in content
        assert "over seeds and examples" not in content


def test_lower_loss_leads(study: Path):
    results = load_results(study)

    assert results.arms["loss"].idxmin() in results.leaders["loss"]
    assert "base (nf4)" not in results.leaders["loss"]


def test_settings_show_differences_first_and_the_batch_as_a_product(study: Path, tmp_path: Path):
    differing, common = setting_table(load_results(study))
    write_tables(study, tmp_path)
    latex = (tmp_path / "settings.tex").read_text()

    assert differing["Method"] == {"full": "full", "lora": "lora", "qlora": "qlora"}
    assert differing["4-bit type"] == {"full": "–", "lora": "–", "qlora": "nf4"}
    assert common["Effective batch"] == "4 = 4 × 1 × 1"
    assert not set(differing) & set(common)
    assert r"4 = 4 $\times$ 1 $\times$ 1" in latex
    assert "output_dir" not in latex


def test_batch_product_multiplies():
    planned = {"effective_batch_size": 64, "per_device_train_batch_size": 4, "gpus": 2}

    assert batch_product(planned | {"gradient_accumulation_steps": 8}) == "64 = 4 × 2 × 8"
    assert batch_product({}) == "–"


def test_a_diverged_arm_has_no_number_and_says_so(tmp_path: Path):
    study = make_results(tmp_path, levels=0)
    empty = {f"rougeL{end}": float("nan") for end in ("", "_low", "_high")}
    set_arms(study, {"lora": empty})
    path = study / "comparison/comparisons.tsv"
    table = pd.read_csv(path, sep="\t")
    table.loc[(table["arm"] == "lora"), ["difference", "low", "high", "p", "p_adjusted"]] = float("nan")
    table.to_csv(path, sep="\t", index=False)

    write_tables(study, tmp_path / "tables")

    row = next(line for line in (tmp_path / "tables/arms.tex").read_text().splitlines() if line.startswith("{LoRA}"))
    assert "diverged" in row
    assert "nan" not in row


def test_an_arm_called_na_stays_an_arm(tmp_path: Path):
    study = make_results(tmp_path)
    relabel(study, {"lora": "NA", "qlora": "1e-4"})

    write_tables(study, tmp_path)

    assert "{NA} &" in (tmp_path / "arms.tex").read_text()
    assert "| 1e-4 |" in (tmp_path / "arms.md").read_text()


def test_markdown_cells_do_not_break_the_table(tmp_path: Path):
    study = make_results(tmp_path)
    relabel(study, {"lora": "a|b"})

    write_tables(study, tmp_path)

    row = next(line for line in (tmp_path / "arms.md").read_text().splitlines() if "a\\|b" in line)
    header = (tmp_path / "arms.md").read_text().splitlines()[0]
    assert row.replace("\\|", "").count("|") == header.count("|")


def test_missing_comparison_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"comparison/arms\.tsv: not there"):
        write_tables(tmp_path, tmp_path / "tables")


def test_escaping_leaves_no_active_character():
    escaped = escape("".join(AWKWARD.values()))

    for command in (r"\textbackslash{}", r"\textasciicircum{}", r"\textasciitilde{}", r"\textless{}"):
        assert command in escaped
        escaped = escaped.replace(command, "")
    for command in (r"\textgreater{}", r"\textbar{}", r"\$", r"\&", r"\#", r"\%", r"\_", r"\{", r"\}"):
        escaped = escaped.replace(command, "")
    assert not set(escaped) & set("\\{}$&#^_~%<>|")


DOCUMENT = r"""\documentclass{article}
\usepackage{booktabs}
\usepackage[margin=2.2cm]{geometry}
%s
\begin{document}
\input{numbers.tex}\input{arms.tex}\input{settings.tex}
\end{document}
"""


def compile_latex(engine: str, folder: Path, preamble: str = "") -> str:
    """Compile the tables in a minimal document; return the log."""
    (folder / "document.tex").write_text(DOCUMENT % preamble, encoding="utf-8")
    command = [engine, "document.tex"]
    if engine != "tectonic":
        command[1:1] = ["-interaction=nonstopmode", "-halt-on-error"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=120)
    assert done.returncode == 0, done.stdout[-3000:]
    assert (folder / "document.pdf").exists()
    return done.stdout


def test_tables_compile_whatever_the_arms_are_called(tmp_path: Path):
    engine = next((name for name in ("pdflatex", "xelatex", "lualatex", "tectonic") if shutil.which(name)), None)
    if engine is None:
        pytest.skip("no LaTeX on this machine (pdflatex, xelatex, lualatex or tectonic)")
    from finegrid.publication.numbers import write_numbers

    study = make_results(tmp_path, arms=4)
    write_tables(study, tmp_path)
    write_numbers(study, tmp_path / "numbers.tex")
    assert "Overfull" not in compile_latex(engine, tmp_path)

    relabel(study, AWKWARD)
    write_tables(study, tmp_path)
    compile_latex(engine, tmp_path)


def test_chinese_tables_compile(tmp_path: Path):
    engine = next((name for name in ("xelatex", "lualatex") if shutil.which(name)), None)
    if engine is None:
        pytest.skip("no LaTeX for Chinese on this machine (xelatex or lualatex)")
    from finegrid.publication.numbers import write_numbers

    study = make_results(tmp_path, chinese=True)
    write_tables(study, tmp_path)
    write_numbers(study, tmp_path / "numbers.tex")

    compile_latex(engine, tmp_path)
