"""The loss of every step, exactly: summed over micro-batches and averaged over processes, without a read of its own."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


class StepLoss:
    """Adds up the micro-batches of a step on the device, and the finished steps on the host.

    The Trainer adds every micro-batch's loss to a sum of its own. One NaN would stay in it for ever, or, with
    `logging_nan_inf_filter`, be replaced there by something that was never measured; so what the Trainer gets is the
    loss with NaN and infinities as 0, and what it logs is corrected from here.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self.window: list[float] = []
        self.count = 0
        self.total = 0.0
        self.nonfinite = 0

    def add(self, loss: Tensor) -> Tensor:
        """Take a micro-batch's loss as `training_step` returns it (detached, already scaled); give the finite one."""
        loss = loss.detach()
        self._sum = loss.float() if self._sum is None else self._sum + loss
        return torch.nan_to_num(loss, nan=0.0, posinf=0.0, neginf=0.0)

    def take(self) -> Tensor | None:
        """The finished step's loss, still on the device; averaged over the processes, so that all decide alike."""
        loss, self._sum = self._sum, None
        if loss is not None and _processes() > 1:
            loss = loss.clone()  # the Trainer may hold the same tensor
            torch.distributed.all_reduce(loss)  # a NaN of one process is everybody's
            loss /= _processes()
        return loss

    def finish(self, value: float) -> None:
        """Remember a step's loss, once it has been read."""
        self.window.append(value)
        if math.isfinite(value):
            self.count += 1
            self.total += value
        else:
            self.nonfinite += 1

    def drain(self) -> list[float]:
        """The losses of the steps since the last call."""
        window, self.window = self.window, []
        return window

    @property
    def mean(self) -> float:
        """Mean over all finite steps so far, NaN when there is none."""
        return self.total / self.count if self.count else math.nan


def mean_of_finite(values: list[float]) -> float:
    """The mean of what is finite, NaN when nothing is.

    >>> mean_of_finite([1.0, float("nan"), 3.0])
    2.0
    """
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _processes() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
