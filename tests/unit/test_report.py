"""The report is one file that loads nothing, says what the verdicts allow and no more, and works in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import jinja2
import lxml.html
import pandas as pd
import pytest
from finegrid.errors import UserError
from finegrid.figures import FIGURES, fitting
from finegrid.publication.captions import CAPTIONS
from finegrid.publication.report import answer, duration, examples, findings, learned, write_report
from finegrid.publication.results import load_results
from study_results import make_results

HOSTILE = '</p><script>alert("x")</script><img src=x onerror=alert(1)> & "quotes"'
# A PNG of 1 x 1 pixel.
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63606060000000040001f61738"
    "550000000049454e44ae426082"
)


def draw_figures(study: Path) -> None:
    (study / "figures").mkdir(exist_ok=True)
    for name in FIGURES:
        (study / "figures" / f"{name}.png").write_bytes(PIXEL)


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


def test_same_results_give_the_same_bytes(study: Path, tmp_path: Path):
    write_report(study, tmp_path / "again.html")

    assert (tmp_path / "again.html").read_bytes() == (study / "report.html").read_bytes()


def test_missing_comparison_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="comparison"):
        write_report(tmp_path, tmp_path / "report.html")


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
    )["smallest_detectable_difference"]
    assert second == (
        f"With 2 seeds the study could reliably see only differences above {detectable.max():.2g} in ROUGE-L, "
        "so it cannot claim that these arms and Full are equally good."
    )


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

    by_tag = {tag: [row["id"] for row in shown if row["tag"] == tag] for tag in ("largest gain", "largest loss")}
    assert by_tag == {"largest gain": ["test-0007"], "largest loss": ["test-0003"]}
    assert sum(row["tag"] == "random" for row in shown) == 8
    assert len({row["id"] for row in shown}) == len(shown)


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


# ---- captions --------------------------------------------------------------------------------------------------------


def test_every_figure_has_the_same_caption_in_both_reports(project: Path):
    template = jinja2.Template((project / "workflow/report/figure.rst").read_text(encoding="utf-8"))

    assert set(CAPTIONS) == set(FIGURES)
    for name, (title, sentence) in CAPTIONS.items():
        rendered = template.render(snakemake={"wildcards": {"figure": name}})
        assert re.sub(r"\s+", " ", rendered).strip() == f"**{title}.** {sentence}"


# ---- in a browser ----------------------------------------------------------------------------------------------------

WATCH = """<script>window.failures = []; addEventListener("error", e => failures.push(e.message));
addEventListener("securitypolicyviolation", e => failures.push("blocked " + e.blockedURI));</script>"""
DRIVE = """<script>addEventListener("load", () => {
  const order = () => [...document.querySelectorAll("#arms-table tbody tr")].map(row => row.dataset.arm);
  const result = {width: document.documentElement.scrollWidth, window: innerWidth};
  const head = document.querySelectorAll("#arms-table thead button")[1];
  head.click(); result.ascending = order(); head.click(); result.descending = order();
  const memory = [...document.querySelectorAll("#arms-table thead button")].find(b => b.textContent === "Memory");
  memory.click(); result.memory = order();
  const shown = () => [...document.querySelectorAll(".example")].filter(card => !card.hidden).length;
  result.all = shown();
  const search = document.getElementById("search");
  search.value = "medicare"; search.dispatchEvent(new Event("input")); result.medicare = shown();
  search.value = "nowhere at all"; search.dispatchEvent(new Event("input")); result.none = shown();
  search.value = ""; search.dispatchEvent(new Event("input"));
  document.querySelector('.filter[data-tag="random"]').click(); result.random = shown();
  document.querySelector(".zoom").click(); result.large = document.getElementById("large").open;
  document.getElementById("large").click(); result.closed = !document.getElementById("large").open;
  result.failures = failures;
  const out = document.createElement("pre"); out.id = "result"; out.textContent = JSON.stringify(result);
  document.body.append(out);
});</script>"""


@pytest.mark.parametrize("width", [1280, 500])
def test_page_works_in_a_browser_without_errors(study: Path, tmp_path: Path, width: int):
    browser = next((name for name in ("chromium", "chromium-browser", "google-chrome") if shutil.which(name)), None)
    if browser is None:
        pytest.skip("no chromium on this machine: the page's script is not driven")
    source = (study / "report.html").read_text(encoding="utf-8")
    driven = source.replace("<style>", f"{WATCH}<style>", 1).replace("</body>", f"{DRIVE}</body>")
    (tmp_path / "driven.html").write_text(driven, encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--dump-dom"]
    done = subprocess.run(
        [*command, (tmp_path / "driven.html").as_uri()], capture_output=True, text=True, timeout=90, check=True
    )

    result = json.loads(lxml.html.document_fromstring(done.stdout).get_element_by_id("result").text_content())

    assert result["failures"] == []
    assert result["width"] <= result["window"]  # nothing sticks out sideways
    means = pd.read_csv(study / "comparison/arms.tsv", sep="\t").set_index("arm")["rougeL"]
    assert result["ascending"] == list(means.sort_values().index)
    assert result["descending"] == list(means.sort_values(ascending=False).index)
    assert result["memory"] == ["qlora", "lora", "full", *result["memory"][3:]]  # arms without a number stay last
    assert 0 < result["medicare"] < result["all"]
    assert result["none"] == 0
    assert result["random"] == 8
    assert result["large"]
    assert result["closed"]
