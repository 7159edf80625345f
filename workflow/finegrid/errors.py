"""Errors that a user can mend: where, what was found, what was expected, how to mend it.

Every stage raises :class:`UserError` for a mistake in a file of the user's; the command line prints its
problems, one a line, and exits with 1. Anything else is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """One or more problems in the user's files, all shown at once.

    Args:
        problems: one sentence each, ``place: what was found; what was expected``.
    """

    def __init__(self, *problems: str):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the valid name nearest to ``name``, or an empty string."""
    found = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return f"; did you mean '{found[0]}'?" if found else ""
