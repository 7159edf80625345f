"""What a study will do, need and prove, before it starts: batches, steps, label tokens, memory, time and findings.

Reads the study, the base models' ``config.json`` and, where they are there, the token reports; before the data stage
it goes by a preview of the raw files and says so. No weights, no GPU, no torch. Writes ``plan.json`` and ``plan.tsv``;
every later stage takes the study's shape from the plan, and the rules take their jobs' resources from
:func:`training_needs` and :func:`evaluation_needs`.
"""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finegrid import layout
from finegrid.arithmetic import disk, training_arithmetic
from finegrid.files import whole, write_json
from finegrid.findings import find
from finegrid.fingerprint import short_hash
from finegrid.forecast import START_SECONDS, Throughputs, evaluation_seconds, start_seconds, training_seconds
from finegrid.gpus import Gpu, detected, gpu
from finegrid.memory import Memory, Shape, evaluation_memory, shape_of, training_memory
from finegrid.packs import GPU_SHARE, ROWS_TOGETHER, alone, at_once, groups, most_runs, pack_memory
from finegrid.preview import data_preview
from finegrid.shapes import model_config
from finegrid.yaml_file import read_yaml

if TYPE_CHECKING:
    from finegrid.settings import RunSettings
    from finegrid.study import Run, Study

CONFIG = Path("config/config.yaml")
CLUSTER = Path("profiles/slurm/cluster.yaml")
COLUMNS = [
    "arm", "run", "method", "seed", "tuned", "per_device_train_batch_size", "gpus", "nodes",
    "gradient_accumulation_steps", "effective_batch_size", "steps", "epochs", "warmup_steps", "train_rows",
    "label_tokens", "tokens_seen", "evaluations", "checkpoints", "checkpoint_bytes", "disk_bytes", "output_bytes",
    "device", "fits", "weights", "adapters", "gradients", "optimiser", "activations", "logits", "quantisation",
    "runtime", "total", "host", "seconds", "gpu_hours", "time_source", "exact", "unknown",
]  # fmt: skip
# Estimates that change while runs of the study finish; a plan that differs in nothing else is the same plan.
TIMES = ("seconds", "gpu_hours", "time_source")
# Arguments that no weight hangs on and the plan does.
TOLD = (
    "use_cpu", "per_device_eval_batch_size", "logging_strategy", "logging_steps", "save_strategy", "save_steps",
    "save_total_limit", "save_only_model",
)  # fmt: skip
# Arguments that no size, step or second hangs on: runs that differ in nothing else are worked out once.
FREE = ("seed", "data_seed", "learning_rate")
MEGABYTE = 10**6
MARGIN = 1.1  # on the memory that a job is given: batches differ, and so do allocators
# On the CPU, of what tensors need: glibc's default allocator holds 1.1 to 2.2 times that (tests/benchmarks/memory.py
# --allocator default) where every row is as long as the longest. Second and third attempts ask for 2.3 and 3 times.
HELD = 1.5
SCORING_MEMORY = 1.25  # times what a pack's training asks for: so much may it ask for to score its runs too
CPU_EVALUATION_SECONDS = 600  # an evaluation that takes no longer on a CPU holds no GPU


# ---------------------------------------------------------------- the plan and its files


def write_plan(study: Study, project: Path, gpus: str | list | None = None, keep: bool = False) -> dict:
    """Make the plan and write ``results/<study>/plan.json`` and ``plan.tsv`` (one row an arm and run); return it.

    Files that differ in the estimates of time alone are left as they are, so that looking at a plan again makes
    nothing anew. A plan with an error among its findings is not written.

    Args:
        gpus: GPUs to plan for, see :func:`hardware_of`.
        keep: leave files that are of the same runs as they are, whatever else differs: results were made with them,
            and a look from a machine without the base model, or for other GPUs, must not change what git has.
    """
    plan = make_plan(study, project, gpus)
    output = project / layout.RESULTS / study.name
    before = _on_record(output / "plan.json")
    if errors(plan) or before == _lasting(plan) or (keep and before and _runs(before) == _runs(plan)):
        return plan
    write_json(output / "plan.json", plan)
    with whole(output / "plan.tsv") as half, half.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter="\t", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for run in plan["runs"]:
            tuned = "; ".join(f"{key}={value}" for key, value in run["tuned"].items())
            unknown = "; ".join(f"{key}: {reason}" for key, reason in run.get("unknown", {}).items())
            writer.writerow({**run, **(run.get("memory") or {}), "tuned": tuned, "unknown": unknown})
    return plan


