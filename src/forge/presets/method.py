"""What a preset's name and the overrides come down to: objective, adapters or all weights, precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import ConflictError, UnknownNameError
from ..hardware import Hardware
from ..models import ModelAnatomy

Objective = Literal["sft", "dpo"]
OBJECTIVES: tuple[Objective, Objective] = ("sft", "dpo")

SIXTEEN_OR_32_BIT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
QUANTIZED = ("nf4", "fp4", "int8")
PRECISIONS = (*QUANTIZED, *SIXTEEN_OR_32_BIT)
PRESETS: dict[str, str] = {
    "qlora": "LoRA adapters on a base quantised to 4 bits: the least memory",
    "lora": "LoRA adapters on a 16-bit base: faster than QLoRA where the base fits",
    "sft": "all weights, fp32 master copies under 16-bit autocast: the most memory, the most capacity",
    "dpo": "preference tuning of LoRA adapters; the base with its adapter switched off is the reference",
}


@dataclass(frozen=True)
class Method:
    """What is trained, towards what, in which number formats.

    Args:
        objective: "sft" (cross-entropy) or "dpo" (preferences).
        use_peft: LoRA adapters, rather than all weights.
        precision: of the base weights: "nf4", "fp4", "int8", "bf16", "fp16" or "fp32".
        compute_dtype: of the matrix products, by torch's name.
        autocast: the Trainer's mixed precision, "bf16", "fp16" or None.
        packed_as: the format that the model came quantised in, None for one that is not (yet).
    """

    objective: Objective
    use_peft: bool
    precision: str
    compute_dtype: str
    autocast: str | None
    packed_as: str | None = None

    @property
    def quantized(self) -> bool:
        """Whether the base's weights are packed, by bitsandbytes now or by whoever made the checkpoint."""
        return self.precision in QUANTIZED or self.packed_as is not None


def resolve_method(
    name: str, overrides: Mapping[str, Any], hardware: Hardware, anatomy: ModelAnatomy | None, *, objective: Objective
) -> Method:
    """The method of preset `name` under these overrides, on this hardware, for this model.

    Raises:
        ConflictError: Two of them contradict each other.
        UnknownNameError: There is no such precision.
    """
    use_peft = bool(overrides.get("use_peft", name != "sft"))
    _refuse_two_widths(overrides)
    precision = _precision(name, overrides, hardware, anatomy)
    loaded_as = anatomy.quantization if anatomy else None
    # MXFP4 has no backward and is unpacked to 16 bits when it is loaded; every other format stays as it is.
    packed_as = None if loaded_as == "mxfp4" else loaded_as
    if loaded_as and precision in QUANTIZED and precision != loaded_as:
        raise ConflictError(
            f"precision={precision!r}, but the model is already quantised as {loaded_as!r} and cannot be quantised "
            "again. Start from its 16-bit weights, or take get_preset('lora') on it as it stands."
        )
    if anatomy and precision in QUANTIZED and not anatomy.quantizable:
        raise ConflictError(
            f"precision={precision!r}: bitsandbytes would find no linear layer to pack in this {anatomy.model_type} "
            "(its own linear class is not torch's) and load all of it in 16 bits. Take get_preset('lora')."
        )
    if packed_as in QUANTIZED and precision != packed_as:
        raise ConflictError(
            f"precision={precision!r}, but the model's weights are already quantised as {packed_as!r}: what was lost "
            "does not come back. Start from its 16-bit weights, or leave precision out."
        )
    if (packed_as or precision in QUANTIZED) and not use_peft:
        raise ConflictError(
            f"All weights of a base quantised as {packed_as or precision!r} cannot be trained. Take "
            "get_preset('qlora') for adapters on it, or start from 16-bit weights."
        )
    compute_dtype, autocast = _arithmetic(precision, overrides, hardware)
    return Method(objective, use_peft, precision, compute_dtype, autocast, packed_as)


def _refuse_two_widths(overrides: Mapping[str, Any]) -> None:
    for first, second in (("load_in_4bit", "load_in_8bit"), ("fp16", "bf16")):
        if overrides.get(first) and overrides.get(second):
            raise ConflictError(f"{first}=True and {second}=True contradict each other: leave one of them out.")


