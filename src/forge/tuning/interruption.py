"""Ctrl-C and SIGTERM: the step is finished, a checkpoint written, and only then does the run end."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger("forge.tuning")


class TuningInterrupted(KeyboardInterrupt):
    """A run was stopped from outside; the message says what is saved and how to go on."""


def interruption(asked: signal.Signals, where: str) -> BaseException:
    """What ends the run: a KeyboardInterrupt for Ctrl-C, the end of the process for SIGTERM.

    Args:
        asked: the signal.
        where: how far the run came, as a sentence.
    """
    said = f"{where} Run the same again, and it goes on there."
    logger.warning(said)
    return TuningInterrupted(said) if asked == signal.SIGINT else SystemExit(128 + asked)


@contextmanager
def held_back() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the block is over: what puts a model back must not stop halfway."""
    came: list[int] = []
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if (handler := signal.getsignal(number)) is not None:
                before[number] = handler
                signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for arrived in came[:1]:
            signal.raise_signal(arrived)


class StopAtStep(TrainerCallback):  # type: ignore[misc]  # transformers carries no types
    """Turns the first SIGINT or SIGTERM into a checkpoint and the end of the training; the second one stops at once.

        with StopAtStep() as stop:
            trainer.add_callback(stop)
            trainer.train()
        if stop.asked: ...

    In a thread that is not the main one no signal arrives, and nothing is changed.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopAtStep:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                if before is not None:  # None: set by C code, which would be lost
                    self._before[number] = before
                    signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            number, before = self._before.popitem()
            signal.signal(number, before)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: ARG002
        """Save and stop, when that was asked for."""
        if self.asked is not None:
            control.should_save = control.should_training_stop = True

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.asked is not None:
            raise interruption(signal.Signals(number), "Stopped at once; the last checkpoint is there.")
        self.asked = signal.Signals(number)
        logger.warning(
            "%s: this step is finished and a checkpoint written, then the run stops. Once more stops it at once.",
            self.asked.name,
        )
