"""What the allocator of the training device remembers; asking it waits for nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

GIB = 2**30


def device_memory(device: torch.device) -> dict[str, float]:
    """Peaks since the process began, of this process on its GPU; empty without one."""
    import torch

    if device.type != "cuda":
        return {}
    stats = torch.cuda.memory_stats(device)
    return {
        "memory/peak_allocated_gb": stats.get("allocated_bytes.all.peak", 0) / GIB,
        "memory/peak_reserved_gb": stats.get("reserved_bytes.all.peak", 0) / GIB,
        "memory/allocation_retries": float(stats.get("num_alloc_retries", 0)),
    }


def peak_of(device: torch.device) -> float | None:
    """The device's dense 16-bit peak in FLOP/s, None where it is not known."""
    import torch

    from ...hardware import peak_flops

    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
