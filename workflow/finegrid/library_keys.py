"""The keys of transformers, peft and bitsandbytes as plain data, so that a recipe is checked without importing them.

``library_keys.json`` lies beside this file and is written by ``python -m finegrid.library_keys``, which reads the
installed libraries; a test regenerates it and compares. A key is described by

    {"types": ["float", "null"], "default": 5e-05, "choices": [...], "fields": {...}, "help": "..."}

``types`` are ``bool, int, float, str, null, list, list[int], list[str], dict, any``; ``choices`` are the texts that
are allowed; ``fields`` are the keys of a nested configuration. ``choices`` and ``fields`` are left out where unknown.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
import re
import types
import typing
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("library_keys.json")
DTYPES = ["bfloat16", "float16", "float32"]


@cache
def library_keys() -> dict[str, Any]:
    """Return ``{"versions", "training_args", "peft_config" (by peft type), "quantization_config",
    "generation_config"}``; each section maps a key to its description."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def describe(annotation: Any) -> dict[str, Any]:
    """Return ``types`` (and ``choices``, ``fields`` where known) of a type annotation."""
    names: list[str] = []
    choices: list[str] = []
    fields: dict[str, Any] = {}
    for part in _union(annotation):
        names += _type_names(part)
        choices += _choices(part)
        if dataclasses.is_dataclass(part):
            fields |= _dataclass_keys(part)
    described: dict[str, Any] = {"types": list(dict.fromkeys(names))}
    if choices:  # an enum beside a free `str` (`SchedulerType | str`) means the enum's values
        described["choices"] = sorted(set(choices))
    if fields:
        described["fields"] = fields
    return described


def introspect() -> dict[str, Any]:
    """Read the keys from the installed libraries (imports torch: seconds)."""
    import peft
    import transformers
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kinds = sorted(PEFT_TYPE_TO_CONFIG_MAPPING.items(), key=lambda item: item[0].value)
    return {
        "versions": {"transformers": transformers.__version__, "peft": peft.__version__},
        "training_args": _training_keys(),
        "peft_config": {kind.value: _peft_keys(config) for kind, config in kinds},
        "quantization_config": _quantization_keys(),
        "generation_config": _generation_keys(),
    }


