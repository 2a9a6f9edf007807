"""What several processes divide among themselves, each on a GPU of its own."""

from __future__ import annotations

from collections.abc import Mapping

from ..models import decoder_layers
from .describe import Described

_DIVIDED = {
    "none": (),
    "ddp": (),
    "zero1": ("optimizer",),
    "zero2": ("optimizer", "gradients"),
    "zero3": ("optimizer", "gradients", "parameters", "reference_model"),
    "fsdp": ("optimizer", "gradients", "parameters", "reference_model"),
}


def sharded(
    parts: Mapping[str, int], reserved: int, run: Described, assumptions: list[str]
) -> tuple[dict[str, int], int]:
    """The parts of one process, and what its allocator reserves for them.

    ZeRO divides the optimizer's state, then gradients, then parameters by the number of processes (Rajbhandari et al.
    2019, arXiv:1910.02054); what divides parameters gathers one layer at a time, and the next one beforehand. DDP keeps
    a flat copy of the gradients in its buckets (torch docs, DistributedDataParallel, `gradient_as_bucket_view`).

    Args:
        parts: of a single process, in bytes.
        reserved: for them.
        run: with its sharding and its number of processes.
        assumptions: to add to.
    """
    kind, world_size = run.scenario.sharding, run.scenario.world_size
    divided = dict(parts)
    if kind == "none":
        return divided, reserved
    for part in _DIVIDED[kind]:
        divided[part] = -(-parts[part] // world_size)
    if kind in ("zero3", "fsdp"):
        largest = max(
            sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in decoder_layers(run.source)
        )
        divided["workspace"] += 2 * largest
    if kind == "ddp":
        divided["gradients"] += parts["gradients"]
    assumptions.append(f"{kind} over {world_size} processes, as a division; buffers for communication are not traced")
    overhead = reserved / max(1, sum(parts.values()))
    return divided, int(sum(divided.values()) * overhead)
