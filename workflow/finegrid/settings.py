"""The recipe: the settings of one run, as strict models with the keys of the libraries that use them.

A recipe is read from YAML (:func:`load_recipe`), old names are mapped, numbers are read as numbers however YAML
reads them, and every section is checked for names, types and sense before anything runs. All problems are shown at
once. Nothing here imports torch or transformers: the keys of the libraries come from ``library_keys.json``, which a
test holds equal to the installed libraries.

Two rules keep ids stable. Ids are hashes of the settings that differ from their default, so a new key with a default
renames nothing; and **a default of ours never changes**: a new behaviour gets a new key or a new value.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from finegrid.errors import nearest
from finegrid.library_keys import describe, library_keys
from finegrid.values import BOUNDS, Findings, check_mapping, check_value, show
from finegrid.yaml_file import read_yaml


class Section(BaseModel):
    """A part of the recipe: unknown keys are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelSettings(Section):
    """The base model."""

    model_name_or_path: str = Field(description="Folder relative to the project, or hub id (then with `revision`).")
    revision: str | None = Field(None, description="Commit of the hub repository; required for a hub id.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Type of the stored weights; compute in bf16 is `training_args.bf16`."
    )
    attn_implementation: str | None = Field(None, description="As in transformers; None lets transformers choose.")
    chat_template: str | None = Field(None, description="Path of a Jinja file that replaces the tokenizer's template.")
    trust_remote_code: bool = Field(False, description="Run code from the model's repository: off unless you say so.")


class Cleaning(Section):
    """Cleaning steps, in the order in which they run; each can be switched, each counts what it did."""

    fix_unicode: bool = Field(True, description="Mend broken Unicode (mojibake) with ftfy.")
    nfc: bool = Field(True, description="Normalise to Unicode NFC.")
    control_characters: bool = Field(True, description="Remove control characters (line breaks and tabs stay).")
    white_space: bool = Field(
        True, description="Fold runs of spaces, trim lines and ends, keep line breaks; code between fences stays."
    )
    empty: bool = Field(True, description="Reject rows with an empty prompt or an empty answer.")
    min_prompt_chars: int = Field(0, ge=0, description="Reject rows whose prompt (all but the answer) is shorter.")
    max_prompt_chars: int | None = Field(None, ge=1, description="Reject rows whose prompt is longer.")
    min_answer_chars: int = Field(0, ge=0, description="Reject rows whose last assistant message is shorter.")
    max_answer_chars: int | None = Field(None, ge=1, description="Reject rows whose last assistant message is longer.")
    exact_duplicates: bool = Field(
        True, description="Within a split, keep the first of rows with equal messages, case and white space aside."
    )
    near_duplicates: bool = Field(False, description="Within train, keep the first of near-duplicate rows (MinHash).")
    near_duplicate_threshold: float = Field(0.8, gt=0, le=1, description="Jaccard similarity of word 3-grams.")
    leaked_questions: bool = Field(True, description="Reject rows of train whose question is in validation or test.")
    leaked_answers: bool = Field(True, description="Reject rows of train whose answer is in validation or test.")
    leaked_near: bool = Field(False, description="Reject rows of train that nearly duplicate one held out.")


class Truncation(Section):
    """What happens to a side that is longer than its limit. Template tokens and roles are never cut."""

    input: Literal["left", "right", "middle", "drop", "error"] = Field(
        "left", description="Prompt over `max_input_length`: which part is cut away, or drop the row, or stop."
    )
    output: Literal["left", "right", "middle", "drop", "error"] = Field(
        "right", description="Answer over `max_output_length`; a cut answer gets no end-of-text label."
    )


class Limits(Section):
    """Past these shares the data stage stops and says what to change."""

    truncated_answers: float = Field(0.05, ge=0, le=1, description="Share of train rows with a cut answer.")
    dropped: float = Field(0.10, ge=0, le=1, description="Share of imported train rows rejected or dropped.")
    leaked: int = Field(0, ge=0, description="Rows of train left that share a question or answer with held-out rows.")


class HubDataset(Section):
    """A hub data set at a pinned revision (read by `datasets`)."""

    path: str = Field(description="Hub id, or a folder relative to the project.")
    name: str | None = Field(None, description="Configuration of the data set, where it has several.")
    revision: str | None = Field(None, description="Commit of the hub repository; required unless `path` is a folder.")
    train_split: str = Field("train", description="Split to train on.")
    validation_split: str | None = Field(None, description="Split that the validation loss is measured on.")
    test_split: str | None = Field(None, description="Split that the comparison is made on.")


