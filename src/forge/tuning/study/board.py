"""A study on a terminal: trials on the way, the best so far, how many are done, and how long it may still take."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .conclusions import saved_share
from .reading import FINISHED, StudyRecord, TrialRecord
from .wording import SHORT, STATUS, duration, figure, settings_line

if TYPE_CHECKING:
    from rich.console import RenderableType

ENOUGH = 3  # trials that are over, before their pace says anything
_ROWS = 16
_COLUMNS = 4


def done(study: StudyRecord) -> int:
    """How many of the launched trials are over; what was never launched does not count."""
    return sum(trial.status in FINISHED and trial.status != "infeasible" for trial in study.trials)


def time_left(study: StudyRecord, *, since: float | None = None, before: int = 0, now: float | None = None) -> str:
    """How long it may take until the last trial is over, in words.

    It is the pace at which trials ended so far, nothing else: survivors take longer than what is stopped, and a search
    ends with both.

    Args:
        study: as it stands.
        since: when the pace began, in seconds since 1970; None is the first trial's beginning.
        before: how many trials were over then.
        now: the time.
    """
    if study.n_trials is None:
        return ""
    over = done(study)
    left, counted = study.n_trials - over, over - before
    begun = [trial.began for trial in study.trials if trial.began is not None]
    since = since if since is not None else min(begun, default=None)
    if left <= 0:
        return "all trials are over"
    if since is None or counted < ENOUGH:
        return f"time left: said after {ENOUGH} trials"
    seconds = ((time.time() if now is None else now) - since) / counted * left
    return f"about {duration(seconds)} left, at the pace of the last {counted} trials"


def summary(study: StudyRecord) -> list[str]:
    """Counts and the best so far, on two lines."""
    counts = study.counts
    of = f" of {study.n_trials}" if study.n_trials is not None else ""
    parts = [f"{counts[status]} {STATUS[status]}" for status in (*FINISHED, "running", "waiting") if counts.get(status)]
    first = f"{done(study)}{of} trials over" + (f": {', '.join(parts)}" if parts else "")
    if share := saved_share(study):
        first += f"; {share:.0%} of their training tokens saved"
    best = study.best()
    if best is None:
        return [first, "no trial is completed yet"]
    value = study.value_of(best)
    what, value = (study.objective.replace("_", " "), value) if value is not None else ("value", best.value)
    base = study.base.get("loss")
    against = f" (base {base:.4g})" if base is not None and study.objective == "loss" else ""
    said = f"best so far: trial {best.number}, {what} {value:.4g}{against}, {settings_line(best.params, most=5)}"
    return [first, said]


def board(study: StudyRecord, *, extra: str = "", training: Mapping[int, str] | None = None) -> RenderableType:
    """The study as rich draws it.

    Args:
        study: as it stands.
        extra: a line below the counts: pace and time left.
        training: for trials on the way, where they are now.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    training = training or {}
    lines = [Text(line, style="bold" if not place else "") for place, line in enumerate(summary(study))]
    lines += [Text(extra, style="dim")] if extra else []
    running = [trial for trial in study.trials if trial.status == "running"]
    if not running:
        return Group(*lines)
    names = [name for name in SHORT if any(name in trial.params for trial in running)][:_COLUMNS]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("trial", *(SHORT[name] for name in names), "rung", "held-out loss", *(["now"] if training else [])):
        table.add_column(name, justify="right")
    for trial in running[:_ROWS]:
        settings = [figure(trial.params[name]) if name in trial.params else "" for name in names]
        cells = [str(trial.number), *settings, *_at(trial)]
        table.add_row(*(Text(cell) for cell in [*cells, *([training.get(trial.number, "")] if training else [])]))
    more = [Text(f"and {len(running) - _ROWS} more on the way", style="dim")] if len(running) > _ROWS else []
    return Group(*lines, table, *more)


def _at(trial: TrialRecord) -> list[str]:
    return [f"{trial.percent}%" if trial.losses else "-", "" if trial.last_loss is None else f"{trial.last_loss:.4f}"]