def errors(plan: Mapping) -> list[str]:
    """Return the plan's findings that stop every later stage, each as one line."""
    return [finding_line(finding) for finding in plan["findings"] if finding["severity"] == "error"]


def finding_line(finding: Mapping[str, str]) -> str:
    """Return a finding as one line: place, what was found, what mends it."""
    return f"{finding['place']}: {finding['message']}; {finding['mend']}"


def make_plan(study: Study, project: Path, gpus: str | list | None = None) -> dict:
    """Return the plan: ``study, title, compare, seeds, tune, arms, runs, hardware, totals, notes, findings``.

    Notes say what of the study's files was read differently from how it stands there, such as an old name.
    """
    context = Context(study.name, project, hardware_of(study, project, gpus), _configured(project).get("threads", 1))
    runs = [_entry(run, arm) | facts for run in study.all_runs for facts in [context.facts(run)] for arm in run.arms]
    plan = plan_settings(study)
    del plan["settings"], plan["limits"]
    plan["runs"] = runs
    plan["hardware"] = {"gpus": [card.name for card in context.hardware.gpus], "source": context.hardware.source}
    plan["totals"] = totals(runs)
    plan["packs"] = _packs(context, study)
    plan["notes"] = list(study.notes)
    settings = {run.id: run.settings for run in study.all_runs}
    reports = context.reports
    plan["findings"] = find(
        study,
        runs,
        {name: reports[name] or context.previews.get(name) for name in reports},
        settings,
        context.hardware.gpus,
    )
    plan["findings"] += [finding for report in reports.values() if report for finding in report["findings"]]
    return plan


def plan_settings(study: Study) -> dict:
    """Return what the plan depends on, as plain data: Snakemake's ``params`` of the plan."""
    return {
        "study": study.name,
        "title": study.title,
        "compare": asdict(study.compare),
        "seeds": list(study.seeds),
        "tune": {factor.name: [level.name for level in factor.levels] for factor in study.tune},
        "arms": [
            {"arm": arm.name, "label": arm.label, "factors": dict(arm.factors), "base": arm.base}
            for arm in study.base_arms + study.arms
        ],
        "runs": [run.id for run in study.all_runs],
        # What the plan tells and the ids leave out.
        "settings": short_hash([[run.settings.training_args.get(key) for key in TOLD] for run in study.runs]),
        "limits": [limits for _, limits in sorted({run.data_id: _limits(run) for run in study.runs}.items())],
    }


def _packs(context: Context, study: Study) -> dict[str, Any]:
    """Return who can share a process: ``groups`` of runs, each with its ``seconds`` as one pack and ``seconds_alone``,
    and ``alone``, the number of runs for each reason why a run can't."""
    if most_runs(_configured(context.project).get("pack")) == 0:
        return {"groups": [], "alone": {}}
    found = [group for group in groups(study).values() if len(group) > 1]
    shared = [
        {
            "runs": [run.id for run in group],
            "seconds": pack_needs(context, group).get("seconds"),
            "seconds_alone": _sum(context.facts(run)["seconds"] for run in group),
        }
        for group in found
    ]
    return {"groups": shared, "alone": dict(Counter(alone(study).values()))}


