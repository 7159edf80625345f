"""The report is one file that loads nothing, says what the verdicts allow and no more, and works in a browser."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from pathlib import Path

import jinja2
import lxml.html
import matplotlib.pyplot as plt
import pandas as pd
import pytest
from browser import Browser, chromium
from finegrid.errors import UserError
from finegrid.figures import FIGURES, fitting
from finegrid.publication.captions import CAPTIONS
from finegrid.publication.examples import examples
from finegrid.publication.report import answer, duration, findings, learned, write_report
from finegrid.publication.results import load_results
from PIL import Image
from study_results import make_results

HOSTILE = '</p><script>alert("x")</script><img src=x onerror=alert(1)> & "quotes"'


def draw_figures(study: Path) -> None:
    (study / "figures").mkdir(exist_ok=True)
    for name in FIGURES:
        Image.new("L", (2040, 900), 255).save(study / "figures" / f"{name}.png")


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    study = make_results(tmp_path_factory.mktemp("report"))
    draw_figures(study)
    write_report(study, study / "report.html")
    return study


@pytest.fixture(scope="module")
def page(study: Path) -> lxml.html.HtmlElement:
    return lxml.html.document_fromstring((study / "report.html").read_bytes())


def text(element: lxml.html.HtmlElement) -> str:
    return re.sub(r"\s+", " ", element.text_content()).strip()


def set_comparisons(study: Path, rows: dict[str, dict], metric: str = "rougeL") -> None:
    """Overwrite columns of arms' rows in comparisons.tsv."""
    path = study / "comparison/comparisons.tsv"
    table = pd.read_csv(path, sep="\t")
    for arm, values in rows.items():
        for column, value in values.items():
            table.loc[(table["arm"] == arm) & (table["metric"] == metric), column] = value
    table.to_csv(path, sep="\t", index=False)


def rewrite_predictions(study: Path, change) -> None:
    for path in study.glob("runs/*/predictions.jsonl"):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for row in rows:
            change(path.parent.name, row)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# ---- one file, nothing loaded ----------------------------------------------------------------------------------------


def test_page_loads_nothing_from_anywhere(study: Path, page):
    source = (study / "report.html").read_text(encoding="utf-8")

    assert not re.findall(r"https?://|//[a-z]+\.", source)
    for element in page.iter():
        for attribute in ("src", "href", "srcset", "action", "data"):
            value = element.get(attribute)
            assert value is None or value.startswith(("data:", "#"))
    assert "@import" not in source
    assert "url(" not in source
    policy = page.xpath("//meta[@http-equiv='Content-Security-Policy']/@content")[0]
    assert policy.startswith("default-src 'none'")


def test_page_names_question_arms_and_the_figures_that_fit(study: Path, page):
    assert text(page.xpath("//h1")[0]) == "Which method answers insurance questions best?"
    rows = page.xpath("//table[@id='arms-table']/tbody/tr")
    assert [row.get("data-arm") for row in rows] == ["base", "base (nf4)", "full", "lora", "qlora"]
    images = page.xpath("//figure//img")
    assert len(images) == len(fitting(json.loads((study / "plan.json").read_text()))) < len(FIGURES)
    for image in images:
        assert image.get("src").startswith("data:image/png;base64,")
        assert len(image.get("alt")) > 20


def test_every_section_is_linked_and_has_content(page):
    targets = {link.get("href")[1:] for link in page.xpath("//nav//a")}

    assert targets == set(page.xpath("//main//h2/@id"))
    for section in page.xpath("//main/section"):
        assert len(text(section)) > 80


def test_arms_table_sorts_by_the_numbers_of_the_comparison(study: Path, page):
    arms = pd.read_csv(study / "comparison/arms.tsv", sep="\t").set_index("arm")
    heads = [text(head.find("button")) for head in page.xpath("//table[@id='arms-table']/thead//th")]
    for row in page.xpath("//table[@id='arms-table']/tbody/tr"):
        cells = row.xpath("./th|./td")
        assert len(cells) == len(heads)
        values = dict(zip(heads, (cell.get("data-sort") for cell in cells), strict=True))
        arm = arms.loc[row.get("data-arm")]
        assert float(values["ROUGE-L"]) == pytest.approx(arm["rougeL"])
        assert float(values["Loss"]) == pytest.approx(arm["loss"])
        assert values["Memory"] == ("" if pd.isna(arm["peak_memory_mb"]) else str(arm["peak_memory_mb"]))


