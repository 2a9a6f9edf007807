"""LP-LoRA that pays: freeze a prefix of the decoder, stop backward there, never compute it twice."""

from __future__ import annotations

from .cache import CacheSize, PrefixCache
from .report import FreezeReport
from .setup import setup_lp_lora_style, unfreeze
from .suggest import suggest_freeze_ratio
from .suggestion import FreezeSuggestion

__all__ = [
    "CacheSize",
    "FreezeReport",
    "FreezeSuggestion",
    "PrefixCache",
    "setup_lp_lora_style",
    "suggest_freeze_ratio",
    "unfreeze",
]
