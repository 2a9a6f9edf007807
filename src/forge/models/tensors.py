"""The bytes of a tensor, and what bitsandbytes keeps beside those of a packed weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def quantization_constants(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """Scales and codebooks that bitsandbytes keeps on a packed weight, by names below the weight's own."""
    import torch

    for attribute in ("SCB", "CB"):
        value = getattr(tensor, attribute, None)
        if isinstance(value, torch.Tensor):
            yield f"{name}.{attribute}", value
    state = getattr(tensor, "quant_state", None)
    while state is not None:
        for attribute in ("absmax", "code", "offset"):
            value = getattr(state, attribute, None)
            if isinstance(value, torch.Tensor):
                yield f"{name}.{attribute}", value
        name, state = f"{name}.state2", getattr(state, "state2", None)


def host_bytes(tensor: Tensor) -> Any:
    """The tensor's bytes as a NumPy array in host memory."""
    import torch

    return tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy()
