"""The average in a model, and the raw weights kept for when it is taken out again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ...errors import ForgeError
from .average import check_same

if TYPE_CHECKING:
    from torch import Tensor, nn


class Applied:
    """At most one model at a time holds the average; this knows which, and what it held before."""

    def __init__(self) -> None:
        self._raw: dict[str, Tensor] | None = None
        self._tensors: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        return self._raw is not None

    @torch.no_grad()
    def apply(self, average: Mapping[str, Tensor], tensors: dict[str, Tensor]) -> None:
        """Write the average into tensors of the same names, in their own dtype; a second call changes nothing.

        Raises:
            ForgeError: These are not the averaged tensors, or other ones hold the average.
        """
        check_same(average, tensors, "The model")
        if self._raw is not None:
            self._refuse_others(tensors)
            return
        self._raw = {name: tensors[name].detach().clone() for name in average}
        self._tensors = {name: tensors[name] for name in average}
        for name, value in average.items():
            tensors[name].copy_(value)

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Write the raw weights back.

        Raises:
            ForgeError: There is nothing to restore, or not in these tensors.
        """
        if self._raw is None:
            raise ForgeError("There is nothing to restore: apply_ema(model) was not called, or was undone already.")
        self._refuse_others(tensors)
        for name, value in self._raw.items():
            self._tensors[name].copy_(value)
        self.forget()

    def forget(self) -> None:
        """Let the raw weights go: what the model holds is what it is."""
        self._raw, self._tensors = None, {}

    def _refuse_others(self, tensors: Mapping[str, Tensor]) -> None:
        if any(tensors.get(name) is not tensor for name, tensor in self._tensors.items()):
            raise ForgeError("The average is in another model: call ema.restore(that_model) first.")


def named_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by the names that they have without DDP's and torch.compile's wrappers."""
    inner: Any = model
    while hasattr(inner, "_orig_mod") or type(inner).__name__ == "DistributedDataParallel":
        inner = getattr(inner, "_orig_mod", None) or inner.module
    return dict(inner.named_parameters())


def named_as(averaged: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters by the names of the averaged ones.

    The base model that was handed to a trainer with `peft_config` holds the same parameters as the PeftModel around it,
    by other names.
    """
    names = {id(tensor): name for name, tensor in averaged.items()}
    return {names.get(id(tensor), name): tensor for name, tensor in named_parameters(model).items()}


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that train, by name."""
    return {name: tensor for name, tensor in named_parameters(model).items() if tensor.requires_grad}
