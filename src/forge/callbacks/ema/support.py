"""What an average cannot follow, refused before the first step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from ...errors import ConflictError, UnsupportedError
from ..support import refuse, refuse_hidden_gradients
from .checkpoint import FOLDER

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerState, TrainingArguments


class Settings(Protocol):
    """What EMACallback was asked for."""

    evaluate: bool
    save: bool
    attached: bool


def refuse_arguments(args: TrainingArguments) -> None:
    """Raise for what the arguments alone tell.

    Raises:
        UnsupportedError: Sharded weights, an optimizer that hides its steps, DataParallel, or copied callbacks.
    """
    refuse_hidden_gradients(args, "EMACallback")
    if args.n_gpu > 1:
        refuse(
            "EMACallback",
            f"torch's DataParallel (one process, {args.n_gpu} GPUs) copies the model at every step",
            "Start with torchrun, or show one GPU with CUDA_VISIBLE_DEVICES=0",
        )
    if getattr(args, "restore_callback_states_from_checkpoint", False):
        refuse(
            "EMACallback",
            "restore_callback_states_from_checkpoint=True replaces every callback by a copy, so that your `ema` would "
            "stay empty",
            "Leave it out: EMACallback restores itself",
        )


def refuse_model(model: nn.Module) -> None:
    """Raise for what only the model tells, once it is where it will train.

    Raises:
        UnsupportedError: A trainable parameter is sharded, or not in memory.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if _is_sharded(parameter):
            refuse("EMACallback", f"{name} is sharded over several devices", "Train with DDP (torchrun)")
        if parameter.is_meta:
            refuse("EMACallback", f"{name} is offloaded (meta device)", 'Load the model with device_map={"": 0}')


def refuse_settings(settings: Settings, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
    """Raise for what would be lost or wrong with these settings.

    Raises:
        ConflictError: The best model would be lost, or an adapter stands where the average goes.
        UnsupportedError: Only `attach` can do it.
    """
    if settings.save and state.global_step == 0 and FOLDER in getattr(model, "peft_config", {}):
        raise ConflictError(
            f"An adapter is called {FOLDER!r}, which is the folder of the average in a checkpoint. Name the adapter "
            "otherwise, or set save=False."
        )
    if settings.evaluate and args.load_best_model_at_end and not settings.save:
        raise ConflictError(
            "load_best_model_at_end=True with evaluate=True scores the average and save=False keeps none: the best "
            "would be lost. Set save=True, or evaluate=False."
        )
    if settings.evaluate and not settings.attached and args.torch_compile:
        raise UnsupportedError(
            "With torch_compile=True a plain callback cannot exchange the weights of a forward pass. Call "
            "ema.attach(trainer) before train(), or set evaluate=False."
        )


def _is_sharded(parameter: Any) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")
