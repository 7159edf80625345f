"""Read the rows of a raw file, whatever holds them: JSON, JSON lines, csv or parquet, plain or gzipped.

What a file is shows in its first bytes; its name only settles what they leave open. Rows come one by one, with the
line where they stand (the row's number in parquet), so that memory does not grow with the file; a ``.json`` file
and gzipped parquet are read whole, for their format asks for it.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from finegrid.data.rows import Row

Report = Callable[[int, str], None]

_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"
_FOREIGN = {
    b"PK\x03\x04": "a zip archive or an Excel file",
    b"\xfd7zXZ": "compressed with xz",
    b"BZh": "compressed with bzip2",
    b"\x28\xb5\x2f\xfd": "compressed with zstandard",
    b"ARROW1": "an Arrow file",
}
_BYTE_ORDER_MARKS = (  # of UTF-32 first: its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_PARQUET_BATCH = 1024
_HEAD = 1 << 16
_BUFFER = 1 << 20


class FileProblem(Exception):
    """Why a file can't be read on: ``what was found; what was expected``, and the line if it is known."""

    def __init__(self, problem: str, line: int | None = None):
        self.line = line
        super().__init__(problem)


def read_rows(path: Path, encoding: str, report: Report) -> tuple[str, Iterator[tuple[int, Row]]]:
    """Return what holds the rows (``jsonl, gzip``) and an iterator of (line, row).

    Args:
        path: the file.
        encoding: of the text in it; a byte order mark of UTF-8 is skipped.
        report: called with line and problem for each row that can't be read; reading goes on behind it.

    Raises:
        FileProblem: here or while iterating, when the file can't be read (on): empty, damaged, truncated, of
            another encoding or no known format.
    """
    head = _head(path)
    zipped = head.startswith(_GZIP)
    inner = _unzipped_head(path) if zipped else head
    for magic, name in _FOREIGN.items():
        if inner.startswith(magic):
            raise FileProblem(f"the file is {name}; expected json, jsonl, csv or parquet, plain or .gz")
    if inner.startswith(_PARQUET):
        kind, rows = "parquet", _parquet_rows(path, zipped)
    else:
        kind, rows = _text_rows(path, zipped, inner, encoding, report)
    return f"{kind}, gzip" if zipped else kind, _guarded(rows)


# ---------------------------------------------------------------- bytes


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise FileProblem(f"can't be read ({error.strerror})") from None
    if not head:
        raise FileProblem("the file is empty; expected rows")
    return head


def _unzipped_head(path: Path) -> bytes:
    try:
        with gzip.open(path) as file:
            head = file.read1(_HEAD)
    except (EOFError, OSError, zlib.error) as error:
        raise FileProblem(_damage(error)) from None
    if not head:
        raise FileProblem("the gzipped file is empty; expected rows")
    return head


def _guarded(rows: Iterator[tuple[int, Row]]) -> Iterator[tuple[int, Row]]:
    """Pass rows on; say how far it came where the file ends early or is damaged."""
    line = 0
    try:
        for item in rows:
            line = item[0]
            yield item
    except (EOFError, OSError, zlib.error) as error:
        raise FileProblem(
            f"{_damage(error)}; it could be read up to line {line:,}" if line else _damage(error)
        ) from None


def _damage(error: Exception) -> str:
    if isinstance(error, EOFError):
        return "the gzip file ends early (a broken download?); expected a whole file"
    return f"the file is damaged ({' '.join(str(error).split())}); expected a whole file"


def _lines(path: Path, zipped: bool, encoding: str) -> Iterator[tuple[int, str]]:
    """Yield (line number, text with its line end) of a text file."""
    with io.BufferedReader(gzip.open(path), _BUFFER) if zipped else path.open("rb") as file:
        if _one_byte_line_ends(encoding):
            for number, raw in enumerate(file, 1):
                try:
                    text = raw.decode(encoding)
                except UnicodeDecodeError as error:
                    raise FileProblem(_encoding_problem(raw, error, encoding), number) from None
                yield number, text.removeprefix("\ufeff") if number == 1 else text
            return
        number = 0
        try:
            for number, text in enumerate(io.TextIOWrapper(file, encoding=encoding, newline=""), 1):
                yield number, text
        except UnicodeError as error:
            raise FileProblem(f"the text is not {encoding} ({error}); see data_config.encoding", number + 1) from None


def _one_byte_line_ends(encoding: str) -> bool:
    try:
        return "a\n".encode(encoding).endswith(b"a\n")
    except LookupError:
        raise FileProblem(
            f"data_config.encoding: '{encoding}' is no known encoding; expected for example utf-8, gb18030, cp1252"
        ) from None


def _encoding_problem(raw: bytes, error: UnicodeDecodeError, encoding: str) -> str:
    guess = "gb18030" if _looks_chinese(raw) else "cp1252"
    hint = f"; if it is {guess}, set data_config.encoding: {guess}" if encoding.lower() in ("utf-8", "utf8") else ""
    return f"byte 0x{raw[error.start]:02x} at column {error.start + 1} is no {encoding}; expected {encoding}{hint}"


def _looks_chinese(raw: bytes) -> bool:
    try:
        text = raw.decode("gb18030")
    except UnicodeDecodeError:
        return False
    others = [character for character in text if not character.isascii()]
    return sum("\u3000" <= c <= "\u9fff" or "\uff00" <= c <= "\uffef" for c in others) > 0.9 * len(others)


# ---------------------------------------------------------------- text


