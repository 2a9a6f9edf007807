"""One run from data to a judged adapter. Loaded when first used: what delivers to a tracker needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .bayesian_tuner import BayesianLoRATuner
    from .config import TuningConfig
    from .interruption import TuningInterrupted
    from .lora_tuner import LoRATuner
    from .result import TuningResult
    from .search.space import SearchSpace
    from .study.result import StudyResult

_WHERE = {
    "BayesianLoRATuner": "bayesian_tuner",
    "SearchSpace": "search.space",
    "StudyResult": "study.result",
    "LoRATuner": "lora_tuner",
    "TuningConfig": "config",
    "TuningInterrupted": "interruption",
    "TuningResult": "result",
}

__all__ = [
    "BayesianLoRATuner",
    "LoRATuner",
    "SearchSpace",
    "StudyResult",
    "TuningConfig",
    "TuningInterrupted",
    "TuningResult",
]


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_WHERE[name]}", __name__), name)
