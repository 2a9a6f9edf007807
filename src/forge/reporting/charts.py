"""Line charts as PNG bytes, drawn without pyplot: no window, no global state, the same picture from any thread."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConflictError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Twice the 600 pixels that a page shows, for screens with two dots a pixel.
SIZE, DPI = (6.0, 3.3), 200
# Okabe & Ito, "Color Universal Design" (2008), less the yellow, which vanishes on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
INK, GREY, GRID, RED = "#333333", "#6b7280", "#e5e7eb", "#d00000"
ROUND = (1, 2, 2.5, 5, 10)
# Beyond it, and on a logarithmic axis below its inverse, the margins of an axis would overflow float64.
LARGEST = 1e100


@dataclass(frozen=True)
class Series:
    """A line: `y` over `x`. Values of `y` that are not finite are kept: the chart shows where they were.

    Raises:
        ConflictError: `x` and `y` differ in length, or an `x` is not finite.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]

    def __post_init__(self) -> None:
        # Copies, because a run goes on appending to its lists, and arrays compare elementwise.
        object.__setattr__(self, "x", tuple(map(float, self.x)))
        object.__setattr__(self, "y", tuple(map(float, self.y)))
        if len(self.x) != len(self.y):
            raise ConflictError(
                f"Series {self.name!r} has {len(self.x)} x and {len(self.y)} y. Give one x for each y, and nan where "
                "there is no value."
            )
        if not all(map(_finite, self.x)):
            raise ConflictError(
                f"Series {self.name!r} has an x that is not finite. Leave it out: only y may be nan or inf."
            )


