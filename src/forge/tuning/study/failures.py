"""Three failures alike in a row: it is not the configurations that are wrong."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from .asking import INFEASIBLE, STATUS, WHY

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

ALIKE = 3
_HEAD = 80


def same_failures(trials: Sequence[FrozenTrial], *, forgiven: Collection[int] = ()) -> list[FrozenTrial]:
    """The last three trials to finish, if all failed alike; else none.

    Args:
        trials: all of the study's.
        forgiven: numbers of trials that do not count.
    """
    finished = [
        trial
        for trial in trials
        if trial.state.is_finished()
        and trial.number not in forgiven
        and trial.user_attrs.get(STATUS) != INFEASIBLE  # never ran
    ]
    finished.sort(key=lambda trial: (trial.datetime_complete, trial.number))
    last = finished[-ALIKE:]
    if len(last) < ALIKE or any(trial.user_attrs.get(STATUS) != "failed" for trial in last):
        return []
    return last if len({_signature(trial) for trial in last}) == 1 else []


def error_of(trace: str) -> str:
    r"""The line of a trace that says what was raised.

    Args:
        trace: as `traceback.format_exc` gives it.

    >>> error_of('Traceback ...:\n  File "a.py", line 1, in f\n    g()\nValueError: no such layer\nSee ...')
    'ValueError: no such layer'
    """
    lines = trace.strip().splitlines()
    frames = [place for place, line in enumerate(lines) if line.startswith("  File ")]
    after = lines[frames[-1] + 1 :] if frames else lines
    return next((line.strip() for line in after if line and not line[0].isspace()), after[-1].strip() if after else "")


def _signature(trial: FrozenTrial) -> str:
    """The kind of the error and the beginning of its message, without numbers, which differ from trial to trial."""
    said = error_of(str(trial.user_attrs.get("trace") or "")) or str(trial.user_attrs.get(WHY) or "")
    return re.sub(r"0x[0-9a-f]+|\d+(\.\d+)?(e-?\d+)?", "#", said)[:_HEAD]
