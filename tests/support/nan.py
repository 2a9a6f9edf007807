"""An injector of NaN (or infinity) into one optimizer step of a standard trainer, by touching only that trainer.

    with inject_nan(trainer, step=3, where="gradient", parameter="q_proj.lora_B") as fault:
        trainer.train()
    assert fault.fired == [(3, 0)]

`step` counts from 1, as `TrainerState.global_step` does after the step. What was patched is undone on exit; a weight
that was made non-finite stays so, since that is the harm to look for. A fault that never fired fails on exit.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Trainer

Where = Literal["loss", "gradient", "weight"]


@dataclass
class Fault:
    """What to break, and when it was broken: pairs of (optimizer step from 1, micro-batch from 0)."""

    where: Where
    parameter: str | None
    fired: list[tuple[int, int]] = field(default_factory=list)


@contextmanager
def inject_nan(
    trainer: Trainer,
    *,
    step: int | Collection[int],
    where: Where = "loss",
    parameter: str | None = None,
    micro_batch: int = 0,
    value: float = float("nan"),
) -> Iterator[Fault]:
    """Break one micro-batch of each chosen step.

    Args:
        trainer: a Trainer, SFTTrainer or DPOTrainer.
        step: the optimizer step, or several, counted from 1.
        where: "loss" multiplies the training loss by `value` (so every gradient goes bad too); "gradient" sets one
            element of one parameter's gradient in the backward pass; "weight" sets one element before the forward pass.
        parameter: the end of or a part of the parameter's name; by default the first trainable parameter.
        micro_batch: which micro-batch of the accumulation, counted from 0.
        value: what to put there.
    """
    steps = {step} if isinstance(step, int) else set(step)
    if where == "loss" and parameter is not None:
        raise ValueError("a loss has no parameter")
    name, target = (None, None) if where == "loss" else find_parameter(trainer.model, parameter)
    fault = Fault(where, name)
    original_step, original_loss = trainer.training_step, trainer.compute_loss
    before = dict(vars(trainer))
    at = (0, 0)  # the optimizer step and the micro-batch that run now

    def is_due() -> bool:
        return at[0] in steps and at[1] == micro_batch and at not in fault.fired

    def training_step(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal at
        now = trainer.state.global_step + 1
        at = (now, at[1] + 1 if at[0] == now else 0)
        if where == "weight" and is_due():
            with torch.no_grad():
                _poison(target, value)
            fault.fired.append(at)
        return original_step(*args, **kwargs)

    def compute_loss(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = original_loss(model, *args, **kwargs)
        if not (model.training and is_due()):
            return result
        fault.fired.append(at)
        return (result[0] * value, *result[1:]) if isinstance(result, tuple) else result * value

    def gradient_hook(gradient: Tensor) -> Tensor | None:
        if not is_due():
            return None
        fault.fired.append(at)
        broken = gradient.clone()
        _poison(broken, value)
        return broken

    trainer.training_step = training_step
    if where == "loss":
        trainer.compute_loss = compute_loss
    handle = target.register_hook(gradient_hook) if where == "gradient" else None
    try:
        yield fault
        if missed := steps - {fired for fired, _ in fault.fired}:
            raise AssertionError(
                f"the {where} of step {sorted(missed)}, micro-batch {micro_batch}, was never broken: "
                f"training stood at step {trainer.state.global_step}"
            )
    finally:
        for attribute in ("training_step", "compute_loss"):
            vars(trainer).pop(attribute, None)
            if attribute in before:
                setattr(trainer, attribute, before[attribute])
        if handle is not None:
            handle.remove()


def _poison(tensor: Tensor, value: float) -> None:
    tensor[(0,) * tensor.dim()] = value


def find_parameter(model: nn.Module, part: str | None) -> tuple[str, nn.Parameter]:
    """Return the first trainable parameter whose name contains `part`."""
    trainable = {name: value for name, value in model.named_parameters() if value.requires_grad}
    for name, value in trainable.items():
        if part is None or part in name:
            return name, value
    raise ValueError(f"no trainable parameter has {part!r} in its name; there are {list(trainable)[:20]}")