def totals(runs: Sequence[Mapping]) -> dict[str, Any]:
    """Return what the study comes to: runs, evaluations, hours and disk; a run of several arms counts once.

    A sum over runs of which one is unknown is None.
    """
    trained = list({run["run"]: run for run in runs if run["train"]}.values())
    base = {run["run"] for run in runs if not run["train"]}
    return {
        "runs": len(trained),
        "base_runs": len(base),
        "seconds": _sum(run["seconds"] for run in trained),
        "gpu_hours": _sum(run["gpu_hours"] for run in trained),
        "label_tokens": _sum(run["label_tokens"] for run in trained),
        "output_bytes": _sum(run["output_bytes"] for run in trained),
        "disk_bytes": _sum(run["disk_bytes"] for run in trained),
        "memory_bytes": max((run["memory"]["total"] for run in trained if run["memory"]), default=None),
    }


def _sum(values) -> float | None:
    values = list(values)
    return None if any(value is None for value in values) else sum(values)


def _on_record(path: Path) -> dict | None:
    try:
        return _lasting(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError):  # none, or one of an earlier form
        return None


def _lasting(plan: Mapping) -> dict:
    """Return the plan without its estimates of time, as plain JSON data."""
    runs = [{key: value for key, value in run.items() if key not in TIMES} for run in plan["runs"]]
    kept = {key: value for key, value in plan["totals"].items() if key not in TIMES}
    return json.loads(json.dumps({**plan, "runs": runs, "totals": kept, "packs": None}))


def _runs(plan: Mapping) -> list[tuple[str, str]]:
    return [(run["arm"], run["run"]) for run in plan["runs"]]


def _limits(run: Run) -> dict:
    return run.settings.data_config.limits.model_dump()


def _entry(run: Run, arm: str) -> dict:
    return {
        "run": run.id,
        "arm": arm,
        "method": run.method,
        "tuned": dict(run.tuned),
        "seed": run.seed,
        "base": run.base_id,
        "data": f"{run.dataset}-{run.data_id}",
        "tokens": f"{run.dataset}-{run.tokens_id}",
        "train": run.method != "base",
    }


# ---------------------------------------------------------------- hardware


@dataclass(frozen=True)
class Hardware:
    """The GPUs that runs are planned for, in the order in which they are tried; none means the CPU."""

    gpus: tuple[Gpu, ...] = ()
    source: str = "no GPU here, none named"

    @property
    def is_a_guess(self) -> bool:
        """Whether it is the CPU for want of a word on GPUs."""
        return self == Hardware()


def hardware_of(study: Study, project: Path, given: str | list | None = None) -> Hardware:
    """Return the GPUs to plan for: those given, else the study's own ``hardware``, else the cluster's, else this
    machine's.

    The cluster's are ``gpus`` of profiles/slurm/cluster.yaml, whether or not the profile is used: a login node has none
    to look at.

    Args:
        given: ``auto``, names with commas, or a list of names and ``{name, memory, …}`` (also as JSON); None is the key
            ``gpus`` of config/config.yaml.

    Raises:
        UserError: an unknown GPU, with the nearest name.
    """
    if given is None:
        given = _configured(project).get("gpus")
    entries = _gpu_entries(given)
    if entries is not None:
        return Hardware(tuple(gpu(entry) for entry in entries), "named by `gpus`" if entries else "`gpus` names none")
    if study.hardware is not None:
        return Hardware(tuple(gpu(entry) for entry in study.hardware), "named by the study")
    named = cluster_gpus(project)
    if named is not None:
        return Hardware(
            tuple(gpu(entry) for entry in named), f"named by {CLUSTER}" if named else f"{CLUSTER} names none"
        )
    found = tuple(detected())
    return Hardware(found, "found on this machine") if found else Hardware()


def cluster_gpus(project: Path) -> list | None:
    """Return the GPUs that the cluster's file names; None where it has no such key."""
    return _gpu_entries(_configured(project, CLUSTER).get("gpus"))


def _configured(project: Path, file: Path = CONFIG) -> dict[str, Any]:
    return read_yaml(project / file, file.as_posix())[0] or {} if (project / file).exists() else {}


