"""What an estimate depends on and no preset says: the options, and what is refused of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from ..errors import ConflictError, ForgeError, UnknownNameError
from ..presets.names import fields_by_object
from .scenario import Reference, Sharding, TrainerKind

if TYPE_CHECKING:
    from peft import PeftConfig

_CHOICES: dict[str, tuple[str, ...]] = {
    "trainer": ("sft", "dpo", "plain"),
    "ema": ("none", "device", "cpu"),
    "reference": ("adapter_off", "copy", "precomputed"),
    "sharding": ("none", "ddp", "zero1", "zero2", "zero3", "fsdp"),
}


class RunOptions(TypedDict, total=False):
    """What an estimate depends on and no preset says; see `estimate_model_memory`."""

    trainer: TrainerKind
    peft_config: PeftConfig
    padded: bool
    packed: bool
    ema: Literal["none", "device", "cpu"]
    reference: Reference
    freeze_ratio: float
    frozen_layers: int
    sharding: Sharding
    world_size: int


def check_numbers(batch_size: int, sequence_length: int) -> None:
    """Refuse what no batch has.

    Raises:
        ForgeError: not whole numbers, or too small.
    """
    for name, value in (("batch_size", batch_size), ("sequence_length", sequence_length)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ForgeError(f"{name}={value!r}: it must be a whole number of at least 1.")
    if sequence_length < 2:
        raise ForgeError("sequence_length=1: there is no next token to predict. Give it at least 2.")


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse what no run has, and what contradicts itself.

    Raises:
        ForgeError: see `estimate_model_memory`.
    """
    known = RunOptions.__annotations__
    for name, value in options.items():
        if name not in known and name in fields_by_object()["SFTConfig"] | fields_by_object()["DPOConfig"]:
            raise UnknownNameError(f"{name!r} belongs to the preset: preset=get_preset(..., {name}={value!r}).")
        if name not in known:
            raise UnknownNameError.among("option", name, known)
        if name in ("padded", "packed") and not isinstance(value, bool):
            raise ForgeError(f"{name}={value!r}: it must be True or False.")
        if name in _CHOICES and value not in _CHOICES[name]:
            raise UnknownNameError.among(name, str(value), _CHOICES[name])
    if "peft_config" in options:
        from peft import PeftConfig

        if not isinstance(options["peft_config"], PeftConfig):
            raise ForgeError(
                f"peft_config={options['peft_config']!r}: it must be a PeftConfig, such as LoraConfig(...)."
            )
    if "freeze_ratio" in options and "frozen_layers" in options:
        raise ConflictError("freeze_ratio and frozen_layers say the same thing twice: leave one of them out.")
    ratio = options.get("freeze_ratio", 0.0)
    if not isinstance(ratio, (int, float)) or not 0 <= ratio < 1:
        raise ForgeError(f"freeze_ratio={ratio!r}: it must be at least 0 and less than 1.")
    count = options.get("world_size", 1)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ForgeError(f"world_size={count!r}: it must be a whole number of at least 1.")
    if options.get("sharding", "none") != "none" and "world_size" not in options:
        raise ConflictError(f"sharding={options['sharding']!r} needs world_size, the number of processes that share.")
