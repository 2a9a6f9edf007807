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
    from .freezing import (
        CacheSize,
        FreezeReport,
        FreezeSuggestion,
        PrefixCache,
        setup_lp_lora_style,
        suggest_freeze_ratio,
        unfreeze,
    )
    from .hardware import Hardware
    from .memory import (
        Fit,
        MemoryEstimate,
        ModelInfo,
        TrainingPlan,
        estimate_model_memory,
        find_card,
        get_memory_savings_estimate,
        plan_training,
        print_model_info,
    )
    from .presets import Preset, get_preset, list_presets

__version__ = "0.1.0"

_WHERE = {
    "CacheSize": "freezing",
    "ConflictError": "errors",
    "EMA": "callbacks",
    "EMACallback": "callbacks",
    "Fit": "memory",
    "ForgeError": "errors",
    "ForgeWarning": "errors",
    "FreezeReport": "freezing",
    "FreezeSuggestion": "freezing",
    "Hardware": "hardware",
    "MemoryEstimate": "memory",
    "MissingAssetError": "errors",
    "ModelInfo": "memory",
    "MonitorCallback": "callbacks",
    "NonFiniteError": "errors",
    "PrefixCache": "freezing",
    "Preset": "presets",
    "TrainingPlan": "memory",
    "UnknownNameError": "errors",
    "UnsupportedError": "errors",
    "estimate_model_memory": "memory",
    "find_card": "memory",
    "get_memory_savings_estimate": "memory",
    "get_preset": "presets",
    "list_presets": "presets",
    "plan_training": "memory",
    "print_model_info": "memory",
    "setup_lp_lora_style": "freezing",
    "suggest_freeze_ratio": "freezing",
    "unfreeze": "freezing",
}

__all__ = [
    "EMA",
    "CacheSize",
    "ConflictError",
    "EMACallback",
    "Fit",
    "ForgeError",
    "ForgeWarning",
    "FreezeReport",
    "FreezeSuggestion",
    "Hardware",
    "MemoryEstimate",
    "MissingAssetError",
    "ModelInfo",
    "MonitorCallback",
    "NonFiniteError",
    "PrefixCache",
    "Preset",
    "TrainingPlan",
    "UnknownNameError",
    "UnsupportedError",
    "estimate_model_memory",
    "find_card",
    "get_memory_savings_estimate",
    "get_preset",
    "list_presets",
    "plan_training",
    "print_model_info",
    "setup_lp_lora_style",
    "suggest_freeze_ratio",
    "unfreeze",
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