def _precision(name: str, overrides: Mapping[str, Any], hardware: Hardware, anatomy: ModelAnatomy | None) -> str:
    """From what the user said, else the live model, else the preset, else the hardware."""
    said = overrides.get("precision")
    if said is not None and said not in PRECISIONS:
        raise UnknownNameError.among("precision", str(said), PRECISIONS)
    plain_base = name != "qlora" and said not in QUANTIZED and not (anatomy and anatomy.quantization)
    loads_it = plain_base and overrides.get("use_peft", name != "sft")
    implied, because = _implied_precision(overrides, dtype=overrides.get("dtype") if loads_it else None)
    if said and implied and implied != said and not (implied == "nf4" and said == "fp4" and because == _FOUR_BIT):
        raise ConflictError(f"precision={said!r} and {because} contradict each other: leave one of them out.")
    if found := said or implied or (anatomy and anatomy.quantization in QUANTIZED and anatomy.quantization):
        _refuse_denied_width(overrides, found)
        return str(found)
    if name == "qlora":
        if overrides.get("load_in_4bit") is False:
            raise ConflictError("load_in_4bit=False contradicts preset 'qlora': take get_preset('lora').")
        return "nf4"
    if flag := next((flag for flag in ("bf16", "fp16") if overrides.get(flag)), None):
        return flag
    return next(short for short, dtype in SIXTEEN_OR_32_BIT.items() if dtype == hardware.compute_dtype)


_FOUR_BIT = "load_in_4bit=True"


def _implied_precision(overrides: Mapping[str, Any], *, dtype: str | None) -> tuple[str | None, str]:
    """The precision that the libraries' own names ask for, and the name that does.

    Args:
        overrides: The user's.
        dtype: What the base is loaded in; None where that is not its precision, as under quantisation or when all
            weights are trained, which are fp32 whatever computes.
    """
    quant_type = overrides.get("bnb_4bit_quant_type")
    if quant_type is not None and quant_type not in ("nf4", "fp4"):
        raise UnknownNameError.among("bnb_4bit_quant_type", str(quant_type), ("nf4", "fp4"))
    if overrides.get("load_in_8bit"):
        if quant_type:
            raise ConflictError(f"load_in_8bit=True and bnb_4bit_quant_type={quant_type!r}: leave one of them out.")
        return "int8", "load_in_8bit=True"
    if quant_type:
        return quant_type, f"bnb_4bit_quant_type={quant_type!r}"
    if overrides.get("load_in_4bit"):
        return "nf4", _FOUR_BIT
    short = next((short for short, name in SIXTEEN_OR_32_BIT.items() if name == dtype), None)
    return short, f"dtype={dtype!r}"


def _refuse_denied_width(overrides: Mapping[str, Any], precision: str) -> None:
    for flag, precisions in (("load_in_4bit", ("nf4", "fp4")), ("load_in_8bit", ("int8",))):
        if overrides.get(flag) is False and precision in precisions:
            raise ConflictError(f"{flag}=False contradicts precision={precision!r}: leave one of them out.")


def _arithmetic(precision: str, overrides: Mapping[str, Any], hardware: Hardware) -> tuple[str, str | None]:
    """Compute dtype and mixed precision, refused where the hardware has no units for them."""
    flag = next((flag for flag in ("bf16", "fp16") if overrides.get(flag)), None)
    compute = overrides.get("bnb_4bit_compute_dtype") if precision in ("nf4", "fp4") else None
    compute = compute or (flag and SIXTEEN_OR_32_BIT[flag])
    compute = compute or SIXTEEN_OR_32_BIT.get(precision) or hardware.compute_dtype
    short = next((short for short, dtype in SIXTEEN_OR_32_BIT.items() if dtype == compute), None)
    if short is None:
        raise UnknownNameError.among("bnb_4bit_compute_dtype", str(compute), SIXTEEN_OR_32_BIT.values())
    if {precision, flag} == {"bf16", "fp16"}:
        raise ConflictError(f"precision={precision!r} and {flag}=True contradict each other: leave one of them out.")
    if "bf16" in (short, precision, flag) and hardware.name == "turing":
        raise ConflictError(
            f"bf16 on hardware 'turing': {hardware.rule}. Use precision='fp16' or, quantised, fp16=True."
        )
    if "fp16" in (short, precision, flag) and hardware.device == "cpu":
        raise ConflictError(
            "fp16 on hardware 'cpu': torch trains in fp16 only on a GPU. Use precision='fp32' or 'bf16'."
        )
    autocast = short if short != "fp32" and overrides.get(short, True) else None
    return str(compute), autocast