class DataConfig(Section):
    """The data strategy: what the run learns from."""

    name: str | None = Field(None, description="Name of the data set in paths; default: folder of the train file.")
    train_file: str | list[str] | None = Field(None, description="json, jsonl, csv or parquet, plain or .gz.")
    val_file: str | list[str] | None = Field(None, description="Rows that the validation loss is measured on.")
    test_file: str | list[str] | None = Field(None, description="Rows that the comparison is made on.")
    dataset: HubDataset | None = Field(None, description="A hub data set instead of files.")
    format: Literal["auto", "conversations", "messages", "sharegpt", "alpaca", "prompt_completion", "columns"] = Field(
        "auto", description="Recognised by content unless named; the report tells which."
    )
    columns: dict[Literal["prompt", "answer", "system", "id"], str] | None = Field(
        None, description="For `format: columns`: which column is the prompt, the answer, the system message, the id."
    )
    encoding: str = Field("utf-8", description="Encoding of text files, as Python names it.")
    system_prompt: str | None = Field(None, description="System message for rows that have none.")
    num_proc: int = Field(1, ge=1, description="Processes for cleaning and tokenising; changes no result.")
    streaming: bool = Field(
        False,
        description="Read a hub data set row by row, without preparing a copy of it first (files are always read so); "
        "its number of rows counts as unknown, so `training_args.max_steps` must decide the length.",
    )
    validation_size: float | int | None = Field(
        None, description="Rows (int) or share (float) split off train when there is no validation file."
    )
    test_size: float | int | None = Field(None, description="The same for test.")
    max_train_samples: int | None = Field(None, ge=1, description="Rows kept of train after cleaning, drawn by seed.")
    max_validation_samples: int | None = Field(None, ge=1, description="The same for the validation split.")
    max_test_samples: int | None = Field(None, ge=1, description="The same for the test split.")
    train_fraction: float | None = Field(None, gt=0, le=1, description="Share of the cleaned train rows kept.")
    sample_seed: int = Field(0, description="Seed of every draw of rows; independent of the run's seed.")
    cleaning: Cleaning = Field(Cleaning(), description="Cleaning steps, see below.")
    truncation: Truncation = Field(Truncation(), description="What happens to long rows, see below.")
    limits: Limits = Field(Limits(), description="How much may be lost, see below.")


class Evaluation(Section):
    """How a run is scored."""

    split: Literal["test", "validation"] = Field("test", description="Split that the comparison reads.")
    generate: bool = Field(True, description="Generate answers; False scores the loss alone.")
    batch_size: int = Field(16, ge=1, description="Rows in one generation batch; changes no result.")
    language: Literal["auto", "en", "zh"] = Field("auto", description="Word segmentation of metrics (jieba for zh).")


class EarlyStopping(Section):
    """Training ends before its last step when the validation loss stops falling (transformers'
    EarlyStoppingCallback); the steps of the recipe are the most that are made. Needs
    `training_args.load_best_model_at_end`, so that the weights are those of the best evaluation, not of the last.
    """

    patience: int = Field(ge=1, description="Evaluations in a row without a lower loss, after which training ends.")
    threshold: float = Field(0.0, ge=0, description="Falls of the loss up to this size count as none.")


class TrainingSettings(Section):
    """How the steps are computed. No result hangs on it beyond rounding."""

    padding_free: bool = Field(
        True,
        description="Lay a batch's rows end to end rather than padding them to the longest, and compute once what all "
        "begin with (a system message; with dropout in validation alone): the same losses, faster. Models whose "
        "attention does not allow it are padded, and the run's summary says so.",
    )


