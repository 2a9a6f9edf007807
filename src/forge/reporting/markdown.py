"""Texts from users as Markdown that says just that: one line each, fit for others to read, no Markdown of their own."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from .private import public


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], *, missing: str = "None") -> str:
    r"""A table; None is shown as `missing`.

    >>> print(table(("setting", "value"), [("learning_rate", 2e-4), ("prompt|s", None)]))
    | setting | value |
    | --- | --- |
    | learning_rate | 0.0002 |
    | prompt\|s | None |
    """
    lines = [header, ["---"] * len(header), *([_cell(value, missing) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(value: Any, missing: str) -> str:
    if value is None:
        return missing
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}" if math.isfinite(value) else str(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return escaped(value) or "-"


def one_line(value: Any) -> str:
    """A value as one line for others: public, and without what cannot be printed."""
    if isinstance(value, (list, tuple, set, frozenset)):
        return ", ".join(map(one_line, value))
    return _printable(public(str(value)))


def escaped(value: Any) -> str:
    """A value as text that Markdown takes for nothing else."""
    text = one_line(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*|\[\]~$#!])", r"\\\1", text)
    text = re.sub(r"^([0-9]*)([-+.)])(?= )", r"\1\\\2", text)  # would begin a list
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)


def literal(text: str) -> str:
    """A text that is public as Python writes it, which cannot end the block of code that it stands in."""
    return json.dumps(_printable(text).replace("`", ""), ensure_ascii=False)


def _printable(text: str) -> str:
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
