"""Evaluation on the average, from a plain callback: the average is in the model only while a forward pass runs.

Before each evaluation loop the Trainer calls `optimizer.eval()`, and before each training step `optimizer.train()`,
wherever an optimizer has them (the protocol of schedule-free optimizers). Nothing tells when a loop has *ended*: a
checkpoint may be saved before the next `train()`, and after an exception there is none. So the weights are exchanged
around every forward pass of the loop and not around the loop; the exchange moves pointers, not values.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from ...errors import ForgeWarning
from ..stack import caller

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer


def installed_on(optimizer: Any) -> EvaluationSwap | None:
    """The swap that this optimizer's `eval` leads to."""
    owner = getattr(vars(optimizer).get("eval"), "__self__", None)
    return owner if isinstance(owner, EvaluationSwap) else None


class EvaluationSwap:
    """Forward passes inside an evaluation loop see other values than the rest of the world.

    Args:
        tensors: The parameters, by name.
        average: Asked at the start of each loop for the values by name, or None for leaving all as it is.

    Attributes:
        training: Whether the callback's `train()` is going on.
    """

    def __init__(self, tensors: Mapping[str, Tensor], average: Callable[[], Mapping[str, Tensor] | None]) -> None:
        self._tensors = tensors
        self._average = average
        self.training = False
        self._staged: list[Tensor] | None = None
        self._wrapped: list[tuple[nn.Module, Any]] = []
        self._depth = 0
        self._passes = 0
        self._loop: FrameType | None = None
        self._optimizer: Optimizer | None = None
        self._modules: list[nn.Module] = []

    def install(self, optimizer: Optimizer, model: nn.Module) -> None:
        """Let the trainer's calls of `optimizer.eval()` and `optimizer.train()` come here; an earlier one gives way."""
        from ...models.layers import unwrap

        if (earlier := installed_on(optimizer)) is not None:
            earlier.remove()
        self._modules = [model] if unwrap(model) is model else [model, unwrap(model)]  # generate() calls the inner one
        self._optimizer = optimizer
        self.training = True
        vars(optimizer).update(eval=self.begin, train=self._on_training_step)

    def remove(self) -> None:
        """Undo `install`."""
        self.end()
        if self._optimizer is not None:
            for name in ("eval", "train"):
                vars(self._optimizer).pop(name, None)
        self._optimizer = None

    def begin(self) -> None:
        """Start: prepare the averaged values, and wrap the model's forward."""
        self.end()
        self._loop = caller("evaluation_loop")
        average = None if self._loop is None else self._average()
        if average is None:
            return
        # The same storage where device and dtype are the parameter's own; a copy for this evaluation elsewhere.
        self._staged = [average[name].to(tensor.device, tensor.dtype) for name, tensor in self._tensors.items()]
        self._passes = 0
        for module in self._modules:
            self._wrapped.append((module, vars(module).get("forward")))
            module.forward = self._exchanging(module.forward)

    def end(self) -> None:
        """Stop; nothing happens when nothing was begun."""
        while self._wrapped:
            module, previous = self._wrapped.pop()
            del module.forward
            if previous is not None:  # accelerate and TRL put wrappers of their own there
                module.forward = previous
        self._staged = self._loop = None

    def _on_training_step(self) -> None:
        if self.training:
            self.end()
        else:  # a train() that never told us that it began: the callback was taken off its trainer
            self.remove()

    def end_of_loop(self) -> None:
        """Stop after a loop that came to its end, and say so when it went past the model's forward."""
        if self._staged is not None and not self._passes:
            warnings.warn(
                "This evaluation never called the model's forward, so it ran on the raw weights and not on their "
                "average. Call ema.attach(trainer) before train(): then the whole loop runs on the average.",
                ForgeWarning,
                stacklevel=2,
            )
        self.end()

    def _exchanging(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def exchanged(*args: Any, **kwargs: Any) -> Any:
            if self._staged is None or self._depth:
                return forward(*args, **kwargs)
            if caller("evaluation_loop") is not self._loop:
                self.end()  # our loop ended by an exception outside the model, which nobody tells us
                return forward(*args, **kwargs)
            self._passes += 1
            try:
                with self._exchange(self._staged):
                    return forward(*args, **kwargs)
            except BaseException:
                self.end()
                raise

        return exchanged

    @contextmanager
    def _exchange(self, values: list[Tensor]) -> Iterator[None]:
        raw = [tensor.data for tensor in self._tensors.values()]
        self._depth += 1
        try:
            for tensor, value in zip(self._tensors.values(), values, strict=True):
                tensor.data = value
            yield
        finally:
            for tensor, value in zip(self._tensors.values(), raw, strict=True):
                tensor.data = value
            self._depth -= 1