class RunSettings(Section):
    """All settings of one run. `training_args`, `peft_config`, `quantization_config` and `generation_config` are
    plain dicts with the libraries' own keys, checked against `library_keys.json`; a null `peft_config` is full
    fine-tuning.

    The ``*_settings`` methods return what a stage's result hangs on, as plain sorted dicts in the recipe's shape that
    hold only what differs from the default. Where a run is computed, how it logs and past which limits a stage stops
    change no result and are in none of them.
    """

    model: ModelSettings = Field(description="The base model, see below.")
    data_config: DataConfig = Field(DataConfig(), description="The data, see below.")
    max_input_length: int = Field(512, ge=1, description="Tokens of the prompt, template included.")
    max_output_length: int = Field(512, ge=1, description="Tokens of the answer, its end-of-text included.")
    training_args: dict[str, Any] = Field(default_factory=dict, description="How it learns: transformers' arguments.")
    peft_config: dict[str, Any] | None = Field(None, description="The adapter; null trains all weights.")
    quantization_config: dict[str, Any] | None = Field(
        None,
        description="Quantization of the frozen weights while they are loaded; bases stored quantised are refused.",
    )
    generation_config: dict[str, Any] = Field(default_factory=dict, description="How answers are generated.")
    evaluation: Evaluation = Field(Evaluation(), description="How a run is scored, see below.")
    gpus: int = Field(
        1, ge=1, description="Processes that train together, one a GPU; each has `per_device_train_batch_size` rows."
    )
    nodes: int = Field(
        1, ge=1, description="Machines of a Slurm cluster that train one run together, each with `gpus` processes."
    )
    early_stopping: EarlyStopping | None = Field(None, description="End a run that stopped improving, see below.")
    training: TrainingSettings = Field(TrainingSettings(), description="How the steps are computed, see below.")

    @property
    def processes(self) -> int:
        """How many processes train the run together, on all its machines."""
        return self.gpus * self.nodes

    @property
    def method(self) -> str:
        """`full`, `lora`, `qlora`, `ia3`, …: the first part of the run's id."""
        if self.peft_config is None:
            return "full"
        kind = str(self.peft_config.get("peft_type", "LORA")).lower()
        return f"q{kind}" if self.quantization_config else kind

    @property
    def dataset_name(self) -> str:
        """The data set's name in paths: `data_config.name`, else the train file's folder or the hub's name."""
        data = self.data_config
        if data.name:
            return data.name
        if data.dataset:
            return _path_name(data.dataset.path)
        first = data.train_file[0] if isinstance(data.train_file, list) else data.train_file
        return _path_name(posixpath.dirname(first or "")) or "data"

    def training_arg(self, key: str) -> Any:
        """Return a key of `training_args`, or transformers' own default where the recipe does not set it.

        Raises:
            KeyError: transformers has no such argument.
        """
        default = library_keys()["training_args"][key]["default"]
        return self.training_args.get(key, default)

    def data_settings(self) -> dict[str, Any]:
        """Return what the imported and cleaned rows hang on."""
        data = self.data_config.model_dump(exclude_defaults=True, exclude={"name", "num_proc", "limits", "truncation"})
        return _canonical({"data_config": data})

    def token_settings(self) -> dict[str, Any]:
        """Return what the token files hang on: the data, the tokenizer and the length limits."""
        settings = self.data_settings()
        truncation = self.data_config.truncation.model_dump(exclude_defaults=True)
        if truncation:
            settings["data_config"]["truncation"] = truncation
        tokenizer = {"model_name_or_path", "revision", "chat_template", "trust_remote_code"}
        settings["model"] = self.model.model_dump(exclude_defaults=True, include=tokenizer)
        lengths = {"max_input_length", "max_output_length"}
        return _canonical(settings | self.model_dump(exclude_defaults=True, include=lengths))

    def training_settings(self) -> dict[str, Any]:
        """Return what the trained weights hang on; the run's id is a hash of it."""
        settings = self.token_settings() | {
            "model": self.model.model_dump(exclude_defaults=True),
            "training_args": self._influential_args(),
            "peft_config": self._influential_peft(),
            "quantization_config": _non_default(self.quantization_config, library_keys()["quantization_config"]),
            "gpus": self.gpus if self.gpus > 1 else None,
            "nodes": self.nodes if self.nodes > 1 else None,
            "early_stopping": self.early_stopping.model_dump(exclude_defaults=True) if self.early_stopping else None,
            "training": self.training.model_dump(exclude_defaults=True) or None,
        }
        return _canonical({key: value for key, value in settings.items() if value is not None})

    canonical = training_settings

    def base_settings(self) -> dict[str, Any]:
        """Return what the untrained base model's scores hang on: model, quantization and tokens."""
        kept = {"data_config", "model", "max_input_length", "max_output_length", "quantization_config"}
        return {key: value for key, value in self.training_settings().items() if key in kept}

    def evaluation_settings(self) -> dict[str, Any]:
        """Return what the scores hang on besides the weights: changing it evaluates again and trains nothing."""
        settings = {
            "generation_config": _non_default(self.generation_config, library_keys()["generation_config"]),
            "evaluation": self.evaluation.model_dump(exclude_defaults=True, exclude={"batch_size"}),
        }
        return _canonical({key: value for key, value in settings.items() if value})

    def _influential_args(self) -> dict[str, Any]:
        left_out = OPERATIONAL
        if not self.training_args.get("load_best_model_at_end"):
            left_out = left_out | CHECKPOINTS
        kept = {key: value for key, value in self.training_args.items() if key not in left_out}
        found = _non_default(kept, library_keys()["training_args"])
        if kept.get("bf16") is False:  # the default, but left out the machine decides: finegrid.precision
            found["bf16"] = False
        return found

    def _influential_peft(self) -> dict[str, Any] | None:
        if self.peft_config is None:
            return None
        keys = library_keys()["peft_config"][self.peft_config.get("peft_type", "LORA")]
        kept = _non_default(self.peft_config, keys)
        for key in MODULE_SETS & kept.keys():
            if isinstance(kept[key], list):
                kept[key] = sorted(kept[key])
        return kept


