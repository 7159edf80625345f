"""The base model's ``config.json``, wherever it can be had without its weights.

``model_shapes.json`` beside this file holds the shapes of well-known families by hub id, so that memory and time of a
study are known on a laptop before anything is fetched:

    {hub id: {"revision": 40 hex or null, "config": {the keys of config.json that give sizes}}}

A test holds each shape's parameter count equal to the published one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finegrid import layout
from finegrid.errors import UserError

if TYPE_CHECKING:
    from finegrid.settings import ModelSettings

FILE = Path(__file__).with_name("model_shapes.json")
TABLE_SOURCE = "shape from Finegrid's own table"
HUB_SECONDS = 5  # a laptop without internet must not wait longer for one small file

# transformers' Gemma3TextConfig: the hub's files leave out what equals it.
GEMMA3_DEFAULTS = {
    "model_type": "gemma3_text",
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
}


@cache
def model_shapes() -> dict[str, dict[str, Any]]:
    """Return the package's table: hub id -> ``revision`` (or None where unknown) and ``config``."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def model_config(model: ModelSettings, project: Path) -> tuple[dict[str, Any], str] | None:
    """Return the base model's ``config.json`` and where it is from, or None where it can't be had.

    Looked up in this order: the model's folder, the hub's local cache, the package's own table, the hub (unless
    ``HF_HUB_OFFLINE`` is set). A folder that is not there yet is looked up in the table by its name, which is how the
    demo's model is planned before it is converted.

    Raises:
        UserError: see :func:`read_config`.
    """
    folder = layout.model_folder(model)
    if (project / folder / "config.json").is_file():
        return read_config(project / folder / "config.json"), f"{folder}/config.json"
    if model.revision:
        cached = _cached(model.model_name_or_path, model.revision)
        if cached:
            return read_config(cached), "config.json in the hub's cache"
    hub_id = _in_table(model)
    if hub_id:
        return dict(model_shapes()[hub_id]["config"]), f"{TABLE_SOURCE} ({hub_id})"
    if model.revision and not _offline():
        fetched = _fetched(model.model_name_or_path, model.revision)
        if fetched:
            return dict(_trainable(fetched, model.model_name_or_path)), "config.json from the hub"
    return None


def read_config(path: Path) -> dict[str, Any]:
    """Return a ``config.json``; of a multimodal Gemma 3 its language model, with the defaults that its file omits.

    Raises:
        UserError: the file holds no JSON object, or its model's weights are stored quantised.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); fetch the model's config.json again") from error
    return _trainable(config, path)


def _trainable(config: Any, place: Path | str) -> dict[str, Any]:
    """Return the config of the language model in what a ``config.json`` holds, see :func:`read_config`."""
    if not isinstance(config, dict):
        raise UserError(f"{place}: holds {type(config).__name__}; expected an object; fetch it again")
    stored = config.get("quantization_config")
    if stored:  # it would be trained as its file says, whatever the recipe, the plan and the paper's table say
        method = stored.get("quant_method", "unknown") if isinstance(stored, dict) else stored
        raise UserError(
            f"{place}: the model's weights are stored quantised (quantization_config of its config.json, quant_method: "
            f"{method}); expected unquantised ones, which the recipe's quantization_config quantises while they are "
            "loaded: set model.model_name_or_path to the model that this one was made from"
        )
    return _language_model(config)


def _language_model(config: dict[str, Any]) -> dict[str, Any]:
    if config.get("model_type") != "gemma3" or "text_config" not in config:
        return config
    dtype = {key: config[key] for key in ("torch_dtype", "dtype") if key in config}
    return GEMMA3_DEFAULTS | dtype | config["text_config"] | {"architectures": ["Gemma3ForCausalLM"]}


def display_name(hub_id: str) -> str:
    """Return the hub id without its organisation: what a table has room for."""
    return hub_id.split("/")[-1]


def positions(config: Mapping[str, Any]) -> int | None:
    """Return the longest row the model was made for, in tokens; None where its config does not say."""
    return config.get("max_position_embeddings") or config.get("seq_length")


def _in_table(model: ModelSettings) -> str | None:
    if model.revision:
        return model.model_name_or_path if model.model_name_or_path in model_shapes() else None
    name = Path(model.model_name_or_path).name
    return next((hub_id for hub_id in model_shapes() if display_name(hub_id) == name), None)


def _cached(hub_id: str, revision: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(hub_id, "config.json", revision=revision)
    except ValueError:  # no hub id by the hub's own rules
        return None
    return Path(found) if isinstance(found, str) else None


@cache
def _fetched(hub_id: str, revision: str) -> dict[str, Any] | None:
    """Read config.json alone, asked once; any failure (no internet, no such model, a licence to accept) is None.

    Not by ``hf_hub_download``: without internet it retries for 25 s.
    """
    from urllib.request import Request, urlopen

    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    try:
        url = hf_hub_url(hub_id, "config.json", revision=revision)
        with urlopen(Request(url, headers=build_hf_headers()), timeout=HUB_SECONDS) as answer:
            return json.load(answer)
    except Exception:
        return None


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in ("1", "on", "yes", "true")
