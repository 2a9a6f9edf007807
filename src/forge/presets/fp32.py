"""Trainable parameters stay fp32, whatever the trainer casts them to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from ..errors import ForgeError

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerControl, TrainerState, TrainingArguments


class Fp32TrainableCallback(TrainerCallback):  # type: ignore[misc]  # transformers carries no types
    """Cast every trainable parameter to fp32 when the trainer has been built, and check it when training begins.

    bf16 keeps 8 bits of mantissa: an update smaller than about 1/256 of a weight is rounded away, so at a learning rate
    of 5e-6 most LoRA weights never move (docs/presets.md has the measurement). SFTTrainer and DPOTrainer nevertheless
    cast the adapters of a quantised model to bf16 in their constructor; this callback undoes it before the optimizer is
    made. It needs nothing else and adds nothing to a step.

    Example:
        >>> from forge import get_preset
        >>> get_preset("qlora", hardware="cpu").get_callbacks()
        [Fp32TrainableCallback()]

    Logged keys: none.
    """

    def on_init_end(
        self,
        args: TrainingArguments,  # noqa: ARG002  (transformers calls with all of them)
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        model: nn.Module,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Cast. This event comes after the trainer's own casts and before the optimizer is built."""
        import torch

        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point() and parameter.dtype != torch.float32:
                parameter.data = parameter.data.float()

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002  (transformers calls with all of them)
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        model: nn.Module,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Check.

        Raises:
            ForgeError: Something cast a trainable parameter after the trainer was built.
        """
        import torch

        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
                raise ForgeError(
                    f"{name} is trainable and {parameter.dtype}: something cast it after the trainer was built, and "
                    "most of its updates would be rounded away. Cast models before you build the trainer, or leave "
                    "Fp32TrainableCallback out if 16-bit training is what you want."
                )

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"
