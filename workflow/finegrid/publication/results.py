"""A study's results as tables, report and numbers read them: the small files of `results/<study>/`, loaded once.

Also what all three must say in the same way: names of metrics, which arms lead, and settings as text.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from finegrid.analysis.compare import LOWER_IS_BETTER
from finegrid.analysis.scores import METRICS
from finegrid.errors import UserError

METRIC_NAMES = {
    "loss": "Loss",
    "exact_match": "Exact match",
    "f1": "F1",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "bleu": "BLEU",
    "chrf": "chrF",
}
MINUS = "\N{MINUS SIGN}"
NOTHING = "–"  # a value that is not there
_COUNTS = ("seeds", "examples")
# Shown as one product, or said by the plan in the same words for every arm, or true of one machine only.
_SHOWN_OTHERWISE = {
    f"training_args.{key}"
    for key in (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "max_steps",
        "num_train_epochs",
        "warmup_steps",
        "warmup_ratio",
        "seed",
        "data_seed",
        "output_dir",
        "logging_dir",
        "run_name",
    )
}
# What the plan worked out of a run's settings and its data.
PLANNED = {
    "effective_batch_size": "Effective batch",
    "steps": "Steps",
    "warmup_steps": "Warmup steps",
    "epochs": "Epochs",
    "label_tokens": "Label tokens",
}
SETTING_NAMES = {
    "model.model_name_or_path": "Base model",
    "model.dtype": "Weights",
    "max_input_length": "Prompt limit (tokens)",
    "max_output_length": "Answer limit (tokens)",
    "data_config.train_fraction": "Share of the data",
    "data_config.max_train_samples": "Rows drawn",
    "training_args.optim": "Optimiser",
    "training_args.learning_rate": "Learning rate",
    "training_args.lr_scheduler_type": "Schedule",
    "training_args.weight_decay": "Weight decay",
    "training_args.max_grad_norm": "Gradient clipping",
    "training_args.bf16": "bf16",
    "peft_config.peft_type": "Adapter",
    "peft_config.r": "Rank",
    "peft_config.lora_alpha": "Alpha",
    "peft_config.lora_dropout": "Adapter dropout",
    "peft_config.target_modules": "Target modules",
    "peft_config.use_rslora": "rsLoRA",
    "peft_config.use_dora": "DoRA",
    "quantization_config.load_in_4bit": "4 bit",
    "quantization_config.load_in_8bit": "8 bit",
    "quantization_config.bnb_4bit_quant_type": "4-bit type",
    "quantization_config.bnb_4bit_use_double_quant": "Double quantisation",
    "quantization_config.bnb_4bit_compute_dtype": "Compute type",
}
# What a paper prints of the settings; all others are in the report.
PRINTED = {"Method", *PLANNED.values(), *SETTING_NAMES.values()}


@dataclass(frozen=True)
class Results:
    """The git-tracked results of one study.

    `arms` has one row an arm (index: arm; text and number columns of `arms.tsv`), `comparisons` and `pairs` the rows of
    `comparisons.tsv` and `pairs.tsv`; `advice` is `advice.json` (empty where there is none); the other dicts are by run
    id (`data`: by token set).
    """

    folder: Path
    plan: dict
    arms: pd.DataFrame
    comparisons: pd.DataFrame
    comparison: dict
    pairs: pd.DataFrame
    advice: dict
    settings: dict[str, dict]
    training: dict[str, dict]
    provenance: dict[str, dict]
    data: dict[str, dict]

    @property
    def metric(self) -> str:
        """The primary metric."""
        return self.comparison["metric"]

    @property
    def baseline(self) -> str:
        """The arm that the others are compared with."""
        return self.comparison["baseline"]

    @property
    def metrics(self) -> list[str]:
        """Metrics that any arm has, the primary one first, then the loss."""
        there = [name for name in METRICS if name in self.arms and self.arms[name].notna().any()]
        return list(dict.fromkeys([name for name in (self.metric, "loss") if name in there] + there))

    @property
    def trained(self) -> list[str]:
        """Arms that were trained, in the plan's order."""
        trained = {run["arm"] for run in self.plan["runs"] if run["train"]}
        return [arm for arm in self.arms.index if arm in trained]

    def label(self, arm: str) -> str:
        """The arm's name for readers."""
        return self.arms.loc[arm, "label"] or arm

    def base_of(self, arm: str) -> str | None:
        """The run of the arm's own untrained base model."""
        return next((entry.get("base") for entry in self.plan["arms"] if entry["arm"] == arm), None)

    def selected_runs(self, arm: str) -> list[str]:
        """The runs that represent the arm: its best tuned level, one a seed."""
        return self.comparison["selected"][arm]["runs"]

    def planned(self, run: str) -> dict:
        """The plan's entry of a run."""
        return next(entry for entry in self.plan["runs"] if entry["run"] == run)

    def difference(self, arm: str, metric: str) -> dict | None:
        """The row of `comparisons.tsv` of an arm in a metric; None for the baseline itself."""
        return self._differences.get((arm, metric))

    @cached_property
    def leaders(self) -> dict[str, set[str]]:
        """Metric -> arms that nothing here sets apart from the best mean: what a table prints in bold.

        The paired verdict of the two arms decides; for a pair or a metric without one, an arm is set apart when the two
        95 % intervals do not overlap.
        """
        return {metric: _leaders(self, metric) for metric in self.metrics}

    @cached_property
    def pair_verdicts(self) -> dict[tuple[str, str, str], str]:
        """`(arm, other, metric)` -> verdict, both ways round; where the verdict of a pair is known from the comparison
        with the baseline, that one counts, since it is what the tables print."""
        turned = {"better": "worse", "worse": "better"}
        found: dict[tuple[str, str, str], str] = {}
        for row in [*self.pairs.to_dict("records"), *self.comparisons.to_dict("records")]:
            other = row["other"] if "other" in row else row["baseline"]
            found[row["arm"], other, row["metric"]] = row["verdict"]
            found[other, row["arm"], row["metric"]] = turned.get(row["verdict"], row["verdict"])
        return found

    @cached_property
    def _differences(self) -> dict[tuple[str, str], dict]:
        return {(row["arm"], row["metric"]): row for row in self.comparisons.to_dict("records")}


