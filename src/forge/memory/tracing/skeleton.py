"""The model of a scenario, of a few of its layers or of all, with shapes in the place of weights.

What from_pretrained, bitsandbytes, PEFT and the trainer do to a model is done here by their own code, on the meta
device. Only then do parameters become tensors that a step can run on: fake ones, or real ones in a test.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ... import compat
from ...models.layers import decoder_layers_path, unwrap
from ..scenario import Scenario
from .quantized import Empty, empty_packed, is_packed, packed_constants


@dataclass
class Skeleton:
    """A model that a step can be traced on.

    Args:
        model: with PEFT around it where there are adapters.
        layers: the decoder's, in order.
        reference: DPO's second model, None where there is none.
    """

    model: Any
    layers: nn.ModuleList
    reference: Any = None

    def constants(self) -> Iterator[torch.Tensor]:
        """Scales and codebooks of packed weights."""
        for module in self.model.modules():
            yield from packed_constants(module)


def build(source: nn.Module, scenario: Scenario, layers: Sequence[int], empty: Empty) -> Skeleton:
    """The skeleton of a model with the given decoder layers.

    Args:
        source: a model on the meta device, or a live one; neither is changed.
        scenario: what is to be done to it.
        layers: which of its decoder layers, by index, ascending.
        empty: makes the tensors.
    """
    model = _shortened(source, layers)
    _as_loaded(model, scenario)
    reference = _shortened(model, range(len(layers))) if scenario.reference == "copy" else None
    if scenario.peft_config is not None:
        model = _with_adapter(model, scenario.peft_config)
    _freeze(model, scenario)
    if scenario.fp32_trainable:
        _cast_trainable(model)
    model.train()
    if reference is not None:
        reference.requires_grad_(False).eval()
        _fill(reference, empty)
    _fill(model, empty)
    return Skeleton(model, _decoder_layers(model), reference)


def _decoder_layers(model: nn.Module) -> nn.ModuleList:
    base = unwrap(model)
    found: Any = base.get_submodule(decoder_layers_path(base))
    layers: nn.ModuleList = found
    return layers


def _shortened(source: nn.Module, layers: Sequence[int]) -> Any:
    """A copy of the structure that shares no weight with the source: those are on meta."""
    all_layers = _decoder_layers(source)
    memo: dict[int, Any] = {}
    kept = set(layers)
    for index, layer in enumerate(all_layers):
        if index not in kept:
            memo[id(layer)] = None
    for tensor in (*source.parameters(), *source.buffers()):
        memo[id(tensor)] = _on_meta(tensor)
    model: Any = copy.deepcopy(source, memo)
    for module in model.modules():
        module.__dict__.pop("forward", None)  # what accelerate or TRL put there is closed over the source
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        module._backward_hooks.clear()
    base: Any = unwrap(model)
    path = decoder_layers_path_of(base, all_layers, source)
    parent_path, _, name = path.rpartition(".")
    shortened = nn.ModuleList([each for each in base.get_submodule(path) if each is not None])
    setattr(base.get_submodule(parent_path), name, shortened)
    for place, layer in enumerate(shortened):
        numbered: list[Any] = [m for m in layer.modules() if isinstance(getattr(m, "layer_idx", None), int)]
        for module in numbered:
            module.layer_idx = place  # caches count by it
    config = base.config.get_text_config(decoder=True) if hasattr(base.config, "get_text_config") else base.config
    types = getattr(config, "layer_types", None)
    config.num_hidden_layers = len(shortened)
    if types is not None:
        config.layer_types = [types[index] for index in layers]
    return model


def decoder_layers_path_of(base: nn.Module, all_layers: nn.ModuleList, source: nn.Module) -> str:
    """Where the copy has what the source has as its decoder layers."""
    source_base = unwrap(source)
    for name, module in source_base.named_modules():
        if module is all_layers:
            return str(name)
    return decoder_layers_path(base)


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    """The same shape and kind of tensor without data."""
    data = torch.empty_like(tensor.detach(), device="meta", requires_grad=False)
    if not isinstance(tensor, nn.Parameter):
        return data
    parameter = nn.Parameter(data, requires_grad=tensor.requires_grad)
    for name in ("quant_state", "quant_type", "compress_statistics", "quant_storage", "blocksize"):
        if hasattr(tensor, name):
            setattr(parameter, name, getattr(tensor, name))
    return parameter


def _as_loaded(model: Any, scenario: Scenario) -> None:
    """What `from_pretrained` makes of the weights: their dtype, their packing."""
    if scenario.dtype is not None:
        dtype = getattr(torch, scenario.dtype)
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    if scenario.quantization is not None:
        compat.replace_with_bitsandbytes(model, scenario.quantization)
        model.is_loaded_in_4bit = bool(scenario.quantization.load_in_4bit)
        model.is_loaded_in_8bit = bool(scenario.quantization.load_in_8bit)
        model.requires_grad_(False)


def _with_adapter(model: Any, peft_config: Any) -> Any:
    from peft import get_peft_model

    config = copy.deepcopy(peft_config)
    if getattr(config, "init_lora_weights", True) not in (True, False):
        config.init_lora_weights = True  # PiSSA and its kin compute with the weights, which are not there
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, config, low_cpu_mem_usage=True)


def _freeze(model: Any, scenario: Scenario) -> None:
    """Nothing of the lowest layers trains, nor what stands before them; their adapters are gone."""
    if not scenario.frozen_layers:
        return
    base: Any = unwrap(model)
    for layer in list(_decoder_layers(model))[: scenario.frozen_layers]:
        compat.remove_adapters(layer)
        layer.requires_grad_(False)
    base.get_input_embeddings().requires_grad_(False)


def _cast_trainable(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.float()


def _fill(model: nn.Module, empty: Empty) -> None:
    """Put tensors that can be computed with in the place of those on meta; what was tied stays tied."""
    filled: dict[int, Any] = {}
    for module in model.modules():
        if is_packed(module):
            empty_packed(module, empty)
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in filled:
                tensor = empty(tuple(parameter.shape), parameter.dtype)
                filled[id(parameter)] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
            module._parameters[name] = filled[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                if id(buffer) not in filled:
                    filled[id(buffer)] = empty(tuple(buffer.shape), buffer.dtype)
                module._buffers[name] = filled[id(buffer)]
        for name, value in list(vars(module).items()):  # `original_inv_freq`, PEFT's lists of parameters
            if isinstance(value, torch.Tensor) and value.is_meta:
                setattr(module, name, filled.get(id(value)) or empty(tuple(value.shape), value.dtype))
