"""A base model's tensors: their digests, copies of those that will change, and how each becomes what it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ForgeError
from ..models.tensors import quantization_constants
from .contents import replace
from .digest import Digest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .source import Source

_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
REMEDY = (
    "Pass restore_from=... (the checkpoint that the base was loaded from: its folder or hub id, a state dict, or "
    "another copy of the model), or load the base again."
)


@dataclass
class Weight:
    """One parameter or buffer, under all of its names.

    Args:
        tensor: the object itself.
        names: those of a state dict.
        places: module (None for the root), which of its dictionaries, and the name there.
        digest: of its bytes; None on the meta device.
        constants: the digests of what bitsandbytes keeps beside a packed weight.
        device: where it was.
        requires_grad: whether it trained.
        attributes: its dictionary.
        state: bitsandbytes' state of an int8 layer, and what that held.
        hooks: of its gradients.
        grad: its gradient.
        copy: its value in host memory.
    """

    tensor: Tensor
    names: list[str]
    places: list[tuple[nn.Module | None, str, str]]
    digest: Digest | None
    constants: dict[str, Digest | None]
    device: torch.device
    requires_grad: bool
    attributes: dict[str, Any]
    state: tuple[Any, dict[str, Any]] | None
    hooks: dict[str, Any]
    grad: Tensor | None
    copy: Tensor | None = None

    def is_in(self, tensor: Tensor) -> bool:
        """Whether a tensor has the bytes that this one had, in its dtype or after being cast to it."""
        if self.digest is None or tensor.is_meta:
            return self.digest is None
        if tensor.dtype != self.digest.dtype and tensor.is_floating_point() and self.digest.dtype.is_floating_point:
            tensor = tensor.detach().to(self.digest.dtype)
        if not self.digest.matches(tensor):
            return False
        now = dict(_constants(tensor, self.state[0] if self.state else None))
        return all(
            digest is None or (name in now and digest.matches(now[name])) for name, digest in self.constants.items()
        )

    def is_value(self, value: Tensor) -> bool:
        """Whether a tensor from elsewhere has the bytes that this one had; beside a packed weight all must be there."""
        if self.digest is None or tuple(value.shape) != self.digest.shape:
            return False
        constants = dict(_constants(self.tensor, self.state[0] if self.state else None))
        whole = all(
            each is None or (n in constants and each.matches(constants[n])) for n, each in self.constants.items()
        )
        return whole and self.digest.matches(value.detach().to(self.digest.dtype))

    def keep_copy(self) -> None:
        """Copy the value to host memory, unless there is a copy."""
        if self.copy is None and not self.tensor.is_meta:
            self.copy = self.tensor.detach().as_subclass(torch.Tensor).to("cpu", copy=True)


@dataclass
class Repairs:
    """What has to be done to the tensors once the modules are back.

    Args:
        values: tensors to be given another value.
        moved: tensors that stand where others stood, because the model moved to another device.
        devices: tensors that did not move with the model.
    """

    values: list[tuple[Weight, Tensor]] = field(default_factory=list)
    moved: list[tuple[Weight, Tensor]] = field(default_factory=list)
    devices: list[tuple[Weight, torch.device]] = field(default_factory=list)


class Weights:
    """All tensors of a model.

    Args:
        model: a module without adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        found: dict[int, Weight] = {}
        for prefix, module in model.named_modules():
            for kind in ("_parameters", "_buffers"):
                for name, tensor in getattr(module, kind).items():
                    if tensor is None:
                        continue
                    if id(tensor) not in found:
                        found[id(tensor)] = _read(module, tensor)
                    found[id(tensor)].names.append(f"{prefix}.{name}" if prefix else name)
                    found[id(tensor)].places.append((None if module is model else module, kind, name))
        self._all = list(found.values())

    def __iter__(self) -> Iterator[Weight]:
        return iter(self._all)

    def below(self, modules: Iterable[str]) -> list[Weight]:
        """Those in some modules, by the modules' names or those of parameters."""
        prefixes = tuple(f"{name}." for name in modules)
        return [each for each in self._all if any(f"{name}.".startswith(prefixes) for name in each.names)]

    def copied_bytes(self) -> int:
        """How much host memory the copies take."""
        return sum(each.copy.nbytes for each in self._all if each.copy is not None)

    def repairs(self, model: nn.Module, source: Source | None) -> Repairs:
        """What has to be done; nothing is changed.

        Args:
            model: that these are of.
            source: where to find the values that were not copied.

        Raises:
            ForgeError: a value has changed that was not copied, and is not in the source.
        """
        repairs, changed = Repairs(), []
        for each in self._all:
            now = _standing(model, each)
            if now is not None and now is not each.tensor and now.device != each.tensor.device and not now.is_meta:
                if now.dtype == each.tensor.dtype and each.is_in(now):
                    repairs.moved.append((each, now))
                    continue
                repairs.devices.append((each, now.device))
            if each.is_in(each.tensor):
                continue
            value = next((value for value in _candidates(each, source) if each.is_value(value)), None)
            if value is None:
                changed.append(each.names[0])
            else:
                repairs.values.append((each, value))
        if changed:
            raise ForgeError(_message(changed, source))
        return repairs

    def put_back(self, model: nn.Module, repairs: Repairs) -> None:
        """Give the tensors what they had, once the modules have their own tensors again."""
        for each in self._all:
            _put_back(each)
        with torch.no_grad():
            for each, value in repairs.values:
                _give(each.tensor, value)
            for each, device in repairs.devices:
                _move(each.tensor, device)
            for each, tensor in repairs.moved:
                for module, kind, name in each.places:
                    getattr(model if module is None else module, kind)[name] = tensor


