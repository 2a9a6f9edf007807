"""A model's anatomy: its decoder layers, LoRA targets, routers, ties and quantised parts, read from structure.

layers.py    where the language decoder's layers are, whatever they are called
experts.py   mixtures of experts: which module routes, which parameters are the experts
targets.py   what LoRA should adapt, in words that PEFT takes exactly
products.py  the matrix products of a forward pass, their order, and which of them train
flops.py     the FLOPs of a training step, for MFU
anatomy.py   all of it as one JSON-serialisable value, from a live model, a config or an id
"""

from __future__ import annotations

from .anatomy import ModelAnatomy, read_anatomy
from .flops import AttentionScores, TrainingFlops, training_flops
from .layers import decoder_layers
from .targets import DEFAULT_TARGET_PATTERN, LoraTargets

__all__ = [
    "DEFAULT_TARGET_PATTERN",
    "AttentionScores",
    "LoraTargets",
    "ModelAnatomy",
    "TrainingFlops",
    "decoder_layers",
    "read_anatomy",
    "training_flops",
]
