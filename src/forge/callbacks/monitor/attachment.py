"""What a callback needs of a trainer and is not given: losses, the norm before clipping, a place before the trackers.

Everything here is put on the one trainer that was handed in: on its `train`, for good; on `training_step` and on the
accelerator's `clip_grad_norm_` while `train` runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import wraps
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Trainer


class Listener(Protocol):
    """Who is told."""

    def on_micro_batch(self, inputs: Any, loss: Tensor) -> Tensor:
        """A micro-batch is over; returns the loss that the Trainer adds up."""

    def on_norm(self, norm: Any, max_norm: float) -> None:
        """Gradients are about to be clipped, and have this norm."""

    def on_leave(self, output: Any) -> Any:
        """`train` is over, by an exception when `output` is None; returns what `train` returns."""


def attach(trainer: Trainer, callback: Any, listener: Listener, *, quiet: bool = False) -> None:
    """Make `listener` hear what happens in `trainer.train()`, and `callback` the first of its callbacks.

    First, because what a callback adds to the logs is seen by those after it only, and the trackers of `report_to`
    stand before the user's callbacks.

    Args:
        trainer: The trainer.
        callback: Its callback; added when it is not in the list.
        listener: Who hears of micro-batches, norms and the end.
        quiet: Whether the progress bar, or the printing of every entry, is silent while `train` runs.
    """
    callbacks = trainer.callback_handler.callbacks
    if callback in callbacks:
        callbacks.remove(callback)
    callbacks.insert(0, callback)
    inner = trainer.train

    @wraps(inner)
    def train(*args: Any, **kwargs: Any) -> Any:
        if callback not in callbacks:  # it was removed
            return inner(*args, **kwargs)
        output = None
        try:
            with _listening(trainer, listener), _silenced(trainer) if quiet else nullcontext():
                output = inner(*args, **kwargs)
        finally:
            output = listener.on_leave(output)
        return output

    trainer.train = train


@contextmanager
def _listening(trainer: Trainer, listener: Listener) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(_replaced(trainer, "training_step", lambda inner: _heard_step(inner, listener)))
        clip = _replaced(trainer.accelerator, "clip_grad_norm_", lambda inner: _heard_norm(inner, listener))
        stack.enter_context(clip)
        yield


@contextmanager
def _silenced(trainer: Trainer) -> Iterator[None]:
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    callbacks = trainer.callback_handler.callbacks
    places = [
        (place, found) for place, found in enumerate(callbacks) if type(found) in (PrinterCallback, ProgressCallback)
    ]
    for _, found in places:
        callbacks.remove(found)
    try:
        yield
    finally:
        for place, found in places:
            callbacks.insert(place, found)


def _heard_step(inner: Callable[..., Tensor], listener: Listener) -> Callable[..., Tensor]:
    @wraps(inner)
    def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        return listener.on_micro_batch(inputs, inner(model, inputs, *args, **kwargs))

    return training_step


def _heard_norm(inner: Callable[..., Any], listener: Listener) -> Callable[..., Any]:
    @wraps(inner)
    def clip_grad_norm_(parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> Any:
        norm = inner(parameters, max_norm, *args, **kwargs)
        listener.on_norm(norm, max_norm)
        return norm

    return clip_grad_norm_


@contextmanager
def _replaced(target: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Put another method on one object, and take it off again."""
    own = vars(target).get(name)
    setattr(target, name, make(getattr(target, name)))
    try:
        yield
    finally:
        delattr(target, name)
        if own is not None:
            setattr(target, name, own)