def _gpu_entries(given: str | list | None) -> list | None:
    """Return a list of GPUs; None for ``auto``."""
    if isinstance(given, str) and given.lstrip().startswith(("[", "{", '"')):
        given = json.loads(given)
    if given in (None, "auto"):
        return None
    if isinstance(given, str):
        return [name.strip() for name in given.split(",") if name.strip()]
    return given if isinstance(given, list) else [given]


# ---------------------------------------------------------------- what one run does and needs


@dataclass
class Context:
    """What the runs of a plan share: the hardware, and what was read once for all of them."""

    study: str
    project: Path
    hardware: Hardware
    threads: int = 1  # of one training on a CPU
    reports: dict[str, dict | None] = field(default_factory=dict)  # token reports, by the folder's name
    previews: dict[str, dict] = field(default_factory=dict)  # rows and tokens, by the same
    _shapes: dict[tuple, tuple[Shape | None, str]] = field(default_factory=dict)
    _done: dict[tuple, dict] = field(default_factory=dict)

    def once(self, work: Callable[[Context, Run], dict], run: Run) -> dict[str, Any]:
        """Return ``work(context, run)``, worked out once for all runs that differ in the arguments FREE alone."""
        settings = dict(vars(run.settings))
        settings["training_args"] = {key: value for key, value in run.settings.training_args.items() if key not in FREE}
        for section in ("data_config", "model", "quantization_config"):  # the base's id holds what matters of them
            del settings[section]
        key = (work, run.dataset, run.base_id, run.method, repr(settings))
        if key not in self._done:
            self._done[key] = work(self, run)
        return dict(self._done[key])

    @cached_property
    def throughputs(self) -> Throughputs:
        """What earlier runs of this project were measured at."""
        return Throughputs.read(self.project)

    def facts(self, run: Run) -> dict[str, Any]:
        """Return a trained run's part of the plan; nothing for an untrained base."""
        self.report(run)
        return {} if run.method == "base" else self.once(Context._facts, run)

    def _facts(self, run: Run) -> dict[str, Any]:
        report = self.report(run)
        data = self.data(run)
        train = data["splits"]["train"]
        facts = training_arithmetic(run.settings, train["rows"], train["label_tokens"], train["tokens"])
        facts["tokens_seen"] = facts.pop("tokens")
        facts["exact"] = report is not None
        unknown = facts["unknown"]
        if train["rows"] is None and data.get("unknown"):
            unknown |= dict.fromkeys(unknown, data["unknown"])
        shape, why = self.shape(run.settings)
        if shape is None:
            unknown["memory"] = why
        facts |= self._disk(run.settings, shape, facts)
        memory, card, fits = self.memory(run, shape)
        facts |= {
            "device": card.name if card else "cpu",
            "memory": asdict(memory) if memory else None,
            "fits": fits,
        }
        facts |= self._time(run, shape, facts, card)
        facts["unknown"] = facts.pop("unknown")
        return facts

    def report(self, run: Run) -> dict | None:
        """Return the run's token report, or None before the data stage; the study's own copy comes first."""
        name = layout.tokens_folder(run).name
        if name not in self.reports:
            places = [
                self.project / layout.RESULTS / self.study / "data" / f"{name}.json",
                self.project / layout.TOKENS / name / "report.json",
            ]
            found = next((path for path in places if path.exists()), None)
            self.reports[name] = json.loads(found.read_text(encoding="utf-8")) if found else None
        return self.reports[name]

    def data(self, run: Run) -> dict[str, Any]:
        """Return ``splits`` with rows, label_tokens, tokens, prompt_max and answer_max: reported, else previewed."""
        name = layout.tokens_folder(run).name
        if name not in self.previews:
            report = self.report(run)
            vocabulary = getattr(self.shape(run.settings)[0], "vocabulary", None)
            self.previews[name] = _reported(report) if report else data_preview(run.settings, self.project, vocabulary)
        return self.previews[name]

    def shape(self, settings: RunSettings) -> tuple[Shape | None, str]:
        """Return the base model's shape, or None and why it is not known."""
        key = (settings.model.model_name_or_path, settings.model.revision)
        if key not in self._shapes:
            config = model_config(settings.model, self.project)
            self._shapes[key] = (
                (shape_of(config[0]), config[1])
                if config
                else (None, f"no config.json of '{key[0]}' at hand; `finegrid model` fetches the model")
            )
        return self._shapes[key]

    def memory(self, run: Run, shape: Shape | None) -> tuple[Memory | None, Gpu | None, bool | None]:
        """Return memory, the first GPU that holds it (the largest if none does, None for the CPU), and whether."""
        cards = () if run.settings.training_arg("use_cpu") else self.hardware.gpus
        if shape is None:
            return None, cards[0] if cards else None, None
        rows = run.settings.training_arg("per_device_train_batch_size")
        length, labels = self._lengths(run)
        memory = training_memory(
            run.settings,
            shape,
            rows=rows,
            length=length,
            labels=rows * labels,
            device="cuda" if cards else "cpu",
        )
        if not cards:
            return memory, None, None
        fitting = next((card for card in cards if memory.total <= card.memory), None)
        return memory, fitting or max(cards, key=lambda card: card.memory), fitting is not None

    def _lengths(self, run: Run) -> tuple[int, int]:
        """Return the tokens of the longest row, and its label tokens: no row can pass both limits."""
        settings, train = run.settings, self.data(run)["splits"]["train"]
        prompt = min(train.get("prompt_max") or math.inf, settings.max_input_length)
        answer = min(train.get("answer_max") or math.inf, settings.max_output_length)
        return prompt + answer, answer

    def _disk(self, settings: RunSettings, shape: Shape | None, facts: Mapping) -> dict[str, int | None]:
        if shape is None or facts["checkpoints"] is None:
            return dict.fromkeys(("checkpoint_bytes", "disk_bytes", "output_bytes"))
        return disk(settings, shape, facts["checkpoints"])

    def _time(self, run: Run, shape: Shape | None, facts: Mapping, card: Gpu | None) -> dict[str, Any]:
        splits = self.data(run)["splits"]
        rows, tokens = splits["train"]["rows"], splits["train"]["tokens"]
        forecast = training_seconds(
            run.settings,
            shape,
            tokens=facts["tokens_seen"],
            label_tokens=facts["label_tokens"],
            length=tokens / rows if tokens and rows else None,
            evaluations=facts["evaluations"],
            validation_tokens=splits["validation"]["tokens"],
            gpu=card,
            measured=self.throughputs,
            micro_batches=facts["steps"] * facts["gradient_accumulation_steps"] if facts["steps"] else None,
            threads=self.threads,
        )
        seconds, hours = forecast.seconds, forecast.gpu_hours
        return {
            "seconds": None if seconds is None else round(seconds),
            "gpu_hours": None if hours is None else round(hours, 4),
            "time_source": forecast.source,
        }


