"""What an average cannot follow, refused before the first step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from ...errors import ConflictError, UnsupportedError
from ..support import refuse, refuse_hidden_gradients
from .checkpoint import FOLDER
from .evaluation import installed_on

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerState, TrainingArguments


RESUMABLE = ("LORA", "IA3", "VERA")
"""Kinds of adapter that were resumed with their average beside them (tests/callbacks/test_ema_callback.py)."""


class Settings(Protocol):
    """What EMACallback was asked for."""

    evaluate: bool
    save: bool
    update_every: int


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


def refuse_settings(
    settings: Settings, args: TrainingArguments, state: TrainerState, model: nn.Module, *, attached: bool
) -> None:
    """Raise for what would be lost or wrong with these settings.

    Raises:
        ConflictError: The best model would be lost, an adapter stands in the way, or there would be no average.
        UnsupportedError: Only `attach` can do it.
    """
    if settings.update_every > state.max_steps:
        raise ConflictError(
            f"update_every={settings.update_every} is more than the run's max_steps={state.max_steps}: the average "
            "would never move. Make it smaller."
        )
    if settings.evaluate and args.load_best_model_at_end and not settings.save:
        raise ConflictError(
            "load_best_model_at_end=True with evaluate=True scores the average and save=False keeps none: the best "
            "would be lost. Set save=True, or evaluate=False."
        )
    if settings.save and state.global_step == 0:
        _refuse_adapters(model)
    past = [
        ("torch_compile=True", args.torch_compile),
        ("an encoder-decoder model", getattr(getattr(model, "config", None), "is_encoder_decoder", False)),
    ]
    for what, there in past:
        if settings.evaluate and not attached and there:
            raise UnsupportedError(
                f"With {what} a plain callback cannot exchange the weights of every forward pass. Call "
                "ema.attach(trainer) before train(), or set evaluate=False."
            )


def refuse_optimizer(optimizer: Any) -> None:
    """Raise for an optimizer with an average of its own, as schedule-free ones have.

    Raises:
        ConflictError: It has `eval` and `train` methods.
    """
    if installed_on(optimizer) is None and (hasattr(optimizer, "eval") or hasattr(optimizer, "train")):
        raise ConflictError(
            f"{type(optimizer).__name__} evaluates on an average of its own: choose another optimizer, or leave "
            "EMACallback out."
        )


def _refuse_adapters(model: Any) -> None:
    """Raise for adapters that the Trainer could not resume beside their average.

    It loads every folder of a checkpoint that holds an adapter as one more adapter, before any callback is asked. An
    initialisation that changes the base would change it again then, and some kinds of adapter allow no second one.
    """
    remedy = "Set save=False, or change that."
    configs = getattr(model, "peft_config", {})
    if FOLDER in configs:
        raise ConflictError(
            f"An adapter is called {FOLDER!r}, which is the folder of the average in a checkpoint. Name the adapter "
            "otherwise, or set save=False."
        )
    for name, config in configs.items():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        initialisation = getattr(config, "init_lora_weights", True)
        for found, bad in (
            (f"peft_type={kind}", kind not in RESUMABLE),
            (f"init_lora_weights={initialisation!r}", initialisation not in (True, False, "gaussian")),
            (f"bias={getattr(config, 'bias', 'none')!r}", getattr(config, "bias", "none") != "none"),
            ("layer_replication", getattr(config, "layer_replication", None)),
        ):
            if bad:
                raise UnsupportedError(
                    f"Adapter {name!r} has {found}: with the average in the checkpoint, transformers could not resume "
                    f"it (it loads the average as a second adapter). {remedy}"
                )
    active = getattr(model, "active_adapters", None)
    if configs and isinstance(active, list) and len(active) > 1:
        raise UnsupportedError(f"The adapters {active} train together, and the folder holds one. {remedy}")


def _is_sharded(parameter: Any) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")
