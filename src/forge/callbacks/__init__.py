"""Callbacks for a standard Trainer, SFTTrainer or DPOTrainer.

ema/       EMACallback: average the weights, evaluate and save the average
monitor/   MonitorCallback: the truth about a run while it trains
"""

from __future__ import annotations

from .ema import EMA, EMACallback
from .monitor import MonitorCallback

__all__ = ["EMA", "EMACallback", "MonitorCallback"]
