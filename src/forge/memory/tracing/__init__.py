"""The tracing engine: the trainer's own step, run on tensors without memory, and what it would have allocated.

tape.py        every storage from its allocation to its end, by category and phase
hollow.py      tensors with a size and no memory, operations that compute shapes alone
skeleton.py    scenario -> model, with from_pretrained's, bitsandbytes' and PEFT's own code
               (quantized.py: packed layers)
step.py        two steps of the trainer on it (optimizers.py: what they keep)
cuda.py        where CUDA allocates otherwise than the CPU that traces
unroll.py      the tape of a few layers -> the tape of them all
engine.py      all of it
"""

from __future__ import annotations

from .engine import Traced, UntraceableError, trace

__all__ = ["Traced", "UntraceableError", "trace"]
