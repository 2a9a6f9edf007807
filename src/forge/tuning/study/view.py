"""What a search shows while it runs: a table that stays in its place on a terminal, lines of a log anywhere else."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .board import board, done, time_left
from .lines import begun_line, ended_line, trial_line
from .reading import StudyRecord, as_record

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

    from ..engines.contract import Arrival, Task
    from .ledger import Asked

logger = logging.getLogger("forge.tuning")

Source = Any
"""A study, what was read of it, or a function that gives one of them."""
READ_S = 0.5
"""Between two looks at the study: they cost a query each."""


class StudyView:
    """Shows a study while it runs. Whatever goes wrong in here is noted once, and the search goes on.

        with StudyView(lambda: ledger.study, n_trials=20) as view:
            Worker(ledger, engine, folder, make_task=..., watchers=[view]).run()

    It may be told of each event, as a worker's watcher; or be shown the study now and then by `update`, and it finds
    out itself what happened since. On a terminal there is a table; anywhere else, and in a notebook, each event is a
    line of the log "forge.tuning" (level INFO), or of the standard error where that log is not listened to.

    Args:
        source: where to look; None if every `update` brings the study.
        n_trials: how many are launched in all, where the study does not say.
        console: rich's; it knows whether it is a terminal.
        live: whether to draw the table; None where the console is a terminal.
    """

    def __init__(
        self,
        source: Source = None,
        *,
        n_trials: int | None = None,
        console: Console | None = None,
        live: bool | None = None,
    ) -> None:
        self._source, self._n_trials, self._console, self._wanted = source, n_trials, console, live
        self._live: Live | None = None
        self._lock = threading.RLock()
        self._params: dict[int, Mapping[str, Any]] = {}
        self._rungs: dict[int, str] = {}
        self._said: dict[int, tuple[str, int]] | None = None
        self._looked = -float("inf")
        self._begun: tuple[float, int, int] | None = None
        self._training: dict[int, str] = {}
        self._broken = False

    def start(self) -> StudyView:
        """Begin to show."""
        self._safely(self._start)
        return self

    def stop(self) -> None:
        """Show the last state and leave it standing. May be called twice."""
        self._safely(self._update, None, (), True)
        live, self._live = self._live, None
        if live is not None:
            self._safely(live.stop)

    def update(self, study: Source = None, running: Iterable[Mapping[str, Any]] = (), *, force: bool = False) -> None:
        """Show the study as it stands; within half a second of the last look this does nothing.

        Args:
            study: as it stands; None looks at the source.
            running: of trials on the way "number", and what is known of them beyond the study: "percent", "loss".
            force: whether to look in any case.
        """
        if force or time.monotonic() - self._looked >= READ_S:
            self._safely(self._update, study, running, force)

    def started(self, asked: Asked, _task: Task | None = None) -> None:
        """A trial begins, or begins anew."""
        self._safely(self._tell_started, asked)

    def reached(self, arrival: Arrival, *, goes_on: bool) -> None:
        """A trial stands at a rung."""
        self._safely(self._tell_reached, arrival, goes_on)

    def ended(self, number: int, status: str, attrs: Mapping[str, Any]) -> None:
        """A trial is over."""
        self._safely(self._tell_ended, number, status, attrs)

    def __enter__(self) -> StudyView:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        from rich.console import Console
        from rich.live import Live

        console = self._console or Console(highlight=False)
        table = console.is_terminal and not console.is_jupyter and not console.is_dumb_terminal
        if self._live is None and (table if self._wanted is None else self._wanted):
            # No thread of its own: it draws when it is told something, so a step never waits for it.
            live = Live(console=console, auto_refresh=False, vertical_overflow="crop")
            live.start()
            self._live = live
        self._update(None, (), force=True)

    def _tell_started(self, asked: Asked) -> None:
        self._params[asked.number] = asked.params
        self._say(begun_line(asked.number, asked.params, asked.prior))
        self._update(None, (), force=False)

    def _tell_reached(self, arrival: Arrival, goes_on: bool) -> None:
        number, percent = arrival.number, round(arrival.percent)
        self._rungs[number] = f"held-out loss {arrival.loss:.4g} at {percent}%"
        if goes_on:  # otherwise `ended` says the same and why
            self._say(ended_line(number, self._params.get(number, {}), "goes on", {}, at=self._rungs[number]))
        self._update(None, (), force=False)

    def _tell_ended(self, number: int, status: str, attrs: Mapping[str, Any]) -> None:
        params, at = self._params.pop(number, {}), self._rungs.pop(number, "")
        self._say(ended_line(number, params, status, attrs, at=at))
        self._update(None, (), force=True)

    def _update(self, study: Source, running: Iterable[Mapping[str, Any]], force: bool) -> None:
        now = time.monotonic()
        if not force and now - self._looked < READ_S:
            return
        told = study is not None
        if not told and self._live is None:
            return  # nobody would see it
        found = self._record(self._source if study is None else study)
        if found is None:
            return
        self._looked = now
        if told:
            self._find_events(found)
        self._training = {int(one["number"]): _place(one) for one in running}
        spent = sum(trial.tokens or 0 for trial in found.trials)
        if self._begun is None:
            self._begun = (time.time(), done(found), spent)
        if self._live is not None:
            extra = self._pace(found, spent)
            self._live.update(board(found, extra=extra, training=self._training), refresh=True)

    def _record(self, source: Source) -> StudyRecord | None:
        if callable(source):
            source = source()
        return None if source is None else as_record(source, n_trials=self._n_trials)

    def _pace(self, study: StudyRecord, spent: int) -> str:
        if self._begun is None:
            return ""
        since, over, before = self._begun
        seconds = time.time() - since
        rate = f"{(spent - before) / seconds:,.0f} tokens/s" if spent > before and seconds > 1 else ""
        return "; ".join(filter(None, (time_left(study, since=since, before=over), rate)))

    def _find_events(self, study: StudyRecord) -> None:
        """Say what happened since the last look; what was there at the first one is not news."""
        now = {trial.number: (trial.status, trial.percent) for trial in study.trials if trial.status != "waiting"}
        if self._said is not None:
            for trial in study.trials:
                if trial.number in now and self._said.get(trial.number) != now[trial.number]:
                    self._say(trial_line(trial))
        self._said = now

    def _say(self, line: str) -> None:
        # On a terminal the table says it; whoever keeps a log of everything has it there too.
        logger.log(logging.DEBUG if self._live is not None else logging.INFO, "%s", line)
        if self._live is None and self._wanted is not False and not logger.isEnabledFor(logging.INFO):
            # Nobody set logging up, and a search of hours that says nothing seems to hang.
            sys.stderr.write(f"{line}\n")

    def _safely(self, show: Callable[..., None], *args: Any) -> None:
        try:
            with self._lock:
                show(*args)
        except Exception:  # noqa: BLE001 - nothing that is shown is worth a search
            self._give_up()

    def _give_up(self) -> None:
        live, self._live = self._live, None
        if not self._broken:
            self._broken = True
            logger.debug("The view of the study broke; the search goes on.", exc_info=True)
        if live is not None:
            try:
                live.stop()
            except Exception:  # the terminal is what broke
                logger.debug("The terminal does not answer.", exc_info=True)


def _place(one: Mapping[str, Any]) -> str:
    percent, loss = one.get("percent"), one.get("loss")
    return ", ".join(
        [*([f"{percent:.0f}%"] if percent is not None else []), *([f"loss {loss:.4f}"] if loss is not None else [])]
    )
