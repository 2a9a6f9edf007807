"""What MLflow calls things, and what it takes: characters, lengths, numbers of things at a time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from numbers import Real
from typing import Any

from .private import told

RUN_KEY = "forge.run_key"
PARENT = "mlflow.parentRunId"
_RENAMED = {"lora_r": "rank"}
# The limits of mlflow.utils.validation.
_KEY, PARAM, TAG = 250, 6000, 5000
METRICS_A_BATCH, PARAMS_A_BATCH, TAGS_A_BATCH = 1000, 100, 100
_NOT_ALLOWED = re.compile(r"[^\w.\- :/]")


def trial_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """A preset's values under the names that a trial has in MLflow: `lora_r` is `rank` there.

    >>> trial_params({"lora_r": 16, "lora_alpha": 32, "learning_rate": 2e-4})
    {'rank': 16, 'lora_alpha': 32, 'learning_rate': 0.0002}
    """
    return {_RENAMED.get(name, name): value for name, value in params.items()}


def key(name: object) -> str:
    """A name with the characters that MLflow allows.

    >>> key("grad_norm/lora_A (mean)")
    'grad_norm/lora_A _mean_'
    """
    allowed = _NOT_ALLOWED.sub("_", str(name)).strip("/ ") or "_"
    while "//" in allowed or ".." in allowed:
        allowed = allowed.replace("//", "/").replace("..", ".")
    return allowed[:_KEY]


def texts(values: Mapping[str, Any], limit: int) -> dict[str, str]:
    """Values as texts of at most so many characters, without what is secret."""
    return {key(name): _cut(told(str(name), value), limit) for name, value in values.items()}


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The values that are numbers, NaN and infinities too, which MLflow knows."""
    return {
        key(name): float(value)
        for name, value in values.items()
        if isinstance(value, Real) and not isinstance(value, bool)
    }


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