@dataclass(frozen=True)
class Chart:
    r"""Lines over a common x.

    A value that is not finite leaves a gap and a red tick at the bottom; on a logarithmic axis one at or below zero
    leaves a gap and a grey triangle. The chart says so wherever it shows one.

    >>> chart = Chart("Loss", (Series("train", (1, 2, 3), (2.5, float("nan"), 1.75)),))
    >>> chart.alt
    'Loss over step. train: first 2.5 at 1, last 1.75 at 3, min 1.75 at 3, max 2.5 at 1, 1 of 3 not finite.'
    >>> chart.png()[:4]
    b'\x89PNG'

    Args:
        title: What is shown.
        series: The lines; their names stand at their ends where there is more than one.
        y_label: The unit of y.
        x_label: The unit of x.
        log_y: Whether y is logarithmic; it stays linear where no value is above zero.
        marks: `(x, label)` of each event to mark with a dashed line; where labels crowd, only `alt` has them all.

    Raises:
        ConflictError: The x of a mark is not finite.
    """

    title: str
    series: tuple[Series, ...]
    _: KW_ONLY
    y_label: str = ""
    x_label: str = "step"
    log_y: bool = False
    marks: tuple[tuple[float, str], ...] = ()

    def __post_init__(self) -> None:
        for x, label in self.marks:
            if not _finite(x):
                raise ConflictError(f"The mark {label!r} of chart {self.title!r} stands at {x}. Give it a finite x.")

    @property
    def alt(self) -> str:
        """The chart in words, for those who do not see it."""
        events = ", ".join(f"{label} at {x:.12g}" for x, label in self.marks)
        said = [f"{self.title} over {self.x_label}.", *map(_describe, self.series), f"Marked: {events}." * bool(events)]
        return " ".join(part for part in said if part) + " Nothing recorded." * self._empty

    @property
    def _empty(self) -> bool:
        return not any(series.x for series in self.series)

    def png(self) -> bytes:
        """The chart as a PNG, 1200 x 660 pixels; drawn once."""
        return self._png

    @cached_property
    def _png(self) -> bytes:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        buffer = BytesIO()
        # matplotlib signs its pictures with its version; without it the same data give the same bytes.
        canvas: Any = FigureCanvasAgg(self.figure())
        canvas.print_png(buffer, metadata={"Software": None})
        return buffer.getvalue()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the PNG to `path`, whole or not at all."""
        write_whole(path, self.png())

    def figure(self) -> Figure:
        """The chart as a matplotlib Figure, of which the first lines are the series."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained", facecolor="white")
        axes = figure.add_subplot(facecolor="white")
        if self._empty:
            axes.set_axis_off()
            axes.text(0.5, 0.5, "nothing recorded", ha="center", va="center", **_style(10, GREY))
            rows = 0
        else:
            self._lines(axes)
            rows = _mark(axes, self.marks)
        title, _ = _text(self.title, 10.5, 380)
        axes.set_title(title, loc="left", pad=7 + 10 * rows, fontweight="bold", **_style(10.5, INK))
        return figure

    def _lines(self, axes: Axes) -> None:
        values = [value for series in self.series for value in series.y if _finite(value)]
        lowest = 1 / LARGEST if self.log_y and any(value > 1 / LARGEST for value in values) else -LARGEST
        log = lowest > 0
        styles = [(line, color) for line in ("-", "--", ":") for color in PALETTE]
        lost: list[float] = []
        below: list[float] = []
        ends: list[tuple[float, float, str, str]] = []
        for series, (line, color) in zip(self.series, cycle(styles)):
            shown = [value if _finite(value) and value > lowest else math.nan for value in series.y]
            lost += [x for x, value in zip(series.x, series.y, strict=True) if not _finite(value)]
            below += [x for x, value in zip(series.x, series.y, strict=True) if _finite(value) and value <= lowest]
            style: dict[str, Any] = {"color": color, "linestyle": line, "linewidth": 1.5 if len(shown) < 150 else 1.1}
            axes.plot(series.x, shown, marker="o", markersize=3.2, markevery=_alone(shown), label=series.name, **style)
            drawn = [(x, value) for x, value in zip(series.x, shown, strict=True) if _finite(value)]
            ends += [(*drawn[-1], series.name, color)] if drawn else []
        if log:
            axes.set_yscale("log")
        places = {x for series in self.series for x in series.x}
        whole = all(x.is_integer() for x in places)
        if whole and len({*places, *(x for x, _ in self.marks)}) == 1:
            # A single step: there is nothing between it and its neighbours.
            axes.set_xlim(min(places) - 1, max(places) + 1)
        _dress(axes, whole_x=whole)
        axes.set_xlabel(_text(self.x_label, 9, 150)[0], **_style(9, GREY))
        axes.set_ylabel(_text(self.y_label, 9, 150)[0], **_style(9, GREY))
        _flag(axes, lost, below)
        if not values:
            axes.set_yticks([])
            axes.text(
                0.5, 0.5, "no finite value", ha="center", va="center", transform=axes.transAxes, **_style(10, GREY)
            )
        if len(self.series) > 1:
            _name_lines(axes, ends)


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` so that neither a reader nor a killed process leaves or finds half of it."""
    beside = Path(f"{os.fspath(path)}.{os.getpid()}.tmp")
    try:
        beside.write_bytes(data)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _finite(value: float) -> bool:
    return abs(value) < LARGEST


def _describe(series: Series) -> str:
    drawn = [(value, x) for x, value in zip(series.x, series.y, strict=True) if _finite(value)]
    points = {"first": drawn[0], "last": drawn[-1], "min": min(drawn), "max": max(drawn)} if drawn else {}
    said = [f"{what} {_number(float(f'{value:.4g}'))} at {x:.12g}" for what, (value, x) in points.items()]
    said += [f"{len(series.y) - len(drawn)} of {len(series.y)} not finite"] * (len(drawn) < len(series.y))
    return f"{series.name}: {', '.join(said) or 'nothing recorded'}."


def _alone(shown: list[float]) -> list[int]:
    """Which points need a dot: all where there are few, else those that no line reaches."""
    seen = [False, *map(_finite, shown), False]
    few = sum(seen) <= 12
    return [i for i in range(len(shown)) if seen[i + 1] and (few or not (seen[i] or seen[i + 2]))]


def _number(value: float, _position: int | None = None) -> str:
    """A number as people write it.

    >>> [_number(value) for value in (0.02, 2e-4, 1500, 12_000, 1_500_000)]
    ['0.02', '2e-4', '1500', '12k', '1.5M']
    """
    if 0 < abs(value) < 1e-3:
        digits, _, power = f"{value:.5e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if max(unit, 1e4) <= abs(value) < 1e9:
            return f"{value / unit:.6g}{name}"
    digits, _, power = f"{value + 0.0:.6g}".partition("e")
    return f"{digits}e{int(power)}" if power else digits


def _text(text: str, size: float, width: float) -> tuple[str, float]:
    """`text` on one line of at most `width` points, and the points it takes.

    It is cut in the middle, because names of parameters differ at both ends.
    """
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("DejaVu Sans"))
    font.set_size(size, 72)
    # For a letter that the font lacks matplotlib would draw the same box, and warn.
    letters = [letter if font.get_char_index(ord(letter)) else "\N{WHITE SQUARE}" for letter in " ".join(text.split())]
    kept, cut = len(letters), letters
    while True:
        font.set_text("".join(cut))
        taken = font.get_width_height()[0] / 64
        if taken <= width:
            return "".join(cut), taken
        kept = min(kept - 1, int(kept * width / taken))
        half = kept // 2
        cut = [*letters[: kept - half], "…", *letters[len(letters) - half :]]


def _style(size: float, color: str) -> dict[str, Any]:
    # The font is matplotlib's own, so it is there on any machine; a dollar sign is a dollar sign, not mathematics.
    return {"fontsize": size, "color": color, "fontfamily": "DejaVu Sans", "parse_math": False}


def _dress(axes: Axes, *, whole_x: bool) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.grid(visible=True, color=GRID, linewidth=0.8, linestyle="-")
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=GREY, labelsize=8.5, labelfontfamily="DejaVu Sans")
    for name, spine in axes.spines.items():
        spine.set(visible=name == "bottom", color="#9ca3af", linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=whole_x, steps=ROUND))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(_number))
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=ROUND))
        return
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = axes.get_ylim()
    if high < 8 * low:  # too few round powers in between: the ticks of a linear axis are rounder
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=ROUND))
    elif high < 1e3 * low:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())


def _flag(axes: Axes, lost: list[float], below: list[float]) -> None:
    """Mark at the bottom where there was a value that no axis can show, and say what the marks mean."""
    flags = ((lost, 2, 7.0, RED, "red: not finite"), (below, "v", 3.5, GREY, "grey: zero or below"))
    row = 0
    for places, marker, size, color, meaning in flags:
        if not places:
            continue
        style: dict[str, Any] = {"marker": marker, "markersize": size, "markeredgewidth": 1.6, "linestyle": "none"}
        height = 0.0 if places is lost else 0.015
        across = axes.get_xaxis_transform()
        axes.plot(places, [height] * len(places), color=color, transform=across, clip_on=False, zorder=3, **style)
        place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "right", "va": "top"}
        axes.annotate(meaning, (1, 0), (0, -19 - 11 * row), **place, **_style(8, color))
        row += 1


def _name_lines(axes: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Write each line's name at its end, moved apart where they would overlap."""
    axes.get_ylim()  # settles the limits that the transformation reads
    to_axes = axes.transScale + axes.transLimits
    wanted = sorted((float(to_axes.transform((x, y))[1]), name, color) for x, y, name, color in ends)
    gap = min(0.075, 1 / max(len(wanted) - 1, 1))
    heights = [height for height, _, _ in wanted]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    ceiling = 1.0
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], ceiling)
        ceiling = heights[i] - gap
    for height, (_, name, color) in zip(heights, wanted, strict=True):
        axes.text(1.015, height, _text(name, 8.5, 130)[0], transform=axes.transAxes, va="center", **_style(8.5, color))


def _mark(axes: Axes, marks: tuple[tuple[float, str], ...]) -> int:
    """Draw the events, their labels in as many rows above the axes as they need; returns how many."""
    for x, _ in marks:
        axes.axvline(x, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1.5)
    axes.get_xlim()
    to_axes = axes.transScale + axes.transLimits
    taken: list[float] = []
    for x, label in sorted(marks):
        text, width = _text(label, 8, 150)
        # The axes are at least about 270 points wide; how wide is known only once these labels have their place.
        middle, half = float(to_axes.transform((x, 1))[0]), (width / 2 + 4) / 270
        row = next((row for row, end in enumerate(taken) if middle - half > end), len(taken))
        if row == 4:
            continue
        taken[row : row + 1] = [middle + half]
        place: dict[str, Any] = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "ha": "center"}
        axes.annotate(text, (x, 1), (0, 3 + 10 * row), va="bottom", **place, **_style(8, GREY))
    return len(taken)
