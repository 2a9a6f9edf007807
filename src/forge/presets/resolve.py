"""From a preset's name and the overrides to the full table of choices."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..hardware import Hardware
from ..models import ModelAnatomy
from .batch import Batch, resolve_batch
from .checks import check_pairs
from .choice import Choice
from .method import Method, Objective, resolve_method
from .names import OWN_NAMES
from .recipes import LORA_ALPHA, LORA_R, Setting, recipe

EFFECTIVE_BATCH = 16
PREFERRED_MICRO_BATCH = {"sft": 4, "dpo": 2}
"""DPO runs every sample twice, chosen and rejected."""

# Overrides that decide the method or the batch act through these, and their choices must not be replaced afterwards.
_ACTS_THROUGH_METHOD = frozenset({"precision", "use_peft", "load_in_4bit", "load_in_8bit", "bf16", "fp16"})


def resolve(
    name: str, overrides: Mapping[str, Any], hardware: Hardware, anatomy: ModelAnatomy | None, *, objective: Objective
) -> dict[str, Choice]:
    """Every choice of the preset `name`, for one objective, the user's values in their places.

    Raises:
        ConflictError: Values that contradict each other.
        UnknownNameError: A precision that does not exist.
    """
    method = resolve_method(name, overrides, hardware, anatomy, objective=objective)
    setting = Setting(
        method=method,
        hardware=hardware,
        anatomy=anatomy,
        batch=_batch(overrides, method),
        lora_r=overrides.get("lora_r", LORA_R),
        lora_alpha=overrides.get("lora_alpha", LORA_ALPHA),
        use_rslora=bool(overrides.get("use_rslora")),
        own_targets=bool({"target_modules", "target_parameters"} & overrides.keys()),
    )
    choices = recipe(setting)
    for key, value in overrides.items():
        if key in choices:
            choices[key] = choices[key].set_by_user(value)
        elif key not in OWN_NAMES and not (key in _ACTS_THROUGH_METHOD and not value):
            choices[key] = Choice(value, "set by you", overridden=True)
    check_pairs(method, choices)
    return choices


def _batch(overrides: Mapping[str, Any], method: Method) -> Batch:
    return resolve_batch(
        effective=overrides.get("effective_batch_size"),
        micro=overrides.get("per_device_train_batch_size"),
        accumulation=overrides.get("gradient_accumulation_steps"),
        world_size=overrides.get("world_size") or int(os.environ.get("WORLD_SIZE", "1")),
        preferred=(EFFECTIVE_BATCH, PREFERRED_MICRO_BATCH[method.objective]),
    )
