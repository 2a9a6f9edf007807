"""The reading end of a spool: lines that are whole, in portions that MLflow takes at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from .spool import LINES, parsed

_TOGETHER = ("metrics", "params", "tags")
_MOST_LINES = 500  # read at a time
_T = TypeVar("_T")
_Lines = list[dict[str, Any]]


def unread(folder: Path, offset: int, until: int | None) -> list[tuple[dict[str, Any] | None, int]]:
    """Some of the whole lines that come next, each with the offset of its end; None is one that a kill cut short.

    Args:
        folder: the spool's.
        offset: of the first of them, in bytes.
        until: the offset that none goes beyond; None for the end of the file.
    """
    path, found = folder / LINES, []
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(offset)
        for _ in range(_MOST_LINES):
            line = file.readline()
            if not line.endswith(b"\n") or (until is not None and file.tell() > until):
                break
            found.append((parsed(line), file.tell()))
    return found


def batches(lines: list[tuple[dict[str, Any] | None, int]]) -> Iterator[tuple[_Lines, int]]:
    """Lines that can go in one request (figures, settings and labels of one run that follow each other), and their end.

    Args:
        lines: as `unread` gives them.
    """
    together: _Lines = []
    end = 0
    for line, after in lines:
        if line is not None:
            alike = together and together[0]["run"] == line["run"] and line["do"] in _TOGETHER
            if together and not (alike and together[0]["do"] in _TOGETHER):
                yield together, end
                together = []
            together.append(line)
        end = after
    if lines:
        yield together, end


def parts(values: list[_T], most: int) -> Iterator[list[_T]]:
    """So many of them at a time."""
    for begin in range(0, len(values), most):
        yield values[begin : begin + most]
