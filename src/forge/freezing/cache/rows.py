"""Some rows of a batch, in whatever a decoder layer is called with."""

from __future__ import annotations

from typing import Any

import torch


class Rows:
    """Takes the same rows out of everything that has a batch's rows; remembers what it has cut, layer after layer.

    A tensor has the rows where it has more than one dimension and the first is as long as the batch. (Positions and
    their embeddings often have a first dimension of 1, for all rows alike, and one-dimensional tensors count tokens.)

    >>> rows = Rows(torch.tensor([2, 0]), batch_size=3)
    >>> hidden, (cos, mask) = rows.of((torch.arange(3).view(3, 1), (torch.zeros(1, 3), None)))
    >>> hidden.flatten().tolist(), cos.shape, mask
    ([2, 0], torch.Size([1, 3]), None)

    Args:
        index: (n,), the rows.
        batch_size: how many there are.
    """

    def __init__(self, index: torch.Tensor, batch_size: int) -> None:
        self.index = index
        self._batch_size = batch_size
        self._cut: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def of(self, value: Any) -> Any:
        """The rows of a tensor, or of the tensors in tuples, lists and dictionaries; anything else as it is."""
        if isinstance(value, torch.Tensor):
            if value.ndim < 2 or value.shape[0] != self._batch_size:
                return value
            if id(value) not in self._cut:
                self._cut[id(value)] = value, value[self.index]
            return self._cut[id(value)][1]
        if isinstance(value, dict):
            return {key: self.of(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
            return type(value)(self.of(item) for item in value)
        return value
