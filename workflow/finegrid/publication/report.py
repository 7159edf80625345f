"""The study's report: one HTML file that opens from disk, with everything in it.

Reads the results of a study: plan, comparison, settings, summaries, data reports, provenance, the figures' PNG files
and, where they are at hand, the predictions. It loads nothing from anywhere: images are data URIs, style and script
are in the page. The same results give the same bytes.
"""

from __future__ import annotations

import base64
import math
import struct
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import jinja2
import pandas as pd
from matplotlib.colors import to_hex

from finegrid.analysis.compare import LOWER_IS_BETTER
from finegrid.analysis.scores import load_plan
from finegrid.figures import fitting
from finegrid.figures.style import arm_colours
from finegrid.files import write_text
from finegrid.publication.captions import CAPTIONS
from finegrid.publication.examples import TAGS, examples
from finegrid.publication.results import (
    METRIC_NAMES,
    NOTHING,
    PRINTED,
    Results,
    batch_product,
    counted,
    decimal,
    flatten,
    joined,
    load_results,
    plain,
    setting_table,
)

SCREEN = 120 / 300  # pixels on screen for a pixel of the file: all figures with letters of one size
FEW = 3  # arms that a sentence names one by one
SPLIT_COLUMNS = [
    *("Split", "Imported", "Rejected", "Not drawn", "Clean", "Used", "Prompts cut", "Answers cut", "End lost"),
    *("Label tokens", "Prompt lengths", "Answer lengths"),
]
VERDICTS = ("better", "equivalent", "worse", "not distinguishable", "diverged")
SEVERITIES = ("error", "warning", "note")


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, and what a click on the column's head sorts by."""

    text: str
    sort: float | str
    bold: bool = False
    detail: str = ""


def write_report(study_dir: Path, output: Path) -> None:
    """Write the report of `results/<study>/` to `output`, one self-contained HTML file.

    Raises:
        UserError: the comparison is not there yet.
    """
    results = load_results(study_dir)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["plain"] = plain
    differing, common = setting_table(results)
    rows, shown = arm_rows(results), examples(results)
    page = environment.get_template("report.html.j2").render(
        results=results,
        study=results.plan["study"],
        question=results.plan["title"],
        answer=answer(results),
        learned=learned(results),
        facts=_facts(results),
        columns=arm_columns(results),
        arms=rows,
        colours=_colours(study_dir),
        statistics=results.comparison.get("statistics", {}),
        baseline=results.label(results.baseline),
        figures=_figures(study_dir / "figures", fitting(results.plan)),
        examples=shown,
        tags=TAGS,
        used_tags={tag for example in shown["shown"] for tag in example["tags"]},
        verdicts=["all", *(verdict for verdict in VERDICTS if verdict in {row["verdict"] for row in rows})],
        metric=METRIC_NAMES[results.metric],
        all_pairs=pair_rows(results),
        cannot_claim=results.comparison.get("cannot_claim", []),
        findings=findings(results),
        advice=advice(results),
        datasets=data_reports(results),
        split_columns=SPLIT_COLUMNS,
        differing=differing,
        common={name: value for name, value in common.items() if name in PRINTED},
        others={name: value for name, value in common.items() if name not in PRINTED},
        training=training_rows(results),
        tuned=tuned_rows(results),
        provenance=provenance(results),
    )
    write_text(output, page)


# ---- the answer ------------------------------------------------------------------------------------------------------


