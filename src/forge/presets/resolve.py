"""From a preset's name and the overrides to the full table of choices."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..errors import ForgeError
from ..hardware import Hardware
from ..models import ModelAnatomy
from .batch import Batch, resolve_batch
from .checks import check_pairs
from .choice import Choice
from .method import Method, Objective, resolve_method
from .names import OWN_NAMES
from .recipes import LORA_ALPHA, LORA_R, Setting, recipe
from .targets import check_targets

EFFECTIVE_BATCH = 16
PREFERRED_MICRO_BATCH = {"sft": 4, "dpo": 2}
"""DPO runs every sample twice, chosen and rejected."""

BATCH_NAMES = frozenset(
    {"effective_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps", "world_size"}
)

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
    batch = _batch(overrides, method)
    setting = Setting(
        method=method,
        hardware=hardware,
        anatomy=anatomy,
        batch=batch,
        lora_r=overrides.get("lora_r", LORA_R),
        lora_alpha=overrides.get("lora_alpha", LORA_ALPHA),
        use_rslora=bool(overrides.get("use_rslora")),
        own_targets="target_modules" in overrides,
        own_batch=not BATCH_NAMES.isdisjoint(overrides) and batch.effective != EFFECTIVE_BATCH,
        unties=_unties(overrides, anatomy),
    )
    choices = recipe(setting)
    for key, value in overrides.items():
        if key in choices:
            choices[key] = choices[key].set_by_user(value)
        elif key not in OWN_NAMES and not (key in _ACTS_THROUGH_METHOD and not value):
            choices[key] = Choice(value, "set by you", overridden=True)
    check_pairs(method, hardware, choices)
    if anatomy and method.use_peft:
        check_targets(anatomy, overrides)
    return choices


def _batch(overrides: Mapping[str, Any], method: Method) -> Batch:
    return resolve_batch(
        effective=overrides.get("effective_batch_size"),
        micro=overrides.get("per_device_train_batch_size"),
        accumulation=overrides.get("gradient_accumulation_steps"),
        world_size=overrides["world_size"] if "world_size" in overrides else _launched_processes(),
        preferred=(EFFECTIVE_BATCH, PREFERRED_MICRO_BATCH[method.objective]),
    )


def _launched_processes() -> int:
    found = os.environ.get("WORLD_SIZE") or "1"
    if not found.isdigit() or int(found) < 1:
        raise ForgeError(
            f"WORLD_SIZE={found!r} in the environment: it must be a number of processes. Unset or mend it."
        )
    return int(found)


def _unties(overrides: Mapping[str, Any], anatomy: ModelAnatomy | None) -> bool:
    """Whether `modules_to_save` copies embeddings that lm_head shares: the two would come apart in training."""
    saved = overrides.get("modules_to_save") or ()
    return bool(anatomy and anatomy.tied_word_embeddings and {"lm_head", "embed_tokens", "wte"} & set(saved))
