"""What MLflow calls things, and what it takes: characters, lengths, numbers of things at a time."""

from __future__ import annotations

import math
import posixpath
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
    allowed = _NOT_ALLOWED.sub("_", str(name))
    while ".." in allowed:
        allowed = allowed.replace("..", ".")
    for _ in range(2):  # MLflow may take it for a path, of which there must be one way to write it
        allowed = posixpath.normpath(allowed.strip("/ ")[:_KEY])
    return "_" if allowed == "." else allowed


def texts(values: Mapping[str, Any], limit: int) -> dict[str, str]:
    """Values as texts of at most so many characters, without what is secret."""
    return {key(told("", name)): _cut(told(str(name), value), limit) for name, value in values.items()}


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The values that are numbers, NaN and infinities too, which MLflow knows.

    >>> numbers({"loss": 1.5, "steps": 3, "name": "x", "flag": True})
    {'loss': 1.5, 'steps': 3.0}
    """
    found = ((key(told("", name)), _number(value)) for name, value in values.items())
    return {name: value for name, value in found if value is not None}


def _number(value: Any) -> float | None:
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # of an array or a tensor
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return -math.inf if str(value).startswith("-") else math.inf


def _cut(text: str, limit: int) -> str:
    # Neither JSON nor databases take every character that a str can hold.
    text = text.encode("utf-8", "replace").decode().replace("\0", " ")
    return text if len(text) <= limit else text[: limit - 3] + "..."
