"""Values that nobody can change behind a config's back, and how they are shown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from enum import Enum
from numbers import Integral, Real
from typing import Any

from ...reporting.private import without_credentials


class FrozenMapping(Mapping[str, Any]):
    """A mapping that cannot be changed, and neither can what it holds; hashable, comparable, picklable.

    >>> held = FrozenMapping({"lora_r": 32, "target_modules": ["q_proj"]})
    >>> held["target_modules"], held == {"lora_r": 32, "target_modules": ("q_proj",)}
    (('q_proj',), True)

    Args:
        items: Plain values; lists and sets become tuples.
    """

    __slots__ = ("_held",)
    _held: dict[str, Any]

    def __init__(self, items: Mapping[str, Any] | None = None) -> None:
        object.__setattr__(self, "_held", {name: frozen(value) for name, value in (items or {}).items()})

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{name}: a FrozenMapping cannot be changed. Make another.")

    def __getitem__(self, name: str) -> Any:
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __hash__(self) -> int:
        return hash(frozenset(self._held.items()))

    def __repr__(self) -> str:
        return repr(plain(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenMapping, (self._held,)


def frozen(value: Any) -> Any:
    """The value so that nobody can change it.

    Raises:
        TypeError: It is none of those that JSON holds; the message says which.
    """
    if isinstance(value, Enum):
        value = value.value
    if value is None or isinstance(value, (bool, FrozenMapping, str, Integral, Real)):
        return _simple(value)
    if isinstance(value, Mapping):
        if others := [name for name in value if not isinstance(name, str)]:
            raise TypeError(f"the name {others[0]!r} is no text")
        return FrozenMapping(value)
    if isinstance(value, (list, tuple)):
        return tuple(frozen(one) for one in value)
    if isinstance(value, (set, frozenset)):
        return tuple(sorted((frozen(one) for one in value), key=repr))
    raise TypeError(f"a {type(value).__name__} cannot be written to the run's folder")


def _simple(value: Any) -> Any:
    """NumPy's numbers and texts of one's own as Python's."""
    if isinstance(value, str):
        return str(value)
    if value is None or isinstance(value, (bool, FrozenMapping)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if not math.isfinite(value):
        raise TypeError(f"{float(value)} is not finite")
    return float(value)


def plain(value: Any) -> Any:
    """A frozen value as JSON knows it: dicts and lists, that the caller may change.

    >>> plain(frozen({"target_modules": {"v_proj", "q_proj"}}))
    {'target_modules': ['q_proj', 'v_proj']}
    """
    if isinstance(value, Mapping):
        return {name: plain(held) for name, held in value.items()}
    return [plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def shown(value: Any) -> str:
    """A value as an error or a `repr` shows it: short, and without credentials."""
    text = without_credentials(repr(value))
    return text if len(text) <= 100 else f"{text[:97]}..."
