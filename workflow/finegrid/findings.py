"""What stands against a plan before it starts: mistakes that stop it, and what weakens the comparison it wants.

One function a finding, each over the plan's entries of runs; the same trouble of many runs is told once. A finding is
``{"severity": "error" | "warning" | "note", "place", "message", "mend"}``: the key in the study's or the recipe's file,
what was found there, and what to do. Errors stop every later stage, warnings stand in plan and report.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from finegrid.arithmetic import interval
from finegrid.power import examples_needed, smallest_detectable_difference

if TYPE_CHECKING:
    from finegrid.gpus import Gpu
    from finegrid.settings import RunSettings
    from finegrid.study import Study

Finding = dict[str, str]
Entry = dict[str, Any]

UNEQUAL_TOKENS = 0.02  # arms whose label tokens differ by more are told
EVALUATION_SHARE = 0.20  # of a run's compute that evaluations in its course may take
WANTED_SHARE = 0.10  # what a proposal brings them down to
BACKWARD = 3  # forward and backward cost three times a forward
SMALL_SHARE = 0.2  # of a run's memory, from which the batch is worth making smaller
NEAR_RATES = 10  # learning rates that lie within this factor are one range
WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")  # schedules that ignore warmup_steps
SHOWN = 4  # arms that a finding names
GIB = 2**30
ORDER = ("error", "warning", "note")


def find(
    study: Study,
    runs: Sequence[Entry],
    reports: Mapping[str, Mapping[str, Any] | None],
    settings_of: Mapping[str, RunSettings],
    hardware: Sequence[Gpu] = (),
) -> list[Finding]:
    """Return all findings about a study's plan, errors first.

    Args:
        study: the study.
        runs: the plan's entries (see :mod:`finegrid.plan`), untrained ones included.
        reports: by the name of the tokens' folder: the token report, or the preview of the raw data
            (:func:`finegrid.preview.data_preview`), or None.
        settings_of: by run id.
        hardware: the GPUs that the runs were planned for.
    """
    trained = [run for run in runs if run["train"]]
    found = [
        *_data_limits(trained, reports, settings_of),
        *_no_steps(trained),
        *_warmup(trained, settings_of),
        *_no_room(trained, settings_of, hardware),
        *_one_seed(study),
        *_unequal_tuning(study, trained),
        *_one_learning_rate(trained, settings_of),
        *_unequal_label_tokens(trained),
        *_never_fires(trained, settings_of),
        *_evaluates_too_often(trained, reports, settings_of),
        *_too_small_to_see(study, trained, reports, settings_of),
        *_early_stopping(trained, settings_of),
        *_estimated(trained, reports),
        *_unknown(trained),
    ]
    return sorted(found, key=lambda finding: ORDER.index(finding["severity"]))


# --- the data ---


def _data_limits(trained: Sequence[Entry], reports: Mapping, settings_of: Mapping[str, RunSettings]) -> list[Finding]:
    """Hold the data against the limits as they are now: they are in no id, so lowering one makes nothing anew."""
    groups: dict[tuple, list[Entry]] = {}
    for run in trained:
        groups.setdefault((run["tokens"], settings_of[run["run"]].data_config.limits), []).append(run)
    losses: dict[tuple[str, ...], list[Entry]] = {}
    for (tokens, _), group in groups.items():
        report, settings = reports.get(tokens), settings_of[group[0]["run"]]
        if report is None or not report["splits"]["train"]["rows"]:
            continue
        for loss in (*_cut_and_dropped(report["splits"]["train"], settings), *_cleaning(report, settings)):
            losses.setdefault(("clean" in report, *loss), []).extend(group)
    return [
        _finding(
            "error" if counted else "warning",
            f"data_config.limits.{key}",
            f"{allowed} allowed, but {'' if counted else 'about '}{what}{_of(group, trained)}",
            mend,
        )
        for (counted, key, allowed, what, mend), group in losses.items()
    ]


def _cut_and_dropped(train: Mapping[str, Any], settings: RunSettings) -> Iterable[tuple[str, str, str, str]]:
    limits = settings.data_config.limits
    cut, rows = train["truncated_answers"], train["rows"]
    dropped = sum(train["dropped"].values()) if isinstance(train["dropped"], Mapping) else train["dropped"]
    if cut > limits.truncated_answers * rows:
        longest = (train.get("answer_lengths") or {}).get("quantiles") or {}
        enough = f"99 % of the answers have at most {longest['99']:g} tokens" if "99" in longest else "answers fit then"
        yield (
            "truncated_answers",
            f"{limits.truncated_answers:.1%}",
            f"{cut:,} of {rows:,} answers of train are longer than max_output_length {settings.max_output_length} "
            f"({cut / rows:.1%}) and are cut",
            f"raise max_output_length ({enough}), drop long rows with data_config.truncation.output: drop, "
            "or raise the limit",
        )
    if dropped > limits.dropped * (rows + dropped):
        yield (
            "dropped",
            f"{limits.dropped:.1%}",
            f"{dropped:,} of {rows + dropped:,} rows of train are dropped for their length",
            "raise max_input_length or max_output_length, choose a data_config.truncation that cuts instead, or raise "
            "the limit",
        )


def _cleaning(report: Mapping[str, Any], settings: RunSettings) -> Iterable[tuple[str, str, str, str]]:
    if "clean" not in report:
        return
    limits, rows = settings.data_config.limits, report["clean"]["rows"]["train"]
    if rows["rejected"] > limits.dropped * rows["in"]:
        yield (
            "dropped",
            f"{limits.dropped:.1%}",
            f"cleaning rejected {rows['rejected']:,} of {rows['in']:,} rows of train",
            "look into rejects.jsonl of the clean data for the reasons, switch off the step of data_config.cleaning "
            "that goes too far, or raise the limit",
        )
    leaked = report["clean"]["leaks"]["rows_left"]
    if leaked > limits.leaked:
        yield (
            "leaked",
            f"{limits.leaked:,}",
            f"{leaked:,} rows of train share a question or an answer with validation or test",
            "let data_config.cleaning.leaked_questions and leaked_answers reject them, or raise the limit",
        )


def _no_steps(trained: Sequence[Entry]) -> list[Finding]:
    idle = [run for run in trained if run["steps"] == 0]
    if not idle:
        return []
    first = idle[0]
    at_once = first["per_device_train_batch_size"] * first["gpus"]
    message = f"no step is made{_of(idle, trained)}: {first['train_rows']:,} rows of train, {at_once:,} rows at once"
    return [
        _finding(
            "error",
            "data_config",
            message,
            "give more rows, a smaller per_device_train_batch_size, or dataloader_drop_last: false",
        )
    ]


# --- how it learns ---


def _warmup(trained: Sequence[Entry], settings_of: Mapping[str, RunSettings]) -> list[Finding]:
    long: dict[bool, list[Entry]] = {}
    for run in trained:
        steps, warmup = run["steps"], run["warmup_steps"]
        if not steps or not warmup or settings_of[run["run"]].training_arg("lr_scheduler_type") in WITHOUT_WARMUP:
            continue
        if warmup > steps / 2:
            long.setdefault(warmup >= steps, []).append(run)
    found = []
    for whole, group in long.items():
        worst = max(group, key=lambda run: run["warmup_steps"] / run["steps"])
        message = f"a warmup of {worst['warmup_steps']:,} steps in a run of {_steps([worst])}{_of(group, trained)}: "
        message += "the learning rate " + ("never gets to its full height" if whole else "rises for most of the run")
        mend = "give a share of the steps instead, such as warmup_steps: 0.05, or train longer"
        found.append(_finding("error" if whole else "warning", "training_args.warmup_steps", message, mend))
    return found


def _one_learning_rate(trained: Sequence[Entry], settings_of: Mapping[str, RunSettings]) -> list[Finding]:
    rates: dict[str, set[float]] = {"full": set(), "adapters": set()}
    for run in trained:
        kind = "full" if run["method"] == "full" else "adapters"
        rates[kind].add(settings_of[run["run"]].training_arg("learning_rate"))
    both = rates["full"] & rates["adapters"]
    every = rates["full"] | rates["adapters"]
    if not both or max(every) / min(every) >= NEAR_RATES:
        return []
    shared = ", ".join(f"{rate:g}" for rate in sorted(both))
    message = (
        f"full fine-tuning and adapters are trained at the same learning rate {shared}; the best rate of adapters is "
        "about ten times higher, so this comparison says little about the methods"
    )
    mend = "give each method a rate of its own, or search inside each arm with tune: and in_arms"
    return [_finding("warning", "training_args.learning_rate", message, mend)]


def _never_fires(trained: Sequence[Entry], settings_of: Mapping[str, RunSettings]) -> list[Finding]:
    late: dict[tuple[str, int], list[Entry]] = {}
    for run in trained:
        settings, steps = settings_of[run["run"]], run["steps"]
        for kind in ("save", "eval", "logging"):
            if not steps or settings.training_arg(f"{kind}_strategy") != "steps":
                continue
            every = interval(settings, kind, steps)
            if every > steps and not (kind == "save" and settings.training_arg("load_best_model_at_end")):
                late.setdefault((kind, every), []).append(run)
    consequence = {
        "save": "no checkpoint is written, and a killed run starts anew",
        "eval": "the validation loss is measured before and after training only",
        "logging": "only the last step is logged, so there is no learning curve",
    }
    found = []
    for (kind, every), group in late.items():
        written = any(f"{kind}_steps" in settings_of[run["run"]].training_args for run in group)
        fewest = min(run["steps"] for run in group)
        found.append(
            _finding(
                "warning" if written else "note",
                f"training_args.{kind}_steps",
                f"{every:,}{'' if written else ' (the default)'} is more than the {_steps(group)} of a run"
                f"{_of(group, trained)}: {consequence[kind]}",
                f"set {kind}_steps to {max(fewest // 4, 1)}, or to 0.25, which is four times a run",
            )
        )
    return found


def _evaluates_too_often(
    trained: Sequence[Entry], reports: Mapping, settings_of: Mapping[str, RunSettings]
) -> list[Finding]:
    """Evaluations in the course of a run; the one before it and the one after it are always made."""
    shares: list[tuple[float, Entry]] = []
    for run in trained:
        validation = _tokens(reports.get(run["tokens"]), "validation")
        if validation and run.get("tokens_seen") and run["evaluations"]:
            evaluating = (run["evaluations"] - 2) * validation
            shares.append((evaluating / (evaluating + BACKWARD * run.get("tokens_seen")), run))
    often = [(share, run) for share, run in shares if share > EVALUATION_SHARE]
    if not often:
        return []
    share, worst = max(often, key=lambda pair: pair[0])
    validation = _tokens(reports[worst["tokens"]], "validation")
    few = int(WANTED_SHARE / (1 - WANTED_SHARE) * BACKWARD * worst["tokens_seen"] / validation)
    by_steps = settings_of[worst["run"]].training_arg("eval_strategy") == "steps"
    message = (
        f"{worst['evaluations']:,} evaluations of {validation:,} tokens in {_steps([worst])}"
        f"{_of([run for _, run in often], trained)} take {share:.0%} of the compute"
    )
    every = math.ceil(worst["steps"] / (few + 1))
    mend = f"set {'' if by_steps else 'eval_strategy to steps and '}eval_steps to {every}, or lower "
    mend += "data_config.max_validation_samples"
    key = "eval_steps" if by_steps else "eval_strategy"
    return [_finding("warning", f"training_args.{key}", message, mend)]


def _early_stopping(trained: Sequence[Entry], settings_of: Mapping[str, RunSettings]) -> list[Finding]:
    stopping = [run for run in trained if settings_of[run["run"]].early_stopping]
    if not stopping:
        return []
    message = (
        f"runs may stop sooner{_of(stopping, trained)}: their steps, tokens, time and disk are the most there can be"
    )
    return [_finding("note", "early_stopping", message, "the report shows the steps that were made")]


# --- the comparison ---


def _one_seed(study: Study) -> list[Finding]:
    if len(study.seeds) > 1:
        return []
    message = "one seed: differences between arms can't be told from the luck of the seed"
    return [_finding("warning", "seeds", message, "give at least three seeds, such as seeds: [0, 1, 2]")]


def _unequal_tuning(study: Study, trained: Sequence[Entry]) -> list[Finding]:
    tried: dict[str, set[tuple]] = {}
    for run in trained:
        tried.setdefault(run["arm"], set()).add(tuple(run["tuned"].items()))
    counts = {arm: len(levels) for arm, levels in tried.items()}
    if len(set(counts.values())) < 2:
        return []
    most, least = max(counts.values()), min(counts.values())
    few = [arm for arm, count in counts.items() if count == least]
    many = [arm for arm, count in counts.items() if count == most]
    message = (
        f"{_few(many)} {'has' if len(many) == 1 else 'have'} {most} tuned levels to choose the best of, {_few(few)} "
        f"only {least}: the arm that may try more looks better"
    )
    factors = ", ".join(f"tune.{factor.name}" for factor in study.tune)
    return [
        _finding("warning", factors, message, "give every arm as many levels; in_arms gives an arm levels of its own")
    ]


def _unequal_label_tokens(trained: Sequence[Entry]) -> list[Finding]:
    seen: dict[str, Entry] = {}
    for run in trained:
        known = run["label_tokens"]
        if known is not None and (run["arm"] not in seen or known > seen[run["arm"]]["label_tokens"]):
            seen[run["arm"]] = run
    if len(seen) < 2:
        return []
    least, most = (choose(seen.values(), key=lambda run: run["label_tokens"]) for choose in (min, max))
    if most["label_tokens"] <= (1 + UNEQUAL_TOKENS) * least["label_tokens"]:
        return []
    share = 1 - least["label_tokens"] / most["label_tokens"]
    message = (
        f"arm {least['arm']} learns from {least['label_tokens']:,} label tokens, arm {most['arm']} from "
        f"{most['label_tokens']:,} ({share:.0%} fewer)"
    )
    if least["tokens"] != most["tokens"]:
        message += ": their rows or lengths differ, so what tells them apart is the data and the longer training both"
        mend = "give all arms the same training_args.max_steps, or read the result as the two together"
    else:
        message += ": the same data, but other batches, steps or epochs, so one of them simply trains longer"
        mend = "let batch × steps be the same in all arms, or read the result as that of the longer training too"
    return [_finding("warning", "factors", message, mend)]


def _too_small_to_see(
    study: Study, trained: Sequence[Entry], reports: Mapping, settings_of: Mapping[str, RunSettings]
) -> list[Finding]:
    metric, margin, seeds = study.compare.metric, study.compare.margin, len(study.seeds)
    counts = set()
    for run in {run["tokens"]: run for run in trained}.values():
        report, split = reports.get(run["tokens"]), settings_of[run["run"]].evaluation.split
        counts.add(((report or {}).get("splits", {}).get(split) or {}).get("rows"))
    examples = min((count for count in counts if count), default=0)
    if examples < 2:
        return []
    smallest = smallest_detectable_difference(metric, examples, seeds)
    spread = " (if scores spread as they did in the demo)"
    sample = f"{examples:,} examples and {seeds} seeds" if seeds > 1 else f"{examples:,} examples and one seed"
    seen = f"{sample} show differences in {metric} from about {smallest:.2g} on"
    if not margin:
        mend = "say with compare.margin which differences matter, and the plan tells how many examples that takes"
        return [_finding("note", "compare.margin", seen + spread, mend)]
    if smallest <= margin:
        return []
    message = f"{seen}{spread}, but the margin is {margin:g}: smaller ones will end as not distinguishable"
    return [_finding("warning", "compare.margin", message, _what_would_do(metric, margin, seeds))]


def _what_would_do(metric: str, margin: float, seeds: int) -> str:
    options = []
    for count in sorted({max(seeds, 2), max(seeds + 1, 3), max(seeds, 5)}):
        examples = examples_needed(metric, margin, count)
        if examples:
            options.append(f"{_round_up(examples):,} examples with {count} seeds")
    return "it takes about " + ", or ".join(options) if options else "the margin is too small for any test split"


def _round_up(count: int) -> int:
    """Return a count with two digits that say something."""
    unit = 10 ** max(len(str(count)) - 2, 0)
    return -(-count // unit) * unit


# --- hardware, and what is not known ---


def _no_room(
    trained: Sequence[Entry], settings_of: Mapping[str, RunSettings], hardware: Sequence[Gpu]
) -> list[Finding]:
    groups: dict[str, list[Entry]] = {}
    for run in trained:
        if run.get("fits") is False:
            groups.setdefault(run["arm"], []).append(run)
    if not groups:
        return []
    worst = {arm: max(group, key=lambda run: run["memory"]["total"]) for arm, group in groups.items()}
    by_help: dict[str, list[Entry]] = {}
    for run in worst.values():
        by_help.setdefault(_what_helps(run, settings_of[run["run"]]), []).append(run)
    largest = max(hardware, key=lambda gpu: gpu.memory, default=None)
    found = []
    for mend, group in by_help.items():
        most = max(group, key=lambda run: run["memory"]["total"])
        members = [run for arm in group for run in groups[arm["arm"]]]
        part = max((key for key in most["memory"] if key not in ("total", "host")), key=lambda key: most["memory"][key])
        card = f"; the largest GPU has {largest.memory / GIB:.1f} GiB ({largest.name})" if largest else ""
        message = (
            f"runs need up to {most['memory']['total'] / GIB:.1f} GiB on each GPU{_of(members, trained)}{card}; most "
            f"of it is {part} ({most['memory'][part] / GIB:.1f} GiB)"
        )
        found.append(_finding("error", "hardware.gpus", message, mend))
    return found


def _what_helps(run: Entry, settings: RunSettings) -> str:
    """Return what would make a run smaller, by what takes most of its memory."""
    memory, batch = run["memory"], run["per_device_train_batch_size"]
    of_batch = memory["activations"] + memory["logits"]
    of_model = memory["weights"] + memory["gradients"] + memory["optimiser"]
    smaller = []
    # Where the model alone is too much, a smaller batch changes nothing.
    helps = of_batch > SMALL_SHARE * memory["total"]
    if helps and not settings.training_arg("activation_checkpointing"):
        smaller.append("training_args.activation_checkpointing: true")
    if helps and batch > 1:
        accumulation = run["gradient_accumulation_steps"] * batch
        smaller.append(f"per_device_train_batch_size: 1 with gradient_accumulation_steps: {accumulation}")
    lighter = []
    if settings.peft_config is None:
        lighter.append("an adapter (peft_config) instead of full fine-tuning")
    elif not settings.quantization_config:
        lighter.append("QLoRA (quantization_config: {load_in_4bit: true})")
    if not settings.training_arg("deepspeed") and not settings.quantization_config:
        lighter.append("training_args.deepspeed: config/deepspeed/zero3.json with gpus: 2 or more")
    options = smaller + lighter if of_batch > of_model else lighter + smaller
    options.append("a larger GPU in hardware.gpus")
    return "try " + ", ".join(options[:-1]) + (", or " if options[:-1] else "") + options[-1]


def _estimated(trained: Sequence[Entry], reports: Mapping) -> list[Finding]:
    groups: dict[str, list[Entry]] = {}
    for run in trained:
        report = reports.get(run["tokens"])
        if report is not None and "clean" not in report and report["splits"]["train"]["rows"] is not None:
            groups.setdefault(report["source"], []).append(run)
    return [
        _finding(
            "note",
            "data_config",
            f"rows and tokens are {source}{_of(group, trained)}",
            "they become exact when the data stage has run",
        )
        for source, group in groups.items()
    ]


def _unknown(trained: Sequence[Entry]) -> list[Finding]:
    reasons: dict[str, dict[str, list[Entry]]] = {}
    for run in trained:
        for key, reason in (run.get("unknown") or {}).items():
            reasons.setdefault(reason, {}).setdefault(key, []).append(run)
    found = []
    for reason, keys in reasons.items():
        names = ", ".join(key.replace("_", " ") for key in keys)
        group = list({run["run"]: run for group in keys.values() for run in group}.values())
        found.append(
            _finding("note", "plan", f"not known{_of(group, trained)}: {names}; {reason}", "the rest of the plan holds")
        )
    return found


# --- words ---


def _finding(severity: str, place: str, message: str, mend: str) -> Finding:
    return {"severity": severity, "place": place, "message": message, "mend": mend}


def _of(group: Sequence[Entry], trained: Sequence[Entry]) -> str:
    """Return whose the trouble is: nothing to add for all runs of the study, else arms and how many runs."""
    runs, every = {run["run"] for run in group}, {run["run"] for run in trained}
    if runs == every:
        return ""
    arms = list(dict.fromkeys(run["arm"] for run in group))
    return f", in {len(runs)} of {len(every)} runs ({_few(arms)})"


def _few(arms: Sequence[str]) -> str:
    """Return ``arm full``, or ``arms full, lora, … (12 in all)``."""
    more = f", … ({len(arms)} in all)" if len(arms) > SHOWN else ""
    return f"{'arm' if len(arms) == 1 else 'arms'} {', '.join(arms[:SHOWN])}{more}"


def _steps(group: Sequence[Entry]) -> str:
    """Return ``30 steps``, or ``15 to 30 steps`` of runs that differ."""
    least, most = (choose(run["steps"] for run in group) for choose in (min, max))
    return f"{least:,} to {most:,} steps" if least < most else f"{most:,} step{'' if most == 1 else 's'}"


def _tokens(report: Mapping[str, Any] | None, split: str) -> int | None:
    return ((report or {}).get("splits", {}).get(split) or {}).get("tokens")