def test_effective_batch_is_shown_as_its_product(page):
    assert "4 = 4 × 1 × 1" in text(page.xpath("//section[@aria-labelledby='training']")[0])
    assert "4 = 4 × 1 × 1" in text(page.xpath("//section[@aria-labelledby='settings']")[0])


def test_data_report_shows_rows_reasons_cuts_and_leaks(page):
    content = text(page.xpath("//section[@aria-labelledby='data']")[0])

    for part in ("exact duplicates", "no label tokens", "answer also in test", "20 (5.0 %)", "Limits: 64 tokens"):
        assert part in content


def test_provenance_shows_commit_and_versions(page):
    content = text(page.xpath("//section[@aria-labelledby='provenance']")[0])

    assert "c12167a0000000000000000000000000000000ff" in content
    assert "2.13.0" in content
    assert "data version: data/raw/insurance_2.1/train.jsonl" in content
    heads = page.xpath("//section[@aria-labelledby='provenance']//th[@scope='col']")
    assert [text(head) for head in heads] == ["Run", "weights: adapter_model.safetensors"]


def test_same_results_give_the_same_bytes(study: Path, tmp_path: Path):
    write_report(study, tmp_path / "again.html")

    assert (tmp_path / "again.html").read_bytes() == (study / "report.html").read_bytes()


def test_missing_comparison_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="comparison"):
        write_report(tmp_path, tmp_path / "report.html")


def test_corpus_scores_are_columns_where_they_were_measured(tmp_path: Path):
    study = make_results(tmp_path)
    path = study / "comparison/arms.tsv"
    arms = pd.read_csv(path, sep="\t")
    for name, value in (("corpus_bleu", 7.25), ("corpus_chrf", float("nan"))):
        arms[[name, f"{name}_low", f"{name}_high"]] = [value, value - 1, value + 1]
    arms.to_csv(path, sep="\t", index=False)

    write_report(study, tmp_path / "report.html")

    page = lxml.html.document_fromstring((tmp_path / "report.html").read_bytes())
    heads = [text(head.find("button")) for head in page.xpath("//table[@id='arms-table']/thead//th")]
    assert "Corpus chrF" not in heads
    cell = page.xpath("//table[@id='arms-table']/tbody/tr[1]/*")[heads.index("Corpus BLEU")]
    assert text(cell) == "7.2[6.2, 8.2]"


# ---- the answer ------------------------------------------------------------------------------------------------------


def test_answer_without_a_verdict_claims_neither_difference_nor_equality(tmp_path: Path):
    study = make_results(tmp_path, effects={"full": 0.035, "lora": 0.035, "qlora": 0.045})
    first, second = answer(load_results(study))

    assert first == (
        "In ROUGE-L on 48 test examples, no arm can be told apart from Full: "
        "LoRA and QLoRA (nf4) are not distinguishable from it."
    )
    detectable = pd.read_csv(study / "comparison/comparisons.tsv", sep="\t").query(
        "metric == 'rougeL' and arm in ['lora', 'qlora']"
    )["smallest_detectable_adjusted"]
    assert second == (
        f"With 2 seeds the study could reliably see only differences above {detectable.max():.2g} in ROUGE-L, "
        "so it cannot claim that these arms and Full are equally good."
    )
    set_comparisons(study, {"qlora": {"verdict": "worse"}})
    assert answer(load_results(study))[1].endswith("so it cannot claim that LoRA and Full are equally good.")


def test_answer_gives_each_verdict_with_its_difference(tmp_path: Path):
    study = make_results(tmp_path, arms=4)
    better = {"verdict": "better", "difference": 0.05, "low": 0.02, "high": 0.08}
    worse = {"verdict": "worse", "difference": -0.04, "low": -0.06, "high": -0.02}
    name = pd.read_csv(study / "comparison/arms.tsv", sep="\t")["arm"].iloc[-1]
    set_comparisons(study, {"lora": better, "qlora": worse, name: {"verdict": "equivalent"}})

    first, second = answer(load_results(study))

    assert first == (
        "In ROUGE-L on 48 test examples, LoRA (+0.050 [0.020, 0.080]) is better than Full; LoRA, rank 10 is equivalent "
        "to Full within ±0.01; QLoRA (nf4) (−0.040 [−0.060, −0.020]) is worse than Full."
    )
    assert "cannot claim that the order holds for another model" in second


