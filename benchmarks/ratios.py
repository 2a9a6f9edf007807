"""Ratios of measurements that were made side by side."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def ratios(mine: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """The median and the quartiles of the ratios within a round.

    >>> ratios([1.0, 2.0, 3.0, 8.0, 5.0], [2.0, 4.0, 4.0, 8.0, 5.0])
    {'median': 0.75, 'low': 0.5, 'high': 1.0}
    """
    found = [one / other for one, other in zip(mine, base, strict=True)]
    low, _, high = statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3
    return {"median": round(statistics.median(found), 4), "low": round(low, 4), "high": round(high, 4)}
