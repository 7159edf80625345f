"""Which study and commit a figure's metadata names: set around the drawing, read where it is saved.

The commit is the one whose code first drew the figure from the same results, not that of the checkout: drawn again
from the same results by the same code, a figure has the same bytes at any commit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

_stamp: dict[str, str] = {}


@contextlib.contextmanager
def stamped(study: str, made_at: Mapping[str, object]) -> Iterator[None]:
    """Give the figures saved in the block a study and a commit.

    Args:
        study: its name.
        made_at: ``commit`` (null outside of git: none is named) and ``dirty``.
    """
    _stamp["study"] = study
    if made_at.get("commit"):
        _stamp["commit"] = f"{made_at['commit']}{' (edited)' if made_at.get('dirty') else ''}"
    try:
        yield
    finally:
        _stamp.clear()


def pdf_metadata() -> dict[str, str | None]:
    """Return the metadata of a PDF: study and commit, and no date, which would change the bytes of the same figure."""
    if not _stamp:
        return {"CreationDate": None}
    words = [f"study {_stamp['study']}"] + ([f"commit {_stamp['commit']}"] if "commit" in _stamp else [])
    return {"CreationDate": None, "Subject": ", ".join(words), "Keywords": " ".join(_stamp.values())}


def png_metadata() -> dict[str, str | None]:
    """Return the text chunks of a PNG: study and commit, and no programme version."""
    return {"Software": None} | {name.capitalize(): value for name, value in _stamp.items()}
