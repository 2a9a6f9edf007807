"""A report as one HTML file: its style and its pictures are inside it, so it can be mailed, archived and printed."""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any, Literal

from ..errors import ConflictError, UnknownNameError
from .charts import Chart, write_whole
from .table import _text

NoticeKind = Literal["error", "warning", "good", "note"]
# The word beside the colour is for those who do not see the colour, and for black and white print.
NOTICES: dict[str, str] = {"error": "Error", "warning": "Warning", "good": "Good", "note": "Note"}

# The browser holds us to it, even if a text found its way around the escaping.
NOTHING_FROM_OUTSIDE = (
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
)
STYLE = """
:root {
  color-scheme: light dark;
  --back: #f6f7f9; --card: #ffffff; --ink: #1f2430; --quiet: #626a78; --line: #e2e5ea;
  --error: #b3261e; --warning: #8a5a00; --good: #1b7240; --note: #1f5fae;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --back: #14171c; --card: #1d2127; --ink: #e5e8ec; --quiet: #9aa3b0; --line: #323841;
    --error: #ff8a80; --warning: #f2b84b; --good: #6fcf97; --note: #82b4f5;
  }
  /* White becomes the card behind it and the lines keep their hues: one picture serves both modes. */
  figure img { filter: invert(1) hue-rotate(180deg); mix-blend-mode: screen; }
}
* { box-sizing: border-box; }
body {
  margin: 0; padding: 2.5rem 1.25rem 4rem; background: var(--back); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 72rem; margin: 0 auto; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; overflow-wrap: anywhere; }
.subtitle { color: var(--quiet); margin: .35rem 0 0; }
p { max-width: 46rem; margin: .75rem 0; overflow-wrap: anywhere; white-space: pre-line; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1.25rem 0; }
.facts div, figure, pre, .table { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
.facts div { padding: .7rem .9rem; }
dt { color: var(--quiet); font-size: .8rem; }
dd { margin: .1rem 0 0; font-size: 1.2rem; font-weight: 600; overflow-wrap: anywhere; }
dd, td { font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: .75rem; }
.charts { margin: 1rem 0; }
figure { margin: 0; padding: .75rem; max-width: 42rem; isolation: isolate; }
img { display: block; width: 100%; height: auto; }
.table { overflow-x: auto; margin: 1rem 0; width: fit-content; max-width: 100%; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .45rem .9rem; text-align: left; vertical-align: top; overflow-wrap: break-word; }
td { white-space: pre-line; }
th { color: var(--quiet); font-weight: 600; white-space: nowrap; }
tbody tr { border-top: 1px solid var(--line); }
.number { text-align: right; white-space: nowrap; }
pre { padding: .9rem 1rem; overflow-x: auto; }
pre { font: .82rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.notice {
  border: 1px solid var(--line); border-left: 4px solid var(--tone); border-radius: .5rem;
  background: var(--card); padding: .6rem .9rem;
}
.notice strong { color: var(--tone); }
.error { --tone: var(--error); } .warning { --tone: var(--warning); }
.good { --tone: var(--good); } .note { --tone: var(--note); }
@media print {
  body { padding: 0; background: #fff; font-size: 10pt; }
  .charts { grid-template-columns: 1fr 1fr; }
  .facts { grid-template-columns: repeat(4, 1fr); }
  figure, .facts div, .notice, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
  pre { white-space: pre-wrap; }
  td { overflow-wrap: anywhere; }
  .notice { print-color-adjust: exact; }
}
"""