def load_results(study_dir: Path) -> Results:
    """Read `results/<study>/`.

    Raises:
        UserError: the plan or the comparison is not there yet.
    """
    needed = ["plan.json", "comparison/arms.tsv", "comparison/comparisons.tsv", "comparison/comparison.json"]
    if missing := [name for name in needed if not (study_dir / name).exists()]:
        raise UserError(*(f"{study_dir / name}: not there; expected the finished comparison" for name in missing))
    return Results(
        folder=study_dir,
        plan=_json(study_dir / "plan.json"),
        arms=_tsv(study_dir / "comparison/arms.tsv").set_index("arm", drop=False),
        comparisons=_tsv(study_dir / "comparison/comparisons.tsv"),
        comparison=_json(study_dir / "comparison/comparison.json"),
        pairs=_optional_pairs(study_dir / "comparison/pairs.tsv"),
        advice=_json(advice) if (advice := study_dir / "comparison/advice.json").exists() else {},
        **{name: _folder(study_dir / name) for name in ("settings", "training", "provenance", "data")},
    )


def _leaders(results: Results, metric: str) -> set[str]:
    values = results.arms[metric].dropna()
    best = values.idxmin() if metric in LOWER_IS_BETTER else values.idxmax()
    return {arm for arm in values.index if arm == best or not _set_apart(results, arm, best, metric)}


def _set_apart(results: Results, arm: str, best: str, metric: str) -> bool:
    verdict = results.pair_verdicts.get((arm, best, metric))
    if verdict is not None:
        return verdict in ("better", "worse")
    row = results.difference(arm, metric)
    if row is not None and row["verdict"] == "worse":
        return True  # than the baseline, whose mean the best one's is not behind
    low, high = (results.arms[f"{metric}_{end}"] for end in ("low", "high"))
    return bool(low[arm] > high[best] or high[arm] < low[best])


