"""Rows of a hub data set at a pinned revision, or of a local copy of one, through ``datasets``; no code of it runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from finegrid.data.reading import FileProblem
from finegrid.data.rows import Row
from finegrid.errors import nearest

if TYPE_CHECKING:
    from finegrid.settings import DataConfig, HubDataset


def hub_name(dataset: HubDataset) -> str:
    """Return the data set's name in paths: the last part of its path."""
    return Path(dataset.path).name


def hub_rows(config: DataConfig, split: str, project: Path) -> Iterator[tuple[int, Row]]:
    """Yield (row number, row) of one split; with ``streaming`` nothing is read ahead or kept.

    Args:
        config: its ``dataset`` names path, configuration, revision and splits.
        split: ``train``, ``validation`` or ``test``.
        project: a ``path`` that is a folder under it is read from there and needs no revision.

    Raises:
        FileProblem: no revision, no such data set, configuration or split, the hub can't be reached, or the files
            are damaged.
    """
    import datasets

    dataset = config.dataset
    folder = project / dataset.path
    local = folder.is_dir()
    if not local and not dataset.revision:
        raise FileProblem(
            "data_config.dataset.revision is not set; expected the commit of the hub repository "
            f"(https://huggingface.co/datasets/{dataset.path}/commits), so that the data stays the same"
        )
    wanted = getattr(dataset, f"{split}_split")
    try:
        rows = datasets.load_dataset(
            str(folder) if local else dataset.path,
            dataset.name,
            split=wanted,
            revision=None if local else dataset.revision,
            streaming=config.streaming,
        )
        yield from enumerate(rows, 1)
    except (datasets.exceptions.DatasetsError, ValueError, KeyError, RuntimeError, OSError) as error:
        raise FileProblem(_explain(error, wanted)) from error


def _explain(error: Exception, split: str) -> str:
    """Return what ``datasets`` found, in one line, with the nearest split if there is none of that name."""
    text = " ".join(str(error).split())
    cause = error.__cause__
    if "Unknown split" in text or "Bad split" in text:
        available = text[text.find("[") + 1 : text.find("]")].replace("'", "").split(", ")
        return f"no split '{split}'{nearest(split, available)}; found {', '.join(available)}"
    if cause is not None and str(cause):
        text = f"{text} ({' '.join(str(cause).split())})"
    return f"datasets could not read it: {text[:400]}"
