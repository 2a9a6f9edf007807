"""What activation checkpointing saves on bitsandbytes' int8 layers, with its two kinds, for real on the CPU.

bitsandbytes' `MatMul8bitLt` keeps its input as an attribute of the autograd context, not through `save_for_backward`.
Checkpointing without reentry frees what goes through the latter alone, so that every input stays until backward;
reentrant checkpointing runs forward without a graph and frees all of it.

`python -m benchmarks.int8_checkpointing` writes results/int8_checkpointing.jsonl: MB alive after forward, and at the
peak.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from benchmarks.runner import Suite, main

MB = 2**20
BLOCKS, LAYERS, TOKENS, WIDTH = 8, 4, 512, 256
CELLS = tuple(
    {"layers": kind, "checkpointing": how} for kind in ("int8", "fp32") for how in ("off", "non_reentrant", "reentrant")
)
SUITE = Suite("int8_checkpointing", "benchmarks.int8_checkpointing:measure", CELLS, timeout_s=None)


def measure(settings: Mapping[str, Any]) -> dict[str, Any]:
    """One forward and backward through blocks of linear layers, recorded."""
    import torch
    from torch.utils.checkpoint import checkpoint

    from forge.memory.tracing.tape import Tape

    torch.manual_seed(0)
    blocks = [[_layer(settings["layers"]) for _ in range(LAYERS)] for _ in range(BLOCKS)]

    def through(block: list[Any], x: torch.Tensor) -> torch.Tensor:
        for layer in block:
            x = torch.relu(layer(x)) * 1.0
        return x

    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    tape = Tape()
    with tape:
        tape.phase("forward")
        hidden = x
        for block in blocks:
            if settings["checkpointing"] == "off":
                hidden = through(block, hidden)
            else:
                hidden = checkpoint(through, block, hidden, use_reentrant=settings["checkpointing"] == "reentrant")
        tape.phase("backward")
        hidden.sum().backward()
    recording = tape.recording
    alive = sum(recording.when("backward").values()) / MB
    return {"alive_after_forward_mb": round(alive, 3), "peak_mb": round(recording.peak().total / MB, 3)}


def _layer(kind: str) -> Any:
    import bitsandbytes
    import torch

    if kind == "fp32":
        return torch.nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
    layer = bitsandbytes.nn.Linear8bitLt(WIDTH, WIDTH, bias=False, has_fp16_weights=False, threshold=6.0)
    weight = bitsandbytes.nn.Int8Params(torch.randn(WIDTH, WIDTH), requires_grad=False, has_fp16_weights=False)
    layer.weight = weight.to("cpu")
    return layer


if __name__ == "__main__":
    sys.exit(main(SUITE))
