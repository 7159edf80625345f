"""How times are said to people."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Return a time as a person says it: ``41 s``, ``12 min``, ``3 h 05 min``, ``4 d 02 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 72 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"
