"""Where the factors of every adapted module lie in a slot's one long row of numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from .skeleton import Adapter


@dataclass(frozen=True)
class Layout:
    """All slots' parameters are one matrix (slots, size); a module's factors are views of some of its columns.

    Norms, clipping and the optimizer then are a handful of operations on that matrix, whatever the number of slots and
    modules.

    Args:
        shapes: by module, (in, out).
        rank: the largest of any slot; smaller ones are padded with zeros, whose gradients are zero.
    """

    shapes: Mapping[str, tuple[int, int]]
    rank: int

    @classmethod
    def of(cls, adapters: Iterable[Adapter]) -> Layout:
        """The one that has room for all of these."""
        shapes: dict[str, tuple[int, int]] = {}
        rank = 0
        for adapter in adapters:
            for name, (down, up) in adapter.factors.items():
                shapes[name] = (down.shape[1], up.shape[0])
                rank = max(rank, down.shape[0])
        return cls(dict(sorted(shapes.items())), rank)

    @cached_property
    def offsets(self) -> dict[str, int]:
        """The first column of each module."""
        found, offset = {}, 0
        for name, (width, height) in self.shapes.items():
            found[name] = offset
            offset += self.rank * (width + height)
        return found

    @cached_property
    def size(self) -> int:
        """Columns in all."""
        return sum(self.rank * (width + height) for width, height in self.shapes.values())

    @cached_property
    def widths(self) -> list[int]:
        """Columns of each A and each B, in their order."""
        return [self.rank * side for shape in self.shapes.values() for side in shape]

    def shaped(self, name: str, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """A module's columns as its factors: A, shaped (slots, rank, in), and B, shaped (slots, out, rank)."""
        width, height = self.shapes[name]
        return down.view(-1, self.rank, width), up.view(-1, height, self.rank)

    def views(self, matrix: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """A module's part of the matrix: A, shaped (slots, rank, in), and B, shaped (slots, out, rank)."""
        width, height = self.shapes[name]
        start = self.offsets[name]
        middle, end = start + self.rank * width, start + self.rank * (width + height)
        return self.shaped(name, matrix[:, start:middle], matrix[:, middle:end])

    def write(self, row: Tensor, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Put factors of any rank up to this layout's into a row of zeros, shaped (size,)."""
        for name, (down, up) in factors.items():
            own_down, own_up = self.views(row[None], name)
            own_down[0, : down.shape[0]] = down
            own_up[0, :, : up.shape[1]] = up

    def read(self, row: Tensor, ranks: Mapping[str, int]) -> dict[str, tuple[Tensor, Tensor]]:
        """The factors in a row, without padding.

        Args:
            row: shaped (size,).
            ranks: by module; one that is not named has no factors.
        """
        found = {}
        for name, rank in ranks.items():
            down, up = self.views(row[None], name)
            found[name] = (down[0, :rank].clone(), up[0, :, :rank].clone())
        return found
