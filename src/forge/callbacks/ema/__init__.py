"""An exponential moving average of the trainable weights: the mathematics, and the callback around it.

average.py      EMA: named tensors and their fp32 shadow
decay.py        decays, half-lives, the warm-up
applied.py      the average in a model, and the way back
callback.py     EMACallback: the trainer's events
evaluation.py   evaluation on the average, without a handle on the trainer
checkpoint.py   the `ema` folder of a checkpoint
support.py      what is refused
"""

from __future__ import annotations

from .average import EMA
from .callback import EMACallback

__all__ = ["EMA", "EMACallback"]
