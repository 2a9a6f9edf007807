"""Something to look at: a live table on a terminal, one line per log entry anywhere else."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any

from .report import duration

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

    from .events import Event

ROWS = 12

# Column, key of the log, format. What no row has is not shown.
_COLUMNS = (
    ("loss", "loss", "{:.4f}"),
    ("eval loss", "eval_loss", "{:.4f}"),
    ("grad norm", "grad_norm", "{:.3g}"),
    ("lr", "learning_rate", "{:.2e}"),
    ("tok/s", "tokens_per_second", "{:,.0f}"),
    ("MFU", "mfu", "{:.1%}"),
    ("data wait", "data_wait_share", "{:.0%}"),
    ("GPU GiB", "memory/peak_allocated_gb", "{:.2f}"),
    ("RAM GiB", "memory/process_rss_gb", "{:.2f}"),
    ("bad steps", "nonfinite_steps", "{:.0f}"),
)


class Display:
    """Shows what is logged while it is logged.

    Args:
        console: Where to; a rich console knows whether it is a terminal.
    """

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console

        self._console = console or Console(highlight=False)
        self._live: Live | None = None
        self._rows: deque[tuple[int, dict[str, Any]]] = deque(maxlen=ROWS)
        self._events: deque[Event] = deque(maxlen=3)
        self._max_steps = 0
        self._eta = ""
        self._step = self._begun_at = 0
        self._drawn = 0.0
        self._evaluated = 0
        self._evaluating = ""

    @property
    def in_notebook(self) -> bool:
        """Whether transformers shows a table of its own there."""
        return bool(self._console.is_jupyter)

    def start(self, max_steps: int, *, step: int = 0) -> None:
        """Begin; on a terminal the table stays at its place until `stop`."""
        from rich.live import Live

        self._max_steps, self._step, self._begun_at, self._eta = max_steps, step, step, ""
        self._rows.clear()
        self._events.clear()
        if self._console.is_terminal and not self.in_notebook:
            self._live = Live(self.render(), console=self._console, auto_refresh=False)
            self._live.start()

    def count(self, step: int, eta_s: float) -> None:
        """A step is over: the bar moves, off the terminal the first step says how long it will take."""
        self._step, self._eta = step, duration(eta_s)
        if self._live is not None:
            if time.monotonic() - self._drawn > 0.25:
                self._draw()
        elif step == self._begun_at + 1 < self._max_steps and not self.in_notebook:
            self._print(f"step {step}/{self._max_steps}  about {self._eta} left, by this step")

    def show(self, step: int, logs: dict[str, Any]) -> None:
        """Show an entry of the log."""
        values = {name: logs[key] for name, key, _ in _COLUMNS if isinstance(logs.get(key), int | float)}
        if "eval_loss" not in logs:
            sets = [value for name, value in logs.items() if name.startswith("eval_") and name.endswith("_loss")]
            values.update({"eval loss": sets[0]} if sets else {})
        if not {"loss", "eval loss"} & values.keys():
            return
        self._eta = duration(logs["eta_s"]) if "eta_s" in logs else self._eta
        self._rows.append((step, values))
        if self._live is not None:
            self._draw()
        elif not self.in_notebook:
            cells = "  ".join(f"{name} {form.format(values[name])}" for name, _, form in _COLUMNS if name in values)
            left = f"  {self._eta} left" if "eta_s" in logs else ""
            self._print(f"step {step}/{self._max_steps}  {cells}{left}")

    def show_evaluation(self, batches: Any) -> None:
        """Show that one more batch was evaluated, where there is a table to show it in."""
        self._evaluated += 1
        total = f"/{len(batches)}" if hasattr(batches, "__len__") else ""
        self._evaluating = f"evaluating: batch {self._evaluated}{total}"
        if self._live is not None and time.monotonic() - self._drawn > 0.25:
            self._draw()

    def end_evaluation(self) -> None:
        """The evaluation is over."""
        self._evaluated, self._evaluating = 0, ""

    def add_event(self, event: Event) -> None:
        """Show an event; off the terminal its log record is enough."""
        self._events.append(event)
        if self._live is not None:
            self._draw()

    def stop(self) -> None:
        """Leave the last table standing. May be called twice."""
        self.end_evaluation()
        self._draw()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _draw(self) -> None:
        if self._live is not None:
            self._live.update(self.render(), refresh=True)
            self._drawn = time.monotonic()

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, markup=False)

    def render(self) -> RenderableType:
        """The table as it stands."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        step = max([self._step, *(number for number, _ in self._rows)])
        head = Table.grid(padding=(0, 2))
        left = self._evaluating or (f"{self._eta} left" if self._eta and step < self._max_steps else "")
        head.add_row(
            f"step {step}/{self._max_steps}", ProgressBar(total=max(1, self._max_steps), completed=step, width=40), left
        )
        shown = [column for column in _COLUMNS if any(column[0] in values for _, values in self._rows)]
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for name in ("step", *(name for name, _, _ in shown)):
            table.add_column(name, justify="right")
        for number, values in self._rows:
            cells = [form.format(values[name]) if name in values else "" for name, _, form in shown]
            table.add_row(str(number), *cells, style="red" if values.get("bad steps") else "")
        notes = [Text(f"! step {event.step}: {event.message}", style="yellow") for event in self._events]
        return Group(head, table, *notes)
