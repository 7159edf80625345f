"""Answers of several runs that adapt one base, generated in batches of all their rows.

Used where one process scores several runs (:mod:`finegrid.packing`); what it gives goes to
:func:`finegrid.evaluation.evaluate.evaluate`. A batch is full where one run alone has few rows left, and the base is
read once for all of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from finegrid.evaluation.decoding import can_decode
from finegrid.evaluation.evaluate import Answers, device_of, paced, questions, read_rows
from finegrid.evaluation.generation import generate_answers_of_all
from finegrid.training.adapters import ManyAdapters, why_not_plain

if TYPE_CHECKING:
    from finegrid.settings import RunSettings
    from finegrid.training.resident import ResidentBase

Runs = Mapping[str, tuple["RunSettings", Path]]


def answers_of_all(
    runs: Runs,
    tokens: Path,
    clean: Path,
    model: Path,
    base: ResidentBase,
    most_rows: int,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Answers]:
    """Generate the answers of several runs that adapt one base on the same tokens, in batches of all their rows.

    Args:
        runs: settings and adapter's folder, by id. Those whose answers can't be made with others' are left out of
            what is returned: sampled ones, and adapters that are more than a low-rank update.
        most_rows: rows of a batch at most.
    """
    found: dict[str, Answers] = {}
    by_settings: dict[str, list[str]] = {}
    for run, (settings, _) in runs.items():
        if settings.evaluation.generate:
            same = [settings.generation_config, settings.max_output_length, settings.evaluation.split]
            by_settings.setdefault(json.dumps(same, sort_keys=True), []).append(run)
    for names in by_settings.values():
        found |= _answers_together(
            {name: runs[name] for name in names}, tokens, clean, model, base, most_rows, progress
        )
    return found


def _answers_together(
    runs: Runs,
    tokens: Path,
    clean: Path,
    model: Path,
    base: ResidentBase,
    most_rows: int,
    progress: Callable[[str], None],
) -> dict[str, Answers]:
    settings = next(iter(runs.values()))[0]
    split, device = settings.evaluation.split, device_of(settings)
    rows = read_rows(tokens, clean, split)
    tokenizer, prompts, config = questions(settings, model, rows)
    if not can_decode(config) or not rows:
        return {}
    adapters = ManyAdapters(base.base(settings, model, device).eval())
    for name, (own, folder) in runs.items():
        trained = base.load(own, model, folder, device)
        if why_not_plain(trained) is None:
            adapters.add(name, trained)
    names = [name for name in runs if name in adapters]
    if len(names) < 2:
        return {}
    start = time.perf_counter()
    most = min(most_rows, max(own.evaluation.batch_size for own, _ in runs.values()) * len(names))
    say = paced(lambda line: progress(f"{len(names)} runs together: {line}"), split, rows * len(names))
    made = generate_answers_of_all(
        adapters, names, tokenizer, prompts, config, most, lambda done: say(done, "answers generated")
    )
    share = (time.perf_counter() - start) / max(1, sum(new_tokens for _, new_tokens in made.values()))
    return {name: Answers(texts, new_tokens, share * new_tokens) for name, (texts, new_tokens) in made.items()}
