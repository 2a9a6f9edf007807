"""What the frozen layers compute, on the disk."""

from __future__ import annotations

from .cache import PrefixCache
from .size import CacheSize

__all__ = ["CacheSize", "PrefixCache"]
