"""Stops a trainer where its trial is to be judged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from ..search.halving import diverged

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from .lane import Lane

# Optimizer steps after which one looks whether the trial has diverged.
LOOK_EVERY = 10


class StopAtRung(TrainerCallback):  # type: ignore[misc]
    """Writes a checkpoint and stops where the trial's rung is, or where it has diverged.

    Args:
        lane: the trial.

    Attributes:
        why: it has diverged; empty where it has not.
        losses: of the steps since training began.
    """

    def __init__(self, lane: Lane) -> None:
        self.why = ""
        self.losses: list[float] = []
        self._before, self._last = list(lane.losses[: lane.steps]), lane.course.steps_at(lane.rung)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep the losses."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop at the rung."""
        if state.global_step >= self._last:
            control.should_save = control.should_training_stop = True
        elif state.global_step % LOOK_EVERY == 0 and (why := diverged([*self._before, *self.losses])):
            self.why = why
            control.should_training_stop = True
