"""Token counts of many rows in a few numbers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Lengths:
    """Tokens in the rows of a split: the shortest, the middle, the 95th percentile, the longest, all together."""

    min: int
    median: int
    p95: int
    max: int
    total: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Lengths:
        """Sum up; percentiles are lengths that occur (nearest rank).

        >>> Lengths.of([1, 2, 3, 4])
        Lengths(min=1, median=2, p95=4, max=4, total=10)
        """
        if not lengths:
            return cls(0, 0, 0, 0, 0)
        ordered = sorted(lengths)
        rank = [ordered[max(0, -(-percent * len(ordered) // 100) - 1)] for percent in (50, 95)]
        return cls(ordered[0], rank[0], rank[1], ordered[-1], sum(ordered))


def counted(number: int, noun: str) -> str:
    """A number of things, in words.

    >>> counted(1, "row"), counted(2000, "row")
    ('1 row', '2,000 rows')
    """
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def lost(lengths: Sequence[int], max_length: int) -> tuple[int, int]:
    """How many rows are longer, and how many tokens they have beyond it.

    >>> lost([5, 10, 20], 8)
    (2, 14)
    """
    beyond = [length - max_length for length in lengths if length > max_length]
    return len(beyond), sum(beyond)


def shortest_that_keeps(lengths: Sequence[int], share: float = 0.99) -> int:
    """The smallest `max_length` that keeps this share of all tokens.

    >>> shortest_that_keeps([10] * 99 + [1000])
    981
    """
    ordered = sorted(lengths)
    if not ordered:
        return 0
    sums = [0, *accumulate(ordered)]
    low, high = 1, ordered[-1]
    while low < high:
        middle = (low + high) // 2
        shorter = bisect_right(ordered, middle)
        kept = sums[shorter] + middle * (len(ordered) - shorter)
        low, high = (low, middle) if kept >= share * sums[-1] else (middle + 1, high)
    return low
