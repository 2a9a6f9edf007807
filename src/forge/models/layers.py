"""Where a model keeps the layers of its language decoder, found by structure and not by a list of names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedError

if TYPE_CHECKING:
    from torch import nn


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The `ModuleList` of the language decoder's layers, of a plain model or of one wrapped by PEFT.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 16}
    >>> len(decoder_layers(LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **tiny))))
    3

    Raises:
        UnsupportedError: for an encoder-decoder model, and when no list of layers is found.
    """
    base = unwrap(model)
    found: Any = base.get_submodule(decoder_layers_path(base))
    layers: nn.ModuleList = found
    return layers


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside a `PeftModel`, or the model itself."""
    inner = getattr(model, "get_base_model", None)
    base: nn.Module = inner() if callable(inner) else model
    return base


def without_adapters(module: nn.Module) -> nn.Module:
    """The module that a PEFT layer wraps, or the module itself."""
    get_base_layer = getattr(module, "get_base_layer", None)  # LoraLayer and its kin, nested ParamWrappers too
    if callable(get_base_layer):
        base: nn.Module = get_base_layer()
        return base
    original: nn.Module | None = getattr(module, "original_module", None)  # modules_to_save
    return module if original is None else original


def named_base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """`named_modules` of the model as it was before any adapter: `base_layer` and `lora_A` do not show in the names."""
    return dict(_walk("", unwrap(model)))


def base_modules_below(module: nn.Module) -> list[nn.Module]:
    """The module and all below it, without adapters."""
    return [found for _, found in _walk("", module)]


def _walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    module = without_adapters(module)
    yield name, module
    for child_name, child in module.named_children():
        yield from _walk(f"{name}.{child_name}" if name else child_name, child)


def decoder_layers_path(model: nn.Module) -> str:
    """The dotted path of the decoder's layers, relative to the transformers model.

    The decoder is the module around the input embeddings: climbing from them, the first ancestor that holds a list
    of `num_hidden_layers` modules is it. A vision or audio tower hangs beside that module, not inside it.
    """
    from torch import nn

    config: Any = getattr(unwrap(model), "config", None)
    model_type = getattr(config, "model_type", type(unwrap(model)).__name__)
    refuse_other_architectures(config)
    modules = named_base_modules(model)
    depth = text_attribute(config, "num_hidden_layers")
    lists = {name: module for name, module in modules.items() if isinstance(module, nn.ModuleList) and len(module) > 0}
    # A list inside another list (the experts of a layer) is a part of a layer, never the layers.
    outermost = {name: found for name, found in lists.items() if not any(name.startswith(f"{o}.") for o in lists)}
    for same_depth in (True, False):  # a pruned or grown model may no longer agree with its config
        for scope in _scopes(_input_embeddings_path(model, modules)):
            candidates = [
                (sum(p.numel() for p in found.parameters()), name)
                for name, found in outermost.items()
                if name.startswith(scope) and (not same_depth or len(found) == depth)
            ]
            if candidates:
                return max(candidates)[1]
    raise UnsupportedError(
        f"No decoder layers found in {type(unwrap(model)).__name__} (model type {model_type!r}): forge looks for a "
        f"ModuleList of {depth} layers around the input embeddings, and saw {sorted(outermost) or 'no list at all'}. "
        "Pass target_modules=[...] to name what LoRA should adapt."
    )


def refuse_other_architectures(config: Any) -> None:
    """Raise for a model that is not a decoder alone."""
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{config.model_type!r} is an encoder-decoder model; forge fine-tunes decoder-only language models "
            "(and the language decoder of multimodal ones). Choose a causal language model."
        )
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    # BERT and its heirs can be made decoders by this switch, and are encoders as they are published.
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise UnsupportedError(
            f"{config.model_type!r} is an encoder (is_decoder=False); forge fine-tunes decoder-only language models. "
            "Choose a causal language model."
        )


def text_attribute(config: Any, name: str) -> Any:
    """An attribute of the language decoder's part of a config, None where it has none."""
    text_config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return getattr(text_config, name, None)


def name_in_layer(name: str, layers_path: str) -> str:
    """A name relative to its decoder layer.

    >>> name_in_layer("model.layers.3.mlp.gate", "model.layers")
    'mlp.gate'
    """
    return name[len(layers_path) + 1 :].partition(".")[2]


def _input_embeddings_path(model: nn.Module, modules: dict[str, nn.Module]) -> str:
    base: Any = unwrap(model)
    try:
        embeddings = without_adapters(base.get_input_embeddings())
    except (AttributeError, NotImplementedError):  # not every architecture can name them: search the whole model
        return ""
    return next((name for name, module in modules.items() if module is embeddings), "")


def _scopes(path: str) -> Iterator[str]:
    """Prefixes of the ancestors of `path`, the nearest first: `a.b.c` gives `a.b.`, `a.` and the whole model."""
    parts = path.split(".")[:-1]
    for depth in range(len(parts), 0, -1):
        yield ".".join(parts[:depth]) + "."
    yield ""
