"""What an estimate depends on and no preset says: the options, and what is refused of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from ..errors import ConflictError, ForgeError, UnknownNameError
from ..models import decoder_layers
from ..presets.names import fields_by_object
from .scenario import Reference, Sharding, TrainerKind

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

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
    prefix_cache: bool
    offload_prefix: bool
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
        if name in ("padded", "packed", "prefix_cache", "offload_prefix") and not isinstance(value, bool):
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


def freezing_of(source: nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
    """The scenario's fields on freezing, from the options, or as they are in a live model.

    Raises:
        ForgeError: see `estimate_model_memory`.
    """
    from ..models.truncation import layers_in_ratio, truncation_of

    depth, truncation = len(decoder_layers(source)), truncation_of(source)
    frozen = options.get("frozen_layers", 0 if truncation is None else truncation.depth)
    if "freeze_ratio" in options:
        frozen = layers_in_ratio(options["freeze_ratio"], depth)
    if not isinstance(frozen, int) or isinstance(frozen, bool) or not 0 <= frozen < depth:
        raise ForgeError(f"frozen_layers={frozen!r}: it must be at least 0 and less than the model's {depth} layers.")
    if truncation is not None and frozen != truncation.depth:
        asked = next(f"{name}={options[name]}" for name in ("freeze_ratio", "frozen_layers") if name in options)
        raise ConflictError(
            f"{asked} freezes {frozen} layers, and the backward pass of this model already stops below layer "
            f"{truncation.depth}. Leave the option out, or call setup_lp_lora_style(model, {asked}) first."
        )
    cached = options.get("prefix_cache", truncation is not None and truncation.shortcut is not None)
    offloaded = options.get("offload_prefix", False)
    if cached and not frozen:
        raise ConflictError(
            "prefix_cache=True: no layer is frozen, so there is nothing that stays the same from epoch to epoch. Add "
            "freeze_ratio=0.5, or call setup_lp_lora_style(model) first."
        )
    if offloaded and not cached:
        raise ConflictError("offload_prefix=True takes away layers that run. Add prefix_cache=True.")
    return {"frozen_layers": frozen, "prefix_cache": cached, "offload_prefix": offloaded}
