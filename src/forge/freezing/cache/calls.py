"""How the decoder is called: what of it a cache must know, and what it must not stand in the way of."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from ...errors import ConflictError, UnsupportedError
from ...models.layers import text_attribute
from .refusals import refuse_router

if TYPE_CHECKING:
    from torch import Tensor


def by_name(decoder: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """All arguments of a call by their names."""
    given = dict(inspect.signature(decoder.forward).bind_partial(*args, **kwargs).arguments)
    given.update(given.pop("kwargs", {}))
    return given


def refuse_labelled_padding(model: Any, _args: Any, kwargs: Any) -> None:
    """Padding has no state in the cache, so nothing can be learnt of it; a hook before the whole model's forward."""
    labels, mask = kwargs.get("labels"), kwargs.get("attention_mask")
    if not model.training or labels is None or mask is None or labels.shape != mask.shape:
        return
    if bool(((labels != -100) & (mask == 0)).any()):
        raise ConflictError(
            "Padding carries labels (attention_mask is 0 where labels are not -100), and a PrefixCache keeps no states "
            "of padding. Set those labels to -100, as DataCollatorForLanguageModeling does, or train without the "
            "cache: detach()."
        )


def _asked(decoder: Any, given: Any, name: str) -> bool:
    """Whether a switch of the forward pass is on: as it is called, else as the config says."""
    value = given.get(name)
    return bool(text_attribute(decoder.config, name) if value is None else value)


def looks_inside(decoder: Any, given: Any) -> bool:
    """Whether somebody wants what the layers below do beside their output: generation, or the states of each."""
    if _asked(decoder, given, "output_router_logits"):
        refuse_router()
    return (
        _asked(decoder, given, "output_hidden_states")
        or _asked(decoder, given, "output_attentions")
        or given.get("past_key_values") is not None
        or bool(given.get("use_cache"))
    )


def scaled_positions(config: Any, length: int) -> bytes:
    """What rotary embeddings make of the longest row of a batch, where all rows depend on it."""
    parameters = text_attribute(config, "rope_parameters") or text_attribute(config, "rope_scaling") or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    for each in nested or [parameters]:
        kind = each.get("rope_type", each.get("type"))
        limit = each.get("original_max_position_embeddings") or text_attribute(config, "max_position_embeddings")
        if kind not in ("longrope", "dynamic") or length <= limit:
            continue
        if kind == "dynamic":
            raise UnsupportedError(
                f"Rows of {length} tokens are longer than {limit}, from where on dynamic rotary embeddings change with "
                "the longest row of a batch. Train on shorter rows, or without the cache: detach()."
            )
        return b"long"
    return b""


def on_host(tensor: Any, name: str) -> Tensor | None:
    """A mask or positions, on the CPU."""
    if tensor is not None and not isinstance(tensor, torch.Tensor):
        raise UnsupportedError(
            f"{name} is a {type(tensor).__name__}; a PrefixCache reads one of rows and tokens. Train without the "
            "cache: detach()."
        )
    return None if tensor is None else tensor.cpu()


def makes_kv_cache(decoder: Any, given: Any) -> bool:
    """Whether attention will keep keys and values, also of the layers below."""
    return _asked(decoder, given, "use_cache")
