"""Where everything lies, relative to the project: one function a place, shared by the command line and the rules."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from finegrid.errors import UserError, nearest

if TYPE_CHECKING:
    from finegrid.settings import ModelSettings
    from finegrid.study import Run

STUDIES = Path("config/studies")
MODELS = Path("data/models")
CLEAN = Path("data/clean")
TOKENS = Path("data/tokens")
RESULTS = Path("results")
DEMO_MODEL = "data/models/SmolLM2-135M-Instruct"
DEMO_DATA = "data/raw/insuranceqa"


def study_file(study: str) -> Path:
    """Return the file of a study: a name in ``config/studies`` (`insurance`), or a path as it is.

    Raises:
        UserError: there is no such file.
    """
    path = Path(study) if study.endswith((".yaml", ".yml")) else STUDIES / f"{study}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in STUDIES.glob("*.yaml"))
        raise UserError(f"study '{study}': there is no {path}{nearest(study, known)}; there are {', '.join(known)}")
    return path


def model_name(model: ModelSettings) -> str:
    """Return the base model's name in paths: its folder's name, or ``organisation--name--revision`` of a hub id."""
    if model.revision:
        return f"{model.model_name_or_path.replace('/', '--')}--{model.revision[:8]}"
    return Path(model.model_name_or_path).name


def model_folder(model: ModelSettings) -> Path:
    """Return the folder with the base model's files; a hub model is fetched into ``data/models``."""
    return MODELS / model_name(model) if model.revision else Path(model.model_name_or_path)


def clean_folder(run: Run) -> Path:
    """Return the folder of the run's clean data set."""
    return CLEAN / f"{run.dataset}-{run.data_id}"


def tokens_folder(run: Run) -> Path:
    """Return the folder of the run's token files."""
    return TOKENS / f"{run.dataset}-{run.tokens_id}"


def weights_folder(study: str, run: Run) -> Path:
    """Return the folder of what the run trained: an adapter, or a whole model for full fine-tuning."""
    return RESULTS / study / "runs" / run.id / ("model" if run.settings.method == "full" else "adapter")
