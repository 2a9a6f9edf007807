"""What the states of a prefix depend on beside the sample: the base model's weights, and how they are computed with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ...models.layers import decoder_layers, named_base_modules, text_attribute, unwrap

if TYPE_CHECKING:
    from torch import Tensor, nn

# What a config says that no hidden state depends on; trainers write some of it.
_IDLE = frozenset(
    {
        *(
            "_name_or_path",
            "name_or_path",
            "architectures",
            "transformers_version",
            "use_cache",
            "dtype",
            "torch_dtype",
        ),
        *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "return_dict", "id2label", "label2id"),
        *("output_hidden_states", "output_attentions", "output_router_logits", "router_aux_loss_coef", "problem_type"),
        *("_commit_hash", "chunk_size_feed_forward", "is_encoder_decoder"),
    }
)


def fingerprint(model: nn.Module, depth: int) -> str:
    """A digest of the weights below the boundary and of what is computed with them.

    Every byte counts: a model that was merged, resized or trained further has another one. Left out are the layers
    above the boundary and whatever trains, which cannot lie below it.

    Args:
        model: with `depth` frozen layers.
        depth: how many.
    """
    import transformers
    import xxhash

    digest = xxhash.xxh3_128()
    base: Any = unwrap(model)
    config = base.config.get_text_config(decoder=True)
    known = {name: value for name, value in config.to_dict().items() if name not in _IDLE}
    digest.update(json.dumps([known, depth, transformers.__version__], sort_keys=True, default=str).encode())
    digest.update(str(config._attn_implementation).encode())
    for name, tensor in _tensors(model, depth):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


class Unchanged:
    """Whether the weights below the boundary are still those of the last fingerprint, as far as torch counts changes.

    Each in-place operation raises a tensor's version; those on `.data` do not, so a fingerprint is taken anew at the
    beginning of each training too. (`model.to(dtype)`, as for evaluation in 16 bits, shows by the dtype.)
    """

    def __init__(self, model: nn.Module, depth: int) -> None:
        self._tensors = [tensor for _, tensor in _tensors(model, depth)]
        self._versions = self._read()

    def __bool__(self) -> bool:
        return self._versions == self._read()

    def _read(self) -> list[Any]:
        return [(tensor._version, tensor.dtype) for tensor in self._tensors]


def _tensors(model: nn.Module, depth: int) -> Iterator[tuple[str, Tensor]]:
    """Weights, buffers and constants of quantisation that lie below the boundary, in a fixed order."""
    above = {id(module) for layer in decoder_layers(model)[depth:] for module in layer.modules()}
    base: Any = unwrap(model)
    head = base.get_output_embeddings()
    tied = head is not None and head.weight is base.get_input_embeddings().weight
    for name, module in sorted(named_base_modules(model).items()):
        if id(module) in above or (module is head and not tied):
            continue
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for each, tensor in own:
            if not tensor.requires_grad:
                yield f"{name}.{each}", tensor
                yield from _constants(f"{name}.{each}", tensor)


def _constants(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """Scales and codebooks that bitsandbytes keeps on a packed weight."""
    import torch

    for attribute in ("SCB", "CB"):
        value = getattr(tensor, attribute, None)
        if isinstance(value, torch.Tensor):
            yield f"{name}.{attribute}", value
    state = getattr(tensor, "quant_state", None)
    while state is not None:
        for attribute in ("absmax", "code", "offset"):
            value = getattr(state, attribute, None)
            if isinstance(value, torch.Tensor):
                yield f"{name}.{attribute}", value
        name, state = f"{name}.state2", getattr(state, "state2", None)


def _bytes(tensor: Tensor) -> Any:
    import torch

    return tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy()


def dropout_below(model: nn.Module, depth: int) -> str | None:
    """Something below the boundary that draws random numbers in training: where, and how much; None without."""
    from torch import nn

    layers = decoder_layers(model)
    base = unwrap(model)
    decoder = next(module for module in base.modules() if any(child is layers for child in module.children()))
    below = [(f"decoder layer {index}", layers[index]) for index in range(depth)]
    below += [(name, child) for name, child in decoder.named_children() if child is not layers]
    for where, module in below:
        for name, found in module.named_modules():
            if isinstance(found, nn.modules.dropout._DropoutNd) and found.p > 0:
                return f"{name or where} of {where} is {found}"
            for attribute, value in vars(found).items():  # attention takes its share as a number
                if "drop" in attribute and isinstance(value, float) and value > 0:
                    return f"{attribute}={value} in {name} of {where}"
    share = text_attribute(getattr(base, "config", None), "layerdrop")
    return f"layerdrop={share} in the config" if share else None
