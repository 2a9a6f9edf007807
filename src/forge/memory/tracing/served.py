"""A `PrefixCache` that is full, for the trace: no layer below the boundary runs, their outputs come from the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ...models.truncation import truncation_of
from .hollow import Shapes
from .quantized import Empty
from .skeleton import Skeleton
from .tape import Tape


class Served:
    """The `Shortcut` of a model whose every row is in the cache.

    Args:
        skeleton: the model; truncated.
        tape: counts the states that arrive.
        empty: makes them.
        shapes: of the tape.
    """

    served = 1.0

    def __init__(self, skeleton: Skeleton, tape: Tape, empty: Empty, shapes: Shapes | None) -> None:
        self._layers, self._tape, self._empty, self._shapes = skeleton.layers, tape, empty, shapes
        self._beside: int | None = None  # how many values a layer returns beside them, -1 where it returns no tuple

    def below(self, index: int, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:  # noqa: ARG002
        """What goes in comes out, in the form in which a layer returns it."""
        hidden_states = args[0] if args else kwargs["hidden_states"]
        if self._beside is None:
            self._beside = self._returned_beside(index, args, kwargs)
        return hidden_states if self._beside < 0 else (hidden_states, *[None] * self._beside)

    def at_boundary(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The states of the batch, on the device."""
        with _disable_current_modes():  # made elsewhere: what that takes is the host's
            states = self._empty(tuple(hidden_states.shape), hidden_states.dtype, "hidden_states")
        self._tape.register([states], "activations")
        return states

    def _returned_beside(self, index: int, args: Any, kwargs: Any) -> int:
        """Run a layer once, on a tape of its own and past the hooks that would tell the other."""
        with _disable_current_modes(), Tape(shapes=self._shapes):
            returned = self._layers[index].forward(*args, **kwargs)
        return len(returned) - 1 if isinstance(returned, tuple) else -1


def serve(skeleton: Skeleton, tape: Tape, empty: Empty, shapes: Shapes | None) -> None:
    """Put a full cache on a truncated skeleton."""
    truncation = truncation_of(skeleton.model)
    assert truncation is not None
    truncation.shortcut = Served(skeleton, tape, empty, shapes)