def answer(results: Results) -> tuple[str, str]:
    """Return two sentences: what the verdicts say of the trained arms, and what they cannot claim."""
    compared = [arm for arm in results.trained if arm != results.baseline]
    compared = compared or [arm for arm in results.arms.index if arm != results.baseline]
    metric = METRIC_NAMES[results.metric]
    examples = counted(int(results.arms["examples"].max()), f"{results.comparison['split']} example")
    if not compared:
        return f"{results.label(results.baseline)} is the only arm: there is nothing to compare.", _limits(results, [])
    groups = _groups(results, compared)
    baseline = results.label(results.baseline)
    if set(groups) == {"not distinguishable"}:
        few = f"{_names(results, compared)} {_is(compared)} not distinguishable from it"
        many = f"none of the {len(compared)} others is distinguishable from it"
        first = f"no arm can be told apart from {baseline}: {few if len(compared) <= FEW else many}"
    else:
        first = "; ".join(_clause(results, verdict, arms, baseline) for verdict, arms in groups.items())
    return f"In {metric} on {examples}, {first}.", _limits(results, groups.get("not distinguishable", []))


def _groups(results: Results, arms: list[str]) -> dict[str, list[str]]:
    """Verdict -> arms, the strongest verdicts first; inside a group the best mean first."""
    groups: dict[str, list[str]] = {}
    for arm in arms:
        row = results.difference(arm, results.metric)
        verdict = row["verdict"] if row and math.isfinite(row["difference"]) else "diverged"
        groups.setdefault(verdict, []).append(arm)
    sign = 1 if results.metric in LOWER_IS_BETTER else -1
    for group in groups.values():
        group.sort(key=lambda arm: sign * value if math.isfinite(value := results.arms.loc[arm, results.metric]) else 0)
    return {verdict: groups[verdict] for verdict in VERDICTS if verdict in groups}


def _clause(results: Results, verdict: str, arms: list[str], baseline: str) -> str:
    if verdict == "diverged":
        return f"{_names(results, arms)} diverged and {'has' if len(arms) == 1 else 'have'} no number"
    if verdict == "not distinguishable":
        return f"{_names(results, arms)} {_is(arms)} not distinguishable from {baseline}"
    if verdict == "equivalent":
        return f"{_names(results, arms)} {_is(arms)} equivalent to {baseline} within ±{results.comparison['margin']:g}"
    led = f", led by {_with_difference(results, arms[0])}," if verdict == "better" else ""
    names = (
        joined([_with_difference(results, arm) for arm in arms], quote=False)
        if len(arms) <= FEW
        else f"{len(arms)} arms{led}"
    )
    return f"{names} {_is(arms)} {verdict} than {baseline}"


def _is(arms: list[str]) -> str:
    return "is" if len(arms) == 1 else "are"


def _names(results: Results, arms: list[str]) -> str:
    return joined([results.label(arm) for arm in arms]) if len(arms) <= FEW else f"{len(arms)} arms"


def _with_difference(results: Results, arm: str) -> str:
    row = results.difference(arm, results.metric)
    difference = decimal(row["difference"], sign=True)
    return f"{results.label(arm)} ({difference} [{decimal(row['low'])}, {decimal(row['high'])}])"


def _limits(results: Results, undecided: list[str]) -> str:
    """What this many seeds do not allow anyone to claim."""
    seeds = int(results.arms["seeds"].max())
    if seeds <= 1:
        return (
            "With one seed this speaks of these trained models alone: it cannot claim that one method beats another, "
            "because the spread between seeds was not measured."
        )
    detectable = [_detectable(results.difference(arm, results.metric)) for arm in undecided]
    detectable = [value for value in detectable if math.isfinite(value)]
    if detectable:
        who = "these arms" if len(undecided) > 1 else results.label(undecided[0])
        return (
            f"With {seeds} seeds the study could reliably see only differences above {max(detectable):.2g} in "
            f"{METRIC_NAMES[results.metric]}, so it cannot claim that {who} "
            f"and {results.label(results.baseline)} are equally good."
        )
    return (
        f"This rests on {seeds} seeds, these data and this budget: it cannot claim that the order holds for another "
        "model, data set or length of training."
    )


def _detectable(row: dict) -> float:
    """The smallest difference that the test of a verdict would have found: adjusted, where that is known."""
    adjusted = row.get("smallest_detectable_adjusted", math.nan)
    return adjusted if math.isfinite(adjusted) else row["smallest_detectable_difference"]


