"""LP-LoRA that pays: freeze a prefix of the decoder, stop backward there, never compute it twice."""

from __future__ import annotations

from .report import FreezeReport
from .setup import setup_lp_lora_style, unfreeze

__all__ = ["FreezeReport", "setup_lp_lora_style", "unfreeze"]
