"""From a study file to its arms and runs: a recipe, the factors that vary it, and the comparison that is wanted.

    recipe + model + settings        what all runs share (each laid over the one before)
      x factors                      -> arms: one combination of levels, a row of a paper's table
      x tune                         -> searched inside each arm on the validation loss
      x seeds                        -> runs: one training each, named by a hash of its settings

A run's id hangs on its own settings and on nothing else of the study: a new level, factor or seed renames no run that
stays as it is. Two arms that come to the same settings share the run. An accumulation that `effective_batch_size` asks
for stands in the settings as if it had been written there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from finegrid.errors import UserError, nearest
from finegrid.fingerprint import file_hash, short_hash
from finegrid.gpus import gpu
from finegrid.library_keys import library_keys
from finegrid.settings import (
    RunSettings,
    check_recipe,
    complete,
    display_path,
    expand_dotted,
    is_setting,
    merge,
    suggestion,
)
from finegrid.values import NUMBER, Findings, check_mapping, is_number, show
from finegrid.yaml_file import read_yaml

METRICS = ("exact_match", "f1", "rouge1", "rouge2", "rougeL", "bleu", "chrf", "loss")
DESIGNS = ("grid", "one-at-a-time", "list")
ACCUMULATION = "training_args.gradient_accumulation_steps"
FORM = "key: …, levels: […]"
IN_ARMS = "{arms: {factor: level}, levels: [...]}"
LABELS = {"full": "Full fine-tuning", "lora": "LoRA", "qlora": "QLoRA", "dora": "DoRA", "ia3": "IA3", "qia3": "QIA3"}

# The study file, key by key, in the form of library_keys; config/README.md and the schema are made from it.
STUDY_KEYS: dict[str, dict[str, Any]] = {
    "title": {"types": ["str"], "help": "The question that the study answers; heads the report."},
    "recipe": {"types": ["str"], "help": "Recipe that every run starts from, relative to the project."},
    "model": {"types": ["dict"], "help": "The recipe's section `model`, laid over the recipe."},
    "settings": {"types": ["dict"], "help": "Any keys of a recipe, nested or dotted, laid over the recipe."},
    "factors": {
        "types": ["dict"],
        "help": "What the arms differ in. Each factor is either a mapping from level names to bundles of settings, "
        "or `{key: dotted.key, levels: [...]}`.",
    },
    "tune": {
        "types": ["dict"],
        "help": "Factors of the same form that are searched inside each arm; the level with the lowest validation "
        "loss stands for the arm. In the form with `key`, `in_arms: [{arms: {factor: level}, levels: [...]}]` gives "
        "some arms levels of their own; the last that fits an arm counts.",
    },
    "design": {
        "types": ["str"],
        "choices": list(DESIGNS),
        "default": "grid",
        "help": "`grid`: all combinations; `one-at-a-time`: the baseline, and each other level alone, which names its "
        "arm; `list`: only what `include` names.",
    },
    "include": {
        "types": ["list"],
        "help": "Arms to add, `{factor: level}` each; a factor left out stays as in the recipe.",
    },
    "exclude": {"types": ["list"], "help": "Arms to leave out: all that have the named levels."},
    "effective_batch_size": {
        "types": ["int"],
        "ge": 1,
        "help": "Rows of one optimiser step in every run; `training_args.gradient_accumulation_steps` is solved for: "
        "this / (`per_device_train_batch_size` × `gpus` × `nodes`).",
    },
    "seeds": {"types": ["list[int]"], "help": "One run for each; sets `training_args.seed` and `data_seed`."},
    "hardware": {
        "types": ["dict"],
        "help": "What the study is planned for, instead of `hardware` in config.yaml; changes no run's name.",
        "fields": {
            "gpus": {
                "types": ["list"],
                "help": "GPUs at hand, smallest first: names that `finegrid fit --help` tells, or "
                "`{name: …, memory: 24GB, bf16_tflops: …}`; an empty list is the CPU. A run is planned for the first "
                "that it fits on.",
            },
        },
    },
    "labels": {"types": ["dict"], "help": "Names of levels in figures and tables, by level name."},
    "compare": {
        "types": ["dict"],
        "help": "The comparison that is wanted.",
        "fields": {
            "baseline": {
                "types": ["dict", "str"],
                "help": "`{factor: level}` of the arm that all others are compared to; default: the first arm.",
            },
            "metric": {"types": ["str"], "choices": list(METRICS), "default": "rougeL", "help": "What decides."},
            "margin": {
                "types": ["float"],
                "ge": 0,
                "default": 0.0,
                "help": "Differences up to this size count as equivalent.",
            },
            "select": {
                "types": ["str"],
                "choices": ["loss"],
                "default": "loss",
                "help": "What chooses the tuned level inside each arm, on the validation split.",
            },
        },
    },
}


@dataclass(frozen=True)
class Level:
    """One value of a factor: a name and the settings that it lays over the recipe."""

    name: str
    label: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class ArmLevels:
    """Levels of a tuned factor for the arms that have the named levels, by factor."""

    arms: Mapping[str, str]
    levels: tuple[Level, ...]


@dataclass(frozen=True)
class Factor:
    """Something that a study varies. A tuned factor may have other levels in some arms."""

    name: str
    levels: tuple[Level, ...]
    in_arms: tuple[ArmLevels, ...] = ()

    def levels_in(self, arm: Mapping[str, str]) -> tuple[Level, ...]:
        """Return the levels for an arm, given as level names by factor; the last entry that fits counts."""
        fitting = [entry.levels for entry in self.in_arms if entry.arms.items() <= arm.items()]
        return fitting[-1] if fitting else self.levels

    @property
    def all_levels(self) -> tuple[Level, ...]:
        """The levels of every arm."""
        return self.levels + tuple(level for entry in self.in_arms for level in entry.levels)


@dataclass(frozen=True)
class Compare:
    """The comparison that is wanted; `baseline` is the name of an arm."""

    baseline: str
    metric: str
    margin: float
    select: str


@dataclass(frozen=True)
class Run:
    """One training, or (method `base`, seed None, `arms` naming a base arm) the untrained model's evaluation.

    `tuned` maps tuned factors to level names. `base_id` is the untrained base run that it is measured against.
    `data_id` and `tokens_id` (8 hex digits) name its clean rows and its token files.
    """

    id: str
    method: str
    arms: tuple[str, ...]
    tuned: Mapping[str, str]
    seed: int | None
    settings: RunSettings
    base_id: str
    data_id: str
    tokens_id: str
    dataset: str


@dataclass(frozen=True)
class Arm:
    """One combination of levels: a row of a table. `runs` are ids; `base` is the id of its untrained base run."""

    name: str
    label: str
    factors: Mapping[str, str]
    base: str
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Study:
    """A study, resolved: `runs` are trained, `base_runs` only evaluated; `base_arms` hold the latter.

    `hardware` are its GPUs as the file names them, none of them for the CPU; None leaves it to config.yaml. `sources`
    are the files that it was read from, with their SHA-256.
    """

    name: str
    title: str
    path: Path
    recipe: Path | None
    factors: tuple[Factor, ...]
    tune: tuple[Factor, ...]
    design: str
    seeds: tuple[int, ...]
    compare: Compare
    arms: tuple[Arm, ...]
    base_arms: tuple[Arm, ...]
    runs: tuple[Run, ...]
    base_runs: tuple[Run, ...]
    hardware: tuple[str | Mapping[str, Any], ...] | None = None
    notes: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)
    _by_id: Mapping[str, Run] = field(default_factory=dict, repr=False, compare=False)

    @property
    def all_runs(self) -> tuple[Run, ...]:
        """Base runs first, then the trained ones."""
        return self.base_runs + self.runs

    def run(self, run_id: str) -> Run:
        """Return the trained or base run with this id.

        Raises:
            UserError: the study has no such run.
        """
        if run_id not in self._by_id:
            hint = nearest(run_id, self._by_id) or f"; `finegrid plan {self.name}` lists its runs in plan.tsv"
            raise UserError(f"{self.path}: '{run_id}' is no run of this study{hint}")
        return self._by_id[run_id]


def load_study(path: Path, project: Path) -> Study:
    """Read a study file and return its arms and runs.

    Args:
        path: the study file, absolute or relative to the project.
        project: the folder that paths in study and recipe are relative to.

    Raises:
        UserError: every problem found, in the study, in its recipe and between its levels.
    """
    place = display_path(path, project)
    mapping, lines = read_yaml(project / path, place)
    sources = {place: file_hash(project / path)}
    findings = Findings(place, lines)
    file = check_mapping(STUDY_KEYS, mapping, "", findings)
    base = _base(file, project, findings)
    factors = _factors(file, "factors", findings)
    tune = _factors(file, "tune", findings)
    seeds = _seeds(file, findings)
    hardware = _hardware(file, findings)
    _check_keys_once(factors, tune, seeds, findings)
    _check_accumulation(file, factors + tune, findings)
    findings.stop()
    if file.get("recipe"):
        sources[file["recipe"]] = file_hash(project / file["recipe"])

    combinations = _combinations(file, factors, findings)
    tune = _levels_in_arms(file, tune, factors, combinations, findings)
    findings.stop()
    cells = _resolve_cells(combinations, tune, base, file.get("effective_batch_size"), project, findings)
    if not cells:
        findings.stop()
    runs, arms = _runs(cells, seeds)
    if not findings.problems:  # levels that overwrite each other come to the same runs: told already
        _check_effects(factors + tune, cells, findings)
    _check_tuning(tune, cells, findings)
    compare = _compare(file, factors, arms, findings)
    findings.stop()

    base_runs, base_arms = _base_runs(runs, arms, by_levels=file.get("design") != "one-at-a-time")
    return Study(
        name=Path(path).stem,
        title=file.get("title") or Path(path).stem,
        path=Path(place),
        recipe=Path(file["recipe"]) if file.get("recipe") else None,
        factors=factors,
        tune=tune,
        design=file.get("design") or "grid",
        seeds=tuple(dict.fromkeys(run.seed for run in runs)),
        compare=compare,
        arms=arms,
        base_arms=base_arms,
        runs=runs,
        base_runs=base_runs,
        hardware=hardware,
        notes=tuple(dict.fromkeys(findings.notes)),
        sources=sources,
        _by_id={run.id: run for run in (*base_runs, *runs)},
    )


# --- what all runs share ---


def _base(file: Mapping[str, Any], project: Path, findings: Findings) -> dict[str, Any]:
    """Return the recipe's mapping with the study's own settings laid over it; its values are checked on the way."""
    base: dict[str, Any] = {}
    if file.get("recipe"):
        recipe = Path(file["recipe"])
        if not (project / recipe).is_file():
            findings.problem("recipe", f"there is no '{recipe}'; expected a recipe relative to the project folder")
        else:
            place = display_path(recipe, project)
            base, lines = read_yaml(project / recipe, place)
            check_recipe(base, replace(_inside(findings), place=place, lines=lines))
            base = expand_dotted(base)
    if file.get("model"):
        check_recipe({"model": file["model"]}, _inside(findings))
        base = merge(base, {"model": file["model"]})
    if file.get("settings"):
        check_recipe(file["settings"], _inside(findings, "settings."))
        base = merge(base, file["settings"])
    return base


def _inside(findings: Findings, prefix: str = "") -> Findings:
    """Return findings that write to the same lists, with a prefix before every key."""
    return replace(findings, prefix=prefix, bad=set())


def _seeds(file: Mapping[str, Any], findings: Findings) -> tuple[int, ...]:
    seeds = file.get("seeds")
    if seeds is None:
        return ()
    if not seeds:
        findings.problem("seeds", "is empty; expected at least one whole number")
    for seed in seeds:
        if seed < 0 or seed >= 2**32:
            findings.problem("seeds", f"{seed} found; expected whole numbers from 0 to {2**32 - 1}")
    if len(set(seeds)) < len(seeds):
        findings.problem("seeds", f"{seeds} has a seed twice; each seed is one run")
    return tuple(seeds)


def _hardware(file: Mapping[str, Any], findings: Findings) -> tuple | None:
    gpus = (file.get("hardware") or {}).get("gpus")
    for number, entry in enumerate(gpus or ()):
        key = f"hardware.gpus[{number}]"
        if not isinstance(entry, (str, Mapping)):
            findings.problem(
                key, f"{show(entry)} found; expected a GPU's name, or {{name: …, memory: 24GB, bf16_tflops: …}}"
            )
            continue
        try:
            gpu(entry)
        except UserError as error:
            for problem in error.problems:
                findings.problem(key, problem)
    return None if gpus is None else tuple(gpus)


def _check_accumulation(file: Mapping[str, Any], factors: Iterable[Factor], findings: Findings) -> None:
    """An effective batch size decides the accumulation: a level that sets it too would be overwritten in silence."""
    wanted = file.get("effective_batch_size")
    if wanted is None:
        return
    for factor in factors:
        if any(ACCUMULATION in _leaves(level.settings) for level in factor.all_levels):
            findings.problem(
                "effective_batch_size",
                f"{wanted} found, and '{factor.name}' sets '{ACCUMULATION}'; expected one of them: the accumulation "
                "follows from the effective batch size, so vary 'training_args.per_device_train_batch_size' instead",
            )


# --- factors ---


def _factors(file: Mapping[str, Any], section: str, findings: Findings) -> tuple[Factor, ...]:
    labels = file.get("labels") or {}
    factors = []
    for name, value in (file.get(section) or {}).items():
        key = f"{section}.{name}"
        if not isinstance(value, Mapping) or not value:
            findings.problem(key, f"{show(value)} found; expected levels, or 'key' and 'levels'")
            continue
        levels = _key_levels(name, value, key, labels, findings) if "key" in value else None
        if levels is None and "key" not in value:
            levels = _bundle_levels(value, key, labels, findings)
        if levels:
            names = [level.name for level in levels]
            for twice in {name for name in names if names.count(name) > 1}:
                findings.problem(key, f"level '{twice}' is given twice")
            factors.append(Factor(name, tuple(levels)))
    return tuple(factors)


def _bundle_levels(value: Mapping, key: str, labels: Mapping, findings: Findings) -> list[Level]:
    levels = []
    for name, bundle in value.items():
        if bundle is not None and not isinstance(bundle, Mapping):
            findings.problem(
                f"{key}.{name}",
                f"{show(bundle)} found; expected a bundle of settings such as {{training_args.seed: 1}}, "
                f"or the form '{FORM}' for the whole factor",
            )
            continue
        check_recipe(bundle or {}, _inside(findings, f"{key}.{name}."))
        label = str(labels.get(name, LABELS.get(name, name)))
        levels.append(Level(str(name), label, expand_dotted(bundle or {})))
    return levels


def _key_levels(name: str, value: Mapping, key: str, labels: Mapping, findings: Findings) -> list[Level] | None:
    tuned = key.startswith("tune.")
    allowed = ("key", "levels", "in_arms") if tuned else ("key", "levels")
    for extra in sorted(value.keys() - set(allowed)):
        hint = "; only a tuned factor has it" if extra == "in_arms" else nearest(extra, allowed)
        findings.problem(f"{key}.{extra}", f"'{extra}' is unknown here{hint}")
    setting = value["key"]
    if not isinstance(setting, str) or not is_setting(setting):
        hint = suggestion(setting) if isinstance(setting, str) else "; expected a dotted key"
        findings.problem(f"{key}.key", f"'{setting}' is no setting{hint}")
        return None
    return _levels_of_key(name, setting, value.get("levels"), f"{key}.levels", labels, findings)


def _levels_of_key(
    name: str, setting: str, given: Any, key: str, labels: Mapping, findings: Findings
) -> list[Level] | None:
    """Return the levels of one setting, given as a list of values or by name; None with a problem at `key`."""
    if isinstance(given, list) and given:
        if not _distinct(given, key, findings):
            return None
        given = {level_name(item): item for item in given}
    if not isinstance(given, Mapping) or not given:
        if given is None:
            findings.problem(key, "is missing; expected a list of values")
        elif given in ([], {}):
            findings.problem(key, "is empty; expected at least one value, else there is nothing to run")
        elif findings.fine(key):
            findings.problem(key, f"{show(given)} found; expected a list of values")
        return None
    levels = []
    for level, item in given.items():
        check_recipe({setting: item}, _inside(findings, f"{key} '{level}': "))
        label = str(labels.get(level, f"{name.replace('_', ' ')} {level}"))
        levels.append(Level(str(level), label, expand_dotted({setting: item})))
    return levels


def _distinct(values: list, key: str, findings: Findings) -> bool:
    names = [level_name(value) for value in values]
    for twice in sorted({name for name in names if names.count(name) > 1}):
        findings.problem(key, f"'{twice}' is given twice; expected different values")
    return len(set(names)) == len(names)


def level_name(value: Any) -> str:
    """Return a value as a level's name: ``2e-5``, ``0.001``, ``q_proj+v_proj``, ``none``, ``true``."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str) and NUMBER.fullmatch(value):
        value = float(value) if not value.lstrip("+-").isdigit() else int(value)
    if is_number(value):
        return f"{value:.15g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    if isinstance(value, (list, tuple)):
        return "+".join(level_name(item) for item in value)
    if isinstance(value, Mapping):
        return "+".join(f"{key}={level_name(item)}" for key, item in value.items())
    return "_".join(str(value).replace("/", "_").split())


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in settings.items():
        nested = isinstance(value, Mapping) and value
        leaves |= _leaves(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return leaves


def _check_keys_once(factors: Iterable, tune: Iterable, seeds: tuple, findings: Findings) -> None:
    """Two factors that set one key would overwrite each other in silence."""
    owners: dict[str, str] = {}
    if seeds:
        owners = {"training_args.seed": "seeds", "training_args.data_seed": "seeds"}
    for section, members in (("factors", factors), ("tune", tune)):
        for factor in members:
            own = f"{section}.{factor.name}"
            for key in dict.fromkeys(key for level in factor.levels for key in _leaves(level.settings)):
                if key in owners:
                    findings.problem(own, f"sets '{key}', which '{owners[key]}' sets too; take it out of one of them")
            owners |= {key: own for level in factor.levels for key in _leaves(level.settings)}
    names = [factor.name for factor in (*factors, *tune)]
    for twice in {name for name in names if names.count(name) > 1}:
        findings.problem(f"tune.{twice}", f"'{twice}' is the name of a factor too; expected another name")


# --- arms ---

Combination = dict[str, Level]


@dataclass(frozen=True)
class _Named:
    """A combination with the name and label of its arm; both are empty in a study without factors."""

    name: str
    label: str
    levels: Combination


def _combinations(file: Mapping[str, Any], factors: tuple[Factor, ...], findings: Findings) -> list[_Named]:
    design = file.get("design") or "grid"
    start: Combination = {}
    if design == "grid":
        chosen = [
            dict(zip([factor.name for factor in factors], levels, strict=True))
            for levels in itertools.product(*(factor.levels for factor in factors))
        ]
    elif design == "one-at-a-time":
        chosen = _one_at_a_time(file, factors, findings)
        start = chosen[0]
    else:
        chosen = []
        if not file.get("include"):
            findings.problem(
                "include", "is missing; 'design: list' runs only the arms named there, {factor: level} each"
            )
    for number, entry in enumerate(file.get("exclude") or []):
        levels = _named(entry, f"exclude[{number}]", factors, findings)
        kept = [arm for arm in chosen if not (levels and levels.items() <= arm.items())]
        if levels and len(kept) == len(chosen):
            findings.problem(f"exclude[{number}]", f"{dict(entry)} matches no arm")
        chosen = kept
    for number, entry in enumerate(file.get("include") or []):
        levels = _named(entry, f"include[{number}]", factors, findings)
        if levels is not None and levels not in chosen:
            chosen.append({factor.name: levels[factor.name] for factor in factors if factor.name in levels})
    if not chosen and not findings.problems:
        findings.problem("exclude", "leaves no arm; a study needs at least one")
    if start and chosen and start not in chosen:
        _tell_excluded_start(file, start, factors, findings)
    named = [_name(combination, start) for combination in chosen]
    _check_arm_names([arm.name for arm in named], findings)
    return named


def _one_at_a_time(file: Mapping[str, Any], factors: tuple[Factor, ...], findings: Findings) -> list[Combination]:
    start = {factor.name: factor.levels[0] for factor in factors}
    baseline = (file.get("compare") or {}).get("baseline")
    if isinstance(baseline, Mapping):
        start |= _named(baseline, "compare.baseline", factors, findings) or {}
    chosen = [start]
    for factor in factors:
        chosen += [start | {factor.name: level} for level in factor.levels if level != start[factor.name]]
    return chosen


def _tell_excluded_start(
    file: Mapping[str, Any], start: Combination, factors: tuple[Factor, ...], findings: Findings
) -> None:
    """Nobody named a baseline, and the one that all arms start from is left out: another arm would silently stand in
    for it, from which the others differ in two factors. A named one is checked with the comparison."""
    if (file.get("compare") or {}).get("baseline") is not None:
        return
    for number, entry in enumerate(file.get("exclude") or []):
        levels = _named(entry, f"exclude[{number}]", factors, findings)
        if levels and levels.items() <= start.items():
            pairs = _pairs({name: level.name for name, level in start.items()})
            findings.problem(
                f"exclude[{number}]",
                f"leaves out {pairs}, the first level of each factor, which 'design: one-at-a-time' starts from; take "
                "the entry out, or name another start with compare.baseline",
            )
            return


def _named(entry: Any, key: str, factors: tuple[Factor, ...], findings: Findings) -> Combination | None:
    """Return the levels that ``{factor: level}`` names, or None with a problem."""
    if not isinstance(entry, Mapping):
        findings.problem(key, f"{show(entry)} found; expected {{factor: level}}")
        return None
    named: Combination = {}
    by_name = {factor.name: factor for factor in factors}
    for name, wanted in entry.items():
        if name not in by_name:
            findings.problem(f"{key}.{name}", f"'{name}' is no factor{nearest(str(name), by_name)}")
            continue
        levels = {level.name: level for level in by_name[name].levels}
        found = levels.get(str(wanted)) or levels.get(level_name(wanted))
        if found is None:
            hint = nearest(str(wanted), levels) or f"; expected one of {', '.join(levels)}"
            findings.problem(f"{key}.{name}", f"'{wanted}' is no level of '{name}'{hint}")
        else:
            named[name] = found
    return named if len(named) == len(entry) else None


def _name(combination: Combination, start: Combination) -> _Named:
    """Name an arm by its levels; one-at-a-time, where `start` is the baseline, by those that differ from it."""
    own = {factor: level for factor, level in combination.items() if level != start.get(factor)}
    if combination and not own:
        return _Named("baseline", "Baseline", combination)
    names = [
        # Alone, `0.5` or `true` says nothing.
        f"{factor}_{level.name}" if start and _is_value(level.name) else level.name
        for factor, level in own.items()
    ]
    return _Named("-".join(names), ", ".join(level.label for level in own.values()), combination)


def _is_value(name: str) -> bool:
    return name in ("true", "false", "none") or bool(NUMBER.fullmatch(name))


def _check_arm_names(names: list[str], findings: Findings) -> None:
    for twice in sorted({name for name in names if names.count(name) > 1}):
        findings.problem("factors", f"two arms come to the name '{twice}'; expected level names that tell them apart")
    for name in names:
        if name == "base" or name.startswith("base ("):
            findings.problem("factors", f"an arm comes to the name '{name}', which is the untrained model's")


def _levels_in_arms(
    file: Mapping[str, Any],
    tune: tuple[Factor, ...],
    factors: tuple[Factor, ...],
    combinations: list[_Named],
    findings: Findings,
) -> tuple[Factor, ...]:
    """Return the tuned factors with the levels that some arms have of their own."""
    labels = file.get("labels") or {}
    arms = [{name: level.name for name, level in arm.levels.items()} for arm in combinations]
    complete_factors = []
    for factor in tune:
        given = file["tune"][factor.name]
        entries = given.get("in_arms", []) if "key" in given else []
        key = f"tune.{factor.name}.in_arms"
        if not isinstance(entries, list):
            findings.problem(key, f"{show(entries)} found; expected a list of {IN_ARMS}")
            entries = []
        own = []
        for number, entry in enumerate(entries):
            place = f"{key}[{number}]"
            if not isinstance(entry, Mapping) or set(entry) != {"arms", "levels"}:
                findings.problem(place, f"{_keys(entry)} found; expected {IN_ARMS}")
                continue
            named = _named(entry["arms"], f"{place}.arms", factors, findings)
            levels = _levels_of_key(factor.name, given["key"], entry["levels"], f"{place}.levels", labels, findings)
            if not named or not levels:
                continue
            wanted = {name: level.name for name, level in named.items()}
            if not any(wanted.items() <= arm.items() for arm in arms) and not findings.problems:
                findings.problem(
                    f"{place}.arms", f"{_pairs(wanted)} fits no arm of this study; expected levels that one of them has"
                )
            own.append(ArmLevels(wanted, tuple(levels)))
        complete_factors.append(replace(factor, in_arms=tuple(own)))
    return tuple(complete_factors)


def _keys(entry: Any) -> str:
    return f"a mapping with {', '.join(entry) or 'no keys'}" if isinstance(entry, Mapping) else show(entry)


# --- runs ---


@dataclass(frozen=True)
class _Cell:
    """An arm at one tuned level, before the seeds."""

    named: _Named
    tuned: Combination
    settings: RunSettings
    evaluation: Mapping[str, Any]  # evaluation-side settings that the levels set: part of the id

    @property
    def arm(self) -> str:
        return self.named.name or self.settings.method

    @property
    def label(self) -> str:
        return self.named.label or LABELS.get(self.arm, self.arm)

    @property
    def combination(self) -> Combination:
        return self.named.levels

    def identity(self, settings: dict[str, Any]) -> dict[str, Any]:
        return settings | ({"evaluation_factors": self.evaluation} if self.evaluation else {})


def _resolve_cells(
    combinations: list[_Named],
    tune: tuple[Factor, ...],
    base: Mapping,
    effective: int | None,
    project: Path,
    findings: Findings,
) -> list[_Cell]:
    cells = []
    batches = _Batches(effective)
    for arm, tuned in _searched(combinations, tune):
        chosen = arm.levels | tuned
        merged = dict(base)
        for level in chosen.values():
            merged = merge(merged, level.settings)
        _check_survival(chosen, merged, findings)
        inner = Findings(f"{findings.place}: arm {arm.name}" if arm.name else findings.place)
        checked = check_recipe(merged, inner)
        if effective:
            batches.solve(checked, arm.name)
        settings = complete(checked, project, inner)
        findings.problems += inner.problems
        # The same for every arm, mostly: told once, for the study.
        findings.notes += [note.replace(inner.place, findings.place, 1) for note in inner.notes]
        if settings is not None:
            cells.append(_Cell(arm, tuned, settings, _evaluation_side(chosen)))
    batches.tell(findings)
    return cells


def _searched(combinations: list[_Named], tune: tuple[Factor, ...]) -> Iterator[tuple[_Named, Combination]]:
    """Yield each arm with each combination of its tuned levels."""
    for arm in combinations:
        names = {name: level.name for name, level in arm.levels.items()}
        for levels in itertools.product(*(factor.levels_in(names) for factor in tune)):
            yield arm, dict(zip([factor.name for factor in tune], levels, strict=True))


@dataclass
class _Batches:
    """Solves for the accumulation of each arm, and remembers what there is to tell."""

    effective: int | None
    arms: dict[tuple[int, int, int], list[str]] = field(default_factory=dict)  # by per-device batch, GPUs and nodes
    overridden: set[int] = field(default_factory=set)
    changing: list[str] = field(default_factory=list)

    def solve(self, checked: dict[str, Any], arm: str) -> None:
        """Set the accumulation in the settings of an arm, if there is a whole one."""
        default = library_keys()["training_args"]["per_device_train_batch_size"]["default"]
        arguments = dict(checked.get("training_args") or {})
        if not isinstance(arguments.get("per_device_train_batch_size", 1), int):
            return  # told as what it is
        batch = arguments.get("per_device_train_batch_size", default)
        gpus, nodes = (checked.get(key) if isinstance(checked.get(key), int) else 1 for key in ("gpus", "nodes"))
        self.arms.setdefault((batch, gpus, nodes), []).append(arm)
        if arguments.get("auto_find_batch_size"):
            self.changing.append(arm)
        if self.effective % (batch * gpus * nodes):
            return
        accumulation = self.effective // (batch * gpus * nodes)
        written = arguments.get("gradient_accumulation_steps", accumulation)
        if written != accumulation:
            self.overridden.add(written)
        checked["training_args"] = arguments | {"gradient_accumulation_steps": accumulation}

    def tell(self, findings: Findings) -> None:
        """Say which arms can't have the effective batch size, and what was overridden."""
        key = "effective_batch_size"
        if self.changing:
            findings.problem(
                key,
                f"{self.effective} found, and training_args.auto_find_batch_size, which may halve the batch; "
                "expected one of them",
            )
        common = math.lcm(*(batch * gpus * nodes for batch, gpus, nodes in self.arms))
        for (batch, gpus, nodes), arms in self.arms.items():
            at_once = batch * gpus * nodes
            if self.effective % at_once:
                names = list(dict.fromkeys(arms))
                who = f"{'arm' if len(names) == 1 else 'arms'} {_few(names)}" if any(names) else "every run"
                trains = "train" if len(names) > 1 else "trains"
                below = self.effective // common * common
                near = f"{below} or {below + common}" if below else f"{common}, or a smaller batch per device"
                findings.problem(
                    key,
                    f"{self.effective} found, but {who} {trains} {at_once} rows at once (per_device_train_batch_size "
                    f"{batch} × gpus {gpus}{f' × nodes {nodes}' if nodes > 1 else ''}), and {self.effective} is no "
                    f"multiple of that; nearest possible: {near}",
                )
        for written in sorted(self.overridden):
            findings.note(key, f"{self.effective} decides; '{ACCUMULATION}: {written}' is overridden")


def _check_survival(chosen: Combination, merged: Mapping[str, Any], findings: Findings) -> None:
    """What a level sets must still stand after all others: ``peft_config: null`` and a rank exclude each other."""
    for name, level in chosen.items():
        for key, value in _leaves(level.settings).items():
            if _value_at(merged, key) == value or (isinstance(value, Mapping) and not value):
                continue
            other, theirs = _rival(key, name, chosen)
            # The one that sets the whole section is the one that can stand alone.
            alone, beside = (name, other) if theirs.startswith(f"{key}.") else (other, name)
            pair = _pairs({alone: chosen[alone].name})
            findings.problem(
                "factors",
                f"level '{level.name}' of {name} sets '{key}', and {other} sets '{theirs}': they can't be combined; "
                f"write 'exclude: [{pair}]' to leave the combinations out, and 'include: [{pair}]' to have "
                f"{chosen[alone].name} once, without any {beside}",
            )


def _rival(key: str, owner: str, chosen: Combination) -> tuple[str, str]:
    """Return the factor and its key that overwrite a key of another factor."""
    candidates = [
        (factor, theirs) for factor, level in chosen.items() if factor != owner for theirs in _leaves(level.settings)
    ]
    section = key.split(".")[0]
    nested = [item for item in candidates if item[1].startswith(f"{key}.") or key.startswith(f"{item[1]}.")]
    return (nested or [item for item in candidates if item[1].split(".")[0] == section] or candidates)[0]


def _value_at(mapping: Mapping[str, Any], key: str) -> Any:
    value: Any = mapping
    for part in key.split("."):
        value = value.get(part, _value_at) if isinstance(value, Mapping) else _value_at
    return value


def _evaluation_side(chosen: Combination) -> dict[str, Any]:
    """Return the evaluation-side settings that the levels themselves set; how fast they are scored is no part."""
    leaves = {key: value for level in chosen.values() for key, value in _leaves(level.settings).items()}
    sections = ("generation_config.", "evaluation.")
    return {key: leaves[key] for key in sorted(leaves) if key.startswith(sections) and key != "evaluation.batch_size"}


def _runs(cells: list[_Cell], seeds: tuple[int, ...]) -> tuple[tuple[Run, ...], tuple[Arm, ...]]:
    runs: dict[str, Run] = {}
    canonical: dict[str, Any] = {}
    by_arm: dict[str, list[str]] = {}
    for cell in cells:
        settings = cell.settings
        shared = {
            "method": settings.method,
            "base_id": f"base-{short_hash(cell.identity(settings.base_settings()))}",
            "data_id": short_hash(settings.data_settings()),
            "tokens_id": short_hash(settings.token_settings()),
            "dataset": settings.dataset_name,
            "tuned": {name: level.name for name, level in cell.tuned.items()},
        }
        for seed in seeds or (settings.training_args["seed"],):
            seeded = _with_seed(settings, seed) if seeds else settings
            identity = cell.identity(seeded.training_settings())
            run_id = f"{settings.method}-{short_hash(identity)}"
            if canonical.setdefault(run_id, identity) != identity:
                raise UserError(f"{run_id}: two different runs come to this id; change any setting of one of them")
            known = runs.get(run_id)
            arms = dict.fromkeys([*(known.arms if known else ()), cell.arm])
            runs[run_id] = (
                replace(known, arms=tuple(arms))
                if known
                else Run(id=run_id, arms=tuple(arms), seed=seed, settings=seeded, **shared)
            )
            by_arm.setdefault(cell.arm, []).append(run_id)
    first = {cell.arm: cell for cell in reversed(cells)}
    arms = tuple(
        Arm(
            name=name,
            label=first[name].label,
            factors={factor: level.name for factor, level in first[name].combination.items()},
            base=runs[ids[0]].base_id,
            runs=tuple(dict.fromkeys(ids)),
        )
        for name, ids in by_arm.items()
    )
    return tuple(runs.values()), arms


def _with_seed(settings: RunSettings, seed: int) -> RunSettings:
    """Return the settings with a seed for initialisation and dropout, and for the order of the rows."""
    arguments = settings.training_args | {"seed": seed, "data_seed": seed}
    return settings.model_copy(update={"training_args": arguments})


def _base_runs(
    runs: tuple[Run, ...], arms: tuple[Arm, ...], by_levels: bool
) -> tuple[tuple[Run, ...], tuple[Arm, ...]]:
    """Return one untrained run for each model, quantization and token set among the runs."""
    factors = {arm.name: arm.factors for arm in arms}
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.base_id, []).append(run)
    if by_levels:
        names = _base_names(groups, factors)
    else:  # one-at-a-time: the first of its arms says it in a word
        names = {
            base_id: f"base ({members[0].arms[0]})" if len(groups) > 1 else "base"
            for base_id, members in groups.items()
        }
    base_runs, base_arms = [], []
    for base_id, members in groups.items():
        first = members[0]
        kept = {"use_cpu"} & first.settings.training_args.keys()
        settings = first.settings.model_copy(
            update={
                "training_args": {key: first.settings.training_args[key] for key in kept},
                "peft_config": None,
                "gpus": 1,
                "nodes": 1,
                "early_stopping": None,
            }
        )
        name = names[base_id]
        base_runs.append(
            replace(first, id=base_id, method="base", arms=(name,), tuned={}, seed=None, settings=settings)
        )
        label = f"Base model{name.removeprefix('base')}"
        base_arms.append(Arm(name=name, label=label, factors={}, base=base_id, runs=(base_id,)))
    return tuple(base_runs), tuple(base_arms)


