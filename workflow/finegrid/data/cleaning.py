"""Cleaning: mend texts, then reject what is empty, out of bounds, double or leaked, then draw the rows to use.

Reads the imported splits; writes ``train, validation, test .jsonl``, ``rejects.jsonl`` (every row that is not in them,
with its reason), ``report.json`` and ``timing.json``. The steps run in the order of the settings' ``cleaning``
section. The first pass mends texts, in ``num_proc`` processes, and keeps some hundred bytes a row: digests decide
the rest. The report depends on data and settings alone, seconds are kept apart in ``timing.json``.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finegrid.data.leakage import HELD_OUT, NOTHING, HeldOut, count_leaks
from finegrid.data.mending import Entry, mend_split, text_of
from finegrid.data.rows import (
    SPLITS,
    Progress,
    draw_order,
    every_few_seconds,
    partial_folder,
    publish,
    quiet,
    to_line,
)
from finegrid.data.texts import TEXT_STEPS
from finegrid.errors import UserError
from finegrid.files import write_json

if TYPE_CHECKING:
    from finegrid.settings import DataConfig, RunSettings

BOUNDS = ("min_prompt_chars", "max_prompt_chars", "min_answer_chars", "max_answer_chars")
LEAK_STEPS = {"question": "leaked_questions", "answer": "leaked_answers"}
TRAIN_STEPS = ("near_duplicates", *LEAK_STEPS.values(), "leaked_near")
NOT_SAMPLED = "not_sampled"
FAILED = ("failed-rejects.jsonl", "failed-report.json")
EXAMPLES = 3
QUANTILES = (50, 90, 99)

Rows = dict[str, list[Entry]]


def clean(settings: RunSettings, imported: Path, output: Path, progress: Progress = quiet) -> dict[str, Any]:
    """Clean an imported data set and return its report, with ``seconds`` and ``rows_per_second``.

    Args:
        settings: only ``data_config`` is read.
        imported: what :func:`finegrid.data.importing.import_data` wrote.
        output: folder for ``{train,validation,test}.jsonl``, ``rejects.jsonl``, ``report.json``, ``timing.json``.
        progress: told about every 5 s how far it is.

    Raises:
        UserError: more of train is rejected than ``limits.dropped`` allows, more rows leak than ``limits.leaked``
            allows, or nothing is left. Report and rejects are then in ``output`` as ``failed-report.json`` and
            ``failed-rejects.jsonl``.
    """
    started = time.perf_counter()
    config = settings.data_config
    with partial_folder(output) as partial:
        rows, report = _clean(config, imported, partial, every_few_seconds(progress))
        for name in FAILED:
            (output / name).unlink(missing_ok=True)
        problems = _past_limits(config, rows, report)
        if problems:
            (partial / "rejects.jsonl").replace(partial / FAILED[0])
            write_json(partial / FAILED[1], report)
            publish(partial, output, FAILED)
            where = f"{output / FAILED[1]}, the rejected rows in {output / FAILED[0]}"
            raise UserError(*problems, f"the report is in {where}")
        total = sum(report["rows"][split]["in"] for split in SPLITS)
        seconds = time.perf_counter() - started
        timing = {"seconds": round(seconds, 3), "rows_per_second": round(total / seconds, 1)}
        write_json(partial / "report.json", report)
        write_json(partial / "timing.json", timing)
        names = [*(f"{split}.jsonl" for split in SPLITS), "rejects.jsonl", "timing.json", "report.json"]
        publish(partial, output, names)
    return report | timing


def _clean(config: DataConfig, imported: Path, partial: Path, progress: Progress) -> tuple[Rows, dict[str, Any]]:
    """Write the splits and the rejects into ``partial``; return all rows with what became of them, and the report."""
    cleaning = config.cleaning
    sketch_for = {"train": cleaning.near_duplicates or cleaning.leaked_near}
    rows, changed, examples = {}, {}, {}
    for split in SPLITS:
        mended = mend_split(
            imported / f"{split}.jsonl",
            partial / f"mended-{split}.jsonl",
            steps=[step for step in TEXT_STEPS if getattr(cleaning, step)],
            sketch=sketch_for.get(split, cleaning.leaked_near),
            num_proc=config.num_proc,
            progress=lambda done, split=split: progress(f"{split}: {done:,} rows mended"),
        )
        rows[split], changed[split] = mended.entries, mended.changed
        for step, found in mended.examples.items():
            examples[step] = [*examples.get(step, []), *found][:EXAMPLES]
    texts = {split: partial / f"mended-{split}.jsonl" for split in SPLITS}
    found = _reject(cleaning, rows, texts, progress)
    _draw(config, rows)
    _write(rows, texts, partial)
    return rows, _report(config, imported, rows, changed, examples, found)


# ---------------------------------------------------------------- rejecting


def _reject(cleaning: Any, rows: Rows, texts: dict[str, Path], progress: Progress) -> dict[str, Any]:
    """Give every row that a step rejects its step and reason; return what was found on the way."""
    for split in SPLITS:
        for row in rows[split]:
            if cleaning.empty and row.empty:
                row.reject("empty", f"empty_{row.empty}")
            _check_bounds(cleaning, row)
    duplicates = {split: _exact_duplicates(rows[split], cleaning.exact_duplicates) for split in SPLITS}
    if cleaning.near_duplicates:
        _near_duplicates(_alive(rows["train"]), cleaning.near_duplicate_threshold, texts["train"], progress)
    held_out = HeldOut({split: _alive(rows[split]) for split in HELD_OUT})
    leaks = {row.id: held_out.leaks(row) for row in _alive(rows["train"])}
    found = count_leaks(leaks.values())
    for kind, step in LEAK_STEPS.items():
        if getattr(cleaning, step):
            for row in _alive(rows["train"]):
                first = next((leak for leak in leaks[row.id] if leak.kind == kind), None)
                if first:
                    row.reject(step, first.reason())
    if cleaning.leaked_near:
        _near_leaks({split: _alive(rows[split]) for split in SPLITS}, cleaning, texts, progress)
    return {
        "exact": duplicates,
        "leaks": leaks,
        "found": found,
        "overlap": held_out.overlap(_alive(rows["validation"])),
    }


def _alive(rows: Sequence[Entry]) -> list[Entry]:
    return [row for row in rows if row.step is None]


def _check_bounds(cleaning: Any, row: Entry) -> None:
    for bound in BOUNDS:
        limit = getattr(cleaning, bound)
        size = row.prompt_chars if "prompt" in bound else row.answer_chars
        if limit is not None and (size < limit if bound.startswith("min") else size > limit):
            row.reject(bound, f"{bound}: {size} characters")


def _exact_duplicates(rows: list[Entry], reject: bool) -> int:
    """Return the number of rows whose messages an earlier row of the split has too, case and white space aside."""
    first: dict[bytes, str] = {}
    count = 0
    for row in _alive(rows):
        known = first.setdefault(row.messages, row.id)
        if known is not row.id:
            count += 1
            if reject:
                row.reject("exact_duplicates", f"exact_duplicate of {known}")
    return count


def _near_duplicates(rows: list[Entry], threshold: float, path: Path, progress: Progress) -> None:
    from finegrid.data.duplicates import Index

    with path.open("rb") as file:
        index = Index(threshold, lambda number: text_of(file, rows[number]))
        for number, row in enumerate(rows):
            found = index.find(number, row.sketch)
            if found:
                other, similarity = rows[found[0]].id, found[1]
                row.reject("near_duplicates", f"near_duplicate of {other} (Jaccard {similarity:.2f})")
            else:
                index.add(number, row.sketch)
            progress(f"train: {number:,} of {len(rows):,} rows compared")


def _near_leaks(rows: Rows, cleaning: Any, texts: dict[str, Path], progress: Progress) -> None:
    from finegrid.data.duplicates import Index

    numbered = [(split, row) for split in (*HELD_OUT, "train") for row in rows[split]]
    files = {split: path.open("rb") for split, path in texts.items()}
    try:
        index = Index(
            cleaning.near_duplicate_threshold,
            lambda number: text_of(files[numbered[number][0]], numbered[number][1]),
        )
        for number, (split, row) in enumerate(numbered):
            if split != "train":
                index.add(number, row.sketch)
                continue
            found = index.find(number, row.sketch)
            if found:
                place, other = numbered[found[0]]
                reason = f"leak: near duplicate in {place} ({other.id}, Jaccard {found[1]:.2f})"
                row.reject("leaked_near", reason)
            progress(f"train: {number:,} of {len(numbered):,} rows compared with held-out rows")
    finally:
        for file in files.values():
            file.close()


# ---------------------------------------------------------------- drawing


def _draw(config: DataConfig, rows: Rows) -> None:
    """Mark the rows that are not drawn; the draw depends on seed and ids, and a larger one holds the smaller."""
    for split in SPLITS:
        left = _alive(rows[split])
        wanted = len(left)
        if split == "train" and config.train_fraction is not None:
            wanted = max(1, round(config.train_fraction * wanted))
        wanted = min(wanted, getattr(config, f"max_{split}_samples") or wanted)
        if wanted < len(left):
            left.sort(key=lambda row: draw_order(config.sample_seed, "sample", row.id))
            for row in left[wanted:]:
                row.reject(NOT_SAMPLED, NOT_SAMPLED)


# ---------------------------------------------------------------- writing


def _write(rows: Rows, texts: dict[str, Path], partial: Path) -> None:
    with (partial / "rejects.jsonl").open("wb") as rejects:
        for split in SPLITS:
            with texts[split].open("rb") as lines, (partial / f"{split}.jsonl").open("wb") as kept:
                for row, line in zip(rows[split], lines, strict=True):
                    if row.step is None:
                        kept.write(line)
                        continue
                    head = {"id": row.id, "split": split, "stage": "clean", "step": row.step, "reason": row.reason}
                    # The row is JSON already: it goes in as it is.
                    rejects.write(to_line(head)[:-2] + b', "row": ' + line[:-1] + b"}\n")


def _report(
    config: DataConfig,
    imported: Path,
    rows: Rows,
    changed: dict[str, Counter],
    examples: dict[str, list[dict[str, str]]],
    found: dict[str, Any],
) -> dict[str, Any]:
    source = json.loads((imported / "report.json").read_text(encoding="utf-8"))
    left = [found["leaks"][row.id] for row in _alive(rows["train"])]
    return {
        "dataset": source["dataset"],
        "format": sorted({file["format"] for files in source["files"].values() for file in files if "format" in file}),
        "encoding": source["encoding"],
        "rows": {split: _row_counts(rows[split]) for split in SPLITS},
        "steps": {split: _step_counts(config.cleaning, split, rows[split], changed[split]) for split in SPLITS},
        "duplicates": {
            split: {"exact_duplicate_rows": found["exact"][split]} | _question_counts(rows[split]) for split in SPLITS
        },
        "leaks": {
            "found": found["found"],
            "left": count_leaks(left),
            "rows_left": sum(1 for leaks in left if leaks),
            "validation_in_test": found["overlap"],
        },
        "characters": {split: _lengths(_alive(rows[split])) for split in SPLITS},
        "examples": examples | _reject_examples(rows),
        "cleaning": config.cleaning.model_dump(),
        "import": source,
    }


def _row_counts(rows: list[Entry]) -> dict[str, int]:
    steps = Counter(row.step for row in rows)
    not_sampled = steps[NOT_SAMPLED]
    return {
        "in": len(rows),
        "out": steps[None],
        "rejected": len(rows) - steps[None] - not_sampled,
        NOT_SAMPLED: not_sampled,
    }


def _step_counts(cleaning: Any, split: str, rows: list[Entry], changed: Counter) -> dict[str, dict[str, int]]:
    """Return step -> rows changed and rejected, of the steps that are switched on and look at the split."""
    rejected = Counter(row.step for row in rows)
    steps = [step for step in type(cleaning).model_fields if step != "near_duplicate_threshold"]
    return {
        step: {"changed": changed[step], "rejected": rejected[step]}
        for step in steps
        if getattr(cleaning, step) not in (False, None) and (split == "train" or step not in TRAIN_STEPS)
    }


def _question_counts(rows: list[Entry]) -> dict[str, int]:
    """Return the distinct questions and answers, and how often a question comes again.

    A question with several answers is in several rows, one behind the other: that is one entry. A question that
    comes again after others were asked is a duplicate.
    """
    questions = [row.turns[-1][0] for row in rows if row.turns[-1][0] != NOTHING]
    entries = sum(1 for before, question in zip([None, *questions], questions, strict=False) if question != before)
    distinct = len(set(questions))
    return {
        "distinct_questions": distinct,
        "distinct_answers": len({row.turns[-1][1] for row in rows} - {NOTHING}),
        "duplicate_questions": entries - distinct,
        "rows_with_a_question_seen_before": len(questions) - distinct,
    }


def _lengths(rows: list[Entry]) -> dict[str, dict[str, int]]:
    """Return the quantiles (nearest rank) of the characters of prompts and answers."""
    lengths = {"prompt": sorted(row.prompt_chars for row in rows), "answer": sorted(row.answer_chars for row in rows)}
    return {
        side: {str(q): sizes[max(0, -(-q * len(sizes) // 100) - 1)] for q in QUANTILES} | {"max": sizes[-1]}
        for side, sizes in lengths.items()
        if sizes
    }


def _reject_examples(rows: Rows) -> dict[str, list[dict[str, str]]]:
    examples: dict[str, list[dict[str, str]]] = {}
    for split in SPLITS:
        for row in rows[split]:
            if row.step not in (None, NOT_SAMPLED) and len(examples.setdefault(row.step, [])) < EXAMPLES:
                examples[row.step].append({"id": row.id, "reason": row.reason})
    return examples


# ---------------------------------------------------------------- limits


def _past_limits(config: DataConfig, rows: Rows, report: dict[str, Any]) -> list[str]:
    """Return what is past the limits, with numbers and what to change."""
    problems = []
    counts = report["rows"]["train"]
    by_step = Counter(row.step for row in rows["train"] if row.step not in (None, NOT_SAMPLED))
    reasons = ", ".join(f"{step} {count:,}" for step, count in by_step.most_common())
    limit = config.limits.dropped
    if not counts["in"]:
        problems.append("train: there are no imported rows; expected some")
    elif not counts["out"]:
        problems.append(
            f"train: all {counts['in']:,} imported rows are rejected ({reasons}); expected rows to train on"
        )
    elif counts["rejected"] > limit * counts["in"]:
        share = counts["rejected"] / counts["in"]
        problems.append(
            f"train: {counts['rejected']:,} of {counts['in']:,} imported rows ({share:.1%}) are rejected ({reasons}); "
            f"data_config.limits.dropped allows {limit:.1%}: mend the data, switch off the step that rejects too much "
            "(data_config.cleaning), or raise the limit"
        )
    for split in HELD_OUT:
        if report["rows"][split]["in"] and not report["rows"][split]["out"]:
            problems.append(f"{split}: all {report['rows'][split]['in']:,} imported rows are rejected; expected some")
    leaked = report["leaks"]["rows_left"]
    if leaked > config.limits.leaked:
        problems.append(_leak_problem(config, report, leaked))
    return problems


def _leak_problem(config: DataConfig, report: dict[str, Any], leaked: int) -> str:
    where = ", ".join(
        f"{count['train_rows']:,} an {kind} that is in {split}".replace("an question", "a question")
        for kind, splits in report["leaks"]["left"].items()
        for split, count in splits.items()
        if count["train_rows"]
    )
    off = [step for step in LEAK_STEPS.values() if not getattr(config.cleaning, step)]
    switch = " and ".join(f"data_config.cleaning.{step}" for step in off)
    return (
        f"train: {leaked:,} rows that are left leak held-out rows ({where}); data_config.limits.leaked allows "
        f"{config.limits.leaked:,}: switch on {switch}, or raise the limit"
    )