def _text_rows(path: Path, zipped: bool, head: bytes, encoding: str, report: Report) -> tuple[str, Iterator]:
    for mark, name in _BYTE_ORDER_MARKS:
        if head.startswith(mark):
            if not encoding.lower().replace("_", "-").startswith(name):
                raise FileProblem(f"the text is {name} (by its byte order mark); set data_config.encoding: {name}")
            break
    if _one_byte_line_ends(encoding) and b"\0" in head:
        raise FileProblem("the file is binary, or UTF-16 (then set data_config.encoding: utf-16); expected text")
    text = head.decode(encoding, errors="ignore").removeprefix("\ufeff").lstrip()
    if not text:
        raise FileProblem("the file holds nothing but white space; expected rows")
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    lines = _lines(path, zipped, encoding)
    if suffix in (".csv", ".tsv") or (text[0] not in "[{" and suffix not in (".json", ".jsonl")):
        return "csv", _csv_rows(lines, report)
    if text[0] == "[" or (text[0] == "{" and _is_one_object(text, suffix)):
        return "json", _json_rows(lines, report)
    return "jsonl", _json_line_rows(lines, report)


def _is_one_object(text: str, suffix: str) -> bool:
    """Return whether a text that begins with ``{`` is one JSON object over many lines, not one object a line."""
    first, line_end, _ = text.partition("\n")
    if re.match(r'\{\s*"data"\s*:\s*\[', text):
        return True
    return suffix != ".jsonl" and line_end != "" and not first.rstrip().endswith("}")


def _json_line_rows(lines: Iterator[tuple[int, str]], report: Report) -> Iterator[tuple[int, Row]]:
    for number, text in lines:
        if text.isspace():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            report(number, f"bad JSON ({_json_error(error)}); expected one JSON object a line")
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            report(number, f"the line is {_json_type(row)}; expected a JSON object")


def _json_rows(lines: Iterator[tuple[int, str]], report: Report) -> Iterator[tuple[int, Row]]:
    """Yield the objects of a list, or of the list under ``data``, each with the line where it begins."""
    text = "".join(line for _, line in lines)
    opening = re.match(r'\s*(\{\s*"data"\s*:\s*)?\[\s*', text)
    if not opening:
        raise FileProblem('the JSON is no list; expected a list of objects, {"data": [...]}, or one object a line')
    decoder, place, line, counted = json.JSONDecoder(), opening.end(), 1, 0
    separator = re.compile(r"\s*(,\s*|(?=\]))")
    while text[place : place + 1] != "]":
        line, counted = line + text.count("\n", counted, place), place
        try:
            row, place = decoder.raw_decode(text, place)
            comma = separator.match(text, place)
            if comma is None:
                following = place + len(text[place:]) - len(text[place:].lstrip())
                raise json.JSONDecodeError("Expecting ',' delimiter", text, following)
        except json.JSONDecodeError as error:
            ended = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
            raise FileProblem(
                f"bad JSON ({'the file ends early' if ended else _json_error(error)}); expected a list of objects",
                error.lineno,
            ) from None
        except RecursionError as error:
            raise FileProblem(f"bad JSON ({_json_error(error)})", line) from None
        place = comma.end()
        if isinstance(row, dict):
            yield line, row
        else:
            report(line, f"the item is {_json_type(row)}; expected a JSON object")
    try:
        json.loads(('{"data":[' if opening[1] else "[") + text[place:])
    except json.JSONDecodeError:
        line += text.count("\n", counted, place)
        raise FileProblem("bad JSON behind the list's end; expected one list of objects", line) from None


def _json_error(error: Exception) -> str:
    return f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deep"


def _json_type(value: Any) -> str:
    if value is None:
        return "null"
    return {list: "a list", str: "a text", bool: "true or false"}.get(type(value), "a number")


def _csv_rows(lines: Iterator[tuple[int, str]], report: Report) -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(1 << 30)
    first = next(lines)
    delimiter = _delimiter(first[1])
    texts = (text for _, text in _chain(first, lines))
    reader = csv.reader(texts, delimiter=delimiter, strict=True)
    header, begin = None, 1
    try:
        for record in reader:
            line, begin = begin, reader.line_num + 1
            if not record or not any(record):
                continue
            if header is None:
                header = _header(record, line)
            elif len(record) != len(header):
                report(
                    line, f"the row's cells are {len(record)}; expected {len(header)}, one for each name in the header"
                )
            else:
                yield line, dict(zip(header, record, strict=True))
    except csv.Error as error:
        problem = "a quoted cell is never closed" if "unexpected end" in str(error) else str(error)
        raise FileProblem(f"bad csv ({problem}, in the row that begins here)", begin) from None


def _chain(first: tuple[int, str], others: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    yield first
    yield from others


def _delimiter(header: str) -> str:
    unquoted = re.sub(r'"[^"]*"', "", header)
    return max(",;\t|", key=unquoted.count)


def _header(record: list[str], line: int) -> list[str]:
    header = [name.strip() for name in record]
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated or not all(header):
        found = f"the column name '{repeated[0][:40]}' twice" if repeated and repeated[0] else "a column without a name"
        raise FileProblem(f"{found}; expected a header line with a name for each column", line)
    return header


# ---------------------------------------------------------------- parquet


def _parquet_rows(path: Path, zipped: bool) -> Iterator[tuple[int, Row]]:
    import pyarrow
    from pyarrow import parquet

    try:
        source = pyarrow.BufferReader(gzip.decompress(path.read_bytes())) if zipped else path
        with parquet.ParquetFile(source) as file:
            number = 0
            for batch in file.iter_batches(_PARQUET_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, zlib.error) as error:
        raise FileProblem(
            f"the parquet file is damaged ({str(error).splitlines()[0]}); expected a whole file"
        ) from None
