"""What a base model was when an adapter was attached, kept in the base's own dictionary until it is brought back."""

from __future__ import annotations

import warnings
import weakref
from typing import TYPE_CHECKING, Any

from ..errors import ForgeWarning
from ..models.truncation import truncation_of
from .structure import Structure
from .weights import Repairs, Weights

if TYPE_CHECKING:
    from torch import nn

    from .source import Source

_KEPT = "_forge_memento"


class Memento:
    """A base model's modules, flags, hooks, configs and the digests of its tensors.

    It knows nothing of what comes later, so it keeps none of it alive; it does not hold the base itself, so the two
    are no circle. A copy of the model has none, and neither has a pickled one: it would restore the wrong model.

    Args:
        base: a model without adapters.
    """

    def __init__(self, base: nn.Module) -> None:
        self.structure = Structure(base)
        self.weights = Weights(base)
        self._wrapper: weakref.ref[nn.Module] | None = None

    def __reduce__(self) -> Any:
        return _nothing, ()

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def keep(self, base: nn.Module, wrapper: nn.Module) -> None:
        """Lay it into the base's dictionary; `wrapper` is the PeftModel around it."""
        self._wrapper = weakref.ref(wrapper)
        vars(base)[_KEPT] = self

    def is_of_another(self, model: nn.Module) -> bool:
        """Whether a PeftModel is another one than this was taken for."""
        wrapper = self._wrapper() if self._wrapper is not None else None
        return wrapper is not None and all(each is not wrapper for each in model.modules())  # it may be nested

    def put_back_structure(self, base: nn.Module) -> None:
        """Undo what PEFT did to the modules and their flags, where it left all values alone."""
        self.structure.put_back(base)
        self.weights.put_back(base, Repairs())

    def put_back(self, base: nn.Module, source: Source | None) -> None:
        """Make the base what it was.

        Raises:
            ForgeError: a value has changed that was not copied, and is not in the source. Nothing is changed then.
        """
        repairs = self.weights.repairs(base, source)
        end_prefix_cache(base)
        self.structure.put_back(base)
        self.weights.put_back(base, repairs)


def memento_of(base: nn.Module) -> Memento | None:
    """That of a base model, None where no adapter was attached by forge, or in a copy."""
    found: Memento | None = vars(base).get(_KEPT)
    return found if found is not None and found.structure.belongs_to(base) else None


def _nothing() -> None:
    return None


def end_prefix_cache(base: nn.Module) -> None:
    """Detach the PrefixCache that serves the base's frozen layers, and bring what it moved to the host back."""
    if "_forge_freezing" not in vars(base):
        return
    truncation = truncation_of(base)
    if truncation is not None and truncation.on_restore is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ForgeWarning)  # that it was detached: the run that it was for is over
            truncation.on_restore()
