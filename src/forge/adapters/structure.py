"""What a model is made of beside its weights: classes, children, hooks, flags, patched methods, configs."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .contents import Contents, copy_of, is_container, refill, replace

if TYPE_CHECKING:
    from torch import nn


@dataclass
class _Module:
    """One module: its class, its dictionary, and what the containers in that dictionary held."""

    module: nn.Module | None  # None for the root
    own_class: type
    values: dict[str, Any]
    containers: list[tuple[Any, Any]] = field(default_factory=list)


class Structure:
    """All modules of a model as they are, and back again.

    The very same objects come back: parameters that were tied are tied, a hook's handle still removes it, and whatever
    was put into a module since (adapters, hooks, a patched `forward`, flags of checkpointing) is out of it.

    The root is not kept alive: this can lie in the model's own dictionary without a circle.

    Args:
        model: a module without adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._root = weakref.ref(model)
        self._modules = [_read(module, root=module is model) for module in model.modules()]
        self._contents = Contents(found for each in self._modules for found in _configs(each.values))

    def belongs_to(self, model: nn.Module) -> bool:
        """Whether this is the model that was read."""
        return self._root() is model

    def put_back(self, model: nn.Module) -> None:
        """Make the model what it was.

        Args:
            model: the one that was read.
        """
        for each in self._modules:
            module: Any = model if each.module is None else each.module
            if type(module) is not each.own_class:
                module.__class__ = each.own_class
            for container, values in each.containers:
                refill(container, values)
            replace(vars(module), each.values)
        self._contents.put_back()


def _read(module: nn.Module, *, root: bool) -> _Module:
    values = dict(vars(module))
    found = _Module(None if root else module, type(module), values)
    for name, value in values.items():
        # What the class holds is shared with other models.
        if is_container(value) and getattr(type(module), name, None) is not value:
            found.containers.append((value, copy_of(value)))
    return found


def _configs(values: dict[str, Any]) -> list[Any]:
    """The configs in a module's dictionary."""
    from transformers import GenerationConfig, PreTrainedConfig

    return [value for value in values.values() if isinstance(value, (PreTrainedConfig, GenerationConfig))]
