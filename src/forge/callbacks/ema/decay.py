"""How fast the average forgets: decays, half-lives and the warm-up between them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from math import inf, log
from numbers import Real

from ...errors import ConflictError, ForgeError, ForgeWarning

HALF_LIFE_SHARE = 0.05
"""The default half-life as a share of `max_steps`. An exponential profile with a half-life of h has a mean age, and a
standard deviation, of h / ln 2: 7% of training here. Karras et al. (arXiv:2312.02696, fig. 5) found the best widths
between about 5% and 15% of training, for image models; how it does on fine-tuning is a study of its own."""


@dataclass(frozen=True)
class Decay:
    """What an average keeps of itself, as a function of how often it was updated.

    >>> decay = Decay.from_half_life(10)
    >>> round(decay.per_step ** 10, 6)
    0.5
    >>> [round(decay.at(n), 3) for n in (0, 10, 1000)]
    [0.1, 0.55, 0.933]

    Args:
        per_step: The decay over one optimizer step, in (0, 1).
        update_every: Optimizer steps from one update to the next; one update then decays by `per_step ** update_every`.
        warmup: Whether early updates forget faster, by `min(decay, (1 + n) / (10 + n))` for the n-th, counted from 0
            (TensorFlow's `ExponentialMovingAverage(num_updates=...)`): else the average of a short run is mostly the
            weights it began with.
    """

    per_step: float
    update_every: int = 1
    warmup: bool = False

    @classmethod
    def from_half_life(cls, steps: float, *, update_every: int = 1) -> Decay:
        """The decay that halves a weight's share every `steps` optimizer steps, with a warm-up."""
        return cls(0.5 ** (1 / steps), update_every, warmup=True)

    @classmethod
    def for_run(
        cls, decay: float | None, half_life_steps: float | None, max_steps: int, *, update_every: int = 1
    ) -> Decay:
        """What was asked for, in a run of `max_steps`; with neither of the two, `HALF_LIFE_SHARE` of the run.

        Warns when the run is too short for the decay.
        """
        if decay is None:
            return cls.from_half_life(
                half_life_steps or max(1.0, HALF_LIFE_SHARE * max_steps), update_every=update_every
            )
        asked = cls(decay, update_every)
        if (share := asked.share_of_start(max_steps)) > 0.1:
            warnings.warn(
                f"decay={decay} spans more than this run: after max_steps={max_steps}, {share:.0%} of the average are "
                f"still the weights it began with. Leave decay out (a half-life of {HALF_LIFE_SHARE:.0%} of the run, "
                "with a warm-up) or set half_life_steps.",
                ForgeWarning,
                stacklevel=4,
            )
        return asked

    @property
    def half_life_steps(self) -> float:
        """Optimizer steps until a weight's share is halved."""
        return log(0.5) / log(self.per_step)

    def at(self, updates: int) -> float:
        """The decay of the update that follows `updates` earlier ones."""
        decay = self.per_step**self.update_every
        return min(decay, (1 + updates) / (10 + updates)) if self.warmup else decay

    def share_of_start(self, steps: int) -> float:
        """How much of the average is still the initial weights after so many optimizer steps.

        >>> Decay(0.999).share_of_start(200) > 0.8
        True
        """
        share = 1.0
        for update in range(steps // self.update_every):
            share *= self.at(update)
        return share


def check(decay: float | None, half_life_steps: float | None, update_every: int) -> None:
    """Refuse what is not a decay.

    Raises:
        ConflictError: Both were given.
        ForgeError: A value outside its range.
    """
    if decay is not None and half_life_steps is not None:
        raise ConflictError(
            f"decay={decay} and half_life_steps={half_life_steps} say the same thing: give one of them."
        )
    if decay is not None and not (_is_number(decay) and 0 < decay < 1):
        raise ForgeError(f"decay={decay!r}: it must be a number between 0 and 1, such as 0.999, both ends excluded.")
    if half_life_steps is not None and not (_is_number(half_life_steps) and 0 < half_life_steps < inf):
        raise ForgeError(f"half_life_steps={half_life_steps!r}: it must be a positive number of optimizer steps.")
    if not isinstance(update_every, int) or isinstance(update_every, bool) or update_every < 1:
        raise ForgeError(f"update_every={update_every!r}: it must be a whole number of at least 1.")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
