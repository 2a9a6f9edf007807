"""How the pictures of a study are drawn: what they have in common with the other charts, and with each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

from ...reporting.charts import DPI, GREY, INK, SIZE, Chart, _dress, _number, _style, _text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Plot(Chart):
    """A chart that draws itself.

    Args:
        title: What is shown.
        series: None.
        words: The picture in words, for those who do not see it.
        draw: Draws it on the axes; None where there is nothing but the words to show.
    """

    series: tuple[Any, ...] = ()
    _: KW_ONLY
    words: str = ""
    draw: Callable[[Axes], None] | None = None

    @property
    def alt(self) -> str:
        """The picture in words."""
        return f"{self.title}. {self.words}"

    def figure(self) -> Figure:
        """The picture as a matplotlib Figure."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained", facecolor="white")
        axes = figure.add_subplot(facecolor="white")
        if self.draw is None:
            axes.set_axis_off()
            axes.text(0.5, 0.5, _text(self.words, 10, 400)[0], ha="center", va="center", **_style(10, GREY))
        else:
            self.draw(axes)
        axes.set_title(_text(self.title, 10.5, 400)[0], loc="left", pad=8, fontweight="bold", **_style(10.5, INK))
        return figure


def wider(low: float, high: float, *, log: bool) -> tuple[float, float]:
    """A range with a margin at both ends, so that no point is cut in two."""
    if low >= high:
        return (low / 2, high * 2) if log else (low - 1, high + 1)
    margin = 0.03
    return (
        (low * (low / high) ** margin, high * (high / low) ** margin)
        if log
        else (
            low - margin * (high - low),
            high + margin * (high - low),
        )
    )


def pairs(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """All x, and all y."""
    return [x for x, _ in points], [y for _, y in points]


def filled() -> dict[str, Any]:
    """Dots that are seen one beside another."""
    return {"marker": "o", "ms": 4.8, "ls": "none", "mec": "white", "mew": 0.5, "zorder": 3}


def hollow() -> dict[str, Any]:
    """Dots that matter less."""
    return {"marker": "o", "ms": 4.2, "ls": "none", "mfc": "white", "mew": 1.2, "zorder": 2}


def level(axes: Axes, y: float, name: str) -> None:
    """Draw a line all the way across."""
    axes.axhline(y, color=INK, lw=1.0, ls=(0, (4, 3)), zorder=1.5, label=name)


def keep_window(axes: Axes, values: Sequence[float]) -> None:
    """Keep the axis where most values are; what is far above it is shown as an arrow at its top."""
    ordered = sorted(values)
    if len(ordered) < 8:
        return
    low, middle, high = ordered[0], ordered[len(ordered) // 2], ordered[len(ordered) * 3 // 4]
    ceiling = high + 3 * max(high - low, abs(middle) * 0.01)
    above = sum(value > ceiling for value in ordered)
    if above:
        axes.set_ylim(low - 0.05 * (ceiling - low), ceiling)
        place: dict[str, Any] = {
            "xycoords": "axes fraction",
            "textcoords": "offset points",
            "ha": "right",
            "va": "bottom",
        }
        axes.annotate(f"{above} above the picture", (1, 1), (0, 3), **place, **_style(8, GREY))


def log_ticks(axes: Axes) -> None:
    """Give a logarithmic x the ticks of 1, 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: _number(value) if value >= 0.01 else f"{value:.0e}".replace("e-0", "e-"))
    )


def finish(axes: Axes, x: str, y: str, *, whole_x: bool, legend: bool = True) -> None:
    """Dress the axes, name them, and put the legend beside them."""
    _dress(axes, whole_x=whole_x)
    axes.set_xlabel(_text(x, 9, 330)[0], **_style(9, GREY))
    axes.set_ylabel(_text(y, 9, 150)[0], **_style(9, GREY))
    if legend and axes.get_legend_handles_labels()[0]:
        font = {"family": "DejaVu Sans", "size": 8}
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, prop=font, labelcolor=INK)
