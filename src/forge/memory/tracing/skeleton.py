"""The model of a scenario, of a few of its layers or of all, with shapes in the place of weights.

What from_pretrained, bitsandbytes, PEFT and the trainer do to a model is done here by their own code, on the meta
device. Only then do parameters become tensors that a step can run on: hollow ones, or real ones in a test.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ... import compat
from ...errors import ConflictError
from ...models.below import modules_beside, trained_embeddings
from ...models.layers import decoder_layers_path, named_base_modules, unwrap
from ...models.truncation import restore, truncate, truncation_of
from ..scenario import Scenario
from .quantized import Empty, empty_packed, is_packed, packed_constants, without_weights


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
    if scenario.frozen_layers or truncation_of(source) is not None:
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


_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks"),
    *("_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks"),
    *("_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)


def _shortened(source: nn.Module, layers: Sequence[int]) -> Any:
    """A copy of the structure that shares no weight with the source: those are on meta."""
    all_layers = _decoder_layers(source)
    model = _copy(source, without=[layer for index, layer in enumerate(all_layers) if index not in set(layers)])
    restore(model)  # the scenario says where backward stops
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
    for name, value in list(vars(config).items()):  # layer_types and their like: one entry per layer
        if isinstance(value, list) and len(value) == len(all_layers):
            setattr(config, name, [value[index] for index in layers])
    config.num_hidden_layers = len(shortened)
    return model


def _copy(source: nn.Module, without: Sequence[nn.Module]) -> Any:
    """The structure with None for some modules, without data, hooks and whatever else a trainer left on it."""
    memo: dict[int, Any] = {id(module): None for module in without}
    for tensor in (*source.parameters(), *source.buffers()):
        memo[id(tensor)] = _on_meta(tensor)
    for module in source.modules():
        # What accelerate, TRL or a callback put there is closed over the source, or would be copied with all it holds.
        for name in _HOOKS:
            memo[id(getattr(module, name))] = OrderedDict()
        if "forward" in vars(module):
            memo[id(vars(module)["forward"])] = None
        for name, kept in vars(module).items():
            if name.startswith("_forge_"):  # the adapters that freezing took out, for giving them back
                memo[id(kept)] = None
    with _TensorsToMeta():
        model: Any = copy.deepcopy(source, memo)
    for module in model.modules():
        module.__dict__.pop("forward", None)
        for name in ("gradient_checkpointing", "activation_checkpointing"):  # the scenario says whether
            if name in vars(module):
                setattr(module, name, False)
    return model


class _TensorsToMeta(TorchFunctionMode):
    """Copies of tensors have no data, wherever they are found: in a quantised layer's state, in a cache."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__deepcopy__:
            tensor, memo = args
            return memo.setdefault(id(tensor), _on_meta(tensor))
        return func(*args, **(kwargs or {}))


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
    """What `from_pretrained` makes of the model: its attention, the dtype of its weights, their packing."""
    base: Any = unwrap(model)
    base.config._attn_implementation = "eager" if scenario.attention == "eager" else "sdpa"  # and of all its parts
    if scenario.dtype is not None:
        dtype = getattr(torch, scenario.dtype)
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    if scenario.device == "cuda":
        _sixteen_bits_alike(model)
    if scenario.quantization is not None:
        unpacked = model.dtype  # what bitsandbytes unpacks to, whatever it computes in
        compat.replace_with_bitsandbytes(model, scenario.quantization)
        for module in model.modules():
            if is_packed(module):
                module.unpacked_dtype = unpacked
        if scenario.device == "cuda":
            _sixteen_bits_alike(model)
        model.is_loaded_in_4bit = bool(scenario.quantization.load_in_4bit)
        model.is_loaded_in_8bit = bool(scenario.quantization.load_in_8bit)
        model.requires_grad_(False)


def _sixteen_bits_alike(model: nn.Module) -> None:
    """bf16 in the place of fp16, which is as wide: the CPU's autocast knows no other, and mixes them to fp32."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype == torch.float16:
            tensor.data = tensor.data.to(torch.bfloat16)
    for module in model.modules():
        for name in ("compute_dtype", "unpacked_dtype"):
            if getattr(module, name, None) == torch.float16:
                setattr(module, name, torch.bfloat16)


def with_adapter(source: Any, scenario: Scenario) -> Any:
    """A copy of a model on meta, loaded and given its adapter as the scenario says; to count what trains."""
    model = _shortened(source, range(len(_decoder_layers(source))))
    _as_loaded(model, scenario)
    return model if scenario.peft_config is None else _with_adapter(model, scenario.peft_config)


def _with_adapter(model: Any, peft_config: Any) -> Any:
    from peft import get_peft_model

    config = copy.deepcopy(peft_config)
    if getattr(config, "use_dora", False):
        without_weights(model)
    if getattr(config, "init_lora_weights", True) not in (True, False):
        config.init_lora_weights = True  # PiSSA and its kin compute with the weights, which are not there
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if config.is_prompt_learning:  # its embeddings are moved to the model's device, which meta refuses
                return get_peft_model(model, config, low_cpu_mem_usage=True)
            # Not low_cpu_mem_usage, which puts the parameters of every thread on meta while it lasts.
            with torch.device("meta"):
                return get_peft_model(model, config)
        except ValueError as error:
            reason = str(error).strip().splitlines()[0]
            raise ConflictError(f"PEFT cannot give this model the adapter {type(config).__name__}: {reason}") from error


def _freeze(model: Any, scenario: Scenario) -> None:
    """What `setup_lp_lora_style` does, and refuses: it stands above this room in the house."""
    for layer in list(_decoder_layers(model))[: scenario.frozen_layers]:
        compat.remove_adapters(layer)
        layer.requires_grad_(False)
    beside = modules_beside(model)
    truncation = truncate(model, scenario.frozen_layers, beside.values())
    base: Any = unwrap(model)
    attention, base.config._attn_implementation = base.config._attn_implementation, "eager"
    below = trained_embeddings(model, truncation)  # calls the decoder; sdpa would read values of the mask
    base.config._attn_implementation = attention
    of_base = {id(p) for module in named_base_modules(model).values() for p in module.parameters(recurse=False)}
    trained = [f"{name}.{each}" for name, m in beside.items() for each, p in m.named_parameters() if p.requires_grad]
    trained += [name for name, parameter in below.items() if id(parameter) not in of_base]
    configs = getattr(model, "peft_config", {})
    trained += [f"the adapter {name!r}" for name, config in configs.items() if config.is_prompt_learning]
    if trained:
        raise ConflictError(
            f"{trained[0]} trains below the {scenario.frozen_layers} frozen layers, where backward does not come, and "
            "setup_lp_lora_style refuses that. Leave it out of what trains (peft_config=), or freeze no layers."
        )
    for parameter in below.values():
        parameter.requires_grad_(False)


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
                if id(value) not in filled:
                    filled[id(value)] = empty(tuple(value.shape), value.dtype)
                setattr(module, name, filled[id(value)])
