"""Adapters: attach them so that the base can be brought back, unload them, give their memory back.

attach.py     get_peft_model with a memory of the base
unload.py     the base, bit for bit; foreign.py where forge did not attach the adapter
cleanup.py    the same, and whatever else holds the adapter's memory
memento.py    structure.py (modules, hooks, flags, configs) and weights.py (digests, copies, repairs)
kinds.py      which adapters change the base's own weights
source.py     where values are read that nobody copied
"""

from __future__ import annotations

from .attach import attach_adapter
from .cleanup import cleanup_peft_model
from .unload import safe_unload_peft_adapters

__all__ = ["attach_adapter", "cleanup_peft_model", "safe_unload_peft_adapters"]