def test_answer_of_one_seed_speaks_of_these_models_only(tmp_path: Path):
    study = make_results(tmp_path, seeds=1)

    _, second = answer(load_results(study))

    assert second.startswith("With one seed this speaks of these trained models alone")


def heading(study: Path, name: str) -> str:
    figure, _ = importlib.import_module(f"finegrid.figures.{name}").plot(study)
    plt.close(figure)
    return figure.get_suptitle().replace("\n", " ")


def test_a_study_whose_arms_differ_says_so_in_report_and_figures(tmp_path: Path):
    effects = {"full": 0.035, "lora": 0.060, "qlora": 0.010}
    study = make_results(tmp_path, seeds=3, examples=300, levels=0, effects=effects)

    first, second = answer(load_results(study))

    assert re.fullmatch(
        r"In ROUGE-L on 300 test examples, LoRA \(\+0\.0\d\d \[0\.0\d\d, 0\.0\d\d\]\) is better than Full; "
        r"QLoRA \(nf4\) \(−0\.0\d\d \[−0\.0\d\d, −0\.0\d\d\]\) is worse than Full\.",
        first,
    )
    assert second.startswith("This rests on 3 seeds, these data and this budget")
    assert heading(study, "quality") == "In ROUGE-L, LoRA is better than Full; QLoRA (nf4) is worse than it"
    assert heading(study, "cost").endswith("QLoRA (nf4) needs less memory")
    assert load_results(study).leaders["rougeL"] == {"lora"}


def test_a_study_whose_arms_do_not_differ_names_no_winner_anywhere(tmp_path: Path):
    effects = {"full": 0.035, "lora": 0.035, "qlora": 0.050}  # from a base that scores 0.015 less
    study = make_results(tmp_path, seeds=3, examples=300, levels=0, effects=effects)

    first, second = answer(load_results(study))

    texts = [first, second, heading(study, "quality"), heading(study, "cost")]
    for sentence in texts:
        assert "better than" not in sentence
        assert "worse than" not in sentence
    undecided = "not distinguishable" in first
    assert undecided or "equivalent to Full within ±0.01" in first
    assert not undecided or "cannot claim that" in second
    assert "not shown to be worse" in texts[3] or "needs the least memory" in texts[3]
    assert {"full", "lora", "qlora"} <= load_results(study).leaders["rougeL"]


def test_answer_names_a_diverged_arm(tmp_path: Path):
    study = make_results(tmp_path)
    nothing = dict.fromkeys(("difference", "low", "high", "p", "p_adjusted", "smallest_detectable_difference"))
    set_comparisons(study, {"lora": nothing})

    first, _ = answer(load_results(study))

    assert "LoRA diverged and has no number" in first
    write_report(study, tmp_path / "report.html")


def test_many_arms_still_give_a_short_answer(tmp_path: Path):
    study = make_results(tmp_path, arms=8, levels=1, examples=24)

    first, _ = answer(load_results(study))

    assert len(first) < 400


def test_an_arm_that_did_not_learn_is_named(tmp_path: Path):
    study = make_results(tmp_path)
    assert "every arm below" in learned(load_results(study))
    path = study / "comparison/arms.tsv"
    table = pd.read_csv(path, sep="\t")
    table.loc[table["arm"] == "qlora", "validation_loss"] = 9.0
    table.to_csv(path, sep="\t", index=False)

    assert learned(load_results(study)).startswith("Training did not lower the validation loss of QLoRA (nf4)")


# ---- examples --------------------------------------------------------------------------------------------------------


def test_examples_with_the_largest_change_from_the_base_come_first(tmp_path: Path):
    study = make_results(tmp_path)
    trained = set(load_results(study).training)

    def change(run: str, row: dict) -> None:
        if row["split"] == "test" and run in trained:
            score = {"test-0007": 1.0, "test-0003": 0.0}.get(row["id"], 0.5)
            row["scores"]["rougeL"] = score
        elif row["split"] == "test":
            row["scores"]["rougeL"] = 0.5

    rewrite_predictions(study, change)

    shown = examples(load_results(study))["shown"]

    by_tag = {tag: [row["id"] for row in shown if tag in row["tags"]] for tag in ("gain", "loss")}
    assert by_tag == {"gain": ["test-0007"], "loss": ["test-0003"]}
    assert sum(row["tags"] == ["random"] for row in shown) == 10
    assert len({row["id"] for row in shown}) == len(shown)