def setting_table(results: Results) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Return the settings of the trained arms, at their chosen level: `(those that differ, those that all share)`.

    The first is name -> arm -> text, the second name -> text. Names are readable for the settings that most papers
    print (:data:`SETTING_NAMES`, first), else the recipe's own keys. The batch is shown as its product.
    """
    columns = {arm: _arm_settings(results, arm) for arm in results.trained}
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    order = list(dict.fromkeys(["Method", "Learning rate", *PLANNED.values(), *SETTING_NAMES.values()]))
    names.sort(key=lambda name: order.index(name) if name in order else len(order))
    differing, common = {}, {}
    for name in names:
        values = {arm: column.get(name, NOTHING) for arm, column in columns.items()}
        if len(set(values.values())) == 1 and len(values) > 1:
            common[name] = next(iter(values.values()))
        else:
            differing[name] = values
    return differing, common


def _arm_settings(results: Results, arm: str) -> dict[str, str]:
    run = results.selected_runs(arm)[0]
    planned = results.planned(run)
    shown = {"Method": planned["method"]}
    shown |= {name: plain(planned[key]) for key, name in PLANNED.items() if planned.get(key) is not None}
    shown["Effective batch"] = batch_product(planned)
    for key, value in flatten(results.settings.get(run, {})).items():
        if key not in _SHOWN_OTHERWISE and value is not None:
            shown[SETTING_NAMES.get(key, key)] = plain(value)
    return shown


def batch_product(planned: dict) -> str:
    """The effective batch size as the product it is: `16 = 4 × 1 × 4` (per device × GPUs × accumulation)."""
    if planned.get("effective_batch_size") is None:
        return NOTHING
    factors = (planned.get(key) for key in ("per_device_train_batch_size", "gpus", "gradient_accumulation_steps"))
    return f"{planned['effective_batch_size']} = {' × '.join(str(factor) for factor in factors)}"


def flatten(tree: dict, prefix: str = "") -> dict[str, object]:
    """Nested dicts as one dict with dotted keys; lists stay values."""
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def plain(value: object) -> str:
    """A setting as text: yes and no, numbers without noise, lists with commas."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value)
    return NOTHING if value is None else str(value)


def decimal(value: object, digits: int = 3, sign: bool = False) -> str:
    """A number with a real minus sign; an en dash for one that is not there."""
    if value is None or not math.isfinite(value):
        return NOTHING
    text = f"{value:{'+' if sign else ''},.{digits}f}"
    return text.replace("-", MINUS) if float(text.replace(",", "")) else text.lstrip("+-")


def joined(names: list[str], quote: bool = True) -> str:
    """`a`, `a and b`, `a, b and c`; several names are quoted where one of them has a comma."""
    if len(names) < 2:
        return "".join(names)
    if quote and any("," in name for name in names):
        names = [f"“{name}”" for name in names]
    return f"{', '.join(names[:-1])} and {names[-1]}"


def counted(count: int, noun: str) -> str:
    """`1 seed`, `2 seeds`, `1,000 examples`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _optional_pairs(path: Path) -> pd.DataFrame:
    return _tsv(path) if path.exists() else pd.DataFrame(columns=["metric", "arm", "other", "verdict"])


def _folder(folder: Path) -> dict[str, dict]:
    return {path.stem: _json(path) for path in sorted(folder.glob("*.json"))}


def _tsv(path: Path) -> pd.DataFrame:
    """Text columns stay text, also where an arm is called `NA` or `1e-4`; number columns become floats."""
    table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    numbers = {f"{name}{end}" for name in METRICS for end in ("", "_low", "_high")}
    numbers |= {f"corpus_{name}{end}" for name in ("bleu", "chrf") for end in ("", "_low", "_high")}
    numbers |= {"difference", "low", "high", "p", "p_adjusted", "smallest_detectable_difference"}
    numbers |= {"smallest_detectable_adjusted"}
    numbers |= {"peak_memory_mb", "train_seconds", "tokens_per_second", "trainable_parameters"}
    numbers |= {"validation_loss", "base_validation_loss", *_COUNTS}
    for name in numbers & set(table.columns):
        table[name] = pd.to_numeric(table[name].replace("", None)).astype("int64" if name in _COUNTS else "float64")
    return table
