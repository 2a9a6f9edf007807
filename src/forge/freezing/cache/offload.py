"""The frozen layers' weights on the host, while nothing runs them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

logger = logging.getLogger(__name__)

_RETURNS = 3  # a cache that misses again and again is not full, and moving weights costs more than it gives


class Offload:
    """Moves layers to the host and back.

    Args:
        layers: those below the boundary.
        moved: called when they have been moved: bitsandbytes makes other parameters of them.
        move: how a layer is moved; for tests.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        moved: Callable[[], None] = lambda: None,
        *,
        move: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        self.away = False
        self._layers = list(layers)
        self._home: torch.device = next(layers[0].parameters()).device
        self._moved = moved
        self._move = move or (lambda layer, device: layer.to(device))
        self._returns = 0

    @property
    def possible(self) -> bool:
        """Whether there is somewhere else to move them to."""
        return self._home.type != "cpu" and self._returns < _RETURNS

    def leave(self) -> None:
        """Move the layers to the host."""
        if self.away or not self.possible:
            return
        self.away = True
        self._move_all("cpu")
        logger.info("The frozen layers' weights are on the host now: the prefix cache has all samples of an epoch.")

    def come_back(self) -> None:
        """Move them back where they were; does nothing where they are."""
        if not self.away:
            return
        self.away = False
        self._returns += 1
        self._move_all(self._home)
        if self._returns == _RETURNS:
            logger.warning(
                "Samples that the prefix cache does not have came up %d times after its weights were offloaded; they "
                "stay on the device from now on.",
                _RETURNS,
            )

    def _move_all(self, device: Any) -> None:
        import torch

        for layer in self._layers:
            self._move(layer, device)
        self._moved()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