def test_examples_where_the_best_arm_is_furthest_ahead_and_behind(tmp_path: Path):
    study = make_results(tmp_path, examples=60, effects={"full": 0.03, "lora": 0.08, "qlora": 0.0})
    results = load_results(study)
    scores = {}
    for arm in ("lora", "full"):
        path = study / "runs" / results.selected_runs(arm)[0] / "predictions.jsonl"
        rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        scores[arm] = {row["id"]: row["scores"]["rougeL"] for row in rows if row["split"] == "test"}
    order = sorted(scores["lora"], key=lambda key: scores["full"][key] - scores["lora"][key])

    found = examples(results)

    assert found["rival"] == ["LoRA", "Full"]
    ahead = [row["id"] for row in found["shown"] if "ahead" in row["tags"]]
    behind = [row["id"] for row in found["shown"] if "behind" in row["tags"]]
    assert set(ahead) == set(order[:10])
    assert set(behind) <= set(order[-10:])


def test_of_many_arms_the_best_and_the_baseline_answer(tmp_path: Path):
    study = make_results(tmp_path, arms=12, levels=0, examples=6)
    results = load_results(study)

    found = examples(results)

    shown = [column.arm for column in found["columns"] if column.base]
    best = results.arms.loc[results.trained, "rougeL"].sort_values(ascending=False).index
    assert len(shown) == 8
    assert {"full", *best[:7]} == set(shown)
    assert found["left_out"] == 4


def test_examples_show_every_arm_beside_its_own_base(study: Path):
    found = examples(load_results(study))

    for example in found["shown"]:
        assert [row["arm"] for row in example["answers"]] == ["base", "base (nf4)", "full", "lora", "qlora"]
        assert [row["change"] is None for row in example["answers"]] == [True, True, False, False, False]
        assert example["prompt"]
        assert example["reference"]


def test_hostile_texts_are_shown_not_run(tmp_path: Path):
    study = make_results(tmp_path)
    rewrite_predictions(study, lambda _, row: row.update(prediction=HOSTILE, prompt=HOSTILE))
    for path in (study / "plan.json", study / "comparison/comparison.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        content["title"] = HOSTILE
        content["findings"] = [{"severity": "warning", "place": HOSTILE, "message": HOSTILE, "mend": HOSTILE}]
        path.write_text(json.dumps(content), encoding="utf-8")

    write_report(study, tmp_path / "report.html")

    page = lxml.html.document_fromstring((tmp_path / "report.html").read_bytes())
    assert len(page.xpath("//script")) == 1
    assert not page.xpath("//*[@onerror]")
    assert HOSTILE in page.xpath("//article//p[@class='prompt']")[0].text_content()


def test_report_without_predictions_says_how_to_get_them(tmp_path: Path):
    study = make_results(tmp_path)
    shutil.rmtree(study / "runs")

    write_report(study, tmp_path / "report.html")

    page = lxml.html.document_fromstring((tmp_path / "report.html").read_bytes())
    assert "dvc pull" in text(page.xpath("//section[@aria-labelledby='examples']")[0])


def test_report_of_a_study_without_generation(tmp_path: Path):
    study = make_results(tmp_path)
    rewrite_predictions(study, lambda _, row: row.update(prediction=None, scores=None))

    assert "No answers were generated" in examples(load_results(study))["missing"]


# ---- findings --------------------------------------------------------------------------------------------------------


def test_findings_come_once_errors_first_and_name_uncommitted_changes(tmp_path: Path):
    study = make_results(tmp_path)
    content = json.loads((study / "comparison/comparison.json").read_text())
    content["findings"] *= 2
    content["findings"].append({"severity": "error", "place": "arm x", "message": "diverged", "mend": "lower it"})
    (study / "comparison/comparison.json").write_text(json.dumps(content))
    record = next(iter((study / "provenance").glob("lora-*.json")))
    record.write_text(json.dumps(json.loads(record.read_text()) | {"dirty": True}))

    found = findings(load_results(study))

    assert found[0]["severity"] == "error"
    assert len({(finding["place"], finding["message"]) for finding in found}) == len(found)
    assert any("1 run of a checkout with changes that were not committed" in row["message"] for row in found)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(4.24, "4.2 s"), (59.4, "59 s"), (59.7, "1 min 00 s"), (219, "3 min 39 s"), (7500, "2 h 05 min")],
)
def test_durations_read_like_durations(seconds: float, shown: str):
    assert duration(seconds) == shown


