"""The Trainer's log, handed on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from .runs import Run


class TrackingCallback(TrainerCallback):  # type: ignore[misc]  # transformers carries no types
    """Logs every number of the Trainer's log to a run in MLflow, at its step and under its own name.

    | key | what |
    |---|---|
    | `loss`, `learning_rate`, `grad_norm`, `eval_loss`, ... | what the Trainer and the callbacks before this one log |

    Args:
        run: the run.
    """

    def __init__(self, run: Run) -> None:
        self._run = run

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Hand it on."""
        if state.is_world_process_zero and logs:
            self._run.log_metrics(logs, step=state.global_step)