def learned(results: Results) -> str:
    """Return one sentence: whether each trained arm's validation loss fell below that of its own untrained base."""
    rows = results.arms.loc[results.trained]
    rows = rows[rows["validation_loss"].notna() & rows["base_validation_loss"].notna()]
    if rows.empty:
        return ""
    failed = list(rows.index[rows["validation_loss"] >= rows["base_validation_loss"]])
    if failed:
        return f"Training did not lower the validation loss of {_names(results, failed)} below that of its base model."
    if len(rows) == 1:
        return "Training lowered the validation loss below that of the untrained base model."
    return "Training lowered the validation loss of every arm below that of its own untrained base model."


def pair_rows(results: Results) -> list[dict]:
    """One row a pair of arms in the primary metric, as `pairs.tsv` has them: names, cells."""
    rows = []
    for row in results.pairs[results.pairs["metric"] == results.metric].to_dict("records"):
        finite = math.isfinite(row["difference"])
        detail = f"[{decimal(row['low'])}, {decimal(row['high'])}]" if finite else ""
        difference = Cell(decimal(row["difference"], sign=True), row["difference"] if finite else "", detail=detail)
        verdict = row["verdict"] if finite else "diverged"
        p = Cell(_p_value(row["p_adjusted"]), row["p_adjusted"] if math.isfinite(row["p_adjusted"]) else "")
        names = {name: results.label(row[name]) for name in ("arm", "other")}
        rows.append(names | {"cells": [difference, Cell(verdict, verdict), p]})
    return rows


def _facts(results: Results) -> list[tuple[str, str]]:
    runs = {run["run"] for run in results.plan["runs"] if run["train"]}
    seconds = sum(results.training[run]["train_seconds"] for run in runs if run in results.training)
    counts = [(len(results.trained), "arm"), (int(results.arms["seeds"].max()), "seed"), (len(runs), "run")]
    counts.append((int(results.arms["examples"].max()), f"{results.comparison['split']} example"))
    return [
        *((name if number == 1 else f"{name}s", f"{number:,}") for number, name in counts),
        ("of training, all runs", duration(seconds)),
    ]


# ---- arms ------------------------------------------------------------------------------------------------------------

CORPUS = {"corpus_bleu": "Corpus BLEU", "corpus_chrf": "Corpus chrF"}  # 0 to 100, of the whole split at once
COSTS = {
    "peak_memory_mb": ("Memory", "peak while training, GiB"),
    "train_seconds": ("Time", "of training alone, a run"),
    "tokens_per_second": ("Tokens/s", "of training"),
    "trainable_parameters": ("Trainable", "parameters, millions"),
}


def arm_columns(results: Results) -> list[tuple[str, str]]:
    """Heads of the arms table: `(name, what it is)`."""
    better = {name: "lower is better" if name in LOWER_IS_BETTER else "higher is better" for name in METRIC_NAMES}
    columns = [("Arm", "click a head to sort"), (METRIC_NAMES[results.metric], f"mean, 95 % interval; {better['f1']}")]
    if results.metric in LOWER_IS_BETTER:
        columns[1] = (METRIC_NAMES[results.metric], f"mean, 95 % interval; {better['loss']}")
    columns += [
        ("Difference", f"to {results.label(results.baseline)}, 95 % interval"),
        ("Verdict", "p adjusted (Holm)"),
    ]
    columns += [(METRIC_NAMES[name], better[name]) for name in results.metrics if name != results.metric]
    columns += [(CORPUS[name], "0 to 100; higher is better") for name in _corpus(results)]
    return [*columns, *COSTS.values(), ("Seeds", "")]


