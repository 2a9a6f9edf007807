"""Stop backward at a decoder layer, whatever a trainer does to the model later.

A layer below the boundary runs without autograd and is never checkpointed: it keeps nothing for backward and is
computed once. The layer at the boundary takes its input as a new leaf. Both are done where a layer is *called*, by
exchanging its class for a subclass (as FSDP2 does), because everything else comes too late or too early:

- `enable_input_require_grads`, checkpointing and the trainers hook the embeddings, so that all hidden states require
  gradients again; what arrives is detached at the boundary, so no hook below it matters.
- Checkpointing is switched on after the freezing, for all layers alike: below the boundary the flag reads False.
- A reentrant checkpoint looks for an input that requires gradients: the leaf does, where the layer is checkpointed so.
  (A forward pre-hook could not give it one under transformers 5.0, which checkpoints around the hooks.)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..errors import ConflictError, UnsupportedError
from .layers import decoder_layers

if TYPE_CHECKING:
    from torch import Tensor, nn


class Shortcut(Protocol):
    """Who knows what the layers below the boundary would compute.

    `served` is the share of the tokens of the last forward pass, in [0, 1], that no layer below was run for.
    """

    served: float

    def below(self, index: int, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A layer below the boundary is called; returns its output, by `run(*args, **kwargs)` or without."""

    def at_boundary(self, hidden_states: Tensor) -> Tensor:
        """The lowest trained layer is called; returns its input."""


class Truncation:
    """What the layers of one model know about their boundary.

    Args:
        model: for naming its parameters in errors.
        depth: how many layers lie below the boundary.

    `shortcut` is asked by the layers where it is set; `on_restore` is called before the layers are given back.
    """

    def __init__(self, model: nn.Module | None, depth: int) -> None:
        self.depth = depth
        self.shortcut: Shortcut | None = None
        self.on_restore: Callable[[], None] | None = None
        self.probe: list[Tensor] | None = None
        self._model = weakref.ref(model) if model is not None else None

    def __reduce__(self) -> Any:
        return Truncation, (None, self.depth)  # a copy of the model is another model, and has no cache

    def name_of(self, parameter: Tensor) -> str:
        """The parameter's name in the model, or its shape."""
        model = self._model() if self._model is not None else None
        named = model.named_parameters() if model is not None else ()
        return next((name for name, found in named if found is parameter), f"one of shape {tuple(parameter.shape)}")


class Reached(BaseException):
    """The lowest layer was called while probing: nothing above it is run. No error, so nothing handles it."""


class _Truncated:
    """What all kinds share. `_truncation` and `_truncation_index` are in the instance's dictionary."""

    _truncation: Truncation
    _truncation_index: int
    _truncation_kind: str
    _truncated_class: type

    def _arriving(self, args: Any, kwargs: Any) -> None:
        """The lowest layer looks at what comes from below."""
        if self._truncation_index or torch.compiler.is_compiling():
            return
        if self._truncation.probe is not None:
            self._truncation.probe += tensors_in((args, kwargs))
            raise Reached
        if torch.is_grad_enabled() and self.training:  # type: ignore[attr-defined]
            below = parameters_behind(tensors_in((args, kwargs)))
            if below:
                names = ", ".join(sorted(self._truncation.name_of(parameter) for parameter in below)[:4])
                raise ConflictError(
                    f"{names}: trains below the frozen layers, where backward does not come. Freeze it "
                    "(parameter.requires_grad_(False)), or unfreeze(model) and freeze no layers."
                )

    def _refuse_trained(self, what: str) -> None:
        """What lies below the boundary must not train."""
        if not (torch.is_grad_enabled() and self.training) or torch.compiler.is_compiling():  # type: ignore[attr-defined]
            return
        named = self.named_parameters()  # type: ignore[attr-defined]
        trains = next((name for name, parameter in named if parameter.requires_grad), None)
        if trains is not None:
            raise ConflictError(
                f"{trains} of {what} trains, below the layers where backward stops: an adapter came after the "
                "freezing, or something switched it on again. Call setup_lp_lora_style again now, on the model that "
                "has the adapter (trainer.model), or keep adapters out of the frozen layers: "
                "LoraConfig(exclude_modules=report.exclude_modules)."
            )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self._truncated_class, self._truncation_kind), self.__dict__


class _Beside(_Truncated):
    """A tower or projector whose outputs go into the embeddings."""

    _truncation_kind = "beside"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._refuse_trained(f"the {type(self).__name__} beside the decoder")
        with torch.no_grad():
            return super().__call__(*args, **kwargs)  # type: ignore[misc]


class _FrozenLayer(_Truncated):
    _truncation_kind = "frozen"

    @property
    def gradient_checkpointing(self) -> bool:
        return False

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.__dict__["gradient_checkpointing"] = value  # what it will be again when the layer is given back

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._arriving(args, kwargs)
        self._refuse_trained(f"decoder layer {self._truncation_index}")
        run: Callable[..., Any] = super().__call__  # type: ignore[misc]
        with torch.no_grad():
            shortcut = self._truncation.shortcut
            if shortcut is None:
                return run(*args, **kwargs)
            return shortcut.below(self._truncation_index, run, args, kwargs)


