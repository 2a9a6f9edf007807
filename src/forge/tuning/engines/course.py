"""A trial's way through its rows: which optimizer step each micro-batch belongs to, and where the rungs are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .contract import RUNGS


@dataclass(frozen=True)
class Course:
    """Rows in order, cut into optimizer steps of `batch` rows and micro-batches of `micro_batch`.

    >>> course = Course(tuple(range(10)), batch=4, micro_batch=2)
    >>> course.steps, course.micro_batches
    (3, 5)
    >>> course.rows(4), course.ends_step(4), course.step_rows(4)
    ((8, 9), True, (8, 9))
    >>> [course.steps_at(percent) for percent in (25, 50, 100)]
    [1, 2, 3]

    Args:
        order: row numbers, all epochs (see `row_order`).
        batch: rows of an optimizer step; the last step may have fewer.
        micro_batch: rows at a time; it divides `batch`.
    """

    order: tuple[int, ...]
    batch: int
    micro_batch: int

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return math.ceil(len(self.order) / self.batch)

    @property
    def micro_batches(self) -> int:
        """Passes through the model."""
        return math.ceil(len(self.order) / self.micro_batch)

    def rows(self, micro: int) -> tuple[int, ...]:
        """Of a micro-batch."""
        return self.order[micro * self.micro_batch : (micro + 1) * self.micro_batch]

    def step_rows(self, micro: int) -> tuple[int, ...]:
        """Of the whole optimizer step that a micro-batch belongs to."""
        step = micro * self.micro_batch // self.batch
        return self.order[step * self.batch : (step + 1) * self.batch]

    def first_of_step(self, micro: int) -> int:
        """The first micro-batch of the same optimizer step."""
        return micro * self.micro_batch // self.batch * (self.batch // self.micro_batch)

    def ends_step(self, micro: int) -> bool:
        """Whether the optimizer steps after a micro-batch."""
        done = (micro + 1) * self.micro_batch
        return done % self.batch == 0 or done >= len(self.order)

    def steps_done(self, micro: int) -> int:
        """Optimizer steps that are over before a micro-batch."""
        return self.steps if micro >= self.micro_batches else micro * self.micro_batch // self.batch

    def steps_at(self, percent: float) -> int:
        """Optimizer steps at a rung: the first number that is no less than this share of them."""
        return math.ceil(self.steps * percent / 100 - 1e-9)

    def percent(self, micro: int) -> float:
        """The share of the steps that is done before a micro-batch."""
        return 100 * self.steps_done(micro) / self.steps


def next_rung(steps: int, course: Course, rungs: Sequence[int] = RUNGS) -> int:
    """The rung that a trial with so many steps behind it comes to next; of those that lie at one step, the highest.

    >>> course = Course(tuple(range(8)), batch=1, micro_batch=1)
    >>> [next_rung(steps, course) for steps in (0, 1, 2, 4, 7)]
    [25, 25, 50, 100, 100]
    >>> next_rung(0, Course((0,), batch=1, micro_batch=1))
    100
    """
    ahead = [rung for rung in rungs if course.steps_at(rung) > steps] or [rungs[-1]]
    return max(rung for rung in ahead if course.steps_at(rung) == course.steps_at(ahead[0]))