# What Finegrid's recipes have unless they say otherwise; shown in the resolved settings.
DEFAULT_ARGS = {
    "optim": "adamw_torch",
    "weight_decay": 0.01,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,  # below 1 it is a share of all steps
    "max_grad_norm": 1.0,
    "seed": 42,
}
# Arguments that have a place of their own in Finegrid: accepted, so that a recipe works as it is, and told.
IGNORED_ARGS = {
    "output_dir": "results lie in results/<study>, checkpoints in scratch/<study>",
    "resume_from_checkpoint": "a killed run goes on from its last checkpoint by itself",
    "do_train": "the workflow decides what runs",
    "do_eval": "the workflow decides what runs",
    "do_predict": "the workflow decides what runs",
    "local_rank": "the launcher sets it",
    "remove_unused_columns": "Finegrid's collator takes the columns it needs",
    "predict_with_generate": "answers are generated in the evaluation stage, see evaluation.generate",
    "generation_max_length": "set generation_config.max_new_tokens",
    "generation_num_beams": "set generation_config.num_beams",
    "generation_config": "use the recipe's section generation_config",
    "sortish_sampler": "use train_sampling_strategy: group_by_length",
    "push_to_hub": "Finegrid publishes nothing by itself",
    "hub_model_id": "Finegrid publishes nothing by itself",
    "hub_strategy": "Finegrid publishes nothing by itself",
    "hub_token": "Finegrid publishes nothing, and a recipe is no place for a secret",
    "hub_private_repo": "Finegrid publishes nothing by itself",
    "hub_always_push": "Finegrid publishes nothing by itself",
    "hub_revision": "Finegrid publishes nothing by itself",
}
# Arguments of older transformers: new name, what a true value stands for, or None and why it is gone.
RENAMED_ARGS = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "warmup_ratio": "warmup_steps",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
}
FLAGS_NOW_VALUES = {
    "adafactor": ("optim", "adafactor"),
    "group_by_length": ("train_sampling_strategy", "group_by_length"),
    "evaluate_during_training": ("eval_strategy", "steps"),
    "include_inputs_for_metrics": ("include_for_metrics", ["inputs"]),
    "tpu_metrics_debug": ("debug", "tpu_metrics_debug"),
}
REMOVED_ARGS = {
    "overwrite_output_dir": "results lie in results/<study>; Snakemake decides what runs again",
    "logging_dir": "TensorBoard files lie beside the run's checkpoints",
    "save_safetensors": "weights are always written as safetensors",
    "fp16_backend": "transformers dropped it",
    "half_precision_backend": "transformers dropped it",
    "fp16_opt_level": "transformers dropped it",
    "use_legacy_prediction_loop": "transformers dropped it",
    "past_index": "transformers dropped it",
    "mp_parameters": "transformers dropped it",
    "ray_scope": "transformers dropped it",
    "tpu_num_cores": "transformers dropped it",
    "use_ipex": "transformers dropped it",
    "use_mps_device": "transformers finds the device by itself",
    "xpu_backend": "use ddp_backend",
    "jit_mode_eval": "transformers dropped it",
    "torchdynamo": "use torch_compile_backend",
    "sharded_ddp": "use fsdp or deepspeed",
    "fsdp_min_num_params": "use fsdp_config.min_num_params",
    "fsdp_transformer_layer_cls_to_wrap": "use fsdp_config.transformer_layer_cls_to_wrap",
    "dispatch_batches": "use accelerator_config.dispatch_batches",
    "split_batches": "use accelerator_config.split_batches",
    "include_tokens_per_second": "the history has tokens and seconds",
    "push_to_hub_organization": "Finegrid publishes nothing by itself",
}
# Where and how a run is computed and logged; no trained weight hangs on these.
OPERATIONAL = frozenset(IGNORED_ARGS) | {
    "use_cpu", "per_device_eval_batch_size", "eval_accumulation_steps", "torch_empty_cache_steps",
    "prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object", "include_for_metrics",
    "batch_eval_metrics", "logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node",
    "logging_nan_inf_filter", "include_num_input_tokens_seen", "log_level", "log_level_replica", "disable_tqdm",
    "report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id",
    "save_on_each_node", "enable_jit_checkpoint", "ignore_data_skip", "restore_callback_states_from_checkpoint",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context", "dataloader_in_order", "ddp_find_unused_parameters", "ddp_bucket_cap_mb",
    "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout", "debug", "skip_memory_metrics",
}  # fmt: skip
# Checkpoints choose the weights only with load_best_model_at_end.
CHECKPOINTS = frozenset({"save_strategy", "save_steps", "save_total_limit", "save_only_model"})
MODULE_SETS = {"target_modules", "exclude_modules", "modules_to_save", "feedforward_modules"}  # order means nothing
LENGTH_KEYS = ("logging_steps", "eval_steps", "save_steps")
BOUNDED = {
    "training_args": {
        "learning_rate": {"gt": 0}, "max_steps": {"ge": -1}, "num_train_epochs": {"gt": 0},
        "per_device_train_batch_size": {"ge": 1}, "per_device_eval_batch_size": {"ge": 1},
        "gradient_accumulation_steps": {"ge": 1}, "warmup_steps": {"ge": 0}, "weight_decay": {"ge": 0},
        "max_grad_norm": {"ge": 0}, "adam_beta1": {"ge": 0, "lt": 1}, "adam_beta2": {"ge": 0, "lt": 1},
        "adam_epsilon": {"gt": 0}, "label_smoothing_factor": {"ge": 0, "lt": 1}, "seed": {"ge": 0},
        "data_seed": {"ge": 0}, "eval_steps": {"gt": 0}, "save_steps": {"gt": 0}, "logging_steps": {"gt": 0},
        "dataloader_num_workers": {"ge": 0}, "save_total_limit": {"ge": 1}, "torch_empty_cache_steps": {"ge": 1},
    },
    "peft_config": {"r": {"ge": 1}, "lora_alpha": {"gt": 0}, "lora_dropout": {"ge": 0, "lt": 1},
                    "num_virtual_tokens": {"ge": 1}},
    "generation_config": {"max_new_tokens": {"ge": 1}, "max_length": {"ge": 1}, "num_beams": {"ge": 1},
                          "temperature": {"gt": 0}, "top_p": {"gt": 0, "le": 1}, "top_k": {"ge": 0},
                          "repetition_penalty": {"gt": 0}},
}  # fmt: skip


def load_recipe(path: Path, project: Path, overrides: Mapping | None = None) -> tuple[RunSettings, list[str]]:
    """Read a recipe and return its settings, with notes on what was renamed or has no effect.

    Args:
        path: the recipe, absolute or relative to the project.
        project: the folder that relative paths in the recipe are relative to.
        overrides: settings laid over the recipe, nested or with dotted keys (``training_args.seed: 1``).

    Raises:
        UserError: every problem found, each ``file: dotted.key: what was found; what was expected``.
    """
    place = display_path(path, project)
    mapping, lines = read_yaml(project / path, place)
    return resolve(merge(mapping, overrides or {}), place=place, project=project, lines=lines)


def resolve(
    mapping: Mapping[str, Any], *, place: str, project: Path, lines: Mapping[str, int] | None = None
) -> tuple[RunSettings, list[str]]:
    """Check a recipe's mapping and return its settings, with Finegrid's defaults filled in, and notes.

    Raises:
        UserError: every problem found, each with `place` in front.
    """
    findings = Findings(place, lines or {})
    settings = complete(check_recipe(mapping, findings), project, findings)
    findings.stop()
    return settings, findings.notes


