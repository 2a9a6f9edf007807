"""What forge raises.

    ForgeError
    ├── UnknownNameError     a name that nothing answers to
    ├── ConflictError        values that contradict each other
    ├── UnsupportedError     what this model, machine or stack cannot do
    ├── NonFiniteError       a loss, gradient or weight is NaN or infinite
    └── MissingAssetError    the examples' model or data are not in the cache

A `ForgeWarning` (a UserWarning) is something that works and is probably not what you want.

Every message states the value, the rule and the remedy.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class ForgeError(ValueError):
    """The base of everything that forge raises on purpose."""


class UnknownNameError(ForgeError):
    """A name that nothing answers to; the message names the nearest."""

    @classmethod
    def among(cls, what: str, name: str, known: Iterable[str]) -> UnknownNameError:
        """The error for `name`, with its nearest neighbours in `known`, or all of them when nothing is near.

        >>> str(UnknownNameError.among("preset", "qlorra", ["qlora", "lora", "sft", "dpo"]))
        "Unknown preset 'qlorra'. Did you mean 'qlora' or 'lora'?"
        """
        names = sorted(known)
        near = get_close_matches(name, names, n=2, cutoff=0.7)
        if near:
            hint = "Did you mean " + " or ".join(repr(n) for n in near) + "?"
        elif len(names) <= 12:
            hint = "Known: " + ", ".join(names) + "."
        else:
            hint = f"Nothing near it among the {len(names)} known names."
        return cls(f"Unknown {what} {name!r}. {hint}")


class ConflictError(ForgeError):
    """Values that contradict each other."""


class UnsupportedError(ForgeError):
    """What this model, this machine or the installed stack cannot do."""


class NonFiniteError(ForgeError):
    """A loss, a gradient or a weight is NaN or infinite."""


class MissingAssetError(ForgeError):
    """The model or data of the examples are not in the cache and cannot be fetched."""


class ForgeWarning(UserWarning):
    """Something that works, and that is probably not what you want."""
