"""Bad values and pairs that contradict each other, found before anything expensive happens."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import ConflictError, ForgeError, ForgeWarning
from ..hardware import Hardware
from .choice import Choice
from .method import QUANTIZED, SIXTEEN_OR_32_BIT, Method
from .recipes import DPO_LEARNING_RATE_LIMIT


def _number(low: float, high: float = float("inf"), *, low_included: bool = False) -> Callable[[Any], bool]:
    def holds(value: Any) -> bool:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return False
        return (low <= value if low_included else low < value) and value < high

    return holds


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


_TRUE_OR_FALSE = (
    "use_peft", "bf16", "fp16", "tf32", "load_in_4bit", "load_in_8bit", "bnb_4bit_use_double_quant", "use_cpu",
    "packing", "activation_checkpointing", "use_dora", "use_rslora", "precompute_ref_log_probs",
)  # fmt: skip

DTYPES = (*SIXTEEN_OR_32_BIT.values(), "auto")

RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "learning_rate": (
        _number(0, low_included=True),
        "a number of at least 0, such as 2e-4 (YAML reads 2e-4 as text: 2.0e-4)",
    ),
    "num_train_epochs": (_number(0), "a number above 0"),
    "warmup_steps": (_number(0, low_included=True), "a number of steps, or a share of all steps below 1"),
    "weight_decay": (_number(0, low_included=True), "a number of at least 0"),
    "beta": (_number(0, low_included=True), "a number of at least 0"),
    "lora_r": (_count, "a whole number of at least 1"),
    "lora_alpha": (_number(0), "a number above 0"),
    "lora_dropout": (_number(0, 1, low_included=True), "a share in [0, 1)"),
    "max_length": (
        lambda value: value is None or _count(value),
        "a whole number of tokens of at least 1, or None for no limit",
    ),
    "max_steps": (lambda value: isinstance(value, int) and not isinstance(value, bool), "a whole number of steps"),
    "dtype": (lambda value: value in DTYPES, f"one of {', '.join(DTYPES)}"),
    "bnb_4bit_quant_storage": (
        lambda value: value in (*DTYPES, "uint8", "int8"),
        "a dtype that torch knows, such as 'uint8' or 'bfloat16'",
    ),
    **dict.fromkeys(_TRUE_OR_FALSE, (_flag, "True or False")),
}


def check_values(overrides: Mapping[str, Any]) -> None:
    """Refuse values that no trainer could use.

    Raises:
        ForgeError: With the value and the rule.
    """
    for name, value in overrides.items():
        holds, rule = RULES.get(name, (None, ""))
        if holds and not holds(value):
            raise ForgeError(f"{name}={value!r}: it must be {rule}.")


def check_pairs(method: Method, hardware: Hardware, choices: Mapping[str, Choice]) -> None:
    """Refuse pairs that PEFT, bitsandbytes or the trainers would refuse or ignore later, when the model is loaded.

    Raises:
        ConflictError: With both values and the remedy.
    """
    value = {name: choice.value for name, choice in choices.items()}
    _refuse_unread_quantization(method, choices)
    _refuse_on_hardware(hardware, value)
    if value.get("packing") and value.get("max_length", 0) is None:
        raise ConflictError(
            "packing=True with max_length=None: max_length is the length that rows are packed to. Set it."
        )
    if not method.use_peft:
        _refuse_adapter_settings(choices)
        return
    init = value.get("init_lora_weights", True)
    if method.quantized and isinstance(init, str) and init.lower().startswith(_NEEDS_FULL_WEIGHTS):
        remedy = "Start from a model with 16-bit weights" if method.packed_as else "Use get_preset('lora')"
        raise ConflictError(
            f"init_lora_weights={init!r} on a base quantised as {method.packed_as or method.precision}: it is computed "
            f"from the unquantised weights, which are not there. {remedy}, or leave init_lora_weights out."
        )
    by_pattern = isinstance(value.get("target_modules"), str)
    if by_pattern and value.get("layers_to_transform") is not None:
        raise ConflictError(
            "layers_to_transform with a pattern in target_modules: PEFT takes it only with a list. Name the model "
            "(get_preset(..., model=...)), or pass target_modules=['q_proj', ...]."
        )
    if value.get("target_parameters"):
        _refuse_on_experts(value)


def _refuse_unread_quantization(method: Method, choices: Mapping[str, Choice]) -> None:
    """Settings of bitsandbytes that nothing would read."""
    for name, choice in choices.items():
        if not choice.overridden or choice.value is False or not name.startswith(("bnb_4bit_", "llm_int8_")):
            continue
        unread = (
            method.precision not in QUANTIZED
            or (method.precision == "int8" and name.startswith("bnb_4bit_"))
            or (method.precision != "int8" and name in ("llm_int8_threshold", "llm_int8_has_fp16_weight"))
        )
        if unread:
            raise ConflictError(
                f"{name}={choice.value!r} with precision={method.precision!r}: nothing would read it. Leave it out, or "
                f"set precision={'int8' if 'int8' in name else 'nf4'!r}."
            )


def _refuse_on_hardware(hardware: Hardware, value: Mapping[str, Any]) -> None:
    """What the profile's device or generation does not have."""
    if value.get("use_cpu") != (hardware.device == "cpu"):
        remedy = 'hardware="cpu"' if value.get("use_cpu") else 'hardware="ampere" or the profile of your GPU'
        raise ConflictError(
            f"use_cpu={value.get('use_cpu')!r} on hardware {hardware.name!r}, whose formats and optimizer are those of "
            f"device {hardware.device}: set {remedy} instead."
        )
    if value.get("tf32") and not hardware.tf32:
        raise ConflictError(f"tf32=True on hardware {hardware.name!r}: {hardware.rule}. Leave it out.")
    if hardware.device == "cpu" and any(part in str(value.get("optim")) for part in ("paged", "8bit", "bnb")):
        raise ConflictError(
            f"optim={value['optim']!r} on hardware 'cpu': paged and 8-bit optimizers exist on CUDA only. Leave it out."
        )