def arm_rows(results: Results) -> list[dict]:
    """One row an arm: `arm`, `label`, the interval's place on a common axis in percent, and its cells."""
    low, high = results.arms[f"{results.metric}_low"].min(), results.arms[f"{results.metric}_high"].max()
    rows = []
    for arm in results.arms.index:
        row = results.arms.loc[arm]
        ends = [row[f"{results.metric}{end}"] for end in ("_low", "", "_high")]
        span = (high - low) or 1.0
        place = [100 * (end - low) / span for end in ends] if all(map(math.isfinite, ends)) else None
        cells = [_difference_cell(results, arm), _verdict_cell(results, arm)]
        cells += [_metric_cell(results, arm, name) for name in results.metrics if name != results.metric]
        cells += [_corpus_cell(row, name) for name in _corpus(results)]
        cells += [_cost_cell(name, row[name]) for name in COSTS]
        cells.append(Cell(str(row["seeds"] or NOTHING), int(row["seeds"])))
        estimate = _metric_cell(results, arm, results.metric)
        rows.append(
            {
                "arm": arm,
                "label": results.label(arm),
                "baseline": arm == results.baseline,
                "untrained": arm not in results.trained,
                "verdict": cells[1].text,
                "place": place,
                "estimate": estimate,
                "cells": cells,
            }
        )
    return rows


def _corpus(results: Results) -> list[str]:
    return [name for name in CORPUS if name in results.arms and results.arms[name].notna().any()]


def _corpus_cell(row: pd.Series, name: str) -> Cell:
    mean, low, high = (row[f"{name}{end}"] for end in ("", "_low", "_high"))
    detail = f"[{decimal(low, 1)}, {decimal(high, 1)}]" if math.isfinite(low) else ""
    return Cell(decimal(mean, 1), _sortable(mean), detail=detail)


def _metric_cell(results: Results, arm: str, metric: str) -> Cell:
    row = results.arms.loc[arm]
    mean, low, high = (row[f"{metric}{end}"] for end in ("", "_low", "_high"))
    detail = f"[{decimal(low)}, {decimal(high)}]" if math.isfinite(low) else ""
    return Cell(decimal(mean), _sortable(mean), arm in results.leaders.get(metric, ()), detail)


def _difference_cell(results: Results, arm: str) -> Cell:
    row = results.difference(arm, results.metric)
    if row is None or not math.isfinite(row["difference"]):
        return Cell(NOTHING, 0.0 if row is None else "")
    detail = f"[{decimal(row['low'])}, {decimal(row['high'])}]"
    return Cell(decimal(row["difference"], sign=True), row["difference"], detail=detail)


def _verdict_cell(results: Results, arm: str) -> Cell:
    row = results.difference(arm, results.metric)
    if row is None:
        return Cell("baseline", "baseline")
    if not math.isfinite(row["difference"]):
        return Cell("diverged", "diverged")
    return Cell(row["verdict"], row["verdict"], detail=_p_value(row["p_adjusted"], "p "))


def _p_value(p: float, before: str = "") -> str:
    if not math.isfinite(p):
        return NOTHING
    return f"{before}< 0.001" if p < 0.001 else f"{before}= {p:.3f}" if before else f"{p:.3f}"


def _cost_cell(name: str, value: float) -> Cell:
    if not math.isfinite(value):
        return Cell(NOTHING, "")
    text = {
        "peak_memory_mb": decimal(value / 1024, 2),
        "train_seconds": duration(value),
        "tokens_per_second": decimal(value, 0),
        "trainable_parameters": decimal(value / 1e6, 2),
    }[name]
    return Cell(text, value)


def _sortable(value: float) -> float | str:
    return float(value) if math.isfinite(value) else ""


def duration(seconds: float) -> str:
    """`42 s`, `3 min 39 s`, `2 h 05 min`."""
    if not math.isfinite(seconds):
        return NOTHING
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _colours(study_dir: Path) -> dict[str, str]:
    """The arms' colours in the figures."""
    return {arm: to_hex(colour) for arm, colour in arm_colours(load_plan(study_dir / "plan.json")).items()}


