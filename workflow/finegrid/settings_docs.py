"""Write what the settings models say about themselves: ``config/README.md`` and the schemas for editors.

    python -m finegrid.settings_docs

Both are generated, so that documentation, messages and checks can't disagree; a test holds them equal to the models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from finegrid.library_keys import library_keys
from finegrid.settings import (
    DEFAULT_ARGS,
    FLAGS_NOW_VALUES,
    IGNORED_ARGS,
    REMOVED_ARGS,
    RENAMED_ARGS,
    RENAMED_KEYS,
    Cleaning,
    DataConfig,
    EarlyStopping,
    Evaluation,
    HubDataset,
    Limits,
    ModelSettings,
    RunSettings,
    TrainingSettings,
    Truncation,
    library_fields,
    recipe_keys,
)
from finegrid.study import STUDY_KEYS
from finegrid.values import BOUNDS, NUMBER, TYPE_NAMES

SHOWN_METHODS = ("LORA", "IA3", "PROMPT_TUNING", "PREFIX_TUNING")
INTRODUCTION = """\
<!-- Written by `python -m finegrid.settings_docs` from the settings models: edit those, not this. -->
# Configuration

A **recipe** (`config/recipes/*.yaml`) holds the settings of one run, in the format fine-tuners know. A **study**
(`config/studies/*.yaml`) starts from a recipe and says what to vary and compare. `config.yaml` says which study is
meant.

- Paths are relative to the project folder.
- `2e-5`, `2.0e-5` and `0.00002` are the same number. `true` and `false` are the only truth values.
- A key set to `null` in a study is as if it were not in the recipe, or is `null` where a key takes it
  (`peft_config: null` is full fine-tuning).
- Any mistake is told before anything runs, all at once, each with file, key and line.
- A run is named by a hash of the settings that its weights hang on: those that differ from the default. Where a run is
  computed and how it logs (batch size of the evaluation, loader workers, trackers, `num_proc`, `limits`, …) change no
  name, and `generation_config` and `evaluation` change scores, not weights.
- Where `training_args.bf16` is not set, a run trains in bf16 over float32 weights if that is faster on its machine: on
  a GPU that has it; on a CPU with AVX512-BF16 or AMX if the weights are stored as float32, the hidden size is 512 or
  more, and DeepSpeed isn't used. Its summary names the type, and the report warns if a study's runs got different ones.
  `bf16: false` is float32 on any machine. Scores are computed in the weights' type.
"""


def readme() -> str:
    """Return the text of config/README.md."""
    keys = library_keys()
    versions = keys["versions"]
    parts = [
        INTRODUCTION,
        "## A study\n\n" + _table(_study_rows()),
        "A factor in both forms, and a combination that makes no sense left out:\n\n" + STUDY_EXAMPLE,
        "## A recipe\n\n" + _table(_rows(recipe_keys(), nested=False)),
    ]
    for section, model in SECTIONS.items():
        parts.append(f"### `{section}`\n\n{_docstring(model)}\n\n" + _table(_rows(_own_keys(section), nested=False)))
    parts += [
        f"### `training_args`\n\nThe keys of transformers {versions['transformers']}'s `Seq2SeqTrainingArguments`. "
        "Exactly one of `max_steps` and `num_train_epochs` must be given. **Bold** defaults are Finegrid's, the others "
        "the library's; `data_seed` follows `seed`, and `warmup_steps` below 1 is a share of all steps.\n\n"
        + _table(_rows(_training_keys(), bold=DEFAULT_ARGS)),
        "Accepted without effect, since Finegrid has its own place for it:\n\n"
        + _list(f"`{key}`: {reason}" for key, reason in IGNORED_ARGS.items()),
        "Old names are read, with a note:\n\n" + _list(_old_names()),
        f"### `peft_config`\n\nThe keys of peft {versions['peft']}; `peft_type` chooses the method (default `LORA`). "
        "`null` trains all weights.",
    ]
    for method in SHOWN_METHODS:
        parts.append(f"#### `peft_type: {method}`\n\n" + _table(_rows(_method_keys(method))))
    parts += [
        "#### Every other method of peft\n\n" + _list(_other_methods()),
        "### `quantization_config`\n\nThe keys of transformers' `BitsAndBytesConfig`; needs a `peft_config`.\n\n"
        + _table(_rows(keys["quantization_config"])),
        "### `generation_config`\n\nThe keys of transformers' `GenerationConfig`; null leaves the choice to the "
        "library, and answers are greedy unless you say otherwise.\n\n"
        + _table(_rows(library_fields("generation_config"))),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe. Nothing is required: the model may come from the study."""
    sections = {key: _schema(described) for key, described in recipe_keys().items()}
    for section in ("training_args", "peft_config", "quantization_config", "generation_config"):
        sections[section] = _mapping_schema(library_fields(section))
    old_args = {**RENAMED_ARGS, **FLAGS_NOW_VALUES, **REMOVED_ARGS}
    for section, old in (("training_args", old_args), *RENAMED_KEYS.items()):
        sections[section]["properties"] |= {key: {"deprecated": True} for key in old}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Finegrid recipe",
        "type": "object",
        "properties": sections,
        "patternProperties": {f"^({'|'.join(sections)})\\.": {}},
        "additionalProperties": False,
    }