def check_recipe(mapping: Mapping[str, Any], findings: Findings, peft_type: str | None = None) -> dict[str, Any]:
    """Check names, types, choices and bounds of a recipe or of a part of one; return the good values, old names mapped.

    Args:
        mapping: nested, or with dotted keys at the top.
        findings: takes problems and notes.
        peft_type: whose keys `peft_config` may have when it names no type itself; None allows those of every type.
    """
    checked: dict[str, Any] = {}
    for section, value in expand_dotted(mapping).items():
        if section not in RunSettings.model_fields:
            findings.problem(section, f"'{section}' is no setting{suggestion(section)}")
        elif value is None:
            checked[section] = None
        elif section in ("training_args", "quantization_config", "generation_config", "peft_config"):
            checked[section] = _check_library(section, value, findings, peft_type)
        elif section in ("model", "data_config") and isinstance(value, Mapping):
            renamed = _rename(value, RENAMED_KEYS[section], section, findings)
            checked[section] = check_mapping(recipe_keys()[section]["fields"], renamed, section, findings)
        else:
            checked[section] = check_value(recipe_keys()[section], value, section, findings)
    return checked


def complete(checked: Mapping[str, Any], project: Path, findings: Findings) -> RunSettings | None:
    """Fill in defaults, check what must hold between settings, and build them; None if there are problems."""
    values = {key: dict(value) if isinstance(value, Mapping) else value for key, value in checked.items()}
    values = {key: value for key, value in values.items() if value is not None}
    arguments = _own_arguments(values.get("training_args", {}), findings)
    values["training_args"] = arguments
    if "peft_config" in values:
        values["peft_config"] = {"peft_type": "LORA", "task_type": "CAUSAL_LM"} | _without_null(
            values["peft_config"], ("peft_type", "task_type")
        )
    for check in (_check_model, _check_data, _check_splits, _check_steps, _check_arguments, _check_method):
        check(values, project, findings)
    if findings.problems:
        return None
    return RunSettings.model_validate(values)


def check_files(settings: RunSettings, project: Path, place: str = "recipe", made: tuple[str, ...] = ()) -> list[str]:
    """Return one problem for each file or folder that the settings name and that is not there.

    Data files, the model's folder, the chat template, and configuration files of DeepSpeed, FSDP and Accelerate.

    Args:
        made: beginnings of paths that the workflow makes itself, the demo's: they need not be there yet.
    """
    findings = Findings(place)
    data, model = settings.data_config, settings.model
    named = [(f"data_config.{key}", getattr(data, key)) for key in ("train_file", "val_file", "test_file")]
    named += [("model.chat_template", model.chat_template)]
    if not model.revision:
        named += [("model.model_name_or_path", model.model_name_or_path)]
    if data.dataset and not data.dataset.revision:
        named += [("data_config.dataset.path", data.dataset.path)]
    for key in ("deepspeed", "fsdp_config", "accelerator_config"):
        named += [(f"training_args.{key}", settings.training_args.get(key))]
    for key, value in named:
        for path in value if isinstance(value, list) else [value]:
            if not isinstance(path, str) or path.startswith(("{", *made)):
                continue
            if not (project / path).exists():
                versioned = f"; `dvc pull {path}` brings it" if (project / f"{path}.dvc").exists() else ""
                findings.problem(key, f"there is no '{path}'; expected it relative to the project folder{versioned}")
    return findings.problems


def merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `change` laid over it: mappings merge, anything else (null too) replaces.

    A `peft_config` that names another `peft_type` replaces the whole section: LoRA's keys mean nothing to IA3.
    """
    return _merge(expand_dotted(base), expand_dotted(change))


def expand_dotted(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping with dotted keys at its top nested: ``{"a.b": 1}`` becomes ``{"a": {"b": 1}}``."""
    nested: dict[str, Any] = {}
    for key, value in mapping.items():
        for part in reversed(str(key).split(".")[1:]):
            value = {part: value}
        nested = _merge(nested, {str(key).split(".")[0]: value})
    return nested


@cache
def setting_keys() -> dict[str, dict[str, Any]]:
    """Return the description of every setting by its dotted key; `peft_config` has the keys of all its types."""
    keys: dict[str, dict[str, Any]] = {}
    for section, described in recipe_keys().items():
        keys[section] = described
        keys |= _flat(library_fields(section) or described.get("fields", {}), section)
    return keys


def is_setting(key: str) -> bool:
    """Return whether a dotted key is a setting, an old name of one, or inside a free mapping (`rank_pattern.…`)."""
    section, _, leaf = key.partition(".")
    old = (
        {**RENAMED_ARGS, **FLAGS_NOW_VALUES, **REMOVED_ARGS}
        if section == "training_args"
        else RENAMED_KEYS.get(section)
    )
    if key in setting_keys() or leaf in (old or {}):
        return True
    around = setting_keys().get(key.rpartition(".")[0], {})
    return "." in leaf and "dict" in around.get("types", ()) and not around.get("fields")


def suggestion(key: str) -> str:
    """Return ``"; did you mean 'training_args.seed'?"`` for a key that is no setting, or an empty string."""
    leaf = key.rpartition(".")[2]
    elsewhere = [known for known in setting_keys() if known.rpartition(".")[2] == leaf]
    if elsewhere:
        return f"; did you mean '{elsewhere[0]}'?"
    return nearest(key, setting_keys()) or f"; expected a key of {', '.join(RunSettings.model_fields)}"


def display_path(path: Path, project: Path) -> str:
    """Return a path as messages name it: relative to the project where it lies inside."""
    full = (project / path).resolve()
    return full.relative_to(project.resolve()).as_posix() if full.is_relative_to(project.resolve()) else str(path)


# --- keys ---

RENAMED_KEYS = {"model": {"torch_dtype": "dtype"}, "data_config": {"validation_file": "val_file"}}


@cache
def recipe_keys() -> dict[str, dict[str, Any]]:
    """Return the descriptions of a recipe's sections; our own have `fields`, the libraries' are in library_keys."""
    return section_keys(RunSettings)


