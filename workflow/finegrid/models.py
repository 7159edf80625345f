"""The base model at hand: fetched from a hub at a pinned revision or taken from a folder, with a manifest.

The manifest ``data/models/<name>.json`` holds the SHA-256 of each file. It is what later stages depend on, so that a
model is compared by content and its gigabytes are hashed once.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from finegrid import layout
from finegrid.errors import UserError
from finegrid.files import write_json
from finegrid.fingerprint import file_hash

if TYPE_CHECKING:
    from finegrid.settings import ModelSettings

# What a causal language model needs; other weights of the same model (.bin, .gguf, .onnx) are not fetched.
WANTED = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]


def fetch_model(model: ModelSettings, project: Path, output: Path) -> None:
    """Make the base model's folder complete and write its manifest to ``output``.

    Raises:
        UserError: the folder or the hub's revision is missing or has no safetensors weights.
    """
    folder = project / layout.model_folder(model)
    if model.revision:
        _download(model, folder)
    place = f"model.model_name_or_path: '{model.model_name_or_path}'"
    if not (folder / "config.json").exists():
        raise UserError(f"{place} holds no model; expected a config.json there")
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"{place} has no *.safetensors; convert the weights with transformers' save_pretrained")
    files = sorted(path for path in folder.iterdir() if path.is_file())
    manifest = {
        "model_name_or_path": model.model_name_or_path,
        "revision": model.revision,
        "files": {path.name: {"bytes": path.stat().st_size, "sha256": file_hash(path)} for path in files},
    }
    write_json(output, manifest)


def _download(model: ModelSettings, folder: Path) -> None:
    """Fetch through the hub's cache, so that a machine without internet finds what was fetched before."""
    from huggingface_hub import snapshot_download

    try:
        cached = snapshot_download(model.model_name_or_path, revision=model.revision, allow_patterns=WANTED)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model: '{model.model_name_or_path}' at revision '{model.revision}' can't be fetched "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); check both, or fetch it where there is internet"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    for source in Path(cached).iterdir():
        if source.is_file():
            _link(source.resolve(), folder / source.name)


def _link(source: Path, target: Path) -> None:
    """Give the file a second name where the file system can, for weights are large; else copy it."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
