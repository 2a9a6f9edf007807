"""A table that prints on any terminal, in a file and in a notebook."""

from __future__ import annotations

import re
from io import StringIO
from typing import Any


class Table:
    """Rows under a header, wrapped to the terminal's width; plain text everywhere, bold where the terminal can.

    >>> table = Table(("name", "value"))
    >>> table.add("lora_r", 16)
    >>> print(table)
    name    value
    lora_r  16

    Args:
        header: The columns' names.
        title: A line or two above them.
    """

    def __init__(self, header: tuple[str, ...], *, title: str = "") -> None:
        self.header = header
        self.title = title
        self.footer = ""
        self._rows: list[tuple[str, ...]] = []
        self._sections: dict[int, str] = {}

    def add(self, *cells: Any) -> None:
        """Add a row; floats are written as people write them."""
        self._rows.append(tuple(_text(cell) for cell in cells))

    def section(self, name: str) -> None:
        """Head the rows that follow."""
        self._sections[len(self._rows)] = name

    def print(self) -> None:
        """Print to standard output, as wide as the terminal."""
        from rich.console import Console

        self._render(Console(highlight=False))

    def __str__(self) -> str:
        from rich.console import Console

        text = StringIO()
        self._render(Console(file=text, width=120, highlight=False))
        return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())

    def _render(self, console: Any) -> None:
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for position, name in enumerate(self.header):
            # Names must survive on narrow terminals: they are what people type.
            table.add_column(_text(name), no_wrap=position == 0, overflow="fold", ratio=self._ratio(position))
        for position, row in enumerate(self._rows):
            if position in self._sections:
                table.add_row(Text(self._sections[position], style="bold italic"))
            table.add_row(*(Text(cell) for cell in row))
        if self.title:
            console.print(Text(_text(self.title), style="bold"))
        console.print(table)
        if self.footer:
            console.print(Text(_text(self.footer)))

    def _ratio(self, position: int) -> int | None:
        """Short columns are as wide as their longest cell; the rest is shared."""
        longest = max((len(row[position]) for row in self._rows), default=0)
        return 2 if longest > 60 else None


# Control characters and those that turn the direction of writing: a terminal obeys them, and a reader is misled.
_UNSHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def _text(cell: Any) -> str:
    r"""A cell as text that shows what it is.

    >>> _text(0.5), _text("a\x1b[31mb")
    ('0.5', 'a\ufffd[31mb')
    """
    return f"{cell:g}" if isinstance(cell, float) else _UNSHOWN.sub("\ufffd", str(cell).replace("\r\n", "\n"))