def section_keys(model: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """Return the descriptions of a settings model's own keys, as of the libraries' (see library_keys)."""
    keys = {}
    for name, field in model.model_fields.items():
        described = describe(field.annotation) | {"help": field.description or ""}
        for bound in BOUNDS:
            for item in field.metadata:
                if hasattr(item, bound):
                    described[bound] = getattr(item, bound)
        nested = [part for part in _annotation_parts(field.annotation) if isinstance(part, type)]
        for part in nested:
            if issubclass(part, BaseModel):
                described["fields"] = section_keys(part)
        if name == "columns":
            described["fields"] = {column: {"types": ["str"]} for column in ("prompt", "answer", "system", "id")}
        described["required"] = field.is_required()
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        described["default"] = default.model_dump() if isinstance(default, BaseModel) else default
        keys[name] = described
    return keys


def _annotation_parts(annotation: Any) -> list[Any]:
    return [annotation, *(getattr(annotation, "__args__", None) or ())]


@cache
def library_fields(section: str, peft_type: str | None = None) -> dict[str, Any]:
    """Return the keys of a library's section, with our bounds; those of every peft type for None."""
    known = library_keys().get(section, {})
    if section == "peft_config":
        kinds = known if peft_type is None else {peft_type: known[peft_type]}
        ordered = sorted(kinds, key=lambda kind: kind != "LORA")  # LoRA first: its types win for shared names
        known = {}
        for kind in ordered:
            known = {**kinds[kind], **known}
    bounds = BOUNDED.get(section, {})
    return {key: described | bounds.get(key, {}) for key, described in known.items()}


def _flat(fields: Mapping[str, Any], prefix: str) -> dict[str, dict[str, Any]]:
    flat = {}
    for name, described in fields.items():
        flat[f"{prefix}.{name}"] = described
        flat |= _flat(described.get("fields") or {}, f"{prefix}.{name}")
    return flat


def _check_library(section: str, value: Any, findings: Findings, peft_type: str | None) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return check_mapping(library_fields(section), value, section, findings)
    if section == "training_args":
        value = _rename_arguments(value, findings)
    if section == "peft_config":
        named = value.get("peft_type")
        if isinstance(named, str):
            peft_type = named.upper()
            value = {**value, "peft_type": peft_type}
        if peft_type is not None and peft_type not in library_keys()["peft_config"]:
            kinds = library_keys()["peft_config"]
            hint = nearest(peft_type, kinds) or f"; expected one of {', '.join(kinds)}"
            findings.problem("peft_config.peft_type", f"'{named}' is no method of peft{hint}")
            peft_type = None
            value = {key: item for key, item in value.items() if key != "peft_type"}
    fields = library_fields(section, peft_type)
    known = {key: item for key, item in value.items() if key in fields}
    for key in [key for key in value if key not in fields]:
        name = f"{section} for {peft_type}" if peft_type else section
        hint = nearest(str(key), fields) or suggestion(f"{section}.{key}")
        findings.problem(f"{section}.{key}", f"'{key}' is no setting of {name}{hint}")
    return check_mapping(fields, known, section, findings)


def _rename(value: Mapping, names: Mapping[str, str], section: str, findings: Findings) -> dict[str, Any]:
    renamed = dict(value)
    for old, new in names.items():
        if old not in renamed:
            continue
        if new in renamed:
            findings.problem(f"{section}.{old}", f"is the old name of '{new}', which is given too; keep '{new}'")
        else:
            findings.note(f"{section}.{old}", f"read as '{new}', its name today")
            renamed[new] = renamed[old]
        del renamed[old]
    return renamed


def _rename_arguments(value: Mapping[str, Any], findings: Findings) -> dict[str, Any]:
    renamed = _rename(value, RENAMED_ARGS, "training_args", findings)
    for old, (new, meaning) in FLAGS_NOW_VALUES.items():
        flag = renamed.pop(old, None)
        if flag not in (None, True, False):
            findings.problem(f"training_args.{old}", f"{show(flag)} found; expected true or false")
        elif flag and new in renamed:
            findings.problem(f"training_args.{old}", f"is the old form of '{new}', which is given too; keep '{new}'")
        elif flag is not None:
            findings.note(f"training_args.{old}", f"read as '{new}: {meaning}'" if flag else "false is the default")
            renamed |= {new: meaning} if flag else {}
    for old, reason in REMOVED_ARGS.items():
        if old in renamed:
            del renamed[old]
            findings.note(f"training_args.{old}", f"has no effect: {reason}")
    return renamed


# --- defaults, and what must hold between settings ---


def _own_arguments(given: Mapping[str, Any], findings: Findings) -> dict[str, Any]:
    for key in [key for key in given if key in IGNORED_ARGS]:
        findings.note(f"training_args.{key}", f"has no effect: {IGNORED_ARGS[key]}")
    arguments = {key: value for key, value in given.items() if key not in IGNORED_ARGS}
    arguments = DEFAULT_ARGS | arguments
    if arguments.get("data_seed") is None:
        arguments["data_seed"] = arguments["seed"]
    for key in LENGTH_KEYS:
        if isinstance(arguments.get(key), float) and arguments[key].is_integer() and arguments[key] > 1:
            arguments[key] = int(arguments[key])
    return dict(sorted(arguments.items()))


def _check_model(values: dict, project: Path, findings: Findings) -> None:
    key = "model.model_name_or_path"
    model = values.get("model", {})
    name = model.get("model_name_or_path")
    if name is None:
        if findings.fine("model"):
            findings.problem(key, "is missing; expected a model's folder, or a hub id with 'revision'")
        return
    if _is_local(name, project):
        model["model_name_or_path"] = posixpath.normpath(name)
        return
    _check_revision("model", name, model.get("revision"), findings)


def _check_revision(section: str, name: str, revision: str | None, findings: Findings) -> None:
    if not findings.fine(f"{section}.revision"):
        return
    if revision is None:
        findings.problem(
            f"{section}.revision",
            f"is missing; '{name}' is no folder of the project, so it is a hub id and needs the commit to use",
        )
    elif revision in ("main", "master", "HEAD"):
        findings.problem(f"{section}.revision", f"'{revision}' moves on; expected the hash of a commit")


def _is_local(name: str, project: Path) -> bool:
    return name.startswith((".", "/", "data/")) or (project / name).exists()


def _check_data(values: dict, project: Path, findings: Findings) -> None:
    data = values.get("data_config", {})
    if not findings.fine("data_config.train_file", "data_config.dataset"):
        return
    for key in ("train_file", "val_file", "test_file"):
        if data.get(key):
            files = data[key]
            normal = posixpath.normpath
            data[key] = [normal(file) for file in files] if isinstance(files, list) else normal(files)
    dataset = data.get("dataset")
    if bool(data.get("train_file")) == bool(dataset):
        found = "is given beside" if dataset else "is missing, and so is"
        findings.problem("data_config.train_file", f"{found} data_config.dataset; expected exactly one of them")
    if dataset:
        if "path" not in dataset:
            findings.problem("data_config.dataset.path", "is missing; expected a hub id or a folder")
        elif not _is_local(dataset["path"], project):
            _check_revision("data_config.dataset", dataset["path"], dataset.get("revision"), findings)
        for key in ("val_file", "test_file"):
            if data.get(key):
                split = "validation_split" if key == "val_file" else "test_split"
                findings.problem(f"data_config.{key}", f"goes with train_file; expected dataset.{split} here")
    _check_columns(data, findings)


def _check_columns(data: dict, findings: Findings) -> None:
    if not findings.fine("data_config.columns", "data_config.format"):
        return
    columns, kind = data.get("columns"), data.get("format", "auto")
    if columns is not None and kind != "columns":
        findings.problem("data_config.columns", f"is given with format '{kind}'; expected 'format: columns'")
    if kind == "columns":
        for column in ("prompt", "answer"):
            if column not in (columns or {}):
                findings.problem(f"data_config.columns.{column}", "is missing; expected the name of a column")


def _check_splits(values: dict, project: Path, findings: Findings) -> None:
    data, arguments = values.get("data_config", {}), values["training_args"]
    dataset = data.get("dataset") or {}
    sources = {}
    for split, file, share in (("validation", "val_file", "validation_size"), ("test", "test_file", "test_size")):
        if not findings.fine(f"data_config.{file}", f"data_config.{share}", "data_config.dataset"):
            return
        given = [f"data_config.{key}" for key in (file, share) if data.get(key)]
        given += [f"data_config.dataset.{split}_split"] if dataset.get(f"{split}_split") else []
        if len(given) > 1:
            findings.problem(given[1], f"gives the {split} split, and so does {given[0]}; expected one of them")
        size = data.get(share)
        if size is not None and not (0 < size < 1 if isinstance(size, float) else size >= 1):
            findings.problem(f"data_config.{share}", f"{size} found; expected rows (1 or more) or a share below 1.0")
        sources[split] = given
    if data.get("max_train_samples") and data.get("train_fraction"):
        findings.problem("data_config.train_fraction", "is given beside max_train_samples; expected one of them")
    _check_evaluation_split(values, sources, findings)
    strategy = arguments.get("eval_strategy", "no")
    if strategy != "no" and not sources["validation"] and findings.fine("data_config"):
        findings.problem(
            "training_args.eval_strategy",
            f"'{strategy}' found, but there are no validation rows; expected data_config.val_file or validation_size",
        )


def _check_evaluation_split(values: dict, sources: Mapping[str, list], findings: Findings) -> None:
    if not findings.fine("data_config", "evaluation.split"):
        return
    evaluation = values.setdefault("evaluation", {})
    wanted = evaluation.get("split")
    if not sources["validation"] and not sources["test"]:
        findings.problem(
            "data_config.test_file", "is missing, and so is val_file; expected rows to score: a file or test_size"
        )
    elif wanted is None and not sources["test"]:
        evaluation["split"] = "validation"
        findings.note("evaluation.split", "'validation', since there are no test rows; give test_file or test_size")
    elif not sources[wanted or "test"]:
        findings.problem("evaluation.split", f"'{wanted}' found, but the data has no such rows")


def _check_steps(values: dict, project: Path, findings: Findings) -> None:
    arguments = values["training_args"]
    steps_key, epochs_key = "training_args.max_steps", "training_args.num_train_epochs"
    if not findings.fine(steps_key, epochs_key):
        return
    steps, epochs = arguments.get("max_steps"), arguments.get("num_train_epochs")
    if steps is not None and steps <= 0:
        if steps == 0:
            findings.problem(steps_key, "0 found; expected at least 1 step")
            return
        steps = None
        del arguments["max_steps"]
    if steps and epochs is not None:
        findings.problem(
            steps_key, f"is {steps} and {epochs_key} is {show(epochs)}; expected exactly one of them to decide"
        )
    elif not steps and epochs is None:
        findings.problem(steps_key, f"is missing and so is {epochs_key}; expected exactly one of them")
    elif not steps and values.get("data_config", {}).get("streaming"):
        findings.problem(steps_key, "is missing; data_config.streaming needs it, a stream has no epochs")


def _check_arguments(values: dict, project: Path, findings: Findings) -> None:
    arguments = values["training_args"]
    if arguments.get("bf16") and arguments.get("fp16"):
        findings.problem("training_args.bf16", "is true, and so is training_args.fp16; expected one of them")
    for key in LENGTH_KEYS:
        length = arguments.get(key)
        if isinstance(length, float) and length > 1:
            findings.problem(f"training_args.{key}", f"{length} found; above 1 expected a whole number of steps")
    keys = ("save_strategy", "eval_strategy", "save_steps", "eval_steps", "load_best_model_at_end")
    if arguments.get("load_best_model_at_end") and findings.fine(*(f"training_args.{key}" for key in keys)):
        _check_best_model(arguments, findings)
    if values.get("early_stopping") is not None and findings.fine("early_stopping", "training_args"):
        _check_early_stopping(values, findings)


def _check_early_stopping(values: dict, findings: Findings) -> None:
    arguments = values["training_args"]
    if "patience" not in values["early_stopping"]:
        findings.problem("early_stopping.patience", "is missing; expected a number of evaluations, 3 is a start")
    if arguments.get("eval_strategy", "no") == "no":
        findings.problem(
            "early_stopping", "needs evaluations to stop by; set training_args.eval_strategy to 'steps' or 'epoch'"
        )
    elif not arguments.get("load_best_model_at_end"):
        findings.problem(
            "early_stopping",
            "needs training_args.load_best_model_at_end: true; else the run ends with the weights of its last "
            "evaluation, which is not its best",
        )


def _check_best_model(arguments: dict, findings: Findings) -> None:
    """The rules of TrainingArguments.__post_init__, told before anything runs."""
    key = "training_args.load_best_model_at_end"
    save, evaluate = arguments.get("save_strategy", "steps"), arguments.get("eval_strategy", "no")
    if evaluate == "no":
        findings.problem(key, "needs evaluation; expected eval_strategy 'steps' or 'epoch'")
    elif save != "best" and save != evaluate:
        findings.problem(key, f"needs save_strategy and eval_strategy to agree; found '{save}' and '{evaluate}'")
    elif save == evaluate == "steps":
        evaluate_steps = arguments.get("eval_steps") or arguments.get("logging_steps", 500)
        save_steps = arguments.get("save_steps", 500)
        multiple = save_steps / evaluate_steps
        if (save_steps < 1) != (evaluate_steps < 1) or abs(multiple - round(multiple)) > 1e-9:
            findings.problem(key, f"needs save_steps ({save_steps}) to be a multiple of eval_steps ({evaluate_steps})")


def _check_method(values: dict, project: Path, findings: Findings) -> None:
    quantization, peft = values.get("quantization_config"), values.get("peft_config")
    if quantization is not None:
        four, eight = bool(quantization.get("load_in_4bit")), bool(quantization.get("load_in_8bit"))
        if peft is None and findings.fine("peft_config"):
            findings.problem(
                "quantization_config",
                "is given without peft_config, but quantized weights can't be trained; add a peft_config, or set "
                "quantization_config to null",
            )
        if four == eight and findings.fine("quantization_config.load_in_4bit", "quantization_config.load_in_8bit"):
            found = "is true, and so is load_in_8bit" if four else "is not true, nor is load_in_8bit"
            findings.problem("quantization_config.load_in_4bit", f"{found}; expected exactly one of them")
    if peft is None or not findings.fine("peft_config"):
        return
    kind = peft["peft_type"]
    if peft["task_type"] != "CAUSAL_LM":
        findings.problem("peft_config.task_type", f"'{peft['task_type']}' found; Finegrid trains 'CAUSAL_LM' models")
    fields = library_fields("peft_config", kind)
    for key in [key for key in peft if key not in fields]:
        findings.problem(f"peft_config.{key}", f"'{key}' is no setting of peft_config for {kind}{nearest(key, fields)}")
    if peft.get("inference_mode"):
        findings.problem("peft_config.inference_mode", "true found; expected false, else nothing would be trained")
    if "num_virtual_tokens" in fields and peft.get("num_virtual_tokens") is None:
        findings.problem("peft_config.num_virtual_tokens", f"is missing; {kind} needs it, 20 is a start")


# --- plain data ---


def _merge(base: Mapping[str, Any], change: Mapping[str, Any], key: str = "") -> dict[str, Any]:
    merged = dict(base)
    for name, value in change.items():
        old = merged.get(name)
        if not (isinstance(old, Mapping) and isinstance(value, Mapping)) or (
            name == "peft_config" and not key and _other_method(old, value)
        ):
            merged[name] = dict(value) if isinstance(value, Mapping) else value
        else:
            merged[name] = _merge(old, value, name)
    return merged


def _other_method(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    named = new.get("peft_type")
    return named is not None and str(named).upper() != str(old.get("peft_type") or "LORA").upper()


def _without_null(mapping: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if not (key in keys and value is None)}


def _non_default(values: Mapping[str, Any] | None, keys: Mapping[str, Any]) -> dict[str, Any] | None:
    if values is None:
        return None
    return {key: value for key, value in values.items() if not _same(value, keys[key]["default"])}


def _same(value: Any, default: Any) -> bool:
    return value == default and isinstance(value, bool) == isinstance(default, bool)


def _canonical(value: Any) -> Any:
    """Return plain data with sorted keys, whole floats as ints: YAML may give either, and repr must not differ."""
    if isinstance(value, Mapping):
        return {key: _canonical(value[key]) for key in sorted(value)}
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _path_name(path: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", posixpath.basename(path.rstrip("/")))
