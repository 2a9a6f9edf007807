"""The preset: a recipe made concrete for a model and a machine, which hands out real Hugging Face objects."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UnknownNameError
from ..hardware import Hardware
from ..models import ModelAnatomy, read_anatomy
from .checks import check_values, warn_of_dpo_rate
from .choice import Choice, Explanation
from .difference import PresetDiff, diff_tables
from .method import OBJECTIVES, PRESETS, Objective
from .names import canonical
from .resolve import BATCH_NAMES, resolve

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel, TrainerCallback, TrainingArguments
    from trl import DPOConfig, SFTConfig


@dataclass(frozen=True)
class Preset:
    """A recipe for fine-tuning, made by `get_preset`; every value in it can say why it is there.

    Args:
        name: "qlora", "lora", "sft" or "dpo".
        hardware: the profile that it was built for, which need not be this machine's.
        anatomy: what is known of the model; None makes the LoRA targets a pattern.
        overrides: what the user set.
        tables: the choices, for "sft" and for "dpo": a learning rate for one would ruin the other.
    """

    name: str
    hardware: Hardware
    anatomy: ModelAnatomy | None
    overrides: Mapping[str, Any] = field(repr=False)
    tables: Mapping[str, Mapping[str, Choice]] = field(repr=False)

    @property
    def objective(self) -> Objective:
        """What the preset is for: "dpo" for the preset of that name, else "sft"."""
        return "dpo" if self.name == "dpo" else "sft"

    @property
    def choices(self) -> Mapping[str, Choice]:
        """Every value by name, for the preset's own objective."""
        return self.tables[self.objective]

    def get_bnb_config(self) -> BitsAndBytesConfig | None:
        """The quantisation of the base model, None when it is not quantised.

        >>> from forge import get_preset
        >>> get_preset("qlora", hardware="ampere").get_bnb_config().bnb_4bit_quant_type
        'nf4'
        """
        from .build import build_bnb_config

        return build_bnb_config(self.choices)

    def get_lora_config(self) -> LoraConfig | None:
        """The adapter, for `get_peft_model` or a trainer's `peft_config`; None when all weights are trained.

        >>> from forge import get_preset
        >>> config = get_preset("qlora", hardware="cpu", lora_r=32).get_lora_config()
        >>> config.r, config.lora_alpha
        (32, 32)
        """
        from .build import build_lora_config

        return build_lora_config(self.choices)

    def get_training_args(self) -> TrainingArguments:
        """The arguments of a plain `Trainer`; as usual, `args.output_dir = ...` may follow.

        >>> from forge import get_preset
        >>> get_preset("qlora", hardware="cpu", learning_rate=1e-4).get_training_args().learning_rate
        0.0001

        Raises:
            UnsupportedError: This machine lacks what the hardware profile needs, or a field that you set does not exist
                in TrainingArguments.
            ConflictError: The processes of this run do not make up the effective batch.
        """
        from .build import build_training_args

        return build_training_args("TrainingArguments", self.choices, self.hardware)

    def get_sft_config(self) -> SFTConfig:
        """The arguments of `SFTTrainer`; from preset "dpo", with the rates of supervised fine-tuning.

        >>> from forge import get_preset
        >>> get_preset("qlora", hardware="cpu").get_sft_config().max_length
        2048

        Raises:
            UnsupportedError: As `get_training_args`, for SFTConfig.
            ConflictError: As `get_training_args`.
        """
        from .build import build_training_args

        return build_training_args("SFTConfig", self.tables["sft"], self.hardware)

    def get_dpo_config(self) -> DPOConfig:
        """The arguments of `DPOTrainer`; from the other presets, with the rates of preference tuning.

        >>> from forge import get_preset
        >>> get_preset("qlora", hardware="cpu").get_dpo_config().learning_rate
        5e-06

        Raises:
            UnsupportedError: As `get_training_args`, for DPOConfig.
            ConflictError: As `get_training_args`.
        """
        from .build import build_training_args

        if self.objective != "dpo":
            warn_of_dpo_rate(self.tables["dpo"], stacklevel=2)
        return build_training_args("DPOConfig", self.tables["dpo"], self.hardware)

    def model_kwargs(self) -> dict[str, Any]:
        """The arguments of `AutoModelForCausalLM.from_pretrained`: dtype, attention, quantisation, device.

        >>> from forge import get_preset
        >>> get_preset("sft", hardware="cpu").model_kwargs()
        {'dtype': torch.float32, 'attn_implementation': 'sdpa', 'device_map': {'': 'cpu'}}
        """
        from .build import build_model_kwargs

        return build_model_kwargs(self.choices, self.hardware, self.anatomy)

    def get_callbacks(self) -> list[TrainerCallback]:
        """What the recipe needs from the trainer: its trainable parameters kept in fp32.

        Empty when `dtype` was overridden for a full fine-tuning: then its 16-bit weights are what was asked for.
        """
        from .fp32 import Fp32TrainableCallback

        asked_for_16_bit = not self.choices["use_peft"].value and self.choices["dtype"].value != "float32"
        return [] if asked_for_16_bit else [Fp32TrainableCallback()]

    def explain(self, name: str) -> Explanation:
        """Why a value is what it is.

        >>> from forge import get_preset
        >>> print(get_preset("qlora", hardware="cpu").explain("activation_checkpointing"))
        activation_checkpointing = False
        why: a CPU has memory to spare and no time
        source: Chen et al. 2016, arXiv:1604.06174
        hardware: device cpu

        Args:
            name: Of any field of the objects that the preset produces, whether the recipe sets it or not.

        Raises:
            UnknownNameError: No object has such a field.
        """
        from .explain import explain

        return explain(self, name)

    def print_info(self) -> None:
        """Print the recipe as a table: value, why, source."""
        from .explain import print_info

        print_info(self)

    def diff(self, other: Preset | str) -> PresetDiff:
        """Where this preset differs from another, or from what TRL does when nothing is said.

        >>> from forge import get_preset
        >>> lora = get_preset("lora", hardware="cpu")
        >>> lora.diff(get_preset("lora", hardware="cpu", lora_r=64)).names
        ('lora_r',)

        Args:
            other: A preset, the name of one (built for the same model and hardware), or "trl".

        Raises:
            UnknownNameError: `other` names neither.
        """
        if isinstance(other, Preset):
            return diff_tables(self.name, self.choices, other.name, other.choices)
        if other == "trl":
            from .difference import trl_defaults

            return diff_tables(self.name, self.choices, "trl", trl_defaults(self.objective, self.choices))
        if other not in PRESETS:
            raise UnknownNameError.among("preset", str(other), [*PRESETS, "trl"])
        plain = _build(other, self.anatomy, self.hardware, {})
        return diff_tables(self.name, self.choices, other, plain.choices)

    def replace(self, **overrides: Any) -> Preset:
        """This preset with more overrides; what is not named stays, as the installed version of forge has it.

        >>> from forge import get_preset
        >>> get_preset("lora", hardware="cpu", lora_r=8).replace(learning_rate=1e-4).overrides
        {'lora_r': 8, 'learning_rate': 0.0001}
        """
        if wrong := overrides.keys() & {"model", "hardware"}:
            raise UnknownNameError(
                f"replace() changes overrides, not {' or '.join(sorted(wrong))}: build the preset anew with get_preset."
            )
        new = canonical(overrides, frozenset(self.choices))
        merged = {**self.overrides, **new}
        if "effective_batch_size" in new and "gradient_accumulation_steps" not in new:
            merged.pop("gradient_accumulation_steps", None)  # it follows from the new batch
        preset = _build(self.name, self.anatomy, self.hardware, merged)
        if self.objective == "dpo" and "learning_rate" in new:
            warn_of_dpo_rate(preset.choices, stacklevel=2)
        return preset

    def on(self, hardware: str | Hardware) -> Preset:
        """This recipe for other hardware, with the same overrides: to estimate a run for a GPU that is not here.

        >>> from forge import get_preset
        >>> get_preset("lora", hardware="cpu", lora_r=8).on("hopper").choices["dtype"].value
        'bfloat16'
        """
        machine = hardware if isinstance(hardware, Hardware) else Hardware.named(hardware)
        return _build(self.name, self.anatomy, machine, self.overrides)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the preset as JSON; `Preset.load` reads back an equal one, also under a later version of forge.

        Raises:
            ForgeError: A value that JSON cannot hold, or a hardware profile of your own.
        """
        from .file import write_preset

        write_preset(self, Path(path))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Preset:
        """The preset that `save` wrote, value for value.

        Raises:
            FileNotFoundError: There is no such file.
            ForgeError: It is not a preset, or one of a later format.
        """
        from .file import read_preset

        return read_preset(Path(path))


def get_preset(
    name: str,
    *,
    model: PreTrainedModel | PeftModel | PreTrainedConfig | str | PathLike[str] | None = None,
    hardware: str | Hardware | None = None,
    **overrides: Any,
) -> Preset:
    """A recipe that produces real `BitsAndBytesConfig`, `LoraConfig`, `TrainingArguments`, `SFTConfig`, `DPOConfig`.

    >>> preset = get_preset("qlora", hardware="ampere", lora_r=32)
    >>> preset.get_lora_config().r
    32

    Args:
        name: "qlora" (adapters on 4-bit weights), "lora" (adapters on 16-bit weights), "sft" (all weights) or "dpo"
            (preferences, with adapters).
        model: A live model, a config, a hub id or a folder (its config is read, no weights). It makes the LoRA targets
            exact, and learning rate and `max_length` fit.
        hardware: "cpu", "turing", "ampere" or "hopper"; by default what this machine has. A preset for absent hardware
            can be built, explained, saved and estimated anywhere.
        **overrides: Fields of those objects by their own names (`learning_rate`, `max_length`, `target_modules`,
            `use_dora`, `bnb_4bit_use_double_quant`, ...), `lora_r`, and forge's own: `precision` ("nf4", "fp4", "int8",
            "bf16", "fp16", "fp32"), `use_peft`, `effective_batch_size`, `world_size`.

    Raises:
        UnknownNameError: An unknown preset, profile or override; the message names the nearest.
        ConflictError: Values that contradict each other.
        ForgeError: A value that no trainer could use.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise UnknownNameError.among("preset", str(name), PRESETS)
    if hardware is None:
        machine = Hardware.detect()
    else:
        machine = hardware if isinstance(hardware, Hardware) else Hardware.named(hardware)
    by_name = isinstance(model, (str, PathLike))
    source = {key: overrides[key] for key in ("revision", "trust_remote_code") if by_name and key in overrides}
    anatomy = None if model is None else read_anatomy(model, **source)
    plain = _build(name, anatomy, machine, {})
    preset = _build(name, anatomy, machine, canonical(overrides, frozenset(plain.choices))) if overrides else plain
    if name == "dpo":
        warn_of_dpo_rate(preset.choices, stacklevel=2)
    return preset


def list_presets() -> dict[str, str]:
    """The presets by name, each with a sentence on when to take it.

    >>> list(list_presets())
    ['qlora', 'lora', 'sft', 'dpo']
    """
    return dict(PRESETS)


def _build(name: str, anatomy: ModelAnatomy | None, hardware: Hardware, overrides: Mapping[str, Any]) -> Preset:
    # A copy: a list which the user goes on changing must not change the preset. For the batch, None is "not set".
    own = copy.deepcopy({n: v for n, v in overrides.items() if v is not None or n not in BATCH_NAMES})
    check_values(own)
    tables = {str(o): resolve(name, own, hardware, anatomy, objective=o) for o in OBJECTIVES}
    return Preset(name, hardware, anatomy, own, tables)
