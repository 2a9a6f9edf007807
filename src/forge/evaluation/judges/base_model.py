"""The model as it was before adapters: how to run it, and how to tell it from others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ...errors import UnsupportedError
from ...models.layers import named_base_modules, unwrap

if TYPE_CHECKING:
    from torch import Tensor, nn

# Initialisations that take a part out of the base weights and put it into the adapter.
_MOVES_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@contextmanager
def adapters_off(model: Any) -> Iterator[Any]:
    """The base of a model with adapters inside, everything as it was afterwards; other models as they are.

    Raises:
        UnsupportedError: The adapters changed the base itself, so that it would not come back by switching them off.
    """
    configs = getattr(model, "peft_config", None)
    if not configs:
        yield model
        return
    for name, config in configs.items():
        kind = getattr(config, "init_lora_weights", None)
        bias = getattr(config, "bias", "none")
        if bias != "none" or (isinstance(kind, str) and kind.lower().startswith(_MOVES_WEIGHTS)):
            how = f"bias={bias!r}" if bias != "none" else f"init_lora_weights={kind!r}"
            raise UnsupportedError(
                f"The adapter {name!r} ({how}) changes weights of the base, which cannot judge as it was before. "
                'Pass the judge another model: get_judge("local", model="<folder of the base>").'
            )
    if any(getattr(module, "merged", False) is True for module in model.modules()):
        raise UnsupportedError(
            "The model's adapters are merged into the base, which cannot judge as it was before. Call "
            'model.unmerge_adapter() first, or pass the judge another model: get_judge("local", model="<folder>").'
        )
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    # Of layers: a transformers model has a method of that name.
    layers = [each for each in model.modules() if isinstance(getattr(each, "disable_adapters", None), bool)]
    off = {layer: layer.disable_adapters for layer in layers}
    try:
        if hasattr(model, "disable_adapter"):  # PEFT's own wrapper
            with model.disable_adapter():
                yield model
        else:  # adapters that transformers attached, or the model inside PEFT's wrapper
            for layer in layers:
                layer.enable_adapters(False)
            yield model
    finally:
        for layer, was_off in off.items():
            layer.enable_adapters(not was_off)
        for parameter, trains in wanted.items():
            parameter.requires_grad_(trains)


def weights_digest(model: nn.Module) -> str:
    """A digest of every byte of the base's weights, and of its config.

    Nothing is remembered from one call to the next: fused optimizers and whatever writes through `.data` change weights
    without torch counting it.

    Args:
        model: With or without adapters, quantised or not.
    """
    import torch
    import xxhash

    base: Any = unwrap(model)
    digest = xxhash.xxh3_128(base.config.to_json_string(use_diff=True).encode())
    for name, tensor in _tensors(model):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        data: Any = tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy()
        digest.update(data)
    return digest.hexdigest()


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, module in sorted(named_base_modules(model).items()):
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        yield from ((f"{name}.{each}", tensor) for each, tensor in own)
        yield from ((f"{name}.{each}", tensor) for each, tensor in _scales(module))


def _scales(module: Any) -> Iterator[tuple[str, Tensor]]:
    """What bitsandbytes keeps beside packed weights: without it, they say nothing of their size."""
    weight = getattr(module, "weight", None)
    state, path = getattr(weight, "quant_state", None), "quant_state"
    while state is not None:
        for name in ("absmax", "code", "offset"):
            if (found := getattr(state, name, None)) is not None:
                yield f"{path}.{name}", found
        state, path = getattr(state, "state2", None), f"{path}.state2"
    # The first forward pass moves those of 8-bit weights from the weight to the module's state.
    for place in (weight, getattr(module, "state", None)):
        if (found := getattr(place, "SCB", None)) is not None:
            yield "SCB", found
