"""What can be changed so that a run fits, one lever each: a change of the preset or of the batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..presets import Preset

SHORTEST = 256  # tokens; below, few conversations are whole


@dataclass(frozen=True)
class Settings:
    """What an estimate is made of, while levers are pulled.

    Args:
        preset: the recipe.
        batch_size: rows in a micro-batch.
        sequence_length: tokens in a row.
        options: of `estimate_model_memory`.
    """

    preset: Preset
    batch_size: int
    sequence_length: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def value(self, name: str) -> Any:
        """A value of the preset, None where it has none."""
        choice = self.preset.choices.get(name)
        return None if choice is None else choice.value


@dataclass(frozen=True)
class Pull:
    """A lever as it would be pulled here.

    Args:
        name: what it is called.
        change: what to write, as code.
        cost: what it costs.
        same_result: whether the trained model is the same but for rounding.
        settings: after it.
    """

    name: str
    change: str
    cost: str
    same_result: bool
    settings: Settings


def pulls(now: Settings) -> list[Pull]:
    """Every lever that is left to pull, in the order in which a careful person would."""
    found = (_checkpointing, _micro_batch, _eight_bit, _precomputed, _adapters, _four_bit, _freezing, _shorter)
    return [pull for lever in found if (pull := lever(now)) is not None]


def _checkpointing(now: Settings) -> Pull | None:
    if now.value("activation_checkpointing"):
        return None
    changed = replace(now, preset=now.preset.replace(activation_checkpointing=True))
    cost = "about a third more time: activations are computed twice (arXiv:1604.06174)"
    return Pull("activation checkpointing", "activation_checkpointing=True", cost, True, changed)


def _micro_batch(now: Settings) -> Pull | None:
    if now.batch_size == 1:
        return None
    smaller = next(size for size in range(now.batch_size - 1, 0, -1) if now.batch_size % size == 0)
    effective = now.value("effective_batch_size")
    share = effective // now.value("world_size")
    if share % smaller:
        return None
    preset = now.preset.replace(per_device_train_batch_size=smaller, gradient_accumulation_steps=share // smaller)
    change = f"per_device_train_batch_size={smaller}, gradient_accumulation_steps={share // smaller}"
    cost = f"some speed; the effective batch stays {effective}"
    return Pull("smaller micro-batch", change, cost, True, replace(now, preset=preset, batch_size=smaller))


def _eight_bit(now: Settings) -> Pull | None:
    if "8bit" in str(now.value("optim")) or str(now.value("optim")).startswith("paged"):
        return None
    changed = replace(now, preset=now.preset.replace(optim="adamw_8bit"))
    return Pull("8-bit optimizer", 'optim="adamw_8bit"', "moments in 8 bits (arXiv:2110.02861)", False, changed)


def _precomputed(now: Settings) -> Pull | None:
    trainer = now.options.get("trainer", now.preset.objective)
    copies = now.options.get("reference", "copy") == "copy" and not now.value("use_peft")
    if trainer != "dpo" or not copies or now.value("precompute_ref_log_probs"):
        return None
    options = {name: value for name, value in now.options.items() if name != "reference"}
    changed = replace(now, preset=now.preset.replace(precompute_ref_log_probs=True), options=options)
    cost = "a pass over the data before training"
    return Pull("precomputed reference", "precompute_ref_log_probs=True", cost, True, changed)


def _adapters(now: Settings) -> Pull | None:
    if now.value("use_peft"):
        return None
    changed = replace(now, preset=now.preset.replace(use_peft=True))
    return Pull("LoRA", "use_peft=True", "adapters are trained in the place of all weights", False, changed)


def _four_bit(now: Settings) -> Pull | None:
    if not now.value("use_peft") or now.value("precision") in ("nf4", "fp4", "int8"):
        return None
    if now.preset.anatomy is not None and (now.preset.anatomy.quantization or not now.preset.anatomy.quantizable):
        return None
    changed = replace(now, preset=now.preset.replace(precision="nf4"))
    cost = "some speed: weights are unpacked for each product (arXiv:2305.14314)"
    return Pull("QLoRA", 'precision="nf4"', cost, False, changed)


def _freezing(now: Settings) -> Pull | None:
    if "freeze_ratio" in now.options or "frozen_layers" in now.options:
        return None
    changed = replace(now, options={**now.options, "freeze_ratio": 0.5})
    change = "setup_lp_lora_style(model, freeze_ratio=0.5)"
    return Pull("LP-LoRA", change, "the lower half of the layers is not trained", False, changed)


def _shorter(now: Settings) -> Pull | None:
    length = now.sequence_length // 2
    if length < SHORTEST:
        return None
    preset = now.preset
    if "max_length" in preset.choices:
        preset = preset.replace(max_length=length)
    cost = f"rows longer than {length} tokens are cut"
    return Pull(
        "shorter sequences", f"max_length={length}", cost, False, replace(now, preset=preset, sequence_length=length)
    )