def test_advice_is_shown_with_its_evidence_and_the_next_study(tmp_path: Path):
    study = make_results(tmp_path)
    fact = {"run": "lora-1a2b3c4d", "step": 30, "what": "slope", "value": -0.04, "threshold": -0.01}
    change = {"key": "training_args.learning_rate", "from": 0.002, "to": 0.004}
    entry = {"case": "edge", "severity": "warning", "place": "arm lora: learning rate", "message": "at the edge"}
    entry |= {"mend": "add the level 0.004", "evidence": [fact], "change": change}
    content = {"study": "synthetic", "advice": [entry], "next_study": "results/next_study.yaml", "changes": ["a level"]}
    (study / "comparison/advice.json").write_text(json.dumps(content), encoding="utf-8")
    comparison = json.loads((study / "comparison/comparison.json").read_text())
    comparison["cannot_claim"] = ["Nothing is said of other models."]
    (study / "comparison/comparison.json").write_text(json.dumps(comparison), encoding="utf-8")

    write_report(study, tmp_path / "report.html")

    page = lxml.html.document_fromstring((tmp_path / "report.html").read_bytes())
    shown = text(page.xpath("//section[@aria-labelledby='findings']")[0])
    for part in ("at the edge", "add the level 0.004", "training_args.learning_rate: 0.002 → 0.004"):
        assert part in shown
    assert "lora-1a2b3c4d at step 30: slope -0.04 (threshold -0.01)" in shown
    assert "finegrid plan results/next_study.yaml" in shown
    assert "Nothing is said of other models." in text(page.xpath("//header")[0])


def test_every_pair_of_arms_can_be_looked_up(tmp_path: Path):
    study = make_results(tmp_path)
    pair = {"metric": "rougeL", "arm": "qlora", "other": "lora", "difference": -0.02, "low": -0.03, "high": -0.01}
    pair |= {"p": 0.001, "p_adjusted": 0.002, "verdict": "worse"}
    pd.DataFrame([pair, pair | {"metric": "loss"}]).to_csv(study / "comparison/pairs.tsv", sep="\t", index=False)

    write_report(study, tmp_path / "report.html")

    page = lxml.html.document_fromstring((tmp_path / "report.html").read_bytes())
    details = next(each for each in page.xpath("//details") if "Every pair of arms (1)" in text(each))
    cells = [text(cell) for cell in details.xpath(".//tbody/tr/*")]
    assert cells == ["QLoRA (nf4)", "LoRA", "−0.020[−0.030, −0.010]", "worse", "0.002"]


# ---- captions --------------------------------------------------------------------------------------------------------


def test_every_figure_has_the_same_caption_in_both_reports(project: Path):
    template = jinja2.Template((project / "workflow/report/figure.rst").read_text(encoding="utf-8"))

    assert set(CAPTIONS) == set(FIGURES)
    for name, (title, sentence) in CAPTIONS.items():
        rendered = template.render(snakemake={"wildcards": {"figure": name}})
        assert re.sub(r"\s+", " ", rendered).strip() == f"**{title}.** {sentence}"


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if chromium() is None:
        pytest.skip("no chromium on this machine: the page is not driven")
    with Browser(tmp_path_factory.mktemp("browser") / "profile") as browser:
        yield browser


def arms_shown(page) -> list[str]:
    rows = "[...document.querySelectorAll('#arms-table tbody tr')].filter(row => row.offsetParent)"
    return page.evaluate(f"{rows}.map(row => row.dataset.arm)")


def head(page, name: str) -> int:
    """The number of a column of the arms table."""
    names = page.evaluate("[...document.querySelectorAll('#arms-table thead button')].map(head => head.textContent)")
    return names.index(name)


