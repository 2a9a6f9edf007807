"""From what a user passes, a model and a preset, to what will run: the scenario, and what had to be assumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

from ..errors import ConflictError, UnknownNameError, UnsupportedError
from ..hardware import Hardware
from ..models.anatomy import build_on_meta, load_config
from ..models.layers import text_attribute, unwrap
from ..presets import Preset, get_preset, list_presets
from .options import check_numbers, check_options, freezing_of
from .scenario import Attention, Checkpointing, Reference, Scenario, TrainerKind

if TYPE_CHECKING:
    from torch import nn

_EVERYWHERE = "ampere"  # what an estimate is for on a machine without a GPU: bf16, sdpa


@dataclass(frozen=True)
class Described:
    """A run to estimate.

    Args:
        name: of the model, for people.
        source: the model, live or on meta.
        scenario: what runs.
        hardware: the profile that it runs on.
        preset: the recipe; None for a live model as it stands.
        assumptions: what was not said and had to be supposed.
        asked: model, preset and options as they were given.
    """

    name: str
    source: nn.Module
    scenario: Scenario
    hardware: Hardware
    preset: Preset | None
    assumptions: tuple[str, ...]
    asked: tuple[Any, Preset | str | None, Mapping[str, Any]]

    def at(self, batch_size: int, sequence_length: int) -> Described:
        """The same run with another batch.

        Raises:
            ForgeError: a number that no batch has.
        """
        model, preset, options = self.asked
        return describe(model, batch_size, sequence_length, preset, options)


def describe(
    model: Any, batch_size: int, sequence_length: int, preset: Preset | str | None, options: Mapping[str, Any]
) -> Described:
    """Read the model's structure and the preset.

    Raises:
        ForgeError: see `estimate_model_memory`.
    """
    check_numbers(batch_size, sequence_length)
    check_options(options)
    source, is_live = _structure(model)
    recipe, assumptions = _recipe(model, source, preset, is_live=is_live)
    if recipe is None:
        hardware = _hardware()
        scenario = _as_it_stands(source, hardware)
        assumptions.append(
            "the model as it stands: its dtypes, its adapters, its checkpointing (SFTTrainer's default "
            "would switch that on); SFTTrainer with bf16 autocast and fused AdamW. Pass preset= for other arguments"
        )
    else:
        hardware = recipe.hardware
        scenario = _from_preset(recipe, source, options, assumptions, is_live=is_live)
        _note_other_batch(recipe, batch_size, sequence_length, assumptions)
    scenario = replace(scenario, batch_size=batch_size, sequence_length=sequence_length)
    scenario = _with_options(scenario, source, options, assumptions)
    _check_positions(source, sequence_length, assumptions)
    asked = (model, preset, options)
    return Described(_name(model, source), source, scenario, hardware, recipe, tuple(assumptions), asked)


def _structure(model: Any) -> tuple[Any, bool]:
    """The model, or one of a config's structure on meta; and whether it is live."""
    from torch import nn
    from transformers import PreTrainedConfig

    if isinstance(model, (str, PathLike)):
        model = load_config(fspath(model))
    if isinstance(model, PreTrainedConfig):
        return build_on_meta(model), False
    if not isinstance(model, nn.Module) or not hasattr(unwrap(model), "config"):
        raise UnsupportedError(
            "Memory is estimated for a transformers model, a PeftModel, a config, a hub id or a local folder, not for "
            f"a {type(model).__name__}."
        )
    return model, True


def _hardware() -> Hardware:
    import torch

    return Hardware.detect() if torch.cuda.is_available() else Hardware.named(_EVERYWHERE)


def _recipe(model: Any, source: Any, preset: Preset | str | None, *, is_live: bool) -> tuple[Preset | None, list[str]]:
    if isinstance(preset, Preset):
        return preset, []
    if preset is None and is_live:
        return None, []
    if preset is not None and (not isinstance(preset, str) or preset not in list_presets()):
        raise UnknownNameError.among("preset", str(preset), list_presets())
    hardware = _hardware()
    known = source if is_live else getattr(source, "config", model)
    recipe = get_preset(preset or "sft", model=known, hardware=hardware)
    if preset is None:
        said = "preset=None: full fine-tuning, fp32 weights under 16-bit autocast, fused AdamW, checkpointing"
        return recipe, [said + ' (get_preset("sft"))', f"hardware profile {hardware.name!r}"]
    return recipe, [f"get_preset({preset!r}) for hardware profile {hardware.name!r}"]


