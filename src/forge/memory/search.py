"""The largest batch, the longest row: a search over estimates, which grow with both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ..errors import ForgeError

if TYPE_CHECKING:
    from .result import MemoryEstimate

_STEP = 128  # tokens; kernels work in tiles, and a finer answer would be finer than the estimate


def largest(
    estimate: MemoryEstimate, gpu: str | int, what: Literal["batch_size", "sequence_length"], limit: int
) -> int:
    """The largest value that fits, by estimates that guess from a straight line and halve what is left.

    Args:
        estimate: of any batch; its values are the starting point.
        gpu: as for `MemoryEstimate.fits`.
        what: which number to raise.
        limit: the most that is tried.
    """
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise ForgeError(f"limit={limit!r}: it must be a whole number of at least 1.")
    usable = estimate.card(gpu).usable_bytes
    unit = _STEP if what == "sequence_length" else 1
    needs: dict[int, int] = {getattr(estimate, what): estimate.heaviest.bytes.high}

    def fits(value: int) -> bool:
        if value not in needs:
            needs[value] = estimate.at(**{what: value}).heaviest.bytes.high
        return needs[value] <= usable

    floor = 2 if what == "sequence_length" else 1
    if not fits(floor):
        return 0
    fitting, too_large = floor, limit // unit * unit + unit
    while too_large - fitting > unit:
        guess = _between(needs, usable, fitting, too_large, unit)
        if fits(guess):
            fitting = guess
        else:
            too_large = guess
    return fitting


def _between(needs: dict[int, int], usable: int, fitting: int, too_large: int, unit: int) -> int:
    """Where a line through the two nearest known points meets the limit, kept inside and on the grid."""
    known = sorted(needs, key=lambda value: abs(needs[value] - usable))[:2]
    guess = (fitting + too_large) // 2
    if len(known) == 2 and needs[known[0]] != needs[known[1]]:
        slope = (needs[known[1]] - needs[known[0]]) / (known[1] - known[0])
        if slope > 0:
            guess = int(known[0] + (usable - needs[known[0]]) / slope)
    lowest, highest = fitting // unit * unit + unit, too_large - 1
    return min(max(guess // unit * unit, lowest), max(lowest, highest // unit * unit))
