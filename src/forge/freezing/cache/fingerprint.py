"""What the states of a prefix depend on beside the sample: the base model's weights, and how they are computed with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ...models.layers import decoder_layers, decoder_layers_path, named_base_modules, unwrap
from ...models.tensors import host_bytes, quantization_constants

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
        digest.update(host_bytes(tensor))
    return digest.hexdigest()


class Unchanged:
    """Whether the weights below the boundary are still those of the last fingerprint, as far as torch counts changes.

    Each in-place operation raises a tensor's version, other tensors have other identities (adapters that came, weights
    that were assigned), and `model.to(dtype)` shows by the dtype. Operations on `.data` leave no trace, so a
    fingerprint is taken anew at the beginning of each training too.
    """

    def __init__(self, model: nn.Module, depth: int) -> None:
        layers = decoder_layers(model)
        decoder = decoder_of(model)
        self._modules = [*list(layers)[:depth], *(child for child in decoder.children() if child is not layers)]
        self._versions = self._read()

    def __bool__(self) -> bool:
        return self._versions == self._read()

    def _read(self) -> list[Any]:
        tensors = [t for module in self._modules for t in (*module.parameters(), *module.buffers())]
        return [(id(t), t._version, t.dtype) for t in tensors if not t.requires_grad]


def decoder_of(model: nn.Module) -> nn.Module:
    """The module around the decoder's layers."""
    base: Any = unwrap(model)
    decoder: nn.Module = base.get_submodule(decoder_layers_path(base).rpartition(".")[0])
    return decoder


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
                yield from quantization_constants(f"{name}.{each}", tensor)
