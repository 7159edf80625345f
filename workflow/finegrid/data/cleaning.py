"""Cleaning: mend texts, then reject what is empty, out of bounds, double or leaked, then draw the rows to use.

Reads the imported splits; writes ``train, validation, test .jsonl``, ``rejects.jsonl`` (every row that is not in them,
with its reason), ``report.json`` and ``timing.json``. The steps run in the order of the settings' ``cleaning``
section. The first pass mends texts, in ``num_proc`` processes, and keeps about a hundred bytes a row: digests decide
the rest, and the keys by which near duplicates are found wait in files. The report depends on data and settings alone,
seconds are kept apart in ``timing.json``.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finegrid.data.leakage import HELD_OUT, KINDS, NOTHING, HeldOut, Leak, count_leaks
from finegrid.data.mending import DIGEST, Row, Rows, mend_split
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

Splits = dict[str, Rows]


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


def _clean(config: DataConfig, imported: Path, partial: Path, progress: Progress) -> tuple[Splits, dict[str, Any]]:
    """Write the splits and the rejects into ``partial``; return all rows with what became of them, and the report."""
    cleaning = config.cleaning
    keys = _band_keys(cleaning, partial)
    rows, changed, examples = {}, {}, {}
    for split in SPLITS:
        mended = mend_split(
            imported / f"{split}.jsonl",
            partial / f"mended-{split}.jsonl",
            steps=[step for step in TEXT_STEPS if getattr(cleaning, step)],
            keys=keys.get(split),
            num_proc=config.num_proc,
            progress=lambda done, split=split: progress(f"{split}: {done:,} rows mended"),
        )
        rows[split], changed[split] = mended.rows, mended.changed
        for step, found in mended.examples.items():
            examples[step] = [*examples.get(step, []), *found][:EXAMPLES]
    texts = {split: partial / f"mended-{split}.jsonl" for split in SPLITS}
    found = _reject(cleaning, rows, texts, keys, progress)
    _draw(config, rows)
    _write(rows, texts, partial)
    return rows, _report(config, imported, rows, changed, examples, found)


def _band_keys(cleaning: Any, partial: Path) -> dict[str, Any]:
    """Return where the splits that are searched for near duplicates keep the keys of their rows."""
    searched = SPLITS if cleaning.leaked_near else SPLITS[:1] if cleaning.near_duplicates else ()
    if not searched:
        return {}
    from finegrid.data.duplicates import BandKeys

    return {split: BandKeys(cleaning.near_duplicate_threshold, partial / f"keys-{split}") for split in searched}


# ---------------------------------------------------------------- rejecting


def _reject(
    cleaning: Any, rows: Splits, texts: dict[str, Path], keys: dict[str, Any], progress: Progress
) -> dict[str, Any]:
    """Give every row that a step rejects its step and reason; return what was found on the way."""
    for split in SPLITS:
        if cleaning.empty:
            for number, side in rows[split].empty():
                rows[split].reject(number, "empty", f"empty_{side}")
        _check_bounds(cleaning, rows[split])
    duplicates = {split: _exact_duplicates(rows[split], cleaning.exact_duplicates) for split in SPLITS}
    if cleaning.near_duplicates:
        _near_duplicates(rows["train"], cleaning.near_duplicate_threshold, texts["train"], keys["train"], progress)
    held_out = HeldOut({split: list(_alive(rows[split])) for split in HELD_OUT})
    leaks = _leaks(rows["train"], held_out)
    found = count_leaks(leaks.values())
    for kind, step in LEAK_STEPS.items():
        if getattr(cleaning, step):
            for number, leaked in leaks.items():
                first = next((leak for leak in leaked if leak.kind == kind), None)
                if first:
                    rows["train"].reject(number, step, first.reason())
    if cleaning.leaked_near:
        _near_leaks(rows, cleaning.near_duplicate_threshold, texts, keys, progress)
    return {
        "exact": duplicates,
        "leaks": leaks,
        "found": found,
        "overlap": held_out.overlap(list(_alive(rows["validation"]))),
    }


def _alive(rows: Rows) -> Iterator[Row]:
    return map(rows.row, rows.alive().tolist())


def _check_bounds(cleaning: Any, rows: Rows) -> None:
    for bound in BOUNDS:
        limit = getattr(cleaning, bound)
        if limit is None:
            continue
        sizes = rows.prompt_chars if "prompt" in bound else rows.answer_chars
        past = sizes < limit if bound.startswith("min") else sizes > limit
        for number in np.flatnonzero(past).tolist():
            rows.reject(number, bound, f"{bound}: {sizes[number]} characters")


def _exact_duplicates(rows: Rows, reject: bool) -> int:
    """Return the number of rows whose messages an earlier row of the split has too, case and white space aside."""
    alive = rows.alive()
    _, first, same = np.unique(rows.messages[alive], return_index=True, return_inverse=True)
    doubles = np.flatnonzero(first[same] != np.arange(len(alive)))
    for double in doubles.tolist() if reject else ():
        known = rows.id(alive[first[same[double]]])
        rows.reject(int(alive[double]), "exact_duplicates", f"exact_duplicate of {known}")
    return len(doubles)


def _near_duplicates(rows: Rows, threshold: float, path: Path, keys: Any, progress: Progress) -> None:
    from finegrid.data.duplicates import Index

    alive = rows.alive()
    with path.open("rb") as file:
        bands = (band[alive] for band in keys.bands())
        index = Index(threshold, bands, lambda number: rows.text(file, alive[number]))
        for number in range(len(alive)):
            found = index.find(number)
            if found:
                other, similarity = rows.id(alive[found[0]]), found[1]
                reason = f"near_duplicate of {other} (Jaccard {similarity:.2f})"
                rows.reject(int(alive[number]), "near_duplicates", reason)
            else:
                index.add(number)
            progress(f"train: {number:,} of {len(alive):,} rows compared")


def _leaks(train: Rows, held_out: HeldOut) -> dict[int, list[Leak]]:
    """Return row number -> what it leaks, of the rows that leak."""
    suspects = [
        train.turn_of(np.flatnonzero(np.isin(train.turns[:, part], held_out.texts(kind))))
        for part, kind in enumerate(KINDS)
    ]
    leaking = np.intersect1d(np.concatenate(suspects), train.alive())
    leaks = {number: held_out.leaks(train.row(number)) for number in leaking.tolist()}
    return {number: found for number, found in leaks.items() if found}


def _near_leaks(
    rows: Splits, threshold: float, texts: dict[str, Path], keys: dict[str, Any], progress: Progress
) -> None:
    from finegrid.data.duplicates import Index

    numbered = [(split, number) for split in (*HELD_OUT, "train") for number in rows[split].alive().tolist()]
    alive = {split: rows[split].alive() for split in SPLITS}
    bands = (
        np.concatenate([band[alive[split]] for split, band in zip((*HELD_OUT, "train"), parts, strict=True)])
        for parts in zip(*(keys[split].bands() for split in (*HELD_OUT, "train")), strict=True)
    )
    with ExitStack() as stack:
        files = {split: stack.enter_context(path.open("rb")) for split, path in texts.items()}

        def read(number: int) -> str:
            split, row = numbered[number]
            return rows[split].text(files[split], row)

        index = Index(threshold, bands, read)
        for number, (split, row) in enumerate(numbered):
            if split != "train":
                index.add(number)
                continue
            found = index.find(number)
            if found:
                place, other = numbered[found[0]]
                reason = f"leak: near duplicate in {place} ({rows[place].id(other)}, Jaccard {found[1]:.2f})"
                rows["train"].reject(row, "leaked_near", reason)
            progress(f"train: {number:,} of {len(numbered):,} rows compared with held-out rows")


# ---------------------------------------------------------------- drawing


def _draw(config: DataConfig, rows: Splits) -> None:
    """Mark the rows that are not drawn; the draw depends on seed and ids, and a larger one holds the smaller."""
    for split in SPLITS:
        left = rows[split].alive()
        wanted = len(left)
        if split == "train" and config.train_fraction is not None:
            wanted = max(1, round(config.train_fraction * wanted))
        wanted = min(wanted, getattr(config, f"max_{split}_samples") or wanted)
        if wanted < len(left):
            places = bytearray()
            for number in left.tolist():
                places += draw_order(config.sample_seed, "sample", rows[split].id(number))
            order = np.frombuffer(places, DIGEST).argsort(kind="stable")
            rows[split].reject_all(left[order[wanted:]], NOT_SAMPLED)


# ---------------------------------------------------------------- writing


def _write(rows: Splits, texts: dict[str, Path], partial: Path) -> None:
    with (partial / "rejects.jsonl").open("wb") as rejects:
        for split in SPLITS:
            found = rows[split]
            with texts[split].open("rb") as lines, (partial / f"{split}.jsonl").open("wb") as kept:
                for number, line in zip(range(len(found)), lines, strict=True):
                    step = found.step_of(number)
                    if step is None:
                        kept.write(line)
                        continue
                    reason = found.reason(number)
                    head = {"id": found.id(number), "split": split, "stage": "clean", "step": step, "reason": reason}
                    # The row is JSON already: it goes in as it is.
                    rejects.write(to_line(head)[:-2] + b', "row": ' + line[:-1] + b"}\n")


def _report(
    config: DataConfig,
    imported: Path,
    rows: Splits,
    changed: dict[str, Counter],
    examples: dict[str, list[dict[str, str]]],
    found: dict[str, Any],
) -> dict[str, Any]:
    source = json.loads((imported / "report.json").read_text(encoding="utf-8"))
    left = [leaks for number, leaks in found["leaks"].items() if rows["train"].step_of(number) is None]
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
            "rows_left": len(left),
            "validation_in_test": found["overlap"],
        },
        "characters": {split: _lengths(rows[split]) for split in SPLITS},
        "examples": examples | _reject_examples(rows),
        "cleaning": config.cleaning.model_dump(),
        "import": source,
    }


def _row_counts(rows: Rows) -> dict[str, int]:
    steps = rows.step_counts()
    not_sampled = steps[NOT_SAMPLED]
    return {
        "in": len(rows),
        "out": steps[None],
        "rejected": len(rows) - steps[None] - not_sampled,
        NOT_SAMPLED: not_sampled,
    }


def _step_counts(cleaning: Any, split: str, rows: Rows, changed: Counter) -> dict[str, dict[str, int]]:
    """Return step -> rows changed and rejected, of the steps that are switched on and look at the split."""
    rejected = rows.step_counts()
    steps = [step for step in type(cleaning).model_fields if step != "near_duplicate_threshold"]
    return {
        step: {"changed": changed[step], "rejected": rejected[step]}
        for step in steps
        if getattr(cleaning, step) not in (False, None) and (split == "train" or step not in TRAIN_STEPS)
    }


def _question_counts(rows: Rows) -> dict[str, int]:
    """Return the distinct questions and answers, and how often a question comes again.

    A question with several answers is in several rows, one behind the other: that is one entry. A question that
    comes again after others were asked is a duplicate.
    """
    nothing = np.frombuffer(NOTHING, DIGEST)
    questions, answers = (texts[texts != nothing] for texts in rows.last_turns().T)
    entries = int((questions[1:] != questions[:-1]).sum()) + bool(len(questions))
    distinct = len(np.unique(questions))
    return {
        "distinct_questions": distinct,
        "distinct_answers": len(np.unique(answers)),
        "duplicate_questions": entries - distinct,
        "rows_with_a_question_seen_before": len(questions) - distinct,
    }


def _lengths(rows: Rows) -> dict[str, dict[str, int]]:
    """Return the quantiles (nearest rank) of the characters of prompts and answers."""
    alive = rows.alive()
    lengths = {"prompt": np.sort(rows.prompt_chars[alive]), "answer": np.sort(rows.answer_chars[alive])}
    return {
        side: {str(q): int(sizes[max(0, -(-q * len(sizes) // 100) - 1)]) for q in QUANTILES} | {"max": int(sizes[-1])}
        for side, sizes in lengths.items()
        if len(sizes)
    }


def _reject_examples(rows: Splits) -> dict[str, list[dict[str, str]]]:
    examples: dict[str, list[dict[str, str]]] = {}
    for split in SPLITS:
        found = rows[split]
        for number in np.flatnonzero(found.step).tolist():
            step = found.step_of(number)
            if step != NOT_SAMPLED and len(examples.setdefault(step, [])) < EXAMPLES:
                examples[step].append({"id": found.id(number), "reason": found.reason(number)})
    return examples


# ---------------------------------------------------------------- limits


def _past_limits(config: DataConfig, rows: Splits, report: dict[str, Any]) -> list[str]:
    """Return what is past the limits, with numbers and what to change."""
    problems = []
    counts = report["rows"]["train"]
    by_step = Counter({step: n for step, n in rows["train"].step_counts().items() if step not in (None, NOT_SAMPLED)})
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
