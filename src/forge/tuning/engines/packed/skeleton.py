"""A model of nothing but shapes, on which PEFT itself makes and saves the adapters of the slots."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ....errors import UnsupportedError
from ....models.layers import decoder_layers_path
from ....models.truncation import layers_in_ratio
from ..contract import Task

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ELSEWHERE = "Search it with engine='shared', which trains one adapter at a time."
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as numbers.

    Args:
        factors: by the adapted module's name in the base: A, shaped (r, in), and B, shaped (out, r).
        scales: by the same name, what B A x is multiplied by.
        dropout: of x, before A.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    scales: Mapping[str, float]
    dropout: float


class Skeleton:
    """The base's modules with weights that take no memory: an adapter on it is made as it would be on the base.

    Args:
        base: a model without adapters; left as it is.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self._bones = _hollow(base)
        self._layers = decoder_layers_path(base)
        self._num_layers = len(base.get_submodule(self._layers))

    def create(self, task: Task) -> Adapter:
        """The adapter at its first step: the values that `get_peft_model` draws after `set_seed(task.seed)`.

        Raises:
            UnsupportedError: what cannot be trained packed.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(task.seed)
            model = self._attach(task)
        return _read(model)

    def save(self, task: Task, adapter: Adapter, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write the adapter as PEFT does, with the tokenizer; the folder is there only when all of it is."""
        from ...publish import save_adapter

        with torch.random.fork_rng(devices=[]):
            model = self._attach(task)
        layers = dict(_lora_layers(model))
        with torch.no_grad():
            for name, (down, up) in adapter.factors.items():
                layers[name].lora_A["default"].weight.copy_(down)
                layers[name].lora_B["default"].weight.copy_(up)
        save_adapter(model, tokenizer, folder)

    def _attach(self, task: Task) -> PeftModel:
        from peft import get_peft_model

        from ....freezing.adapters import remove_adapters

        config = task.preset.get_lora_config()
        refuse_config(config)
        bones: Any = copy.deepcopy(self._bones, _as_they_are(self._bones))
        with warnings.catch_warnings():
            # PEFT asks transformers for an attribute that was renamed; nothing in a configuration would avoid it.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            model = get_peft_model(bones, config)
        remove_adapters(model, range(layers_in_ratio(task.freeze_ratio, self._num_layers)))
        return model


def frozen_layers(task: Task, num_layers: int) -> int:
    """How many of the lowest layers the trial leaves without adapter, and need no backward."""
    return layers_in_ratio(task.freeze_ratio, num_layers)


def _hollow(base: PreTrainedModel) -> nn.Module:
    """A copy whose weights are one number each, however large they look."""
    memo: dict[int, Any] = {}
    for module in base.modules():
        if type(module).__module__.startswith("bitsandbytes."):
            plain = nn.Linear(1, 1, bias=False)  # PEFT makes the same factors for a quantised layer as for a plain one
            plain.in_features, plain.out_features = module.in_features, module.out_features
            plain.weight = _empty(torch.empty((module.out_features, module.in_features), device="meta"))
            memo[id(module)] = plain
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            memo[id(tensor)] = _empty(tensor)
    kept = {name: vars(base)[name] for name in list(vars(base)) if name.startswith("_forge")}
    for name in kept:
        del vars(base)[name]
    try:
        bones: nn.Module = copy.deepcopy(base, memo)
    finally:
        vars(base).update(kept)
    for name in ("quantization_config", "_pre_quantization_dtype"):
        vars(bones.config).pop(name, None)
    for name in ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        vars(bones).pop(name, None)
    return bones


def _empty(tensor: Tensor) -> nn.Parameter:
    dtype = tensor.dtype if tensor.dtype.is_floating_point else torch.float32
    return nn.Parameter(torch.zeros((), dtype=dtype).expand(tensor.shape), requires_grad=False)


def _as_they_are(bones: nn.Module) -> dict[int, Any]:
    """For copies of the skeleton that share its weights, which nobody writes to."""
    return {id(tensor): tensor for tensor in (*bones.parameters(), *bones.buffers())}


def refuse_config(config: Any) -> None:
    """Raise for adapters that a pack does not know.

    Raises:
        UnsupportedError: with what to do instead.
    """
    said = {
        "use_dora": bool(config.use_dora),
        "bias": config.bias != "none" and config.bias,
        "modules_to_save": config.modules_to_save,
        "trainable_token_indices": getattr(config, "trainable_token_indices", None),
        "target_parameters": getattr(config, "target_parameters", None),
        "layer_replication": config.layer_replication,
        "lora_bias": getattr(config, "lora_bias", False),
        "init_lora_weights": config.init_lora_weights not in (True, "gaussian") and config.init_lora_weights,
    }
    for name, value in said.items():
        if value:
            raise UnsupportedError(f"{name}={value!r} cannot be trained packed with other trials. {_ELSEWHERE}")


def _lora_layers(model: PeftModel) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return [
        (name.removeprefix(_PREFIX), module) for name, module in model.named_modules() if isinstance(module, LoraLayer)
    ]


def _read(model: PeftModel) -> Adapter:
    factors, scales, dropout = {}, {}, 0.0
    for name, layer in _lora_layers(model):
        if "default" not in layer.lora_A or type(layer.lora_A["default"]) is not nn.Linear:
            raise UnsupportedError(
                f"The adapter of {name} ({type(layer).__name__}) is not of a linear layer, and cannot be trained "
                f"packed with other trials. {_ELSEWHERE}"
            )
        down, up = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        factors[name] = (down.float() if down.dtype in (torch.bfloat16, torch.float16) else down, up.to(down.dtype))
        scales[name] = float(layer.scaling["default"])
        drop = layer.lora_dropout["default"]
        dropout = float(getattr(drop, "p", 0.0))
    if not factors:
        raise UnsupportedError("The adapter targets no linear layer that trains.")
    return Adapter(factors, scales, dropout)