def _reported(report: Mapping) -> dict[str, Any]:
    splits = {}
    for name, split in report["splits"].items():
        longest = {side: split[f"{side}_lengths"]["quantiles"].get("max") for side in ("prompt", "answer")}
        splits[name] = {
            "rows": split["rows"],
            "label_tokens": split["label_tokens"],
            "tokens": split["tokens"],
            "prompt_max": longest["prompt"],
            "answer_max": longest["answer"],
        }
    return {"splits": splits, "source": "the token report", "unknown": None}


# ---------------------------------------------------------------- what a job asks for


def training_needs(context: Context, run: Run) -> dict[str, int]:
    """Return what a training job asks for: ``nodes``; on each of them ``mem_mb`` of host memory, ``gpus`` and
    ``processes``; and ``runtime`` in minutes if known.

    Host memory is that of the process on the CPU; beside a GPU it is the process, the weights while they are read,
    and what DeepSpeed moves to the host.
    """
    return context.once(_training_needs, run)


def _training_needs(context: Context, run: Run) -> dict[str, int]:
    facts = context.facts(run)
    memory, on_gpu = facts["memory"], facts["device"] != "cpu"
    processes = run.settings.gpus
    needs = {"nodes": run.settings.nodes, "processes": processes, "gpus": processes if on_gpu else 0, "mem_mb": 8000}
    if memory:
        shape, _ = context.shape(run.settings)
        host = evaluation_host(shape, run.settings) + memory["host"] if on_gpu else memory["total"]
        needs["mem_mb"] = math.ceil(host * processes * (MARGIN if on_gpu else HELD) / MEGABYTE)
    if facts["seconds"] is not None:
        needs["runtime"] = math.ceil((facts["seconds"] * 1.5 + 600) / 60)  # loading, saving, a slower node
    return needs