def study_schema() -> dict[str, Any]:
    """Return the JSON schema of a study file."""
    properties = {key: _schema(described) for key, described in STUDY_KEYS.items()}
    properties["settings"] = {"$ref": "recipe.schema.json", "description": STUDY_KEYS["settings"]["help"]}
    by_key: dict[str, Any] = {
        "type": "object",
        "properties": {"key": {"type": "string"}, "levels": {"type": ["array", "object"], "minItems": 1}},
        "required": ["key", "levels"],
        "additionalProperties": False,
    }
    own_levels = {
        "type": "object",
        "properties": {"arms": {"type": "object"}, "levels": by_key["properties"]["levels"]},
        "required": ["arms", "levels"],
        "additionalProperties": False,
    }
    tuned_by_key = by_key | {
        "properties": {**by_key["properties"], "in_arms": {"type": "array", "items": own_levels}},
    }
    bundles = {
        "type": "object",
        "not": {"required": ["key"]},
        "additionalProperties": {"anyOf": [{"type": "null"}, {"$ref": "recipe.schema.json"}]},
    }
    for section, form in (("factors", by_key), ("tune", tuned_by_key)):
        properties[section]["additionalProperties"] = {"anyOf": [form, bundles]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Finegrid study",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def documents() -> dict[str, str]:
    """Return each generated file's text, by its path relative to the project."""
    return {
        "config/README.md": readme(),
        "workflow/schemas/recipe.schema.json": json.dumps(recipe_schema(), indent=1, ensure_ascii=False) + "\n",
        "workflow/schemas/study.schema.json": json.dumps(study_schema(), indent=1, ensure_ascii=False) + "\n",
    }


# --- tables ---

SECTIONS = {
    "model": ModelSettings,
    "data_config": DataConfig,
    "data_config.dataset": HubDataset,
    "data_config.cleaning": Cleaning,
    "data_config.truncation": Truncation,
    "data_config.limits": Limits,
    "evaluation": Evaluation,
    "early_stopping": EarlyStopping,
    "training": TrainingSettings,
}
STUDY_EXAMPLE = """\
```yaml
factors:
  method:                              # levels that are bundles of settings
    full: {peft_config: null}
    lora: {}
  rank:                                # levels of one key
    key: peft_config.r
    levels: [8, 64]
tune:
  learning_rate:                       # searched inside each arm, on the validation loss …
    key: training_args.learning_rate
    levels: [1.0e-4, 2.0e-4, 4.0e-4]
    in_arms:                           # … in a range of its own where an arm needs one
      - {arms: {method: full}, levels: [1.0e-5, 2.0e-5, 4.0e-5]}
effective_batch_size: 32               # the accumulation is solved for
exclude: [{method: full}]              # a rank means nothing to full fine-tuning …
include: [{method: full}]              # … which stays, once, without one
seeds: [0, 1, 2]
compare: {baseline: {method: full}, metric: rougeL, margin: 0.01}
```"""


def _own_keys(section: str) -> dict[str, Any]:
    keys: dict[str, Any] = {"fields": recipe_keys()}
    for part in section.split("."):
        keys = keys["fields"][part]
    return keys["fields"]


def _training_keys() -> dict[str, Any]:
    old = {*IGNORED_ARGS, *RENAMED_ARGS}
    keys = {key: item for key, item in library_fields("training_args").items() if key not in old}
    return {key: item | {"default": DEFAULT_ARGS.get(key, item["default"])} for key, item in keys.items()}


def _method_keys(method: str) -> dict[str, Any]:
    by_itself = {"auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "task_type"}
    keys = library_fields("peft_config", method)
    return {key: item for key, item in keys.items() if key not in {*by_itself, "peft_type"}}


def _other_methods() -> Iterable[str]:
    for method in library_keys()["peft_config"]:
        if method not in SHOWN_METHODS:
            yield f"`{method}`: " + ", ".join(f"`{key}`" for key in _method_keys(method))


def _old_names() -> Iterable[str]:
    yield from (f"`{old}` → `{new}`" for old, new in RENAMED_ARGS.items())
    yield from (f"`{old}: true` → `{new}: {value}`" for old, (new, value) in FLAGS_NOW_VALUES.items())
    yield from (f"`{old}`: no effect, {reason}" for old, reason in REMOVED_ARGS.items())
    for section, names in RENAMED_KEYS.items():
        yield from (f"`{section}.{old}` → `{new}`" for old, new in names.items())


def _study_rows() -> Iterable[tuple[str, ...]]:
    yield from _rows(STUDY_KEYS)


def _rows(
    keys: Mapping[str, Any], prefix: str = "", nested: bool = True, bold: Iterable[str] = ()
) -> Iterable[tuple[str, ...]]:
    for key, described in keys.items():
        yield f"`{prefix}{key}`", _takes(described), _default(described, key in bold), described.get("help", "")
        if nested and described.get("fields"):
            yield from _rows(described["fields"], f"{prefix}{key}.")


def _takes(described: Mapping[str, Any]) -> str:
    choices = [f"`{choice}`" for choice in described.get("choices", ())]
    names = [TYPE_NAMES[kind] for kind in described["types"] if kind not in ("any", "null")]
    if choices:
        names = [name for name in names if name != "a text"] + [", ".join(choices)]
    bounds = [f"{name} {described[bound]}" for bound, name in BOUNDS.items() if bound in described]
    text = " or ".join(names) + (f", {' and '.join(bounds)}" if bounds else "")
    return text or "anything"


def _default(described: Mapping[str, Any], bold: bool) -> str:
    if described.get("required"):
        return "required"
    value = described.get("default")
    if value is None or isinstance(value, Mapping):
        return ""
    text = f"`{json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value}`" if value != "" else ""
    return f"**{text}**" if bold else text


def _table(rows: Iterable[tuple[str, ...]]) -> str:
    lines = ["| key | takes | default | |", "|---|---|---|---|"]
    return "\n".join(lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows])


def _list(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _docstring(model: type[RunSettings]) -> str:
    return " ".join((model.__doc__ or "").split())


# --- schemas ---

JSON_TYPES: dict[str, dict[str, Any]] = {
    "bool": {"type": "boolean"},
    "int": {"type": "integer"},
    "str": {"type": "string"},
    "null": {"type": "null"},
    "list": {"type": "array"},
    "list[int]": {"type": "array", "items": {"type": "integer"}},
    "list[str]": {"type": "array", "items": {"type": "string"}},
}
JSON_BOUNDS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}


def _schema(described: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of one key; null is allowed everywhere, it takes a key back."""
    if described.get("fields") and set(described["types"]) <= {"dict", "null"}:
        return _mapping_schema(described["fields"]) | _description(described)
    options: list[dict[str, Any]] = [{"type": "null"}]
    bounds = {JSON_BOUNDS[bound]: described[bound] for bound in BOUNDS if bound in described}
    for kind in described["types"]:
        if kind == "any":
            return _description(described)
        if kind == "float":
            options += [{"type": "number", **bounds}, {"type": "string", "pattern": f"^{NUMBER.pattern}$"}]
        elif kind == "dict":
            fields = described.get("fields")
            options.append(_mapping_schema(fields) if fields else {"type": "object"})
        elif kind == "str" and described.get("choices"):
            options.append({"type": "string", "pattern": f"^({'|'.join(map(_choice_pattern, described['choices']))})$"})
        elif kind != "null":
            options.append(JSON_TYPES[kind] | (bounds if kind == "int" else {}))
    return {"anyOf": options} | _description(described)


def _choice_pattern(choice: str) -> str:
    return re.sub(r"\\\[.*?\\\]", "[0-9]+", re.escape(choice))


def _mapping_schema(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": ["object", "null"],
        "properties": {key: _schema(described) for key, described in fields.items()},
        "additionalProperties": False,
    }


def _description(described: Mapping[str, Any]) -> dict[str, Any]:
    text = {"description": described["help"]} if described.get("help") else {}
    default = described.get("default")
    return text | ({"default": default} if default is not None else {})


def main(project: Path = Path()) -> None:
    """Write the generated files below the project's folder."""
    for name, text in documents().items():
        path = project / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
