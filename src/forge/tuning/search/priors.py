"""Where a search begins: configurations that others found to work, before anything is sampled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...presets import Preset
    from .space import BoundSpace

# Schulman et al., "LoRA Without Regret", Thinking Machines Lab, 2025, and the cookbook that they published with it: the
# best rate of LoRA is 5e-5 * 10 * (2000 / hidden size) ** exponent, with an exponent fitted by family.
_BASE, _LORA, _WIDTH = 5e-5, 10.0, 2000.0
_EXPONENTS = {"llama": 0.781, "qwen": 0.0775}
# Narrower models were not in the fit; a power law would take them far beyond what was ever tried.
_NARROWEST = 1024


def published_rate(preset: Preset) -> float | None:
    """The learning rate that was published for LoRA on a model of this width; None where nothing was fitted.

    It was fitted to supervised training of adapters: for other families, for DPO and for all weights there is none.

    >>> from forge import get_preset
    >>> from transformers import LlamaConfig
    >>> preset = get_preset("lora", hardware="cpu", model=LlamaConfig(hidden_size=4096, num_hidden_layers=2))
    >>> f"{published_rate(preset):.3g}"
    '0.000286'

    Args:
        preset: that knows its model.
    """
    anatomy = preset.anatomy
    if anatomy is None or not preset.choices["use_peft"].value or preset.objective == "dpo":
        return None
    exponent = next((value for family, value in _EXPONENTS.items() if family in anatomy.model_type), None)
    return None if exponent is None else _BASE * _LORA * (_WIDTH / max(_NARROWEST, anatomy.hidden_size)) ** exponent


def priors(preset: Preset, space: BoundSpace) -> list[tuple[str, dict[str, Any]]]:
    """Configurations to begin with, by name, as raw parameters of the space; no two alike.

    Args:
        preset: the recipe.
        space: bound to it.
    """
    value = {name: choice.value for name, choice in preset.choices.items()}
    own = {name: value[name] for name in space.dimensions if name in value}
    own = {name: list(one) if isinstance(one, (set, frozenset)) else one for name, one in own.items()}
    own.setdefault("freeze_ratio", 0.0)
    wanted = [
        (f"preset {preset.name}", own),
        ("LoRA Without Regret", {**own, "learning_rate": space.rate}),
        # Dettmers et al. 2023 (arXiv:2305.14314), table 9: r = 64 at 2e-4, dropout .05 or .1, warm-up .03.
        ("QLoRA", {**own, "learning_rate": 2e-4, "lora_r": 64, "lora_dropout": 0.05, "warmup_steps": 0.03}),
        # "LoRA Without Regret": with alpha held, the best rate hardly depends on the rank.
        ("low rank", {**own, "learning_rate": space.rate, "lora_r": 4}),
    ]
    found: list[tuple[str, dict[str, Any]]] = []
    for name, params in wanted:
        raw = space.raw(params)
        for missing, one in space.dimensions.items():  # a prior says all of it, or the sampler would fill it in
            if missing in space.distributions and missing not in raw:
                raw[missing] = one.raw(one.values[0]) if hasattr(one, "values") else one.raw(one.low)  # type: ignore[union-attr]
        if raw not in [other for _, other in found]:
            found.append((name, raw))
    return found