def pack_needs(context: Context, runs: Sequence[Run]) -> dict[str, int]:
    """Return what the training of a pack asks for: ``mem_mb``, ``gpus``, ``together`` (runs in one step at most),
    and ``seconds`` and ``runtime`` in minutes if known: those of all its runs, with one start."""
    needed = [training_needs(context, run) for run in runs]
    facts = [context.facts(run) for run in runs]
    needs = {"gpus": max(each["gpus"] for each in needed), "mem_mb": max(each["mem_mb"] for each in needed)}
    memories = [Memory(**each["memory"]) for each in facts if each["memory"]]
    largest = max(memories, key=lambda memory: memory.total, default=None)
    card = next((card for card in context.hardware.gpus if card.name == facts[0]["device"]), None)
    needs["together"] = min(len(runs), at_once(largest, card.memory if card else None))
    if largest is not None and card is None:
        needs["mem_mb"] = math.ceil(pack_memory(largest, len(runs), needs["together"]) * HELD / MEGABYTE)
    return needs | _pack_seconds([each["seconds"] for each in facts], START_SECONDS)


def evaluation_pack_needs(context: Context, runs: Sequence[Run], without_gpu: bool = False) -> dict[str, int]:
    """Return what the scoring of a pack's runs asks for, as :func:`pack_needs`; their base is loaded once. ``rows`` are
    those of all runs in one batch of answers at most; 0 where memory has no room for more than one run's."""
    needed = [evaluation_needs(context, run, without_gpu) for run in runs]
    needs = {key: max(each[key] for each in needed) for key in ("gpus", "mem_mb")} | {"rows": 0}
    shape, _ = context.shape(runs[0].settings)
    if shape is not None:
        card = context.hardware.gpus[0] if needs["gpus"] else None
        batch = max(run.settings.evaluation.batch_size for run in runs)
        rows = max(batch, min(ROWS_TOGETHER, batch * len(runs)))
        memory = _answering(context, runs[0], shape, rows, card)
        if card is None or memory.total <= card.memory * GPU_SHARE:
            needs["rows"] = rows
            needs["mem_mb"] = max(needs["mem_mb"], _host_mb(memory, shape, runs[0].settings, card))
        adapters = [context.facts(run)["memory"]["adapters"] for run in runs]
        needs["mem_mb"] += math.ceil(sum(adapters) * HELD / MEGABYTE)
    return needs | _pack_seconds([each.get("seconds") for each in needed], start_seconds(runs[0].settings, shape))


def scores_with_training(training: Mapping[str, int], evaluation: Mapping[str, int]) -> bool:
    """Return whether a pack's training scores its runs too, which saves a start and a wait: on as many GPUs, and with
    about the same memory. The arguments are what the two ask for."""
    same = training["gpus"] == evaluation["gpus"]
    return same and evaluation["mem_mb"] <= training["mem_mb"] * SCORING_MEMORY


def _pack_seconds(seconds: Sequence[float | None], saved: float) -> dict[str, int]:
    """Return the time of all runs, where each but the first saves so many seconds."""
    if any(each is None for each in seconds):
        return {}
    whole = sum(seconds) - (len(seconds) - 1) * saved
    return {"seconds": round(whole), "runtime": math.ceil((whole * 1.5 + 600) / 60)}


