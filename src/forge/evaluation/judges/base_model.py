"""The model as it was before adapters: how to run it, and how to tell it from others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

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
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        if hasattr(model, "disable_adapter"):  # PEFT's own wrapper
            with model.disable_adapter():
                yield model
        else:  # adapters that transformers itself attached
            model.disable_adapters()
            try:
                yield model
            finally:
                model.enable_adapters()
    finally:
        for parameter, trains in wanted.items():
            parameter.requires_grad_(trains)


_known: WeakKeyDictionary[Any, tuple[Any, str]] = WeakKeyDictionary()


def weights_digest(model: nn.Module) -> str:
    """A digest of every byte of the base's weights, and of its config.

    It is computed once, and again when torch has counted a change of a weight.

    Args:
        model: With or without adapters, quantised or not.
    """
    base: Any = unwrap(model)
    tensors = dict(_tensors(model))
    state = [(name, id(tensor), tensor._version, tensor.dtype) for name, tensor in tensors.items()]
    known = _known.get(base)
    if known is not None and known[0] == state:
        return known[1]
    import torch
    import xxhash

    digest = xxhash.xxh3_128(base.config.to_json_string(use_diff=True).encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        data: Any = tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy()
        digest.update(data)
    _known[base] = (state, digest.hexdigest())
    return digest.hexdigest()


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, module in sorted(named_base_modules(model).items()):
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        yield from ((f"{name}.{each}", tensor) for each, tensor in own)