def _from_preset(
    preset: Preset, source: Any, options: Mapping[str, Any], assumptions: list[str], *, is_live: bool
) -> Scenario:
    trainer: TrainerKind = options.get("trainer", preset.objective)
    table = preset.tables["dpo" if trainer == "dpo" else "sft"]
    values = {name: choice.value for name, choice in table.items()}
    packed_already = _is_packed(source)
    has_adapter = hasattr(source, "peft_config")
    peft_config = options.get("peft_config", preset.get_lora_config())
    if has_adapter:
        if "peft_config" in options:
            raise ConflictError("peft_config was given, and the model has an adapter already. Pass its base model.")
        peft_config = None
        assumptions.append("the model's own adapter, not the preset's")
    if (packed_already or preset.get_bnb_config() is not None) and peft_config is None and not has_adapter:
        raise ConflictError("All weights of a quantised base cannot be trained. Pass a preset with adapters.")
    _note_untraced(values, assumptions)
    kwargs = values.get("activation_checkpointing_kwargs") or values.get("gradient_checkpointing_kwargs") or {}
    on = bool(values.get("activation_checkpointing", values.get("gradient_checkpointing", False)))
    checkpointing: Checkpointing = "off"
    if on:
        checkpointing = "reentrant" if kwargs.get("use_reentrant", False) else "non_reentrant"
    quantization = None if packed_already else preset.get_bnb_config()
    if quantization is not None and has_adapter:
        quantization = None
        assumptions.append("the live model's weights as they are: a model that has its adapter is not packed any more")
    elif quantization is not None and is_live:
        assumptions.append("weights packed as by from_pretrained(**preset.model_kwargs()); this live model's are not")
    precomputed = bool(values.get("precompute_ref_log_probs"))
    reference: Reference = "none"
    if trainer == "dpo":
        reference = "precomputed" if precomputed else "adapter_off" if peft_config or has_adapter else "copy"
    dtype = None if is_live else _dtype(values["dtype"], source)
    return Scenario(
        device=preset.hardware.device,
        trainer=trainer,
        dtype=dtype,
        autocast="bf16" if values.get("bf16") else "fp16" if values.get("fp16") else None,
        quantization=quantization,
        peft_config=peft_config,
        fp32_trainable=bool(preset.get_callbacks()),
        flash_kernel=preset.hardware.name != "turing",
        attention=_attention(values["attn_implementation"], assumptions),
        checkpointing=checkpointing,
        optim=str(values.get("optim", "adamw_torch_fused")),
        max_grad_norm=float(values.get("max_grad_norm", 1.0) or 0.0),
        accumulation=int(values["gradient_accumulation_steps"]),
        packed=bool(values.get("packing")),
        reference=reference,
        world_size=int(values.get("world_size", 1)),
        settings=values,
    )


def _as_it_stands(source: Any, hardware: Hardware) -> Scenario:
    trainable = [p for p in source.parameters() if p.requires_grad]
    floating = [p for p in trainable if p.is_floating_point()]
    if not floating:
        raise UnsupportedError(
            "Nothing of this model trains. Give it an adapter, or pass preset='qlora' (or another) to say what would."
        )
    if _is_packed(source) and not hasattr(source, "peft_config"):
        raise UnsupportedError(
            "This model's weights are packed and it has no adapter. Pass preset='qlora' to say what would be trained."
        )
    checkpointed = [m for m in source.modules() if getattr(m, "gradient_checkpointing", False)]
    kind: Checkpointing = "off"
    if checkpointed:
        function = getattr(checkpointed[0], "_gradient_checkpointing_func", None)
        kind = "reentrant" if getattr(function, "keywords", {}).get("use_reentrant", False) else "non_reentrant"
    base: Any = unwrap(source)
    return Scenario(
        device=hardware.device,
        dtype=None,
        autocast="fp16" if hardware.compute_dtype == "float16" else "bf16",
        fp32_trainable=False,
        flash_kernel=hardware.name != "turing",
        attention=_attention(getattr(base.config, "_attn_implementation", None) or "sdpa", []),
        checkpointing=kind,
    )