def _figures(folder: Path, names: tuple[str, ...]) -> list[dict]:
    """The figures that fit the study and were drawn, as data URIs."""
    figures = []
    for path in [path for name in names if (path := folder / f"{name}.png").exists()]:
        title, caption = CAPTIONS[path.stem]
        content = path.read_bytes()
        width, height = struct.unpack(">II", content[16:24])  # of the PNG's first chunk
        data = f"data:image/png;base64,{base64.b64encode(content).decode()}"
        size = {"width": round(width * SCREEN), "height": round(height * SCREEN)}
        figures.append({"name": path.stem, "title": title, "caption": caption, "data": data} | size)
    return figures


# ---- findings and data -----------------------------------------------------------------------------------------------


def findings(results: Results) -> list[dict]:
    """Findings of plan, comparison, data and provenance, each once, errors first."""
    found = [*results.plan.get("findings", []), *results.comparison.get("findings", [])]
    for report in results.data.values():
        found += report.get("findings", []) + ((report.get("clean") or {}).get("findings") or [])
    dirty = sorted({run for run, record in results.provenance.items() if record.get("dirty")})
    if dirty:
        message = f"{counted(len(dirty), 'run')} of a checkout with changes that were not committed"
        mend = "commit, then train again, before you publish"
        found.append({"severity": "warning", "place": "provenance", "message": message, "mend": mend})
    found += _types_left_to_machines(results)
    unique = {tuple(sorted((key, str(value)) for key, value in finding.items())): finding for finding in found}
    rank = {severity: index for index, severity in enumerate(SEVERITIES)}
    return sorted(unique.values(), key=lambda finding: rank.get(finding.get("severity", "note"), len(rank)))


def _types_left_to_machines(results: Results) -> list[dict]:
    """Tell of runs that left it to model and machine what to compute in, and got different types."""
    types: dict[str, int] = {}
    for run, summary in results.training.items():
        settings = results.settings.get(run, {})
        arguments, stored = settings.get("training_args") or {}, (settings.get("model") or {}).get("dtype")
        said = "bf16" in arguments or arguments.get("fp16") or settings.get("quantization_config")
        if not said and stored == "float32" and summary.get("compute_dtype"):
            types[summary["compute_dtype"]] = types.get(summary["compute_dtype"], 0) + 1
    if len(types) < 2:
        return []
    message = "not set, and the runs computed in different types: " + ", ".join(
        f"{counted(number, 'run')} in {name}" for name, number in sorted(types.items())
    )
    mend = "set it in the recipe to train all in one type: a part of their differences may be rounding"
    return [{"severity": "warning", "place": "training_args.bf16", "message": message, "mend": mend}]


def advice(results: Results) -> dict:
    """What `advice.json` says: `entries` (severity, place, message, mend, change, evidence as texts), `next_study`,
    `changes`."""
    found = results.advice.get("advice", [])
    rank = {severity: index for index, severity in enumerate(SEVERITIES)}
    entries = [
        {key: entry.get(key) or "" for key in ("severity", "place", "message", "mend")}
        | {
            "change": _change(entry.get("change")),
            "evidence": [_evidence(fact) for fact in entry.get("evidence") or []],
        }
        for entry in sorted(found, key=lambda entry: rank.get(entry.get("severity"), len(rank)))
    ]
    next_study = results.advice.get("next_study")
    return {"entries": entries, "next_study": next_study, "changes": results.advice.get("changes") or []}


def _change(change: dict | None) -> str:
    return f"{change['key']}: {plain(change.get('from'))} → {plain(change.get('to'))}" if change else ""


def _evidence(fact: dict) -> str:
    step = "" if fact.get("step") is None else f" at step {fact['step']}"
    limit = "" if fact.get("threshold") is None else f" (threshold {_short(fact['threshold'])})"
    return f"{fact.get('run', '')}{step}: {fact.get('what', '')} {_short(fact.get('value'))}{limit}"


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else plain(value)


