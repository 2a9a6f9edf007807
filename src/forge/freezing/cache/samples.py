"""The samples in a batch: where each one's tokens are, and a key that says what they are."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ...errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One sample's tokens in a batch, without padding.

    Args:
        row: of the batch.
        start: of its tokens in the row.
        stop: behind the last of them.
        key: 16 bytes: a digest of all that its hidden states depend on beside the model.
    """

    row: int
    start: int
    stop: int
    key: bytes


def find_samples(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    *,
    context: bytes = b"",
) -> list[Sample]:
    """The samples in a batch: one per row, or one per document where positions begin again inside a row.

    The digest is of the token ids, of the first position (padding on the left moves it; states of models with absolute
    positions depend on it), and of what only some batches have: token types, positions that are not consecutive, holes
    in the mask.

    >>> import torch
    >>> padded = find_samples(torch.tensor([[5, 6, 7, 0]]), torch.tensor([[1, 1, 1, 0]]))
    >>> packed = find_samples(torch.tensor([[5, 6, 7, 5, 6, 7]]), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    >>> [(sample.row, sample.start, sample.stop) for sample in (*padded, *packed)]
    [(0, 0, 3), (0, 0, 3), (0, 3, 6)]
    >>> len({sample.key for sample in (*padded, *packed)})
    1

    Args:
        input_ids: (rows, length), on the CPU.
        attention_mask: (rows, length), 0 where a token is padding; all are real without it.
        position_ids: (rows or 1, length); each row counts from 0 without it.
        token_type_ids: (rows, length).
        context: what else the states of all of them depend on.

    Returns:
        In the order of rows and tokens; rows that are padding alone have none.

    Raises:
        UnsupportedError: a mask or positions of another shape.
    """
    rows, length = input_ids.shape
    mask = _checked(attention_mask, "attention_mask", rows, length)
    positions = _checked(position_ids, "position_ids", rows, length)
    types = _checked(token_type_ids, "token_type_ids", rows, length)
    samples = []
    for row in range(rows):
        start, stop = _extent(mask, row, length)
        if start == stop:
            continue
        borders = [start, *(start + 1 + i for i in _restarts(positions, row, start, stop)), stop]
        for first, end in pairwise(borders):
            own = [None if tensor is None else tensor[row, first:end] for tensor in (mask, positions, types)]
            samples.append(Sample(row, first, end, _digest(input_ids[row, first:end], first, own, context)))
    return samples


def _checked(tensor: Tensor | None, name: str, rows: int, length: int) -> Tensor | None:
    if tensor is None:
        return None
    if tensor.ndim != 2 or tensor.shape[1] != length or tensor.shape[0] not in (1, rows):
        raise UnsupportedError(
            f"{name} has the shape {tuple(tensor.shape)}; a PrefixCache reads ({rows}, {length}), as the collators of "
            "transformers and TRL make it. Train without the cache, or with another collator."
        )
    return tensor.expand(rows, length).contiguous()


def _extent(mask: Tensor | None, row: int, length: int) -> tuple[int, int]:
    """From the first real token of a row to behind the last."""
    if mask is None:
        return 0, length
    real = mask[row].nonzero().flatten()
    return (0, 0) if not len(real) else (int(real[0]), int(real[-1]) + 1)


def _restarts(positions: Tensor | None, row: int, start: int, stop: int) -> list[int]:
    """Where in a row's tokens a position is not larger than the one before: there, another document begins."""
    if positions is None:
        return []
    own = positions[row, start:stop]
    found: list[int] = (own[1:] <= own[:-1]).nonzero().flatten().tolist()
    return found


def _digest(ids: Tensor, start: int, own: list[Tensor | None], context: bytes) -> bytes:
    import xxhash

    mask, positions, types = own
    first = start if positions is None else int(positions[0])
    digest = xxhash.xxh3_128(f"{len(ids)} {first}".encode() + _bytes(ids) + context)
    if positions is not None and bool((positions[1:] - positions[:-1] != 1).any()):
        digest.update(b"positions" + _bytes(positions))
    if mask is not None and not bool(mask.all()):
        digest.update(b"mask" + _bytes(mask))
    if types is not None and bool(types.any()):
        digest.update(b"types" + _bytes(types))
    return digest.digest()


def _bytes(tensor: Tensor) -> Any:
    import torch

    return tensor.to(torch.int64).contiguous().numpy().tobytes()