def evaluation_needs(context: Context, run: Run, without_gpu: bool = False) -> dict[str, int]:
    """Return what an evaluation job asks for: ``mem_mb``, ``gpus``, and ``runtime`` in minutes if known.

    Args:
        without_gpu: also where there are GPUs, see :func:`evaluates_without_gpu`.
    """
    cards = () if without_gpu or run.settings.training_arg("use_cpu") else context.hardware.gpus
    return context.once(_evaluation_on_gpu if cards else _evaluation_on_cpu, run)


def evaluates_without_gpu(context: Context, study: Study) -> bool:
    """Return whether the study's evaluations leave the GPUs to the trainings: none takes longer than ten minutes on a
    CPU, by model and rows, and no base is quantised, which a CPU computes otherwise.

    All evaluations of a study go the same way, so that no two arms are compared across devices.
    """
    first = {arm.runs[0] for arm in (*study.base_arms, *study.arms)}
    runs = [run for run in study.all_runs if run.id in first]
    seconds = [context.once(_evaluation_on_cpu, run).get("seconds") for run in runs]
    return all(
        each is not None and each <= CPU_EVALUATION_SECONDS and not run.settings.quantization_config
        for each, run in zip(seconds, runs, strict=True)
    )


def _evaluation_on_gpu(context: Context, run: Run) -> dict[str, int]:
    return _evaluation_needs(context, run, context.hardware.gpus[0])


def _evaluation_on_cpu(context: Context, run: Run) -> dict[str, int]:
    return _evaluation_needs(context, run, None)


def _evaluation_needs(context: Context, run: Run, card: Gpu | None) -> dict[str, int]:
    settings = run.settings
    shape, _ = context.shape(settings)
    needs = {"gpus": 1 if card else 0, "mem_mb": 8000}
    if shape is None:
        return needs
    memory = _answering(context, run, shape, settings.evaluation.batch_size, card)
    needs["mem_mb"] = _host_mb(memory, shape, settings, card)
    seconds = _evaluation_seconds(context, run, shape, card)
    if seconds is not None:
        needs |= {"seconds": round(seconds), "runtime": math.ceil((seconds * 1.5 + 600) / 60)}
    return needs


def _answering(context: Context, run: Run, shape: Shape, rows: int, card: Gpu | None) -> Memory:
    settings = run.settings
    return evaluation_memory(
        settings,
        shape,
        rows=rows,
        prompt=context._lengths(run)[0],
        new_tokens=settings.generation_config.get("max_new_tokens") or settings.max_output_length,
        device="cuda" if card else "cpu",
    )


def _host_mb(memory: Memory, shape: Shape, settings: RunSettings, card: Gpu | None) -> int:
    host = evaluation_host(shape, settings) if card else memory.total
    return math.ceil(host * (MARGIN if card else HELD) / MEGABYTE)


def _evaluation_seconds(context: Context, run: Run, shape: Shape, card: Gpu | None) -> float | None:
    """Return how long an evaluation takes; None before the rows are known."""
    splits, evaluation = context.data(run)["splits"], run.settings.evaluation
    both = [splits["test"], splits["validation"]]
    if any(split[key] is None for split in both for key in ("rows", "tokens", "label_tokens")):
        return None
    answered = splits[evaluation.split]
    rows = answered["rows"] if evaluation.generate else 0
    return evaluation_seconds(
        run.settings,
        shape,
        rows=rows,
        prompt=(answered["tokens"] - answered["label_tokens"]) / rows if rows else 0,
        tokens=sum(split["tokens"] for split in both),
        label_tokens=sum(split["label_tokens"] for split in both),
        gpu=card,
        threads=context.threads,
    )


def evaluation_host(shape: Shape, settings: RunSettings) -> int:
    """Return the bytes of host memory of a process that works on a GPU: itself, and the weights while they are read."""
    size = {"float32": 4, "bfloat16": 2, "float16": 2}[settings.model.dtype]
    return 3 * 10**9 + shape.parameters * size
