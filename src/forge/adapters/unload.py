"""Take the adapters off, and give the base model back as it was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import ConflictError, UnsupportedError
from ..models.layers import unwrap
from .attach import has_adapters
from .foreign import unload_foreign
from .memento import Memento, memento_of
from .source import Source

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from peft import PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel

_UNLOADED = "_forge_unloaded"


def safe_unload_peft_adapters(
    model: PeftModel | PreTrainedModel,
    restore_from: str | Path | Mapping[str, Tensor] | nn.Module | None = None,
) -> PreTrainedModel:
    """Take all adapters off and return the base, bit for bit as it was before them, whatever ran in between.

    After `attach_adapter` the base comes back as it was at that moment: weights (compared by digest), ties,
    `requires_grad`, `training`, config and generation config (`use_cache`), hooks, checkpointing, patched methods. A
    model that moved to another device since stays there.

    An adapter that was attached without forge leaves no such memory. Where PEFT did not change the base's own
    weights (LoRA, DoRA, `modules_to_save`, token adapters), the base comes back as `from_pretrained` returns it: all
    floating-point weights trainable, `eval()`, no checkpointing, none of the trainers' hooks. Where it did, this raises
    before anything is changed, unless it is told where to read the base's values.

    >>> from peft import LoraConfig
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 16}
    >>> base = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **tiny))
    >>> from forge.adapters import attach_adapter
    >>> model = attach_adapter(base, LoraConfig(r=2, target_modules=["q_proj"]))
    >>> safe_unload_peft_adapters(model) is base
    True

    Args:
        model: the PeftModel, or the base that has the adapters inside. A model without adapters, or whose adapters
            were unloaded before, is left as it is, and its base returned.
        restore_from: where to read values that changed without a copy: the folder or hub id of the checkpoint (only
            the tensors that are needed are read), a state dict, or another copy of the base.

    Returns:
        The base: the very object that the adapter was attached to.

    Raises:
        ForgeError: a weight has changed and nobody has its value (the message names it and the remedy); the model is
            left as it is.
        ConflictError: the base has another adapter by now.
        UnsupportedError: not a model.
    """
    model = innermost(model)
    base: Any = base_of(model)
    if vars(model).get(_UNLOADED):
        return base
    source = None if restore_from is None else Source(restore_from, base)
    memento = memento_of(base)
    if memento is not None:
        _refuse_another(memento, model, base)
        memento.put_back(base, source)
    elif model is not base or has_adapters(base):
        unload_foreign(model, base, source)
    if model is not base:
        vars(model)[_UNLOADED] = True
    return base


def carries_adapters(model: Any) -> bool:
    """Whether there is anything to unload: not where it was unloaded before, and not in a model that never had any."""
    base = base_of(model)
    if vars(model).get(_UNLOADED):
        return False
    return memento_of(base) is not None or model is not base or has_adapters(base)


def refuse_another_run(model: Any) -> None:
    """Refuse a PeftModel whose base is in another one by now.

    Raises:
        ConflictError: it is.
    """
    base = base_of(model)
    memento = memento_of(base)
    if memento is not None:
        _refuse_another(memento, model, base)


def base_of(model: Any) -> Any:
    """The model inside a PeftModel (a mixed one too), or the model itself."""
    if hasattr(model, "peft_config") and not callable(getattr(model, "get_base_model", None)):
        tuner: Any = getattr(model, "base_model", None)
        return tuner.model if hasattr(tuner, "tuner_layer_cls") or hasattr(tuner, "targeted_module_names") else model
    base = unwrap(model)
    return base_of(base) if base is not model and hasattr(base, "get_base_model") else base  # one in another


def innermost(model: Any) -> Any:
    """The model inside DistributedDataParallel and torch.compile."""
    from torch import nn

    if not isinstance(model, nn.Module):
        raise UnsupportedError(
            f"safe_unload_peft_adapters takes a PeftModel, not a {type(model).__name__}. Of a trainer it is "
            "trainer.model; cleanup_peft_model takes either."
        )
    while True:
        inner = vars(model).get("_modules", {}).get("_orig_mod") or (
            vars(model).get("_modules", {}).get("module") if not hasattr(model, "config") else None
        )
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _refuse_another(memento: Memento, model: Any, base: Any) -> None:
    if model is not base and memento.is_of_another(model):
        raise ConflictError(
            "The base of this PeftModel has another adapter by now, which forge attached later. Pass the model that "
            "attach_adapter returned last."
        )