class Page:
    """A report, written from the top down. All that is handed in is text, never HTML.

    >>> page = Page("Training report", "run 7")
    >>> page.notice("loss < 0", kind="warning")
    >>> page.facts({"Steps": 120, "Final loss": 1.875})
    >>> '<p class="notice warning"><strong>Warning:</strong> loss &lt; 0</p>' in page.html()
    True

    Args:
        title: Its headline, and its name in the browser.
        subtitle: A line below it.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = title
        self.subtitle = subtitle
        self._blocks: list[tuple[bool, str]] = []

    def heading(self, text: str) -> None:
        """Begin a section."""
        self._add(_tag("h2", text))

    def text(self, text: str) -> None:
        """Add a paragraph for each block between blank lines; line ends are kept."""
        for block in filter(None, (block.strip() for block in str(text).split("\n\n"))):
            self._add(_tag("p", block))

    def facts(self, facts: Mapping[str, Any]) -> None:
        """Add key figures, a small card for each."""
        cards = (f"<div>{_tag('dt', name)}{_tag('dd', value)}</div>" for name, value in facts.items())
        self._add(f'<dl class="facts">{"".join(cards)}</dl>')

    def table(self, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Add a table; columns of numbers are set flush right.

        Raises:
            ConflictError: A row is longer or shorter than the header.
        """
        cells = [tuple(row) for row in rows]
        for row in cells:
            if len(row) != len(header):
                raise ConflictError(
                    f"A row has {len(row)} cells under a header of {len(header)}: {row!r}. Give one cell a column."
                )
        classes = ["number" if cells and all(map(_is_number, column)) else "" for column in zip(*cells, strict=True)]
        classes = classes or [""] * len(header)
        head = "".join(_tag("th", name, kind, scope="col") for name, kind in zip(header, classes, strict=True))
        body = "\n".join(
            f"<tr>{''.join(_tag('td', cell, kind) for cell, kind in zip(row, classes, strict=True))}</tr>"
            for row in cells
        )
        # The region scrolls on a narrow screen, so the keyboard must be able to reach it.
        table = f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"
        self._add(f'<div class="table" tabindex="0">{table}</div>')

    def chart(self, chart: Chart) -> None:
        """Add a chart; charts that follow each other stand side by side where there is room."""
        data = b64encode(chart.png()).decode("ascii")
        alt = escape(chart.alt)
        image = f'<img alt="{alt}" width="1200" height="660" src="data:image/png;base64,{data}">'
        self._blocks.append((True, f"<figure>{image}</figure>"))

    def preformatted(self, text: str) -> None:
        """Add text as it stands, in a fixed-width font."""
        self._add(_tag("pre", text))

    def notice(self, text: str, kind: NoticeKind = "error") -> None:
        """Add a line that must not be missed.

        Raises:
            UnknownNameError: There is no such kind.
        """
        if kind not in NOTICES:
            raise UnknownNameError.among("kind of notice", kind, NOTICES)
        self._add(f'<p class="notice {kind}">{_tag("strong", f"{NOTICES[kind]}:")} {escape(_text(text))}</p>')

    def html(self) -> str:
        """The page."""
        body = [_tag("h1", self.title)]
        body += [_tag("p", self.subtitle, "subtitle")] if self.subtitle else []
        for are_charts, blocks in groupby(self._blocks, key=lambda block: block[0]):
            run = "\n".join(html for _, html in blocks)
            body.append(f'<div class="charts">\n{run}\n</div>' if are_charts else run)
        content = "\n".join(body)
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"{NOTHING_FROM_OUTSIDE}\n{_tag('title', self.title)}\n<style>{STYLE}</style>\n</head>\n"
            f"<body>\n<main>\n{content}\n</main>\n</body>\n</html>\n"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page to `path`, whole or not at all."""
        # Text that a tokenizer cut in the middle of a character may hold what UTF-8 cannot.
        write_whole(path, self.html().encode("utf-8", "replace"))

    def _add(self, html: str) -> None:
        self._blocks.append((False, html))


def _tag(name: str, content: Any, kind: str = "", **attributes: str) -> str:
    """An element around text; the one place where text becomes HTML, but for attributes and notices."""
    attributes |= {"class": kind} if kind else {}
    said = "".join(f' {key}="{escape(value)}"' for key, value in attributes.items())
    return f"<{name}{said}>{escape(_text(content))}</{name}>"


def _is_number(value: Any) -> bool:
    """Whether it is a number, or the text of one: people round their own figures."""
    try:
        float(str(value).replace(",", ""))
    except ValueError:
        return False
    return True