# What PEFT cannot do to a parameter that belongs to no layer of its own: (name, values that are fine).
_HARMLESS_ON_EXPERTS: dict[str, tuple[Any, ...]] = {
    "lora_dropout": (0.0,),
    "use_dora": (False,),
    "lora_bias": (False,),
    "init_lora_weights": (True, False, "gaussian"),
    "layers_to_transform": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
}


def _refuse_on_experts(value: Mapping[str, Any]) -> None:
    for name, harmless in _HARMLESS_ON_EXPERTS.items():
        if name in value and value[name] not in harmless:
            raise ConflictError(
                f"{name}={value[name]!r} with fused experts ({', '.join(value['target_parameters'])}): PEFT refuses or "
                f"ignores it there. Leave it out, or leave the experts unadapted: target_modules=['q_proj', ...]."
            )


# OLoRA too reads the weights, but PEFT unpacks and repacks them for it.
_NEEDS_FULL_WEIGHTS = ("pissa", "corda", "loftq", "mica")


def _refuse_adapter_settings(choices: Mapping[str, Choice]) -> None:
    from .names import owners

    for name, choice in choices.items():
        if choice.overridden and owners(name) == ("LoraConfig",):
            raise ConflictError(
                f"{name}={choice.value!r}, but all weights are trained and there is no adapter. Take "
                f"get_preset('lora'), or leave {name} out."
            )


def warn_of_dpo_rate(choices: Mapping[str, Choice], *, stacklevel: int) -> None:
    """Warn of a learning rate at which DPO is known to run away."""
    rate = choices["learning_rate"].value
    if rate > DPO_LEARNING_RATE_LIMIT:
        warnings.warn(
            f"learning_rate={rate:g} for DPO: above {DPO_LEARNING_RATE_LIMIT:g} the policy tends to run away from its "
            "reference, rewards grow and answers degrade. The published rates are 5e-7 (all weights) and 5e-6 (LoRA).",
            ForgeWarning,
            stacklevel=stacklevel + 1,
        )