class _BoundaryLayer(_Truncated):
    _truncation_kind = "boundary"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._arriving(args, kwargs)
        hidden_states = (args[0] if args else kwargs["hidden_states"]).detach()
        if self._truncation.shortcut is not None:
            hidden_states = self._truncation.shortcut.at_boundary(hidden_states)
        if torch.is_grad_enabled() and _checkpoints_reentrant(self):
            hidden_states.requires_grad_()
        if args:
            args = (hidden_states, *args[1:])
        else:
            kwargs = kwargs | {"hidden_states": hidden_states}
        return super().__call__(*args, **kwargs)  # type: ignore[misc]


_KINDS: dict[str, type] = {"frozen": _FrozenLayer, "boundary": _BoundaryLayer, "beside": _Beside}
_CLASSES: dict[tuple[type, str], type] = {}


def _subclass(original: type, kind: str) -> type:
    """The layer's class with another `__call__`, under the same name: libraries look for layers by it."""
    if (original, kind) not in _CLASSES:
        names = {"__module__": original.__module__, "__qualname__": original.__qualname__}
        made: Any = type(original.__name__, (_KINDS[kind], original), names | {"_truncated_class": original})
        made.forward = original.forward  # type: ignore[attr-defined]  # transformers wraps that of a subclass anew
        _CLASSES[original, kind] = made
    return _CLASSES[original, kind]


def _rebuild(original: type, kind: str) -> Any:
    made: Any = _subclass(original, kind)
    return made.__new__(made)


def _checkpoints_reentrant(layer: Any) -> bool:
    function = getattr(layer, "_gradient_checkpointing_func", None)
    keywords = getattr(function, "keywords", {})
    return bool(layer.training and getattr(layer, "gradient_checkpointing", False)) and keywords.get(
        "use_reentrant", True
    )


def truncate(model: nn.Module, depth: int, beside: Iterable[nn.Module] = ()) -> Truncation:
    """Make backward stop below decoder layer `depth`: that one is the lowest that it visits.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 16}
    >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **tiny))
    >>> _ = model.model.embed_tokens.requires_grad_(False), model.model.layers[:2].requires_grad_(False)
    >>> _ = truncate(model, 2)
    >>> ids = torch.tensor([[1, 2, 3]])
    >>> model(ids, labels=ids).loss.backward()
    >>> truncated_layers(model)
    2

    Args:
        model: plain, quantised or wrapped by PEFT; its decoder layers are changed in place, until `restore`.
        depth: how many layers lie below the boundary, 0 for none of them.
        beside: frozen modules whose outputs go into the embeddings; they keep nothing for backward either.

    Raises:
        UnsupportedError: no decoder layers are found, or they are truncated already.
    """
    layers = decoder_layers(model)
    if not 0 <= depth < len(layers):
        raise UnsupportedError(f"depth={depth}: it must be at least 0 and less than the model's {len(layers)} layers.")
    if truncation_of(model) is not None:
        raise UnsupportedError("The model's layers are truncated already: restore(model) first.")
    truncation = Truncation(model, depth)
    for index in range(depth):
        _exchange(layers[index], "frozen", truncation, index)
    _exchange(layers[depth], "boundary", truncation, depth)
    for module in beside:
        _exchange(module, "beside", truncation, -1)
    return truncation


def _exchange(module: Any, kind: str, truncation: Truncation, index: int) -> None:
    module.__dict__ |= {"_truncation": truncation, "_truncation_index": index}
    module.__class__ = _subclass(type(module), kind)


def restore(model: nn.Module) -> None:
    """Give the layers their own class back; does nothing where `truncate` was not called."""
    truncation = truncation_of(model)
    if truncation is not None and truncation.on_restore is not None:
        truncation.on_restore()
    modules: list[Any] = list(model.modules())
    for module in modules:
        if isinstance(module, _Truncated):
            module.__class__ = module._truncated_class
            del module.__dict__["_truncation"], module.__dict__["_truncation_index"]


def truncation_of(model: nn.Module) -> Truncation | None:
    """The truncation of a model, None without one.

    Raises:
        UnsupportedError: no decoder layers are found.
    """
    lowest = decoder_layers(model)[0]
    return lowest._truncation if isinstance(lowest, _Truncated) else None


def truncated_layers(model: nn.Module) -> int:
    """How many of the lowest decoder layers backward does not visit, whatever is hooked or checkpointed.

    Raises:
        UnsupportedError: no decoder layers are found.
    """
    truncation = truncation_of(model)
    return 0 if truncation is None else truncation.depth


def layers_in_ratio(freeze_ratio: float, num_layers: int) -> int:
    """How many layers a share is, rounded down; 7 / 10 of ten layers are seven, whatever floats make of it.

    >>> layers_in_ratio(0.5, 5), layers_in_ratio(0.29, 100)
    (2, 29)
    """
    return int(freeze_ratio * num_layers + 1e-9)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def parameters_behind(tensors: Iterator[Tensor]) -> list[nn.Parameter]:
    """The parameters that autograd would reach from some tensors; a leaf that is no parameter is none of them."""
    waiting = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen = set(waiting)
    found = []
    while waiting:
        node = waiting.pop()
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, torch.nn.Parameter):
            found.append(leaf)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return found