def _base_names(groups: Mapping[str, list[Run]], factors: Mapping[str, Mapping]) -> dict[str, str]:
    """Return ``base``, ``base (nf4)``, and where that does not tell them apart the levels that do."""
    details = {base_id: [quantization_name(members[0].settings)] for base_id, members in groups.items()}
    levels = {base_id: [{**factors[run.arms[0]], **run.tuned} for run in runs] for base_id, runs in groups.items()}
    for name in dict.fromkeys(name for chosen in levels.values() for each in chosen for name in each):
        own = {base_id: {each.get(name) for each in chosen} for base_id, chosen in levels.items()}
        longer = {
            base_id: [*parts, *(own[base_id] if len(own[base_id]) == 1 else [])] for base_id, parts in details.items()
        }
        if _distinct_count(longer) > _distinct_count(details):
            details = longer
    if _distinct_count(details) < len(details):
        details = {base_id: [*parts, base_id.removeprefix("base-")] for base_id, parts in details.items()}
    joined = {base_id: ", ".join(filter(None, parts)) for base_id, parts in details.items()}
    return {base_id: f"base ({text})" if text else "base" for base_id, text in joined.items()}


def _distinct_count(details: Mapping[str, list]) -> int:
    return len({tuple(filter(None, parts)) for parts in details.values()})


