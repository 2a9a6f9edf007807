"""The same division for the formulas, which have no tape."""

from __future__ import annotations

from collections.abc import Mapping

from ..models import decoder_layers
from .describe import Described
from .tracing.sharding import DIVIDED


def sharded(parts: Mapping[str, int], reserved: int, run: Described) -> tuple[dict[str, int], int]:
    """The parts of one process, and what its allocator reserves for them.

    Args:
        parts: of a single process, in bytes.
        reserved: for them.
        run: with its sharding and its number of processes.
    """
    kind, world_size = run.scenario.sharding, run.scenario.world_size
    divided = dict(parts)
    for part in DIVIDED[kind]:
        divided[part] = -(-parts[part] // world_size)
    if kind in ("zero3", "fsdp"):
        layers = decoder_layers(run.source)
        divided["workspace"] += 2 * max(sum(p.numel() * p.element_size() for p in each.parameters()) for each in layers)
    if kind == "ddp":
        divided["gradients"] += parts["gradients"]
    return divided, int(sum(divided.values()) * reserved / max(1, sum(parts.values())))