def data_reports(results: Results) -> list[dict]:
    """One entry a token set: the arms that use it, rows by split, reasons, leaks and examples of what cleaning did."""
    arms: dict[str, list[str]] = {}
    for run in results.plan["runs"]:
        users = arms.setdefault(run["tokens"], [])
        if run["train"] and results.label(run["arm"]) not in users:
            users.append(results.label(run["arm"]))
    return [_data_report(name, arms.get(name, []), report) for name, report in results.data.items()]


def _data_report(name: str, arms: list[str], report: dict) -> dict:
    clean = report.get("clean") or {}
    steps = {split: clean.get("steps", {}).get(split, {}) for split in report["splits"]}
    left_out = {
        split: {step: counts["rejected"] for step, counts in steps[split].items()} | facts["dropped"]
        for split, facts in report["splits"].items()
    }
    mended = {split: {step: counts["changed"] for step, counts in found.items()} for split, found in steps.items()}
    imported = clean.get("rows", {})
    return {
        "name": name,
        "arms": arms,
        "limits": report["limits"],
        "splits": [_split_row(split, facts, imported.get(split, {})) for split, facts in report["splits"].items()],
        "columns": list(report["splits"]),
        "left_out": _by_split(left_out),
        "mended": _by_split(mended),
        "leaks": _leak_rows(clean.get("leaks") or {}),
        "leaks_left": (clean.get("leaks") or {}).get("rows_left"),
        "examples": {_words(step): shown for step, shown in (clean.get("examples") or {}).items() if shown},
    }


def _split_row(split: str, facts: dict, imported: dict) -> list[str]:
    """The cells of :data:`SPLIT_COLUMNS`."""
    rows = facts["rows"]
    counts = [imported.get(key) for key in ("in", "rejected", "not_sampled")] + [facts["rows_in"], rows]
    return [
        split,
        *(NOTHING if count is None else f"{count:,}" for count in counts),
        _share(facts["truncated_prompts"], rows),
        _share(facts["truncated_answers"], rows),
        _share(facts.get("end_lost", 0), rows),
        f"{facts['label_tokens']:,}",
        _quantiles(facts.get("prompt_lengths")),
        _quantiles(facts.get("answer_lengths")),
    ]


def _by_split(counts: dict[str, dict[str, int]]) -> list[tuple[str, list[str]]]:
    """Counts of each split as rows `(name, a text a split)`; what happened nowhere is left out."""
    names = list(dict.fromkeys(name for found in counts.values() for name in found))
    return [
        (_words(name), [f"{found.get(name, 0):,}" for found in counts.values()])
        for name in names
        if any(found.get(name) for found in counts.values())
    ]


def _leak_rows(leaks: dict) -> list[tuple[str, list[str]]]:
    """Rows of train that share a question or answer with held-out rows: found, distinct texts, left in train."""
    return [
        (f"{kind} also in {split}", [f"{n:,}" for n in (count["train_rows"], count["distinct"], left["train_rows"])])
        for kind, splits in leaks.get("found", {}).items()
        for split, count in splits.items()
        if (left := leaks["left"][kind][split])
    ]


def _share(count: int, rows: int) -> str:
    return f"{count:,} ({100 * count / rows:.1f} %)" if rows and count else f"{count:,}"


def _quantiles(lengths: dict | None) -> str:
    quantiles = (lengths or {}).get("quantiles") or {}
    values = [quantiles.get(key) for key in ("50", "99", "max")]
    return " / ".join(NOTHING if value is None else f"{value:,.0f}" for value in values)


def _words(key: str) -> str:
    return key.replace("_", " ").replace(".", ": ")


# ---- training and provenance -----------------------------------------------------------------------------------------


def training_rows(results: Results) -> list[dict]:
    """One row a trained run: those that represent their arm first marked as `chosen`."""
    rows, seen = [], set()
    for run in results.plan["runs"]:
        if not run["train"] or (run["run"], run["arm"]) in seen:
            continue
        seen.add((run["run"], run["arm"]))
        rows.append(_training_row(results, run) | {"chosen": run["run"] in results.selected_runs(run["arm"])})
    return rows


