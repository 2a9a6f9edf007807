"""Judgements on one number per step: a spike, a loss that stands still, a learning rate that stays zero."""

from __future__ import annotations

import math
from collections import deque

WINDOW = 128
ACTIVE_AFTER = 64
SIGMAS = 6.0
FLAT_STEPS = 64
ZERO_RATE_STEPS = 10


class SpikeDetector:
    """Whether a value lies more than 6 standard deviations above the mean of the last 128; active after 64.

    A spike enters the window cut to the limit, so that it hides no second one and a level that really moved is
    accepted in the end.

    >>> detector = SpikeDetector()
    >>> any(detector.is_spike(2.0 + 0.01 * (step % 7)) for step in range(100))
    False
    >>> detector.is_spike(4.0)
    True
    >>> detector.is_spike(1.0)  # below is no spike
    False
    """

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=WINDOW)
        self.mean = math.nan
        self.limit = math.inf
        self.steps = 0

    def is_spike(self, value: float) -> bool:
        """Judge a finite value, then remember it."""
        spike = False
        if len(self._values) >= ACTIVE_AFTER:
            self.steps = len(self._values)
            self.mean = sum(self._values) / len(self._values)
            variance = sum((seen - self.mean) ** 2 for seen in self._values) / len(self._values)
            # Values that hardly differ at all would make every change a spike.
            self.limit = self.mean + SIGMAS * max(math.sqrt(variance), 1e-3 * abs(self.mean))
            spike = value > self.limit
        self._values.append(min(value, self.limit) if spike else value)
        return spike


class FlatDetector:
    """Whether the last 64 values are all the same, to 1e-6 of their size.

    >>> detector = FlatDetector()
    >>> [detector.is_flat(2.5) for _ in range(64)][-2:]
    [False, True]
    """

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=FLAT_STEPS)

    def is_flat(self, value: float) -> bool:
        """Remember a finite value, then judge."""
        self._values.append(value)
        if len(self._values) < FLAT_STEPS:
            return False
        low, high = min(self._values), max(self._values)
        return high - low <= 1e-6 * max(abs(low), abs(high))


class ZeroRun:
    """Whether a value was exactly zero ten times in a row.

    >>> zeros = ZeroRun()
    >>> [zeros.is_stuck(0.0) for _ in range(10)][-2:]
    [False, True]
    """

    def __init__(self) -> None:
        self._length = 0

    def is_stuck(self, value: float) -> bool:
        """Count a value, then judge."""
        self._length = self._length + 1 if value == 0 else 0
        return self._length >= ZERO_RATE_STEPS
