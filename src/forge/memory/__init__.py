"""What a run will need, before it is launched.

estimate.py    estimate_model_memory: the whole of it
describe.py    model, preset, options -> what will run (scenario.py; options.py: what is refused)
tracing/       the engine: the trainer's own step on tensors without memory
analytic.py    the formulas behind it, for what cannot be traced
allocator.py   a model of PyTorch's caching allocator: what is reserved for what is allocated
overheads.py   CUDA context, cuBLAS workspaces, the width of the band     (sharding.py: DDP, ZeRO, FSDP)
result.py      MemoryEstimate: the numbers, and the questions asked of them   (search.py, printed.py, calibration.py)
part.py        the parts that memory is told in
cards.py       what GPUs really offer
plan.py        plan_training: what fits, and what to change               (levers.py: one lever each)
savings.py     what freezing saves
info/          print_model_info
"""

from __future__ import annotations

from .cards import Card, find_card
from .estimate import estimate_model_memory
from .info import ModelInfo, print_model_info
from .plan import TrainingPlan, plan_training
from .result import Fit, MemoryEstimate
from .savings import get_memory_savings_estimate

__all__ = [
    "Card",
    "Fit",
    "MemoryEstimate",
    "ModelInfo",
    "TrainingPlan",
    "estimate_model_memory",
    "find_card",
    "get_memory_savings_estimate",
    "plan_training",
    "print_model_info",
]
