"""Which decoder layers are to be frozen: a share of them, the lowest so many, or a list."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from numbers import Integral, Real

from ..errors import ConflictError, ForgeError
from ..models.truncation import layers_in_ratio


def select_layers(
    num_layers: int, freeze_ratio: float | None = None, frozen_layers: int | Sequence[int] | None = None
) -> tuple[int, ...]:
    """The indices of the layers to freeze, ascending.

    >>> select_layers(8, 0.5), select_layers(8, frozen_layers=2), select_layers(8, frozen_layers=[7, -8])
    ((0, 1, 2, 3), (0, 1), (0, 7))

    Args:
        num_layers: how many the model has.
        freeze_ratio: the share of the lowest ones, in [0, 1), rounded down; half of them when neither is given.
        frozen_layers: how many of the lowest, or which; negative indices count from the top, as in a list.

    Raises:
        ConflictError: both are given.
        ForgeError: a share, number or index that the model does not have.
    """
    if frozen_layers is None:
        ratio = 0.5 if freeze_ratio is None else freeze_ratio
        if not _is_number(ratio, Real) or not 0 <= ratio < 1:
            raise ForgeError(
                f"freeze_ratio={ratio!r}: it must be at least 0 and less than 1. Of {num_layers} layers, "
                f"freeze_ratio=0.5 freezes {num_layers // 2}; frozen_layers={num_layers // 2} says the same by number."
            )
        return tuple(range(layers_in_ratio(float(ratio), num_layers)))
    if freeze_ratio is not None:
        raise ConflictError("freeze_ratio and frozen_layers say the same thing twice: leave one of them out.")
    if _is_number(frozen_layers, Integral):
        count = operator.index(frozen_layers)  # type: ignore[arg-type]
        if not 0 <= count < num_layers:
            raise ForgeError(
                f"frozen_layers={frozen_layers}: it must be at least 0 and less than the model's {num_layers} layers."
            )
        return tuple(range(count))
    return _from_list(num_layers, frozen_layers)


def _from_list(num_layers: int, chosen: object) -> tuple[int, ...]:
    if isinstance(chosen, (str, bytes, bool)) or not hasattr(chosen, "__iter__"):
        raise ForgeError(
            f"frozen_layers={chosen!r}: it must be a number of layers, or a list of their indices, "
            "such as range(0, 12) or [0, 1, 2]."
        )
    indices = set()
    for index in chosen:
        if not _is_number(index, Integral) or not -num_layers <= index < num_layers:
            raise ForgeError(
                f"frozen_layers holds {index!r}: the model's {num_layers} layers have the indices 0 to "
                f"{num_layers - 1} (or -{num_layers} to -1, from the top)."
            )
        indices.add(int(index) % num_layers)
    if len(indices) == num_layers:
        raise ForgeError(f"frozen_layers names all {num_layers} layers: nothing of them would train. Leave one out.")
    return tuple(sorted(indices))


def _is_number(value: object, kind: type) -> bool:
    """NumPy's numbers count; truth values do not."""
    return isinstance(value, kind) and not isinstance(value, bool)