def quantization_name(settings: RunSettings) -> str:
    """Return ``nf4``, ``fp4``, ``int8``, or an empty string for weights that are not quantized."""
    quantization = settings.quantization_config
    if not quantization:
        return ""
    return "int8" if quantization.get("load_in_8bit") else quantization.get("bnb_4bit_quant_type", "fp4")


# --- sense ---


def _check_effects(factors: tuple[Factor, ...], cells: list[_Cell], findings: Findings) -> None:
    """A factor whose levels all come to the same runs tells nothing."""
    results = [(cell, short_hash(cell.identity(cell.settings.training_settings()))) for cell in cells]
    for factor in factors:
        if len(factor.levels) < 2:
            continue
        groups: dict[tuple, set[str]] = {}
        levels: set[str] = set()
        for cell, result in results:
            chosen = cell.combination | cell.tuned
            if factor.name not in chosen:
                continue
            levels.add(chosen[factor.name].name)
            rest = tuple((name, level.name) for name, level in chosen.items() if name != factor.name)
            groups.setdefault(rest, set()).add(result)
        if len(levels) > 1 and len(groups) < len(results) and all(len(found) == 1 for found in groups.values()):
            section = "tune" if any(factor.name in cell.tuned for cell in cells) else "factors"
            findings.problem(
                f"{section}.{factor.name}",
                f"changes nothing: its levels {', '.join(sorted(levels))} come to the same runs; expected levels that "
                "change what is learned, and not only how it is computed or logged",
            )


