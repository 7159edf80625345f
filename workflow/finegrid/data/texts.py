"""The cleaning steps that change a text: each a pure function of one text, in the order in which they run."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

import ftfy

# Only what is broken is mended: quotes, ligatures, full-width forms (Chinese punctuation!) and HTML stay as written.
_MEND = ftfy.TextFixerConfig(
    unescape_html=False,
    remove_terminal_escapes=False,
    fix_latin_ligatures=False,
    fix_character_width=False,
    uncurl_quotes=False,
    fix_line_breaks=False,
    remove_control_chars=False,
    normalization=None,
    explain=False,
)
_LINE_BREAKS = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ufeff]")
_SPACES = re.compile(r"[^\S\n\t]{2,}|[^\S\n\t ]")
_PLAIN_SPACES = re.compile("  +")
_LINE_ENDS = re.compile(r"[^\S\n]*\n[^\S\n]*")
_FENCES = re.compile(r"(^```.*?^```[^\S\n]*$|^~~~.*?^~~~[^\S\n]*$)", re.DOTALL | re.MULTILINE)


def fix_unicode(text: str) -> str:
    """Mend UTF-8 that was read in another encoding (``â€™`` -> ``’``) with ftfy; ASCII can't be broken so."""
    return text if text.isascii() else ftfy.fix_text(text, _MEND)


def nfc(text: str) -> str:
    """Put accents and letters together (Unicode NFC)."""
    return text if text.isascii() or unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


def control_characters(text: str) -> str:
    """Remove control characters and byte order marks; every kind of line break becomes ``\\n``, tabs stay."""
    return text if text.isprintable() else _CONTROL.sub("", _LINE_BREAKS.sub("\n", text))


def white_space(text: str) -> str:
    """Fold runs of spaces to one, trim lines and ends; line breaks and tabs inside lines stay.

    Code between fences (three backticks or tildes, each on a line of its own) is left alone: its indentation means
    something.
    """
    if "```" not in text and "~~~" not in text:
        return _fold(text).strip()
    pieces = _FENCES.split(text)
    return "".join(piece if number % 2 else _fold(piece) for number, piece in enumerate(pieces)).strip()


TEXT_STEPS: dict[str, Callable[[str], str]] = {
    "fix_unicode": fix_unicode,
    "nfc": nfc,
    "control_characters": control_characters,
    "white_space": white_space,
}


def _fold(text: str) -> str:
    if text.isascii() and text.isprintable():  # one line with plain spaces only, the common case: five times faster
        return _PLAIN_SPACES.sub(" ", text) if "  " in text else text
    text = _SPACES.sub(" ", text)
    return _LINE_ENDS.sub("\n", text) if "\n" in text else text
