"""Rows into samples: bad ones raise all together, useless ones are left out and counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ForgeError
from .formats import Layout
from .messages import BadValueError, first_five, without_nulls
from .rows import DUPLICATE, Sample, read_row
from .source import Rows


def read(rows: Rows, layout: Layout, *, chat: bool) -> tuple[list[Sample], dict[str, list[int]]]:
    """All rows as samples.

    Args:
        rows: of the data set.
        layout: of its columns.
        chat: whether texts become messages.

    Returns:
        The samples, and reason -> numbers of the rows that were left out.

    Raises:
        ForgeError: rows are broken; the message names the first five, with the field.
    """
    samples: list[Sample] = []
    dropped: dict[str, list[int]] = {}
    broken: list[str] = []
    seen: set[str] = set()
    arrow = not isinstance(rows.rows, list)
    for number, row in enumerate(rows):
        sample = _read(without_nulls(row) if arrow else row, number, layout, chat)
        if isinstance(sample, BadValueError):
            broken.append(f"row {number}, {sample}")
        elif isinstance(sample, str):
            dropped.setdefault(sample, []).append(number)
        elif sample.content in seen:
            dropped.setdefault(DUPLICATE, []).append(number)
        else:
            seen.add(sample.content)
            samples.append(sample)
    if broken:
        more, listed = first_five(broken)
        raise ForgeError(
            f"{len(broken):,} of the {len(rows):,} rows of {rows.name} are broken{more}; rows count from 0:\n"
            f"  {listed}\nCorrect them, or leave them out (dataset.filter)."
        )
    return samples, dropped


def _read(row: Mapping[str, Any], number: int, layout: Layout, chat: bool) -> Sample | str | BadValueError:
    try:
        return read_row(row, number, layout, chat=chat)
    except BadValueError as error:
        return error