def cards_shown(page) -> list[str]:
    cards = "[...document.querySelectorAll('.example')].filter(card => card.offsetParent)"
    return page.evaluate(f"{cards}.map(card => card.textContent)")


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_page_is_sorted_filtered_searched_and_opened_without_an_error(browser, study: Path, width: int, dark: bool):
    page = browser.open((study / "report.html").as_uri(), width=width, height=844, dark=dark)
    means = pd.read_csv(study / "comparison/arms.tsv", sep="\t").set_index("arm")["rougeL"]

    page.click("#arms-table thead button", head(page, "ROUGE-L"))
    assert arms_shown(page) == list(means.sort_values().index)
    page.click("#arms-table thead button", head(page, "ROUGE-L"))
    assert arms_shown(page) == list(means.sort_values(ascending=False).index)
    page.click("#arms-table thead button", head(page, "Memory"))
    assert arms_shown(page)[:3] == ["qlora", "lora", "full"]  # arms without a number stay last

    page.write("#arms-search", "lora")
    assert arms_shown(page) == ["qlora", "lora"]
    assert page.evaluate("document.getElementById('arms-count').textContent") == "2 of 5 arms"
    page.write("#arms-search", "")
    verdicts = pd.read_csv(study / "comparison/comparisons.tsv", sep="\t").query("metric == 'rougeL'")
    wanted = set(verdicts.loc[verdicts["verdict"] == "not distinguishable", "arm"])
    page.click(".verdict[data-verdict='not distinguishable']")
    assert set(arms_shown(page)) == wanted
    page.click(".verdict[data-verdict='all']")
    assert len(arms_shown(page)) == 5

    every = cards_shown(page)
    page.write("#search", "medicare transferred")
    found = cards_shown(page)
    assert 0 < len(found) < len(every)
    assert all("medicare" in card.lower() and "transferred" in card.lower() for card in found)
    page.write("#search", "nowhere at all")
    assert cards_shown(page) == []
    page.write("#search", "")
    page.click(".filter[data-tag='random']")
    assert 0 < len(cards_shown(page)) <= 10

    page.click(".zoom", 1)
    assert page.evaluate("document.getElementById('large').open")
    assert page.evaluate("document.querySelector('#large img').src === document.querySelectorAll('.zoom img')[1].src")
    assert page.evaluate("document.querySelector('#large img').getBoundingClientRect().width") >= min(width, 390) * 0.9
    page.key("Escape")
    assert not page.evaluate("document.getElementById('large').open")

    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # nothing sticks out sideways
    assert page.errors == []
    assert [url for url in page.requests if not url.startswith(("data:", "about:"))] == [
        (study / "report.html").as_uri()
    ]


def test_an_error_in_the_page_would_be_heard(browser, tmp_path: Path):
    broken = (
        "<button onclick='nothing()'>x</button><img src='http://127.0.0.1:9/a.png'><script>console.error('e')</script>"
    )
    (tmp_path / "page.html").write_text(broken, encoding="utf-8")

    page = browser.open((tmp_path / "page.html").as_uri())
    page.click("button")
    page.wait("true")

    assert any("nothing is not defined" in error for error in page.errors)
    assert "e" in page.errors
    assert "http://127.0.0.1:9/a.png" in page.requests


def test_report_of_many_arms_opens_and_filters(browser, tmp_path: Path):
    factors = {"rank": ["2", "4", "8", "16", "32", "64", "128"], "target": ["all", "attention", "query and value"]}
    factors["schedule"] = ["cosine", "linear", "constant", "polynomial"]
    study = make_results(tmp_path, factors=factors, seeds=1, levels=0, examples=3)
    write_report(study, study / "report.html")

    page = browser.open((study / "report.html").as_uri())
    page.write("#arms-search", "rank 128 cosine")

    assert len(arms_shown(page)) == 3
    assert page.evaluate("document.querySelectorAll('.example')[0].querySelectorAll('section').length") <= 11
    assert "1seed84runs" in page.evaluate("document.querySelector('.facts').textContent")
    claims = page.evaluate("document.querySelector('.limits').textContent")
    assert re.search(
        r"that rank 2, all, cosine does as well as \d\d other arms: differences below \S+ in ROUGE-L", claims
    )
    assert page.errors == []
