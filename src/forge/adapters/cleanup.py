"""A finished run's memory, given back: the adapter, and whatever holds its parameters beside the model."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UnsupportedError
from .memento import memento_of
from .unload import base_of, carries_adapters, innermost, refuse_another_run, safe_unload_peft_adapters

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import Trainer

_log = logging.getLogger("forge.adapters")


def cleanup_peft_model(model: PeftModel | Trainer) -> None:
    """Unload a model's adapters and give back what their training took.

    Trainers, optimizers, schedulers and accelerators that hold the adapters' parameters are found wherever they are,
    and let go of them, also where a notebook still has the trainer in a variable. The base is brought back as by
    `safe_unload_peft_adapters`; it is neither moved nor freed, and whoever has it keeps it. Then Python's garbage is
    collected, the accelerator's cache emptied, and one line logged (`forge.adapters`, INFO) with how much came back.

    >>> from peft import LoraConfig
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from forge.adapters import attach_adapter
    >>> tiny = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 16}
    >>> base = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **tiny))
    >>> model = attach_adapter(base, LoraConfig(r=2, target_modules=["q_proj"]))
    >>> optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    >>> cleanup_peft_model(model)
    >>> optimizer.param_groups[0]["params"]
    []

    Args:
        model: the PeftModel, or the trainer that trained it. The trainer cannot train afterwards; make a new one.

    Raises:
        ForgeError: the base cannot be brought back exactly (see `safe_unload_peft_adapters`). The optimizer and all
            else is let go of all the same.
        ConflictError: the base has another adapter by now; nothing is touched.
        UnsupportedError: neither a model nor a trainer.
    """
    wrapped = _model_of(model)
    device = _device_of(wrapped)
    before = _in_use(device)
    trainer = model if hasattr(model, "callback_handler") else None
    if not carries_adapters(
        wrapped
    ):  # unloaded before: the base may be in another run by now, which is not to be touched
        if trainer is not None:
            _empty_trainer(trainer)
        del wrapped, model, trainer
        gc.collect()
        return
    refuse_another_run(wrapped)
    _let_go(wrapped, trainer)
    try:
        safe_unload_peft_adapters(wrapped)
    finally:
        del wrapped, model, trainer
        gc.collect()
        _empty_cache(device)
    returned = before - _in_use(device)
    kind = "resident host memory" if device is None else f"memory of {device}"
    _log.info("the run's memory has been returned: %s of %s", _size(max(returned, 0)), kind)


def _model_of(model: Any) -> Any:
    from torch import nn

    found = model
    if not isinstance(model, nn.Module) and hasattr(model, "callback_handler"):
        found = model.model
    if not isinstance(found, nn.Module):
        raise UnsupportedError(f"cleanup_peft_model takes a PeftModel or a trainer, not a {type(model).__name__}.")
    return innermost(found)


def _let_go(model: nn.Module, trainer: Any) -> None:
    """Make everything in the process let go of the parameters that the adapters brought or trained."""
    ours = _parameters_of_run(model)
    trainers, optimizers, accelerators = _holders()
    for each in trainers:
        if each is trainer or _inner(getattr(each, "model", None)) is model or _holds(_optimizer(each), ours):
            _empty_trainer(each)
    for accelerator in accelerators:
        _empty_accelerator(accelerator, ours, model)
    for optimizer in optimizers:
        _empty_optimizer(optimizer, ours)
    for parameter in model.parameters():
        if id(parameter) in ours:
            parameter.grad = None


def _parameters_of_run(model: nn.Module) -> set[int]:
    """All that is not the base's own, and what of the base trains now and did not before."""
    memento = memento_of(base_of(model))
    own = {} if memento is None else {id(each.tensor): each.requires_grad for each in memento.weights}
    return {id(p) for p in model.parameters() if p.requires_grad or (own and id(p) not in own)}


def _holders() -> tuple[list[Any], list[Any], list[Any]]:
    """The trainers, optimizers and accelerators of this process. By `type`: some proxies lie about their class."""
    from accelerate import Accelerator
    from transformers import Trainer

    found: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
    kinds = (Trainer, torch.optim.Optimizer, Accelerator)
    wanted: dict[type, tuple[list[Any], ...]] = {}  # by class: there are millions of objects, and few classes
    for each in gc.get_objects():
        several = wanted.get(type(each))
        if several is None:
            several = tuple(of for kind, of in zip(kinds, found, strict=True) if issubclass(type(each), kind))
            wanted[type(each)] = several
        for one in several:
            one.append(each)
    return found


def _inner(model: Any) -> Any:
    return innermost(model) if isinstance(model, torch.nn.Module) else model


def _optimizer(trainer: Any) -> Any:
    return getattr(trainer, "optimizer", None)


def _empty_trainer(trainer: Any) -> None:
    handler = getattr(trainer, "callback_handler", None)  # none where its own __init__ broke off
    for holder, names in (
        (handler, ("model", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader")),
        (trainer, ("optimizer", "lr_scheduler", "model_wrapped")),
    ):
        for name in names:
            if hasattr(holder, name):
                setattr(holder, name, None)
    if hasattr(trainer, "accelerator"):
        trainer.accelerator.free_memory()


def _empty_accelerator(accelerator: Any, ours: set[int], model: nn.Module) -> None:
    """One that is the caller's own keeps what belongs to other models."""
    gone = [each for each in getattr(accelerator, "_optimizers", ()) if _is_all_ours(each, ours)]
    accelerator._models = [each for each in getattr(accelerator, "_models", ()) if _inner(each) is not model]
    accelerator._optimizers = [each for each in getattr(accelerator, "_optimizers", ()) if each not in gone]
    accelerator._schedulers = [
        each
        for each in getattr(accelerator, "_schedulers", ())
        if not any(_is_all_ours(optimizer, ours) for optimizer in getattr(each, "optimizers", ()))
    ]


def _holds(optimizer: Any, ours: set[int]) -> bool:
    groups = getattr(optimizer, "param_groups", ())  # none where there is no optimizer yet
    return any(id(parameter) in ours for group in groups for parameter in group["params"])


def _is_all_ours(optimizer: Any, ours: set[int]) -> bool:
    parameters = [parameter for group in getattr(optimizer, "param_groups", ()) for parameter in group["params"]]
    return bool(parameters) and all(id(parameter) in ours for parameter in parameters)


def _empty_optimizer(optimizer: Any, ours: set[int]) -> None:
    """Forget the run's parameters and their moments; those of other models stay."""
    if not _holds(optimizer, ours):
        return
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper holds the real one
    for group in inner.param_groups:
        kept: Iterable[Any] = [parameter for parameter in group["params"] if id(parameter) not in ours]
        group["params"][:] = kept
    for parameter in [key for key in inner.state if id(key) in ours]:
        del inner.state[parameter]


def _device_of(model: nn.Module) -> torch.device | None:
    """The accelerator that the model is on; None on the CPU."""
    return next((p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")), None)


def _in_use(device: torch.device | None) -> int:
    if device is None:
        import psutil  # type: ignore[import-untyped]

        return int(psutil.Process().memory_info().rss)
    allocated: int = torch.get_device_module(device).memory_reserved(device)
    return allocated


def _empty_cache(device: torch.device | None) -> None:
    if device is not None:
        torch.get_device_module(device).empty_cache()


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
