"""What a parameter may be: one of some values, a range of numbers, or one value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import ConflictError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

_PLAIN = (str, int, float, bool, type(None))


@dataclass(frozen=True)
class Choice:
    """One of some values.

    Args:
        values: that it may have; lists among them are tuples.
    """

    values: tuple[Any, ...]

    def distribution(self) -> BaseDistribution:
        """As Optuna knows it: values that it cannot hold are named by their text."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution([_key(value) for value in self.values])

    def value(self, raw: Any) -> Any:
        """What a raw value stands for."""
        return next(_listed(value) for value in self.values if _key(value) == raw)

    def raw(self, value: Any) -> Any:
        """What stands for a value: of numbers the nearest, None where there is none."""
        own = [each for each in self.values if each == value]
        if own:
            return _key(own[0])
        numbers = [each for each in self.values if _is_number(each)]
        if not _is_number(value) or not numbers:
            return None
        return min(numbers, key=lambda each: abs(each - value))

    def to_dict(self) -> Any:
        """As JSON knows it."""
        return [_listed(value) for value in self.values]


@dataclass(frozen=True)
class Range:
    """A range of numbers.

    Args:
        low: the least.
        high: the greatest.
        log: whether equal ratios are equally likely.
        step: between two values, where not all are allowed.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def whole(self) -> bool:
        """Whether it is of whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def distribution(self) -> BaseDistribution:
        """As Optuna knows it."""
        from optuna.distributions import FloatDistribution, IntDistribution

        if self.whole:
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)

    def value(self, raw: Any) -> Any:
        """What a raw value stands for."""
        return raw

    def raw(self, value: Any) -> Any:
        """The value, within the range."""
        if not _is_number(value):
            return None
        inside = min(max(value, self.low), self.high)
        if self.step:
            inside = min(self.low + round((inside - self.low) / self.step) * self.step, self.high)
        return round(inside) if self.whole else float(inside)

    def to_dict(self) -> Any:
        """As JSON knows it."""
        found: dict[str, Any] = {"low": self.low, "high": self.high}
        return found | ({"log": True} if self.log else {}) | ({"step": self.step} if self.step else {})


@dataclass(frozen=True)
class Fixed:
    """One value.

    Args:
        only: the value.
    """

    only: Any

    def to_dict(self) -> Any:
        """As JSON knows it."""
        return _listed(self.only)


Dimension = Choice | Range | Fixed


def dimension(given: Any) -> Dimension:
    """What a caller gave: a list of values, `{"low": ..., "high": ...}`, one of Optuna's distributions, or one value.

    >>> dimension([8, 16])
    Choice(values=(8, 16))
    >>> dimension({"low": 1e-5, "high": 1e-3, "log": True})
    Range(low=1e-05, high=0.001, log=True, step=None)
    >>> dimension(0.1)
    Fixed(only=0.1)

    Raises:
        ConflictError: it is none of them; the message has the rule and the remedy.
    """
    if isinstance(given, (Choice, Range, Fixed)):
        return given
    kind = type(given).__name__
    if kind == "CategoricalDistribution":
        return _choice(given.choices)
    if kind in ("FloatDistribution", "IntDistribution"):
        step = None if kind == "IntDistribution" and given.step == 1 else given.step
        return _range({"low": given.low, "high": given.high, "log": given.log, "step": step})
    if isinstance(given, Mapping):
        return _range(given)
    if isinstance(given, (list, tuple, set, frozenset, range)):
        return _choice(sorted(given) if isinstance(given, (set, frozenset)) else tuple(given))
    if isinstance(given, _PLAIN):
        return Fixed(given)
    raise ConflictError(
        "it must be a list of values, a range such as {'low': 1e-5, 'high': 1e-3, 'log': True}, a distribution of "
        "Optuna's, or one value."
    )


def _choice(values: Sequence[Any]) -> Dimension:
    held = tuple(dict.fromkeys(_held(value) for value in values))
    if not held:
        raise ConflictError("there is nothing in it to choose from. Give some values, or leave it out.")
    return Choice(held) if len(held) > 1 else Fixed(held[0])


def _range(given: Mapping[str, Any]) -> Dimension:
    if not {"low", "high"} <= given.keys() <= {"low", "high", "log", "step"}:
        raise ConflictError("a range has low and high, and perhaps log and step: {'low': 0.0, 'high': 0.1}.")
    low, high, log, step = given["low"], given["high"], given.get("log") or False, given.get("step")
    if not _is_number(low) or not _is_number(high) or not low <= high:
        raise ConflictError("low and high must be numbers, and low no more than high.")
    if not isinstance(log, bool) or (log and low <= 0):
        raise ConflictError("log must be True or False, and a logarithmic range begins above 0.")
    if step is not None and (log or not _is_number(step) or step <= 0):
        raise ConflictError("step must be a number above 0, and cannot stand beside log=True.")
    if low == high:
        return Fixed(low)
    whole = all(isinstance(each, int) for each in (low, high))
    if step is not None and whole and not isinstance(step, int):
        raise ConflictError("step must be a whole number where low and high are; for shares write low=1.0, say.")
    if step is not None and abs((high - low) / step - round((high - low) / step)) > 1e-9:
        raise ConflictError("high must lie a whole number of steps above low: {'low': 4, 'high': 64, 'step': 4}.")
    return Range(low if whole else float(low), high if whole else float(high), log, step)


def _held(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_held(one) for one in value)
    if not isinstance(value, _PLAIN):
        raise ConflictError(f"{value!r:.60} is no value that JSON holds. Give text, numbers, True, False or lists.")
    return value


def _listed(value: Any) -> Any:
    return [_listed(one) for one in value] if isinstance(value, tuple) else value


def _key(value: Any) -> Any:
    return "+".join(map(str, value)) if isinstance(value, tuple) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
