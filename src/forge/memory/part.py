"""The parts that memory is told in."""

from __future__ import annotations

from typing import Literal, get_args

Part = Literal[
    "parameters",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "quantization",
    "reference_model",
    "workspace",
]
PARTS: tuple[Part, ...] = get_args(Part)
