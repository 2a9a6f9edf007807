"""What objects hold, remembered so that it can be put back into the very same objects."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from enum import Enum
from types import ModuleType
from typing import Any

_CONTAINERS = (dict, OrderedDict, list, set)


class Contents:
    """The contents of configs and of all that lies in them: other objects of theirs, dictionaries, lists.

    What is put back are the same objects with the same values: modules share a config's parts, and each looks at the
    one that it was built with.

    >>> class Config: pass
    >>> config = Config()
    >>> config.use_cache, config.rope = True, {"theta": 1e4}
    >>> contents = Contents([config])
    >>> config.use_cache = config.rope["theta"] = config.later = False
    >>> contents.put_back()
    >>> vars(config)
    {'use_cache': True, 'rope': {'theta': 10000.0}}

    Args:
        roots: where to begin.
    """

    def __init__(self, roots: Iterable[Any]) -> None:
        self._objects: list[tuple[Any, dict[str, Any]]] = []
        self._containers: list[tuple[Any, Any]] = []
        seen: set[int] = set()
        waiting = list(roots)
        while waiting:
            found = waiting.pop()
            if id(found) in seen:
                continue
            seen.add(id(found))
            if is_container(found):
                self._containers.append((found, copy_of(found)))
                waiting += found.values() if isinstance(found, dict) else found
            elif _has_contents(found):
                self._objects.append((found, dict(vars(found))))
                waiting += vars(found).values()

    def put_back(self) -> None:
        """Give all of them what they held."""
        for found, values in self._objects:
            replace(vars(found), values)
        for found, values in self._containers:
            refill(found, values)


def is_container(value: Any) -> bool:
    """Whether a value is one of Python's own containers that can be emptied and filled."""
    return type(value) in _CONTAINERS


def copy_of(container: Any) -> Any:
    """A shallow copy."""
    return container.copy()


def refill(container: Any, values: Any) -> None:
    """Give a container other contents."""
    if isinstance(container, list):
        container[:] = values
    else:
        container.clear()
        container.update(values)


def replace(namespace: dict[str, Any], values: dict[str, Any]) -> None:
    """Make an object's dictionary hold some values, in their order."""
    if list(namespace) != list(values) or any(namespace[name] is not value for name, value in values.items()):
        namespace.clear()
        namespace.update(values)


def _has_contents(value: Any) -> bool:
    """Whether a value is a plain object: no module, no tensor, nothing that others may share beside a config."""
    import torch

    others = (type, ModuleType, Enum, torch.nn.Module, torch.Tensor, torch.dtype, torch.device)
    return hasattr(value, "__dict__") and not callable(value) and not isinstance(value, others)
