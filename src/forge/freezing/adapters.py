"""The adapters of frozen layers: away, so that nothing wakes them and no checkpoint holds them, and back again.

PEFT's `enable_adapters` makes every adapter trainable that it finds, and DPOTrainer calls it after each pass of its
reference; an adapter that is only frozen would be awake from the second step on.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .. import compat
from ..errors import ConflictError, UnsupportedError
from ..models.layers import decoder_layers, decoder_layers_path, unwrap

if TYPE_CHECKING:
    from torch import nn


@dataclass
class RemovedAdapters:
    """What was taken out of a PEFT model, and what its configs said before.

    Args:
        wrappers: PEFT's layers, by the dotted name of their place in the base model.
        configs: the adapters' configs as they were.
        changed: the copies that the model has in their place, since the user may give the same config to another model.
        elsewhere: whether adapters are left in other layers.
        targeted: PEFT's list of the modules that it adapted.
    """

    wrappers: list[tuple[str, Any]] = field(default_factory=list)
    configs: dict[str, Any] = field(default_factory=dict)
    changed: dict[str, Any] = field(default_factory=dict)
    elsewhere: bool = False
    targeted: list[str] | None = None

    def put_back(self, model: nn.Module) -> None:
        """Undo: the very same modules, where they were.

        Nothing is put back where the adapters are not those any more: merged, unloaded, or others in their place.
        """
        base = unwrap(model)
        live = getattr(model, "peft_config", {})
        gone = self.elsewhere and not _has_adapters(base)  # PEFT 0.18 leaves the configs on an unloaded model
        if gone or any(live.get(adapter) is not config for adapter, config in self.changed.items()):
            return
        for name, wrapper in self.wrappers:
            parent, _, child = name.rpartition(".")
            wrapped = base.get_submodule(name)
            wrapper.train(wrapped.training)
            weight = next(wrapped.parameters(), None)
            if weight is not None and not weight.is_meta:
                wrapper.to(weight.device)  # the model may have moved meanwhile
            setattr(base.get_submodule(parent), child, wrapper)
        live.update(self.configs)
        tuner = getattr(model, "base_model", None)
        if self.targeted is not None and hasattr(tuner, "targeted_module_names"):
            tuner.targeted_module_names = self.targeted  # type: ignore[union-attr]

    def config_before(self, adapter: str, live: Any) -> Any:
        """The config that an adapter had before, given the one that it has."""
        return self.configs[adapter] if self.changed.get(adapter) is live else live


def remove_adapters(model: nn.Module, frozen: Sequence[int]) -> RemovedAdapters:
    """Take the adapters out of some decoder layers, and make the adapters' configs say so.

    A config that did not would give those layers new adapters when the checkpoint is loaded.
    """
    removed = RemovedAdapters()
    path, layers = decoder_layers_path(unwrap(model)), decoder_layers(model)
    for index in frozen:
        removed.wrappers += [(f"{path}.{index}.{name}", found) for name, found in compat.remove_adapters(layers[index])]
    removed.elsewhere = _has_adapters(model)
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    for adapter, config in list(configs.items()):
        changes = _without_layers(config, path, frozen, len(layers), model)
        if changes:
            removed.configs[adapter], configs[adapter] = config, copy.copy(config)
            removed.changed[adapter] = configs[adapter]
            vars(configs[adapter]).update(changes)
    tuner: Any = getattr(model, "base_model", None)
    targeted = getattr(tuner, "targeted_module_names", None)
    if targeted is not None and removed.wrappers:
        removed.targeted = targeted
        gone = re.compile(excluding(path, frozen))
        tuner.targeted_module_names = [name for name in targeted if not gone.fullmatch(name)]
    return removed


def _has_adapters(model: nn.Module) -> bool:
    return any(compat.wrapped_by_adapter(module) is not None for module in model.modules())


def excluding(path: str, frozen: Iterable[int]) -> str:
    """A pattern for PEFT's `exclude_modules` that matches whatever lies in some layers.

    >>> bool(re.fullmatch(excluding("model.layers", [0, 1]), "model.layers.1.mlp.up_proj"))
    True
    >>> bool(re.fullmatch(excluding("model.layers", [0, 1]), "model.layers.11.mlp.up_proj"))
    False
    """
    return rf"(.*\.)?{re.escape(path)}\.({'|'.join(str(index) for index in frozen)})\..*"


def _without_layers(config: Any, path: str, frozen: Sequence[int], depth: int, model: nn.Module) -> dict[str, Any]:
    """The fields of a PeftConfig that keep adapters out of the frozen layers."""
    changes: dict[str, Any] = {}
    if frozen and hasattr(config, "exclude_modules"):
        own = config.exclude_modules
        ours = excluding(path, frozen)
        if own and not isinstance(own, str):
            own = rf"(.*\.)?({'|'.join(re.escape(name) for name in sorted(own))})"
        changes["exclude_modules"] = f"({own})|({ours})" if own else ours
    parameters = getattr(config, "target_parameters", None)
    if frozen and parameters:  # PEFT reads no exclusion there
        kept = [index for index in range(depth) if index not in set(frozen)]
        changes["target_parameters"] = [name for each in parameters for name in _in_layers(each, path, kept, model)]
    return changes


def _in_layers(suffix: str, path: str, kept: Sequence[int], model: nn.Module) -> list[str]:
    """The full names of a parameter that was named by its end, in the layers that are kept."""
    layers = decoder_layers(model)
    places = {
        compat.without_wrappers(name) for index in kept for name, _ in layers[index].named_parameters(prefix=f"{index}")
    }
    return sorted({f"{path}.{name}" for name in places if f"{path}.{name}".endswith(f".{suffix}")}) or [suffix]


def refuse_trained(model: nn.Module, frozen: Iterable[int]) -> None:
    """Raise where removing the adapters of some layers would change what the model computes.

    Raises:
        ConflictError: they have learnt something, or are merged into the weights.
        UnsupportedError: whether they have cannot be told.
    """
    layers = decoder_layers(model)
    for index in frozen:
        for name, module in layers[index].named_modules():
            wrapped = compat.wrapped_by_adapter(module)
            if wrapped is None or not _changes_output(module, wrapped, f"decoder layer {index}, {name}"):
                continue
            raise ConflictError(
                f"The adapter of {name} in decoder layer {index} is not as it begins: it has been trained, merged, or "
                "initialised from the weights (PiSSA, OLoRA). Freezing a layer removes its adapters, and would change "
                "the model. Merge it (model = model.merge_and_unload()) and attach a new adapter, or freeze before "
                "training."
            )


def _changes_output(module: Any, wrapped: Any, name: str) -> bool:
    if getattr(module, "merged", False):
        return True
    if hasattr(module, "original_module"):  # modules_to_save, trainable tokens
        return _saved_copy_differs(module)
    if hasattr(module, "lora_B") and not hasattr(module, "lora_E"):
        pairs = (*module.lora_B.values(), *getattr(module, "lora_embedding_B", {}).values())
        return any(_any_nonzero(getattr(pair, "weight", pair)) for pair in pairs)
    width = getattr(wrapped, "in_features", None)
    weight = next(wrapped.parameters(), None)
    if width is None or weight is None:
        raise UnsupportedError(
            f"{name}: forge cannot tell whether a {type(module).__name__} is as it begins, and so whether removing it "
            "changes the model. Attach adapters with layers_to_transform=... instead, or freeze the base model first "
            "and pass exclude_modules=report.exclude_modules."
        )
    if weight.is_meta:
        return False
    return _outputs_differ(module, wrapped, width, weight)


def _outputs_differ(module: Any, wrapped: Any, width: int, weight: torch.Tensor) -> bool:
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((2, width), generator=generator).to(weight.device, dtype)
    training = {child: child.training for child in module.modules()}
    try:
        module.eval()
        with torch.no_grad():
            expected = wrapped(x)
            close = 4 * torch.finfo(expected.dtype).eps * expected.abs().max()
            return bool((module(x) - expected).abs().max() > close)
    finally:
        for child, mode in training.items():
            child.training = mode


def _saved_copy_differs(module: Any) -> bool:
    originals = dict(module.original_module.named_parameters())
    for saved in getattr(module, "modules_to_save", {}).values():
        for name, parameter in saved.named_parameters():
            if not parameter.is_meta and not torch.equal(parameter, originals[name].to(parameter.dtype)):
                return True
    return False


def _any_nonzero(tensor: torch.Tensor) -> bool:
    return not tensor.is_meta and bool(torch.count_nonzero(tensor))
