"""What an average cannot follow, refused before the first step."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Protocol

from ...errors import ConflictError, UnsupportedError
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
        UnsupportedError: Sharded weights, an optimizer that hides its steps, or DataParallel.
    """
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
        _refuse("FSDP shards the parameters over the processes", "Train with DDP (torchrun without fsdp)")
    if args.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true"):
        _refuse("DeepSpeed keeps parameters of its own (ZeRO-3 shards them)", "Train with DDP (torchrun)")
    if args.n_gpu > 1:
        _refuse(
            f"torch's DataParallel (one process, {args.n_gpu} GPUs) copies the model at every step",
            "Start with torchrun, or show one GPU with CUDA_VISIBLE_DEVICES=0",
        )
    name = str(getattr(args.optim, "value", args.optim))
    if "lomo" in name or "layerwise" in name:
        _refuse(f"optim={name!r} updates inside backward, where no step can be counted", 'Use optim="adamw_torch"')
    if getattr(args, "restore_callback_states_from_checkpoint", False):
        _refuse(
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
            _refuse(f"{name} is sharded over several devices", "Train with DDP (torchrun)")
        if parameter.is_meta:
            _refuse(f"{name} is offloaded (on the meta device)", 'Load the model with device_map={"": 0}')


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


def _refuse(why: str, remedy: str) -> None:
    raise UnsupportedError(f"EMACallback cannot average here: {why}. {remedy}, or take EMACallback out of callbacks.")
