"""The base model is taken from a folder or from the hub's cache, and named by the content of its files."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from finegrid.errors import UserError
from finegrid.models import fetch_model
from finegrid.settings import ModelSettings

REVISION = "0123456789abcdef0123456789abcdef01234567"


def test_manifest_holds_the_hash_of_each_file(tiny_model_dir, tmp_path):
    fetch_model(ModelSettings(model_name_or_path=str(tiny_model_dir)), tmp_path, tmp_path / "tiny.json")
    files = json.loads((tmp_path / "tiny.json").read_text())["files"]
    assert set(files) == {path.name for path in tiny_model_dir.iterdir()}
    weights = (tiny_model_dir / "model.safetensors").read_bytes()
    expected = {"bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}
    assert files["model.safetensors"] == expected


def test_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    settings = ModelSettings(model_name_or_path="model")
    with pytest.raises(UserError, match=r"'model' holds no model; expected a config\.json"):
        fetch_model(settings, tmp_path, tmp_path / "manifest.json")
    (tmp_path / "model/config.json").write_text("{}")
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        fetch_model(settings, tmp_path, tmp_path / "manifest.json")
    assert not (tmp_path / "manifest.json").exists()


def hub_cache(home: Path, source: Path) -> None:
    """Lay a model out as huggingface_hub's cache does after a download at REVISION."""
    snapshot = home / "hub/models--someone--tiny/snapshots" / REVISION
    blobs = home / "hub/models--someone--tiny/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in source.iterdir():
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")


def fetch_from_hub(home: Path, project: Path, revision: str) -> subprocess.CompletedProcess:
    """The hub library reads its environment when it is imported: a process of its own."""
    code = f"""
from pathlib import Path
from finegrid.models import fetch_model
from finegrid.settings import ModelSettings
model = ModelSettings(model_name_or_path="someone/tiny", revision="{revision}")
fetch_model(model, Path("."), Path("data/models/tiny.json"))
"""
    environment = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PATH": ""}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)


def test_hub_model_at_a_pinned_revision_comes_into_the_project(tiny_model_dir, tmp_path):
    hub_cache(tmp_path / "home", tiny_model_dir)
    done = fetch_from_hub(tmp_path / "home", tmp_path, REVISION)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / f"data/models/someone--tiny--{REVISION[:8]}"
    assert (folder / "model.safetensors").read_bytes() == (tiny_model_dir / "model.safetensors").read_bytes()
    manifest = json.loads((tmp_path / "data/models/tiny.json").read_text())
    assert manifest["revision"] == REVISION


def test_unknown_revision_names_model_and_revision(tiny_model_dir, tmp_path):
    hub_cache(tmp_path / "home", tiny_model_dir)
    done = fetch_from_hub(tmp_path / "home", tmp_path, "f" * 40)
    assert done.returncode != 0
    assert "'someone/tiny' at revision 'ffff" in done.stderr
