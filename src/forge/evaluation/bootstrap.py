"""How far a mean over samples, or a difference of two, could be off: the percentile bootstrap.

Samples are drawn again, with replacement and as many as there are, and the statistic is computed each time; the middle
95% of what comes out is the interval (Efron and Tibshirani 1993, chapter 13). Two systems are compared on the same
draws: samples differ far more than systems do, and what is hard for both cancels (Koehn 2004, "Statistical significance
tests for machine translation evaluation").

The percentile interval is a little narrow on few samples, as it takes their spread for that of all there could be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ConflictError, ForgeError
from .combined import is_finite_number

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Numbers = Sequence[float] | NDArray[np.floating[Any]]

# Indices drawn at once: 8 MiB of them.
_AT_ONCE = 2**20


@dataclass(frozen=True)
class Interval:
    """A mean and where it may lie.

    Args:
        low: the interval's lower end; minus infinity for a single sample, which says nothing of others.
        mean: of the samples.
        high: its upper end.
    """

    low: float
    mean: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Difference:
    """What one system has more than another, on the same samples.

    Args:
        mean: the first's mean less the second's.
        low: the interval's lower end; minus infinity where so few samples cannot show a difference.
        high: its upper end.
        p_value: two-sided: how often draws fall on the other side of 0, and at least what that many samples can show.
    """

    mean: float
    low: float
    high: float
    p_value: float

    @property
    def is_tie(self) -> bool:
        """Whether the interval contains 0: the samples do not tell which is better."""
        return self.low <= 0 <= self.high

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def bootstrap_interval(
    values: Numbers, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """The mean of samples, with its percentile interval.

    >>> print(bootstrap_interval([0.7, 0.8, 0.9, 0.8, 0.8, 0.8]))
    0.800 [0.750, 0.850]

    Args:
        values: One number a sample.
        confidence: Of the interval, between 0 and 1.
        resamples: How often to draw.
        seed: Of the draws; the same seed gives the same interval.

    Raises:
        ConflictError: No values, or one that is missing or not finite.
        ForgeError: A confidence, number or seed that is none.
    """
    found = _numbers("values", values)
    check_bootstrap(confidence, resamples, seed)
    mean = math.fsum(found) / len(found)
    if len(found) == 1:
        return Interval(-math.inf, mean, math.inf)
    low, high = percentiles(resampled_sums([(found - mean)[:, None] / len(found)], resamples, seed)[:, 0], confidence)
    return Interval(mean + low, mean, mean + high)


def paired_bootstrap(
    a: Numbers,
    b: Numbers,
    *,
    weights: Numbers | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """How much the mean of `a` is above that of `b`, on the same samples, with the interval of the difference.

    >>> print(paired_bootstrap([0.9, 0.8, 0.7, 0.9, 0.8, 0.7], [0.8, 0.7, 0.7, 0.8, 0.8, 0.6]))
    +0.067 [+0.033, +0.100]

    Args:
        a: One number a sample.
        b: Those of the other system, in the same order.
        weights: What each sample counts, such as its tokens; they are drawn with the samples. None for equally much.
        confidence: Of the interval.
        resamples: How often to draw.
        seed: Of the draws.

    Raises:
        ConflictError: Unequal numbers, none, or one that is missing or not finite; weights that are not positive.
        ForgeError: A confidence, number or seed that is none.
    """
    import numpy as np

    first, second = _numbers("a", a), _numbers("b", b)
    check_bootstrap(confidence, resamples, seed)
    weight = np.ones(len(first)) if weights is None else _numbers("weights", weights)
    if not len(first) == len(second) == len(weight):
        raise ConflictError(
            f"{len(first)}, {len(second)} and {len(weight)} values: a, b and the weights belong to the same samples."
        )
    if not (weight > 0).all():
        raise ConflictError(f"weights[{int((weight <= 0).argmax())}]={weight.min()!r}: weights are positive.")
    gain = first - second
    mean = math.fsum(weight * gain) / math.fsum(weight)
    draws = resampled_sums([np.stack([weight * (gain - mean), weight], axis=1)], resamples, seed)
    return difference(mean, mean + draws[:, 0] / draws[:, 1], len(gain), confidence)


def difference(mean: float, draws: NDArray[np.floating[Any]], samples: int, confidence: float) -> Difference:
    """The difference from what it was in each draw.

    Few samples that all favour one system would always seem to tell: by chance alone, n do so in 2 of 2^n cases. Where
    that is more often than the interval may be wrong, it is unbounded.

    Args:
        mean: The difference itself.
        draws: What it was in each draw.
        samples: How many samples it rests on.
        confidence: Of the interval.
    """
    least = 2.0 ** (1 - samples)
    sides = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    p_value = min(1.0, max(least, 2 * (sides + 1) / (len(draws) + 1)))
    if samples < fewest_samples(confidence):
        return Difference(mean, -math.inf, math.inf, p_value)
    low, high = percentiles(draws, confidence)
    return Difference(mean, low, high, p_value)


def fewest_samples(confidence: float) -> int:
    """With how many samples, all favouring one system, that is less likely by chance than an interval may be wrong.

    >>> fewest_samples(0.95), fewest_samples(0.9)
    (6, 5)
    """
    return math.ceil(1 - math.log2(1 - confidence))


def percentiles(draws: NDArray[np.floating[Any]], confidence: float) -> tuple[float, float]:
    """Where the middle share of the draws ends."""
    import numpy as np

    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def resampled_sums(strata: Sequence[NDArray[np.floating[Any]]], resamples: int, seed: int) -> NDArray[np.floating[Any]]:
    """Draw rows with replacement, each stratum by itself and as many as it has, and add them up.

    Args:
        strata: Arrays of (samples, columns); all columns of a stratum see the same draws.
        resamples: How often.
        seed: Of the draws.

    Returns:
        The sums over all strata, (resamples, columns).
    """
    import numpy as np

    total = np.zeros((resamples, strata[0].shape[1]))
    for number, values in enumerate(strata):
        generator = np.random.default_rng([seed, number])
        count = len(values)
        step = max(1, _AT_ONCE // max(1, count))
        columns = np.ascontiguousarray(values.T)
        for start in range(0, resamples if count else 0, step):
            drawn = generator.integers(count, size=(min(step, resamples - start), count))
            for column, own in enumerate(columns):
                total[start : start + len(drawn), column] += own[drawn].sum(axis=1)
    return total


def check_bootstrap(confidence: float, resamples: int, seed: int) -> None:
    """Refuse what is no confidence, number of draws or seed."""
    if not is_finite_number(confidence) or not 0 < confidence < 1:
        raise ForgeError(f"confidence={confidence!r}: give a number between 0 and 1, such as 0.95.")
    if isinstance(resamples, bool) or not isinstance(resamples, int) or resamples < 100:
        raise ForgeError(f"resamples={resamples!r}: give a whole number of at least 100; 10,000 is usual.")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ForgeError(f"seed={seed!r}: give a whole number of at least 0.")


def _numbers(name: str, values: Numbers) -> NDArray[np.floating[Any]]:
    import numpy as np

    found = list(values)
    if not found:
        raise ConflictError(f"{name} is empty: there must be at least one sample.")
    for place, value in enumerate(found):
        if not is_finite_number(value):
            raise ConflictError(
                f"{name}[{place}] is {value!r}: each sample has a finite number; leave out what has none."
            )
    return np.asarray(found, dtype=np.float64)
