"""Attach an adapter so that the base model can be brought back bit for bit."""

from __future__ import annotations

import copy
import logging
import warnings
from typing import TYPE_CHECKING, Any

from ..errors import ConflictError, ForgeError, UnsupportedError
from ..models.layers import without_adapters
from .kinds import may_rewrite, rewrites_targets
from .memento import Memento, memento_of

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel

_log = logging.getLogger("forge.adapters")


def attach_adapter(model: PreTrainedModel, peft_config: PeftConfig, *, adapter_name: str = "default") -> PeftModel:
    """`get_peft_model`, with a memory of the base: `safe_unload_peft_adapters` brings that back as it is now.

    Remembered are the base's modules, flags, hooks and config, a digest of each tensor, and copies in host memory of
    those that the adapter changes: biases that it trains, weights from which it is initialised (PiSSA, OLoRA, CorDA,
    LoftQ, LoRA-GA). The memory is gone when the base is unloaded, and does not come along with copies of the model.

    >>> from peft import LoraConfig
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 16}
    >>> base = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **tiny))
    >>> model = attach_adapter(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"))
    >>> type(model).__name__
    'PeftModel'
    >>> from forge.adapters import safe_unload_peft_adapters
    >>> safe_unload_peft_adapters(model) is base
    True

    Args:
        model: the base, plain or quantised, without adapters; changed in place, as by `get_peft_model`.
        peft_config: any of PEFT's; a copy is attached, so that the same config serves many models.
        adapter_name: the adapter's name.

    Returns:
        What `get_peft_model` returns, for any trainer.

    Raises:
        ConflictError: the model has adapters already.
        ForgeError: not a model, or not a PeftConfig.
    """
    from peft import PeftConfig, get_peft_model

    _refuse(model, peft_config, PeftConfig)
    memento = Memento(model)
    try:
        vars(model).pop("peft_config", None)  # PEFT 0.18's unload() leaves it, and get_peft_model warns of it
        _copy_what_attaching_changes(model, peft_config, memento)
        with warnings.catch_warnings():
            # PEFT asks transformers for an attribute that was renamed; nothing in a configuration would avoid it.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            wrapped = get_peft_model(model, copy.deepcopy(peft_config), adapter_name=adapter_name)
        for weight in memento.weights:
            if weight.copy is not None and not weight.tensor.requires_grad and weight.is_in(weight.tensor):
                weight.copy = None
            elif weight.tensor.requires_grad:
                weight.keep_copy()
    except BaseException:
        memento.put_back(model, None)
        raise
    memento.keep(model, wrapped)
    if size := memento.weights.copied_bytes():
        _log.debug("%.1f MiB of base weights that the adapter changes are copied to host memory", size / 2**20)
    return wrapped


def _copy_what_attaching_changes(model: nn.Module, config: PeftConfig, memento: Memento) -> None:
    if rewrites_targets(config):
        chosen = memento.weights.below(_targets(model, config, memento))
    elif may_rewrite(config):
        chosen = list(memento.weights)
    else:
        return
    for weight in chosen:
        weight.keep_copy()


def _targets(model: nn.Module, config: PeftConfig, memento: Memento) -> list[str]:
    """The modules and parameters that LoRA would adapt: PEFT itself says so, on adapters without memory."""
    from peft import get_peft_model

    plain: Any = copy.deepcopy(config)
    plain.init_lora_weights, plain.loftq_config = True, {}
    for name in ("corda_config", "lora_ga_config", "eva_config"):
        if hasattr(plain, name):
            setattr(plain, name, None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the real call warns of what there is to warn of
            tuner: Any = get_peft_model(model, plain, low_cpu_mem_usage=True).base_model
    finally:
        memento.put_back_structure(model)
    return [*tuner.targeted_module_names, *getattr(tuner, "targeted_parameter_names", ())]


def _refuse(model: Any, config: Any, config_class: type) -> None:
    from torch import nn

    if not isinstance(model, nn.Module):
        raise UnsupportedError(f"attach_adapter takes a model, not a {type(model).__name__}. Load the model first.")
    if not isinstance(config, config_class):
        raise ForgeError(
            f"peft_config is a {type(config).__name__}: it must be one of PEFT's, as LoraConfig(...) or "
            "get_preset(...).get_lora_config()."
        )
    inner = getattr(model, "module", None)
    if isinstance(inner, nn.Module) and not hasattr(model, "config"):
        raise UnsupportedError(
            f"The model is wrapped ({type(model).__name__}). Attach the adapter before anything wraps the model."
        )
    if hasattr(model, "peft_type") or hasattr(model, "get_base_model") or has_adapters(model):
        raise ConflictError(
            f"This {type(model).__name__} has an adapter already; a second one would be trained with the first still "
            "active below it. Call base = safe_unload_peft_adapters(model) first, or merge_and_unload() to keep what "
            "it learnt."
        )
    if memento_of(model) is not None:
        raise ConflictError(
            "The adapter that was attached to this model is gone, but what it changed is not brought back. Call "
            "base = safe_unload_peft_adapters(model) first."
        )


def has_adapters(model: nn.Module) -> bool:
    """Whether layers of PEFT are left in a model."""
    return any(without_adapters(module) is not module for module in model.modules())
