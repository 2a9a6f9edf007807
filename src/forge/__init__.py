"""forge: presets, callbacks and estimates for people who fine-tune language models with transformers, PEFT and TRL.

Importing it is cheap: the names below are loaded when they are first used, and torch and transformers with them.
"""

from __future__ import annotations

# Type checkers go by the name; importing it from typing would be most of the time that this module takes.
TYPE_CHECKING = False
if TYPE_CHECKING:  # the twin of _WHERE below, for editors and type checkers
    from .callbacks import EMA, EMACallback, MonitorCallback
    from .errors import (
        ConflictError,
        ForgeError,
        ForgeWarning,
        MissingAssetError,
        NonFiniteError,
        UnknownNameError,
        UnsupportedError,
    )
    from .hardware import Hardware
    from .presets import Preset, get_preset, list_presets

__version__ = "0.1.0"

_WHERE = {
    "ConflictError": "errors",
    "EMA": "callbacks",
    "EMACallback": "callbacks",
    "ForgeError": "errors",
    "ForgeWarning": "errors",
    "Hardware": "hardware",
    "MissingAssetError": "errors",
    "MonitorCallback": "callbacks",
    "NonFiniteError": "errors",
    "Preset": "presets",
    "UnknownNameError": "errors",
    "UnsupportedError": "errors",
    "get_preset": "presets",
    "list_presets": "presets",
}

__all__ = [
    "EMA",
    "ConflictError",
    "EMACallback",
    "ForgeError",
    "ForgeWarning",
    "Hardware",
    "MissingAssetError",
    "MonitorCallback",
    "NonFiniteError",
    "Preset",
    "UnknownNameError",
    "UnsupportedError",
    "get_preset",
    "list_presets",
]


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_WHERE[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
