"""What each kind of adapter does to the base's own weights, found by experiment (tests/adapters/test_kinds.py)."""

from __future__ import annotations

from typing import Any

# LoRA's initialisations that leave the base as it is. All others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) subtract from
# the weights what the adapter begins with; of one that is not known yet the same is assumed.
_HARMLESS_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica", "true", "false"})

# Types of adapters whose layers wrap those of the base and never write to them.
_WRAPPING = frozenset(
    {
        *("ADALORA", "BOFT", "C3A", "DELORA", "FOURIERFT", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS"),
        *("OFT", "RANDLORA", "ROAD", "SHIRA", "TRAINABLE_TOKENS", "VBLORA", "VERA"),
    }
)


def type_of(config: Any) -> str:
    """The name of a PeftConfig's type."""
    found = config.peft_type
    return str(getattr(found, "value", found))


def rewrites_targets(config: Any) -> bool:
    """Whether attaching changes the weights of the targeted modules: LoRA initialised from the weights themselves.

    >>> from peft import LoraConfig
    >>> rewrites_targets(LoraConfig(init_lora_weights="pissa_niter_4")), rewrites_targets(LoraConfig())
    (True, False)
    """
    return type_of(config) == "LORA" and str(config.init_lora_weights).lower() not in _HARMLESS_INITS


def may_rewrite(config: Any) -> bool:
    """Whether nothing is known of this type of adapter."""
    return type_of(config) not in _WRAPPING and not config.is_prompt_learning


def what_stays(config: Any) -> str | None:
    """What an adapter of this config leaves behind in the base that nothing in the model can undo; None if nothing.

    >>> from peft import LoraConfig
    >>> what_stays(LoraConfig(bias="all"))
    "bias='all' trained the base's own biases"
    >>> what_stays(LoraConfig(use_dora=True, modules_to_save=["lm_head"]))
    """
    bias = getattr(config, "bias", "none")
    if isinstance(bias, str) and bias != "none":
        return f"bias={bias!r} trained the base's own biases"
    if rewrites_targets(config):
        return f"init_lora_weights={config.init_lora_weights!r} subtracted the adapter's beginning from the weights"
    if getattr(config, "layer_replication", None):
        return "layer_replication changed the list of layers"
    if may_rewrite(config):
        return f"forge does not know what {type_of(config)} does to the base"
    return None
