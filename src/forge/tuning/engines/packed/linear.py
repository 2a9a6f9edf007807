"""A frozen linear layer with a LoRA adapter for each slot of a pack."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ....errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor


class Turn:
    """Which slots the rows of a batch belong to: what all packed layers of a model look at.

    The rows of a batch are those of the first slot, then those of the second, and so on, as many of each.
    """

    def __init__(self) -> None:
        self.slots = 0
        self.dropout: Tensor | None = None  # (slots,), None where no slot drops anything

    @contextmanager
    def of(self, slots: int, dropout: Tensor | None = None) -> Iterator[None]:
        """A batch of these slots; without slots the layers are the base's own.

        Args:
            slots: how many there are in the batch.
            dropout: (slots,), the share of x that each drops.
        """
        before = self.slots, self.dropout
        self.slots, self.dropout = slots, dropout
        try:
            yield
        finally:
            self.slots, self.dropout = before


class PackedLinear(nn.Module):
    """`base(x) + scale_k * B_k A_k dropout_k(x)` for the rows x of each slot k: LoRA (arXiv:2106.09685), K at once.

    Args:
        base: the frozen layer: plain or quantised, or GPT-2's Conv1D.
        turn: which slots the rows belong to.
        name: of the layer, for errors.
    """

    def __init__(self, base: nn.Module, turn: Turn, name: str) -> None:
        super().__init__()
        self.base_layer = base
        self._turn, self._path = turn, name
        # Plain values and no parameters: the base's own lists stay as they are.
        self._factors: tuple[Tensor, Tensor, Tensor] | None = None

    def bind(self, down: Tensor, up: Tensor, scale: Tensor) -> None:
        """The factors of a batch's slots.

        Args:
            down: A, shaped (slots, r, in).
            up: B, shaped (slots, out, r), the same.
            scale: (slots,).
        """
        self._factors = down, up, scale

    def release(self) -> None:
        """Forget the factors: the graph behind them need not live until the next batch."""
        self._factors = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base's output and each slot's own product."""
        y: Tensor = self.base_layer(x, *args, **kwargs)
        turn = self._turn
        if self._factors is None:
            return y
        down, up, scale = self._factors
        if x.dim() < 2 or x.shape[0] % turn.slots:
            raise UnsupportedError(
                f"{self._path} is called with {tuple(x.shape)}, where the rows of {turn.slots} trials cannot be told "
                "apart. Search this model with engine='shared'."
            )
        rows = x.reshape(turn.slots, -1, x.shape[-1]).to(down.dtype)
        if turn.dropout is not None and self.training:
            share = turn.dropout.to(rows.dtype)[:, None, None]
            rows = rows * (torch.rand_like(rows) >= share) / (1 - share)
        inner = torch.bmm(rows, down.transpose(1, 2)) * scale[:, None, None]
        return (y + torch.bmm(inner, up.transpose(1, 2)).view(y.shape)).to(y.dtype)


def install(model: nn.Module, names: Mapping[str, Any] | list[str], turn: Turn) -> dict[str, PackedLinear]:
    """Put packed layers around a model's own; `take_out` gives those back.

    Args:
        model: the base.
        names: of the layers.
        turn: what they look at.
    """
    packed = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        owner: Any = model.get_submodule(parent)
        packed[name] = PackedLinear(getattr(owner, last), turn, name).train(model.training)
        setattr(owner, last, packed[name])
    return packed


def take_out(model: nn.Module, packed: Mapping[str, PackedLinear]) -> None:
    """Give the model its own layers back."""
    for name, layer in packed.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.base_layer)
