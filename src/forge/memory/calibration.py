"""Holds an estimate against the run that it was made for."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from ..errors import ForgeWarning

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from .result import MemoryEstimate

GB = 2**30
AFTER_STEPS = 2  # the optimizer's state is there from the first step's end on


@dataclass(frozen=True)
class Calibration:
    """Estimated and measured peaks in GiB; errors are (estimated - measured) / measured.

    Args:
        allocated_gb: measured by `torch.cuda.max_memory_allocated()`.
        reserved_gb: measured by `torch.cuda.max_memory_reserved()`.
        estimated_allocated_gb: of the estimate.
        estimated_reserved_gb: of the estimate.
    """

    allocated_gb: float
    reserved_gb: float
    estimated_allocated_gb: float
    estimated_reserved_gb: float

    @property
    def allocated_error(self) -> float:
        """0.02: the estimate was 2% too high."""
        return self.estimated_allocated_gb / self.allocated_gb - 1

    @property
    def reserved_error(self) -> float:
        """The same for what the allocator held."""
        return self.estimated_reserved_gb / self.reserved_gb - 1

    def __str__(self) -> str:
        return (
            f"memory: {self.estimated_allocated_gb:.2f} GiB estimated, {self.allocated_gb:.2f} measured "
            f"({self.allocated_error:+.1%}); reserved {self.estimated_reserved_gb:.2f}, {self.reserved_gb:.2f} "
            f"({self.reserved_error:+.1%})"
        )


class CalibrationCallback(TrainerCallback):  # type: ignore[misc]  # transformers carries no types
    """After the second step of a run, compares the measured peak of GPU memory with an estimate, once, and says so.

    Example:
        >>> from transformers import LlamaConfig
        >>> from forge import estimate_model_memory
        >>> sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        >>> estimate = estimate_model_memory(LlamaConfig(**sizes, vocab_size=1000), preset="lora")
        >>> callback = estimate.calibration_callback()  # callbacks=[..., callback]
        >>> callback.result is None  # until two steps have been trained on a GPU
        True

    Logged keys: none; `result` has the numbers, and the terminal a line.

    Args:
        estimate: of this run.

    Attributes:
        result: the `Calibration`, None until there is one.
    """

    def __init__(self, estimate: MemoryEstimate) -> None:
        self.estimate = estimate
        self.result: Calibration | None = None
        self._steps = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin a new peak; say what will be wrong with the comparison."""
        import torch

        self._steps, self.result = 0, None
        if not torch.cuda.is_available():
            warnings.warn(
                "calibration_callback: this run has no CUDA device, so there is no peak to compare the estimate with.",
                ForgeWarning,
                stacklevel=2,
            )
            return
        if args.per_device_train_batch_size != self.estimate.batch_size:
            warnings.warn(
                f"calibration_callback: the estimate is for a micro-batch of {self.estimate.batch_size}, this run has "
                f"{args.per_device_train_batch_size}. Make the estimate for the run: estimate.at(batch_size=...).",
                ForgeWarning,
                stacklevel=2,
            )
        torch.cuda.reset_peak_memory_stats()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Compare after the second step."""
        import torch

        self._steps += 1
        if self._steps != AFTER_STEPS or not torch.cuda.is_available():
            return
        self.result = Calibration(
            allocated_gb=torch.cuda.max_memory_allocated() / GB,
            reserved_gb=torch.cuda.max_memory_reserved() / GB,
            estimated_allocated_gb=self.estimate["allocated_peak_gb"],
            estimated_reserved_gb=self.estimate["reserved_peak_gb"],
        )
        measured = self.result.reserved_gb + self.estimate["cuda_context_gb"]
        if not self.estimate["low_gb"] <= measured <= self.estimate["high_gb"]:
            warnings.warn(
                f"{self.result}: outside of the estimate's band of {self.estimate['low_gb']:.2f} to "
                f"{self.estimate['high_gb']:.2f} GiB. The rows of this run may be longer than "
                f"{self.estimate.sequence_length} tokens, or the run another one than was described.",
                ForgeWarning,
                stacklevel=2,
            )
        elif state.is_world_process_zero:
            from rich.console import Console

            Console(highlight=False).print(str(self.result))