def _check_tuning(tune: tuple[Factor, ...], cells: list[_Cell], findings: Findings) -> None:
    for cell in cells:
        data = cell.settings.data_config
        held_out = data.val_file or data.validation_size or (data.dataset and data.dataset.validation_split)
        if tune and not held_out:
            findings.problem(
                "tune",
                "chooses by the validation loss, but there are no validation rows; give data_config.val_file or "
                "validation_size",
            )
            return


def _compare(
    file: Mapping[str, Any], factors: tuple[Factor, ...], arms: tuple[Arm, ...], findings: Findings
) -> Compare:
    given = file.get("compare") or {}
    fields = STUDY_KEYS["compare"]["fields"]
    values = {key: given.get(key, described.get("default")) for key, described in fields.items()}
    return Compare(
        baseline=_baseline(given.get("baseline"), file.get("exclude") or [], factors, arms, findings),
        metric=values["metric"],
        margin=float(values["margin"]),
        select=values["select"],
    )


def _baseline(
    given: Any, excluded: list, factors: tuple[Factor, ...], arms: tuple[Arm, ...], findings: Findings
) -> str:
    names = [arm.name for arm in arms]
    if given is None:
        return names[0]
    key = "compare.baseline"
    if isinstance(given, str):
        if given not in names:
            hint = nearest(given, names) or f"; expected one of {_few(names)}"
            findings.problem(key, f"'{given}' is no arm{hint}")
        return given
    levels = _named(given, key, factors, findings)
    if levels is None:
        return names[0]
    wanted = {name: level.name for name, level in levels.items()}
    exact = [arm.name for arm in arms if arm.factors == wanted]
    matching = exact or [arm.name for arm in arms if wanted.items() <= arm.factors.items()]
    if len(matching) != 1 and not findings.problems:
        found = f"matches {len(matching)} arms ({_few(matching)})" if matching else "is no arm of this study"
        for number, entry in enumerate(excluded):
            levels = _named(entry, f"exclude[{number}]", factors, findings) or {}
            if not matching and {name: level.name for name, level in levels.items()}.items() <= wanted.items():
                found = f"is no arm of this study: exclude[{number}] leaves it out"
        findings.problem(key, f"{_pairs(wanted)} {found}; expected the levels of exactly one of {_few(names)}")
    return matching[0] if matching else names[0]


def _pairs(levels: Mapping[str, str]) -> str:
    """Return ``{method: full, rank: 8}``, as a study has it."""
    return f"{{{', '.join(f'{name}: {level}' for name, level in levels.items())}}}"


def _few(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f", … ({len(names)} in all)" if len(names) > 8 else "")
