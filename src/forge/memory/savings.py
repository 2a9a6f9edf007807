"""What freezing layers saves, against training the same model without freezing."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedError
from ..models.anatomy import build_on_meta
from ..models.layers import unwrap
from .describe import Described, describe

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from .tracing import Traced

GB = 2**30
_RECORD = "_forge_freezing"  # on a base model: what forge.freezing, which stands above this room, has changed in it


def get_memory_savings_estimate(
    model: PreTrainedModel | PeftModel, batch_size: int = 1, sequence_length: int = 512
) -> dict[str, float]:
    """What the frozen lowest layers of a live model save, against the same training with none frozen.

    Both are traced, with the model's dtypes and checkpointing. Only what freezing saves is credited to it: the base
    weights that LoRA leaves alone anyway are no saving, the adapters that the frozen layers would have had are one.
    Where a PrefixCache is attached, the epochs after the first are compared, in which the frozen layers do not run.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 256}
    >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, **sizes))
    >>> get_memory_savings_estimate(model)["total_saved_gb"]
    0.0
    >>> for layer in model.model.layers[:2]:
    ...     _ = layer.requires_grad_(False)
    >>> _ = model.model.embed_tokens.requires_grad_(False)
    >>> saved = get_memory_savings_estimate(model)
    >>> saved["gradient_saved_gb"] > 0, round(saved["optimizer_saved_gb"] / saved["gradient_saved_gb"], 3)
    (True, 2.0)

    Args:
        model: with layers frozen, by `setup_lp_lora_style` or by hand.
        batch_size: rows in a micro-batch.
        sequence_length: tokens in a row.

    Returns:
        In GiB `gradient_saved_gb`, `optimizer_saved_gb` (AdamW's two fp32 moments), `activation_saved_gb` (of what is
        alive at the peak) and their sum `total_saved_gb`; `frozen_parameters` (that would train without freezing),
        `trainable_parameters` and `frozen_percentage` (of both together).

    Raises:
        UnsupportedError: no live model, nothing of it trains, or its step cannot be traced.
    """
    from .tracing import trace

    if not hasattr(model, "parameters"):
        raise UnsupportedError(
            "get_memory_savings_estimate compares the frozen layers of a live model; it was given a "
            f"{type(model).__name__}. Load the model, or estimate_model_memory(config, freeze_ratio=...)."
        )
    run = describe(model, batch_size, sequence_length, None, {})
    counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    without = _without_freezing(run)
    everything = _trainable(without)
    if everything == counted and not run.scenario.frozen_layers:
        nothing = dict.fromkeys(
            ("gradient_saved_gb", "optimizer_saved_gb", "activation_saved_gb", "total_saved_gb"), 0.0
        )
        return nothing | _counts(everything, counted)
    before, after = trace(without.source, without.scenario), trace(run.source, run.scenario)
    saved = {
        "gradient_saved_gb": _when_clipping(before, "gradients") - _when_clipping(after, "gradients"),
        "optimizer_saved_gb": _when_clipping(before, "optimizer") - _when_clipping(after, "optimizer"),
        "activation_saved_gb": _activations(before) - _activations(after),
    }
    return saved | {"total_saved_gb": sum(saved.values())} | _counts(everything, counted)


def _counts(everything: int, trainable: int) -> dict[str, float]:
    return {
        "frozen_parameters": everything - trainable,
        "trainable_parameters": trainable,
        "frozen_percentage": 100 * (everything - trainable) / everything,
    }


def _without_freezing(run: Described) -> Described:
    """The same model from its config, with every layer trained: wholly, or by the adapters that the live one has.

    Of one that `setup_lp_lora_style` has changed trains what did before.
    """
    base: Any = unwrap(run.source)
    source, record = build_on_meta(base.config), vars(base).get(_RECORD)
    dtypes = [p.dtype for p in base.parameters() if p.is_floating_point()]
    adapters = getattr(run.source, "peft_config", None)
    if adapters and record is not None:  # without what keeps adapters out of the frozen layers
        adapters = {name: record.adapters.config_before(name, config) for name, config in adapters.items()}
    scenario = replace(
        run.scenario,
        dtype=str(max(set(dtypes), key=dtypes.count)).removeprefix("torch."),
        quantization=getattr(base.config, "quantization_config", None),
        peft_config=copy.deepcopy(adapters[run.source.active_adapter]) if adapters else None,
        frozen_layers=0,
        prefix_cache=False,
    )
    if record is not None and not adapters:
        trained = {name for name, p in base.named_parameters() if p.requires_grad}.union(record.switched_off)
        for name, parameter in source.named_parameters():
            parameter.requires_grad_(name in trained)
    return replace(run, source=source, scenario=scenario)


def _trainable(run: Described) -> int:
    """How many parameters train."""
    from .tracing.skeleton import with_adapter

    return sum(p.numel() for p in with_adapter(run.source, run.scenario).parameters() if p.requires_grad)


def _when_clipping(traced: Traced, category: str) -> float:
    """GiB of a category when backward is done: all gradients are there, and the state of the step before."""
    return traced.recording.when("2.clip")[category] / GB


def _activations(traced: Traced) -> float:
    return (traced.peak.parts["activations"] + traced.peak.parts["logits"]) / GB
