"""A tensor's digest: equal bytes have equal digests, on whatever device they lie when it is asked again.

Bytes in host memory go through xxHash, which reads them as fast as memory does. Those on an accelerator are summed up
there, each word times an odd number that depends on its place, modulo 2^64: nothing is copied to the host but the sum.
A digest remembers which of the two it is, so that a tensor which moved meanwhile is read the same way again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from ..models.tensors import host_bytes

if TYPE_CHECKING:
    from torch import Tensor

_WORDS = 1 << 20  # in a block: 8 MiB
# Odd constants of 64 bits (the golden ratio's, and Knuth's of MMIX), as torch's signed integers.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MMIX = 6364136223846793005


@dataclass(frozen=True)
class Digest:
    """The digest of a tensor's bytes, with its dtype and shape.

    Args:
        kind: by which function.
        value: what it gave.
        dtype: of the tensor.
        shape: of the tensor.
    """

    kind: Literal["xxh3", "sum"]
    value: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor, kind: Literal["xxh3", "sum"] | None = None) -> Digest | None:
        """The digest of a tensor; None of one that has no bytes here (on the meta device).

        >>> zeros = Digest.of(torch.zeros(3))
        >>> zeros == Digest.of(torch.zeros(3)), zeros == Digest.of(torch.ones(3))
        (True, False)

        Args:
            tensor: of any dtype and class.
            kind: the one that suits its device, by default.
        """
        if tensor.is_meta:
            return None
        plain = tensor.detach().as_subclass(torch.Tensor)
        chosen = kind or ("xxh3" if plain.device.type == "cpu" else "sum")
        value = _xxh3(plain) if chosen == "xxh3" else _sum(plain)
        return cls(chosen, value, tensor.dtype, tuple(tensor.shape))

    def matches(self, tensor: Tensor) -> bool:
        """Whether a tensor has this digest, dtype and shape."""
        return (
            not tensor.is_meta
            and tensor.dtype == self.dtype
            and tuple(tensor.shape) == self.shape
            and Digest.of(tensor, self.kind) == self
        )


def _xxh3(tensor: Tensor) -> int:
    import xxhash

    return int(xxhash.xxh3_64_intdigest(host_bytes(tensor)))


def _sum(tensor: Tensor) -> int:
    data = tensor.contiguous().flatten().view(torch.uint8)
    if data.storage_offset() % 8:  # a view into a larger storage, between its words
        data = data.clone()
    whole = data.numel() // 8 * 8
    rest = torch.zeros(8, dtype=torch.uint8, device=data.device)
    rest[: data.numel() - whole] = data[whole:]
    words = data[:whole].view(torch.int64)
    total = rest.view(torch.int64)[0]
    factors = torch.arange(min(_WORDS, words.numel()), dtype=torch.int64, device=data.device) * _GOLDEN
    factors = (factors ^ (factors >> 29)) | 1
    for begin in range(0, words.numel(), _WORDS):
        block = words[begin : begin + _WORDS]
        total = total * _MMIX + (block * factors[: block.numel()]).sum()
    return int(total)
