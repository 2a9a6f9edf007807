"""Bad values and pairs that contradict each other, found before anything expensive happens."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import ConflictError, ForgeError, ForgeWarning
from .choice import Choice
from .method import Method
from .recipes import DPO_LEARNING_RATE_LIMIT


def _number(low: float, high: float = float("inf"), *, low_included: bool = False) -> Callable[[Any], bool]:
    def holds(value: Any) -> bool:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return False
        return (low <= value if low_included else low < value) and value < high

    return holds


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


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
    "use_peft": (lambda value: isinstance(value, bool), "True or False"),
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


def check_pairs(method: Method, choices: Mapping[str, Choice]) -> None:
    """Refuse pairs that PEFT or the trainers would refuse later, when the model is loaded.

    Raises:
        ConflictError: With both values and the remedy.
    """
    if not method.use_peft:
        _refuse_adapter_settings(choices)
        return
    value = {name: choice.value for name, choice in choices.items()}
    init = value.get("init_lora_weights", True)
    if method.quantized and isinstance(init, str) and init.lower().startswith(_NEEDS_FULL_WEIGHTS):
        raise ConflictError(
            f"init_lora_weights={init!r} on a {method.precision} base: it is computed from the unquantised weights, "
            "which are not there. Use precision='bf16', or leave init_lora_weights out."
        )
    by_pattern = isinstance(value.get("target_modules"), str)
    if by_pattern and value.get("layers_to_transform") is not None:
        raise ConflictError(
            "layers_to_transform with a pattern in target_modules: PEFT takes it only with a list. Name the model "
            "(get_preset(..., model=...)), or pass target_modules=['q_proj', ...]."
        )
    if value.get("target_parameters"):
        _refuse_on_experts(value)


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