def _training_row(results: Results, run: dict) -> dict:
    summary = results.training.get(run["run"], {})
    before, after = summary.get("base_eval_loss"), summary.get("final_eval_loss")
    memory = summary.get("peak_memory_mb")
    return {
        "run": run["run"],
        "arm": results.label(run["arm"]),
        "tuned": ", ".join(f"{_words(key)} {value}" for key, value in run["tuned"].items()) or NOTHING,
        "seed": plain(run["seed"]),
        "batch": batch_product(run),
        "steps": plain(summary.get("steps", run.get("steps"))),
        "epochs": plain(summary.get("epochs", run.get("epochs"))),
        "label_tokens": plain(summary.get("label_tokens", run.get("label_tokens"))),
        "loss": f"{decimal(before)} → {decimal(after)}",
        "time": duration(summary.get("train_seconds", math.nan)),
        "speed": decimal(summary.get("tokens_per_second"), 0),
        "memory": decimal(None if memory is None else memory / 1024, 2),
        "device": " · ".join(str(summary[key]) for key in ("device", "dtype", "compute_dtype") if summary.get(key)),
        "notes": "; ".join(summary.get("notes") or []),
        "sort": _training_sort(run, summary),
    }


def _training_sort(run: dict, summary: dict) -> dict[str, float | str]:
    """What the columns with numbers sort by; nothing for a number that is not there."""
    keys = {"loss": "final_eval_loss", "time": "train_seconds", "speed": "tokens_per_second"}
    keys |= {"memory": "peak_memory_mb", "steps": "steps", "epochs": "epochs", "label_tokens": "label_tokens"}
    values = {name: summary.get(key) for name, key in keys.items()} | {"batch": run.get("effective_batch_size")}
    return {name: "" if value is None or not math.isfinite(value) else value for name, value in values.items()}


def tuned_rows(results: Results) -> list[dict]:
    """One row a tuned level of each arm that has more than one: its validation value, and whether it was chosen."""
    rows = []
    for arm in results.trained:
        selection = results.comparison["selected"][arm]
        if len(selection["levels"]) < 2:
            continue
        for level in selection["levels"]:
            rows.append(
                {
                    "arm": results.label(arm),
                    "level": ", ".join(f"{_words(key)} {value}" for key, value in level["tuned"].items()),
                    "validation": "diverged" if level["diverged"] else decimal(level["validation"], 4),
                    "chosen": level["tuned"] == selection["tuned"],
                }
            )
    return rows


def provenance(results: Results) -> dict:
    """What all runs share, and what differs: `common` (name -> text), `columns`, `rows` (run, texts), `packages`."""
    records = {run: _provenance_record(record) for run, record in results.provenance.items()}
    names = list(dict.fromkeys(name for record in records.values() for name in record))
    common, differing = {}, []
    for name in names:
        values = {record.get(name, NOTHING) for record in records.values()}
        if len(values) == 1:
            common[name] = values.pop()
        elif name != "run":
            differing.append(name)
    rows = [(run, [record.get(name, NOTHING) for name in differing]) for run, record in records.items()]
    packages = {key: value for key, value in common.items() if key.startswith(("packages: ", "versions: "))}
    return {
        "common": {key: value for key, value in common.items() if key not in packages},
        "packages": {key.split(": ", 1)[1]: value for key, value in packages.items()},
        "columns": differing,
        "rows": rows,
    }


def _provenance_record(record: dict) -> dict[str, str]:
    """One run's record as name -> text. Files keep their names, and weights go by theirs alone, without the run's
    folder: all runs then have the same lines."""
    outputs, versions = record.get("outputs") or {}, record.get("data_version") or {}
    files = {f"weights: {PurePosixPath(path).name}": digest for path, digest in outputs.items()}
    files |= {f"data version: {path}": digest for path, digest in versions.items()}
    facts = {key: value for key, value in record.items() if key not in ("outputs", "data_version")}
    return {_words(key): plain(value) for key, value in flatten(facts).items() if value is not None} | files
