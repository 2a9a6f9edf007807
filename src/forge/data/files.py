"""Files of rows.

JSON and CSV are read without Arrow, whose readers want one type a column and do not say which line has another.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConflictError, ForgeError
from .formats import find_layout
from .lengths import counted
from .messages import describe, looks_like_messages

if TYPE_CHECKING:
    from datasets import Dataset

Row = Mapping[str, Any]


def read_file(path: Path) -> list[Row] | Dataset:
    """The rows of a file.

    Raises:
        ForgeError: its kind is unknown, or it cannot be read; the message names the line.
    """
    read = READERS.get(path.suffix.lower())
    if read is None:
        raise ForgeError(
            f"{path}: files called *{path.suffix} are not read; known are {', '.join(READERS)}. Convert it."
        )
    return read(path)


def _text(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ForgeError(
            f"{path}, line {line}: byte 0x{raw[error.start]:02x} is not UTF-8. Save the file as UTF-8."
        ) from None


def _read_json_lines(path: Path) -> list[Row]:
    rows: list[Row] = []
    # Not splitlines(): JSON strings may hold U+2028 and its like unescaped.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ForgeError(
                f"{path}, line {number}: no JSON: {error.msg} at column {error.colno}: {_around(line, error.pos)}. "
                "Each line must be one object; correct or remove the line."
            ) from None
        if not isinstance(row, dict):
            raise ForgeError(
                f"{path}, line {number}: {describe(row)}, where an object (column: value) belongs. "
                "Correct or remove the line."
            )
        rows.append(row)
    return rows


def _read_json(path: Path) -> list[Row]:
    text = _text(path)
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        lines = [line for line in text.split("\n") if line.strip()]
        if len(lines) > 1 and lines[0].lstrip().startswith("{") and lines[0].rstrip().endswith("}"):
            return _read_json_lines(path)  # many call JSON lines .json
        raise ForgeError(
            f"{path}, line {error.lineno}: no JSON: {error.msg} at column {error.colno}: {_around(text, error.pos)}."
        ) from None
    if isinstance(found, dict):
        lists = [name for name, held in found.items() if isinstance(held, list) and held and isinstance(held[0], dict)]
        if not lists or _is_row(found):
            return [found]
        if len(lists) > 1:
            raise ForgeError(f"{path} holds several lists of objects: {', '.join(lists)}. Keep the one that is meant.")
        found = found[lists[0]]
    if not isinstance(found, list):
        raise ForgeError(f"{path} holds {describe(found)}, where a list of objects belongs.")
    for number, row in enumerate(found):
        if not isinstance(row, dict):
            raise ForgeError(f"{path}: entry {number} is {describe(row)}, where an object (column: value) belongs.")
    return found


def _is_row(found: Row) -> bool:
    """Whether an object is a row itself: its lists are messages, or its own columns make a format."""
    if any(isinstance(held, list) and looks_like_messages(held) for held in found.values()):
        return True
    columns = [name for name in found if name != "tools"]
    try:
        format = find_layout(columns, {name: [found[name]] for name in columns if found[name] is not None}).format
    except ConflictError:
        return False
    return format != "text" or "tools" in found  # a text beside a list of rows may describe them


def _around(text: str, position: int) -> str:
    return repr(text[max(0, position - 20) : position + 20])


def _read_table(path: Path) -> list[Row]:
    # Everything is text: an answer "007" is no number, and one that says "NA" is not missing.
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    text = _text(path)
    if not text.strip():
        raise ForgeError(f"{path} is empty, and so has no rows: not even a header with the names of the columns.")
    # Strict: else a quote that is never closed swallows the rest of the file, without a word.
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    before = csv.field_size_limit(sys.maxsize)  # the module's own limit would refuse a long document
    try:
        begin, header, rows = 1, next(lines), list[Row]()
        if twice := sorted({column for column in header if header.count(column) > 1}):
            raise ForgeError(f"{path}: the header names {', '.join(twice)} more than once. Rename or remove a column.")
        begin = lines.line_num + 1
        for fields in lines:
            if len(fields) == len(header):
                rows.append(dict(zip(header, fields, strict=True)))
            elif fields:
                raise ForgeError(
                    f"{path}, line {begin}: {counted(len(fields), 'field')} under a header of {len(header)} "
                    f"({', '.join(header)}). Quote fields that hold the separator or line ends."
                )
            begin = lines.line_num + 1
    except csv.Error as error:
        raise ForgeError(
            f"{path}, the row that begins in line {begin}: {error}. A field that begins with a quote must end with "
            "one; quotes inside it are doubled."
        ) from None
    finally:
        csv.field_size_limit(before)
    return rows


def _read_parquet(path: Path) -> Dataset:
    import datasets
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ForgeError(f"{path} is not a Parquet file that can be read: {error}.") from None
    return datasets.Dataset(table)


READERS: dict[str, Callable[[Path], list[Row] | Dataset]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".parquet": _read_parquet,
}
