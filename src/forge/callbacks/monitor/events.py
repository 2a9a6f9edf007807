"""What a monitor has to say about a step, and how it says it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

Kind = Literal["nonfinite", "spike", "flat_loss", "zero_gradient", "zero_learning_rate"]

logger = logging.getLogger("forge.monitor")


@dataclass(frozen=True)
class Event:
    """Something that happened at a step.

    Args:
        step: The optimizer step, counted from 1 as in the logs.
        kind: What it was.
        message: What was seen, what was done about it, and the remedy.
    """

    step: int
    kind: Kind
    message: str


class Events:
    """The events of a run, in order; each is a log record of `forge.monitor` too, on the main process."""

    def __init__(self) -> None:
        self.all: list[Event] = []
        self.is_main = True

    def add(self, step: int, kind: Kind, message: str) -> Event:
        """Record an event."""
        event = Event(step, kind, message)
        self.all.append(event)
        if self.is_main:
            logger.warning("step %d: %s", step, message)
        return event

    def add_once(self, step: int, kind: Kind, message: str) -> None:
        """Record an event unless the same was said before."""
        if not any(event.kind == kind and event.message == message for event in self.all):
            self.add(step, kind, message)
