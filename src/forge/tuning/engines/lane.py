"""A trial in a pack: how far it is, and what it has seen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .contract import Arrival, Status, Task
from .course import Course, next_rung


@dataclass
class Lane:
    """A trial on its way through its rows.

    Args:
        task: the trial.
        course: its way.
        cohort: trials of the same one began together and have as far to go: they come to the rungs together.
        micro: micro-batches done.
        rung: that it comes to next.
        tokens: trained on.
        seconds: its share of the wall time.
        losses: of its optimizer steps so far.
        held_out: the loss that was measured last.
    """

    task: Task
    course: Course
    cohort: tuple[int, int]
    micro: int = 0
    rung: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    held_out: float = math.nan

    def __post_init__(self) -> None:
        self.rung = self.rung or next_rung(0, self.course)

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return self.course.steps_done(self.micro)

    @property
    def waits(self) -> bool:
        """Whether it has come to its rung, where the others of its cohort may not be yet."""
        return self.steps >= self.course.steps_at(self.rung)

    def rewind(self) -> None:
        """Back to the first micro-batch of its optimizer step."""
        self.micro = self.course.first_of_step(self.micro)

    def arrival(self, status: Status, *, loss: float = math.nan, why: str = "", trace: str = "") -> Arrival:
        """How far it is, as the search is told."""
        percent = float(self.rung) if status == "reached" else round(self.course.percent(self.micro), 1)
        return Arrival(
            self.task.number,
            percent,
            status,
            loss,
            self.steps,
            self.course.steps,
            self.tokens,
            round(self.seconds, 3),
            why,
            trace,
            curve_of(self.losses, self.course.steps),
        )

    def state_dict(self) -> dict[str, Any]:
        """All that the task does not say."""
        return {
            "number": self.task.number,
            "cohort": self.cohort,
            "micro": self.micro,
            "rung": self.rung,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "losses": list(self.losses),
            "held_out": self.held_out,
        }

    @classmethod
    def load(cls, task: Task, course: Course, state: Mapping[str, Any]) -> Lane:
        """What `state_dict` gave."""
        rest = {name: state[name] for name in ("micro", "rung", "tokens", "seconds", "losses", "held_out")}
        return cls(task, course, tuple(state["cohort"]), **rest)


def curve_of(losses: Sequence[float], steps: int, points: int = 50) -> tuple[tuple[float, float], ...]:
    """The training loss over the run, as means over at most so many parts of it.

    >>> curve_of([4.0, 2.0, 1.0], steps=4, points=2)
    ((50.0, 3.0), (75.0, 1.0))
    """
    size = max(1, -(-steps // points))
    parts = [losses[start : start + size] for start in range(0, len(losses), size)]
    ends = [min(start + size, len(losses)) for start in range(0, len(losses), size)]
    return tuple(
        (round(100 * end / steps, 2), round(sum(part) / len(part), 5)) for end, part in zip(ends, parts, strict=True)
    )