def _with_options(scenario: Scenario, source: Any, options: Mapping[str, Any], assumptions: list[str]) -> Scenario:
    chosen: dict[str, Any] = {
        name: options[name]
        for name in ("trainer", "padded", "packed", "ema", "reference", "sharding", "world_size")
        if name in options
    }
    if "peft_config" in options and scenario.peft_config is None:
        chosen["peft_config"] = options["peft_config"]
    scenario = replace(scenario, **chosen, **freezing_of(source, options))
    if scenario.trainer == "dpo" and scenario.reference == "none":
        adapters = scenario.peft_config is not None or hasattr(source, "peft_config")
        scenario = replace(scenario, reference="adapter_off" if adapters else "copy")
    if scenario.reference == "adapter_off" and scenario.peft_config is None and not hasattr(source, "peft_config"):
        raise ConflictError('reference="adapter_off": there is no adapter to switch off. Take "copy" or "precomputed".')
    if scenario.trainer != "dpo":
        if "reference" in options:
            raise ConflictError(f'reference={options["reference"]!r} belongs to trainer="dpo".')
        scenario = replace(scenario, reference="none")
    if scenario.packed and scenario.padded:
        raise ConflictError("packed=True and padded=True contradict each other: packed rows have no padding.")
    if scenario.packed and scenario.trainer != "sft":
        raise ConflictError(f"packing is SFTTrainer's: trainer={scenario.trainer!r} does not pack.")
    if not scenario.padded and not scenario.packed:
        assumptions.append("every row is full: no padding, no attention mask (padded=True for rows that differ)")
    assumptions.append("the loss is taken on every token")
    return scenario


_NOT_TRACED = {
    "activation_offloading": "activations that it moves to the host are counted",
    "use_liger_kernel": "its kernels are not traced: the model's own are",
    "torch_compile": "what the compiler fuses is counted apart",
    "label_smoothing_factor": "the second forward pass that TRL makes for it is not traced",
    "neftune_noise_alpha": "its noise is not traced",
    "sync_ref_model": "the copy of the reference that it keeps is not counted",
    "deepspeed": "say sharding= and world_size= for what it divides",
    "fsdp": "say sharding= and world_size= for what it divides",
}


def _note_untraced(values: Mapping[str, Any], assumptions: list[str]) -> None:
    """Arguments that change what a run needs and that the trace does not know."""
    assumptions += [f"{name}: {what}" for name, what in _NOT_TRACED.items() if values.get(name)]


def _note_other_batch(preset: Preset, batch_size: int, sequence_length: int, assumptions: list[str]) -> None:
    values = preset.choices
    micro = values["per_device_train_batch_size"].value
    length = values["max_length"].value if "max_length" in values else None
    if (batch_size, sequence_length) != (micro, length or sequence_length):
        wanted = f"batch_size={micro}" + (f", sequence_length={length}" if length else "")
        assumptions.append(
            f"a micro-batch of {batch_size} x {sequence_length} tokens; the preset itself trains {wanted}"
        )


def _check_positions(source: Any, sequence_length: int, assumptions: list[str]) -> None:
    base: Any = unwrap(source)
    limit = text_attribute(base.config, "max_position_embeddings")
    if isinstance(limit, int) and sequence_length > limit:
        assumptions.append(f"{sequence_length} tokens are more than the model was made for ({limit})")


def _attention(name: str, assumptions: list[str]) -> Attention:
    if name in ("sdpa", "eager"):
        return name  # type: ignore[return-value]
    if "flash" in name:
        assumptions.append(
            f"{name} cannot be traced without a GPU: torch's own flash kernel, which keeps the same, stands in"
        )
        return "flash"
    raise UnsupportedError(
        f"attn_implementation={name!r} cannot be traced on a CPU. Estimate with sdpa, eager or a flash kernel."
    )


def _dtype(name: str, source: Any) -> str:
    if name != "auto":
        return name
    dtype = getattr(source.config, "dtype", None)
    return str(dtype).removeprefix("torch.") if dtype is not None else "float32"


def _is_packed(source: Any) -> bool:
    return any(type(p).__name__ in ("Params4bit", "Int8Params") for p in source.parameters())


def _name(model: Any, source: Any) -> str:
    if isinstance(model, (str, PathLike)):
        return fspath(model)
    base: Any = unwrap(source)
    return str(getattr(base.config, "name_or_path", "") or type(base).__name__)