def _read(module: nn.Module, tensor: Any) -> Weight:
    state = getattr(module, "state", None)
    state = state if type(state).__name__ == "MatmulLtState" else None
    return Weight(
        tensor=tensor,
        names=[],
        places=[],
        digest=Digest.of(tensor),
        constants={name: Digest.of(value) for name, value in _constants(tensor, state)},
        device=tensor.device,
        requires_grad=tensor.requires_grad,
        attributes=dict(vars(tensor)),
        state=None if state is None else (state, dict(vars(state))),
        hooks={name: dict(hooks) for name in _HOOKS if (hooks := getattr(tensor, name, None))},
        grad=tensor.grad if tensor.is_leaf else None,
    )


def _constants(tensor: Any, state: Any) -> Iterator[tuple[str, Tensor]]:
    """Those of bitsandbytes; an int8 layer moves them from its weight to its state when it first runs."""
    found = dict(quantization_constants("", tensor))
    for name in ("CB", "SCB"):
        value = getattr(state, name, None)
        if isinstance(value, torch.Tensor):
            found.setdefault(f".{name}", value)
    yield from found.items()


def _standing(model: nn.Module, weight: Weight) -> Tensor | None:
    """What stands now where the tensor stood."""
    module, kind, name = weight.places[0]
    now: Tensor | None = getattr(model if module is None else module, kind).get(name)
    return now


def _candidates(weight: Weight, source: Source | None) -> Iterator[Tensor]:
    if weight.copy is not None:
        yield weight.copy
    rows = weight.digest.shape[0] if weight.digest is not None and weight.digest.shape else 0
    if 0 < rows < weight.tensor.shape[0]:  # embeddings that were resized meanwhile have their old rows first
        yield weight.tensor.detach()[:rows]
    found = source.find(weight.names) if source is not None else None
    if found is not None:
        yield found


def _put_back(weight: Weight) -> None:
    tensor: Any = weight.tensor
    same_device = tensor.device == weight.device
    if weight.digest is not None and tensor.dtype != weight.digest.dtype and not tensor.is_meta:
        tensor.data = tensor.data.to(weight.digest.dtype)
    if weight.state is None or same_device:  # what bitsandbytes keeps beside an int8 weight moved with it
        replace(vars(tensor), weight.attributes)
        if weight.state is not None:
            replace(vars(weight.state[0]), weight.state[1])
    if tensor.is_leaf:
        tensor.requires_grad_(weight.requires_grad)
        tensor.grad = weight.grad if same_device else None
    for name in _HOOKS:
        hooks = getattr(tensor, name, None)
        if hooks:
            hooks.clear()
            hooks.update(weight.hooks.get(name, {}))


def _give(tensor: Any, value: Tensor) -> None:
    if tensor.shape == value.shape:
        tensor.detach().as_subclass(torch.Tensor).copy_(value)
    else:
        tensor.data = value.detach().to(tensor.device, tensor.dtype, copy=True)


def _move(tensor: Any, device: torch.device) -> None:
    state = getattr(tensor, "quant_state", None)
    tensor.data = tensor.data.to(device)
    if state is not None:
        state.to(device)


def _message(changed: list[str], source: Source | None) -> str:
    shown = ", ".join(changed[:4]) + (f" and {len(changed) - 4} more" if len(changed) > 4 else "")
    what = f"{shown}: changed since the adapter was attached, and no copy was kept"
    if source is not None:
        return (
            f"{what}; restore_from has no values there that are those of the base (by their digests). Pass the very "
            "checkpoint that the base was loaded from, or load the base again. The model is left as it is."
        )
    return (
        f"{what} (an adapter merged into the weights, a parameter made trainable, another adapter that rewrites "
        f"weights). {REMEDY} The model is left as it is."
    )