def _union(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [part for arg in typing.get_args(annotation) for part in _union(arg)]
    return [annotation]


def _type_names(part: Any) -> list[str]:
    origin, arguments = typing.get_origin(part), typing.get_args(part)
    if part is None or part is type(None):
        return ["null"]
    if part is Any:
        return ["any"]
    if origin is typing.Literal:
        return list(dict.fromkeys(_plain_type(type(value)) for value in arguments))
    if origin in (list, set, tuple):
        inner = _plain_type(arguments[0]) if arguments else "any"
        return [f"list[{inner}]"] if inner in ("int", "str") and origin is not tuple else ["list"]
    return [_plain_type(origin or part)]


def _plain_type(cls: Any) -> str:
    if cls is type(None):
        return "null"
    if not isinstance(cls, type):
        return "any"
    if issubclass(cls, (str, enum.Enum, Path)):
        return "str"
    for kind in (bool, int, float):
        if issubclass(cls, kind):
            return kind.__name__
    if issubclass(cls, (list, tuple, set)):
        return "list"
    return "dict"  # mappings, and configurations that are written as mappings


def _choices(part: Any) -> list[str]:
    if typing.get_origin(part) is typing.Literal:
        return [value for value in typing.get_args(part) if isinstance(value, str)]
    if isinstance(part, type) and issubclass(part, enum.Enum):
        return [str(member.value) for member in part]
    return []


def _dataclass_keys(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    keys = {}
    for field in dataclasses.fields(cls):
        if not field.init or field.name.startswith("_"):
            continue
        described = describe(hints[field.name])
        if "choices" in field.metadata:
            described["choices"] = sorted(field.metadata["choices"])
        keys[field.name] = {
            **described,
            "default": _default(field),
            "help": _first_sentence(field.metadata.get("help")),
        }
    return keys


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return _jsonable(field.default_factory())
    return None if field.default is dataclasses.MISSING else _jsonable(field.default)


def _jsonable(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    if isinstance(value, (list, tuple, set)):
        return [_jsonable(item) for item in value]
    if dataclasses.is_dataclass(value):
        return {field.name: _jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return {} if isinstance(value, Mapping) else None


def _first_sentence(text: Any) -> str:
    """Return the first sentence of a help text on one line, at most 200 characters long."""
    text = "".join(text) if isinstance(text, tuple) else text or ""  # peft has stray commas behind some texts
    line = re.sub(r"</?\w[^>]*>", "", " ".join(text.split())).replace("|", "/")
    sentence = re.split(r"(?<=[a-z0-9`'\")])\. (?=[A-Z`])", line, maxsplit=1)[0].rstrip(".")
    return sentence if len(sentence) <= 200 else sentence[:197].rsplit(" ", 1)[0] + "..."


def _training_keys() -> dict[str, Any]:
    from transformers import Seq2SeqTrainingArguments
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    keys = _dataclass_keys(Seq2SeqTrainingArguments)
    keys["report_to"]["choices"] = sorted([*INTEGRATION_TO_CALLBACK, "all", "none"])
    keys["fsdp"]["types"] = ["bool", *keys["fsdp"]["types"]]  # its own help: "or `fsdp=True`"
    return keys


def _peft_keys(config: Any) -> dict[str, Any]:
    from peft import PeftType

    keys = _dataclass_keys(config)
    keys["peft_type"]["choices"] = sorted(kind.value for kind in PeftType)
    # Their annotation says int, their default says "from the model".
    for key in keys.values():
        if key["default"] is None and "null" not in key["types"]:
            key["types"].append("null")
    return keys


def _quantization_keys() -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    help_texts = _docstring_keys(BitsAndBytesConfig.__doc__)
    known = {  # BitsAndBytesConfig.__init__ has no annotations: these are what its own checks demand
        "llm_int8_skip_modules": {"types": ["list[str]", "null"]},
        "bnb_4bit_compute_dtype": {"types": ["str", "null"], "choices": DTYPES},
        "bnb_4bit_quant_type": {"types": ["str"], "choices": ["fp4", "nf4"]},
        "bnb_4bit_quant_storage": {
            "types": ["str", "null"],
            "choices": ["bfloat16", "float16", "float32", "float64", "int8", "uint8"],
        },
    }
    keys = {}
    for name, parameter in inspect.signature(BitsAndBytesConfig.__init__).parameters.items():
        if name == "self" or parameter.kind is parameter.VAR_KEYWORD:
            continue
        described = known.get(name) or {"types": [_plain_type(type(parameter.default))]}
        keys[name] = {**described, "default": parameter.default, "help": help_texts.get(name, ([], ""))[1]}
    return keys


def _generation_keys() -> dict[str, Any]:
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS

    documented = _docstring_keys(GenerationConfig.__doc__)
    keys = {}
    for name, value in GenerationConfig().__dict__.items():
        if name.startswith("_") or name == "transformers_version":
            continue
        kinds, text = documented.get(name, (["any"], ""))
        keys[name] = {"types": [*kinds, "null"], "default": _jsonable(value), "help": text}
    keys["cache_implementation"]["choices"] = sorted({*ALL_CACHE_IMPLEMENTATIONS, "paged"})
    keys["early_stopping"]["choices"] = ["never"]
    return keys


def _docstring_keys(docstring: str) -> dict[str, tuple[list[str], str]]:
    """Return types and help of each argument in a docstring of transformers' form ``name (`int`, *optional*):``."""
    entry = re.compile(r"^ +(\w+):? ?\((.*)\):?$\n((?: +.*\n)?)", re.MULTILINE)
    return {name: (_documented_types(form), _first_sentence(text)) for name, form, text in entry.findall(docstring)}


def _documented_types(form: str) -> list[str]:
    form = form.split("optional")[0].replace("Union[", "").replace("Dict", "dict")
    found = []
    for name in re.findall(r"list\[int\]|list\[str\]|list\[list|tuple|dict|Config|bool|int|float|str", form):
        kind = {"list[list": "list", "tuple": "list", "Config": "dict"}.get(name, name)
        if kind not in found:
            found.append(kind)
        if kind in ("dict", "list"):
            break  # what follows describes its contents
    return found or ["any"]


def main() -> None:
    """Write ``library_keys.json`` from the installed libraries."""
    FILE.write_text(json.dumps(introspect(), indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
