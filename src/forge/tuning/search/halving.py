"""Which trials go on: successive halving on the held-out loss, and who has diverged before."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

# Training losses that are compared: one step's loss is noise.
_WINDOW = 10
# A loss that is above where it began by more than this share of it, and by more than so many nats, will not come back
# before the first rung.
_SHARE, _NATS = 0.5, 1.0
# Nor is it one where the rise is within so many standard errors of the two means: steps of few rows are that noisy.
_ERRORS = 4.0


def survivors(arrived: Mapping[int, float], history: Sequence[float] = (), *, reduction: int = 2) -> set[int]:
    """Of the trials that came to a rung together, those that go on.

    They are held against each other and against all that stood at this rung before: a trial goes on where no more than
    `1 / reduction` of all of them, rounded up, are at least as good. The first group is halved exactly (synchronous
    successive halving, Jamieson and Talwalkar, arXiv:1502.07943); a group that a sampler drew later, from what it had
    learnt, may go on as a whole or end as a whole; a trial that comes alone is judged by the others' records, as in
    ASHA (Li et al., arXiv:1810.05934).

    >>> sorted(survivors({0: 2.0, 1: 1.0, 2: 3.0}))
    [0, 1]
    >>> survivors({7: 2.5}, [2.0, 1.0, 3.0])
    set()

    Args:
        arrived: the held-out loss by trial; NaN and infinity never go on.
        history: the losses of all others at this rung.
        reduction: the best of so many go on.
    """
    finite = {number: loss for number, loss in arrived.items() if math.isfinite(loss)}
    before = [loss for loss in history if math.isfinite(loss)]
    room = -(-(len(arrived) + len(history)) // reduction)
    kept = set()
    for number, loss in finite.items():
        # Of equals the earlier one goes first.
        better = sum(other <= loss for other in before)
        better += sum((other, each) < (loss, number) for each, other in finite.items())
        if better < room:
            kept.add(number)
    return kept


def diverged(losses: Sequence[float]) -> str:
    """Why a trial is to be stopped before its first rung; empty where it is not.

    Before a quarter of the steps the losses of trials say little about their end, and favour learning rates that are
    too high; only what is beyond repair is stopped: losses that are no numbers three times in a row, or whose mean over
    ten steps is half above, a nat above, and four standard errors above that of the first steps.

    >>> diverged([2.3] * 40)
    ''
    >>> diverged([2.3] * 10 + [9.0] * 10)
    'The training loss rose from 2.3 to 9 nats per token.'

    Args:
        losses: of the optimizer steps so far, in nats per token.
    """
    last = losses[-3:]
    if len(last) == 3 and not any(math.isfinite(loss) for loss in last):
        return "The training loss is not a number any more."
    finite = [loss for loss in losses if math.isfinite(loss)]
    if len(finite) < 2 * _WINDOW:
        return ""
    first, now = sum(finite[:3]) / 3, sum(finite[-_WINDOW:]) / _WINDOW
    if now - first > max(_SHARE * first, _NATS, _ERRORS * _noise(finite) * math.sqrt(1 / 3 + 1 / _WINDOW)):
        return f"The training loss rose from {first:.3g} to {now:.3g} nats per token."
    return ""


def _noise(losses: Sequence[float]) -> float:
    """The standard deviation of a step's loss, from one step to the next, so that a trend or one bad batch adds little.

    The median of the absolute differences of normal noise is 0.6745 * sqrt(2) standard deviations.
    """
    jumps = sorted(abs(after - before) for before, after in itertools.pairwise(losses))
    return jumps[len(jumps) // 2] / (0.6745 * math.sqrt(2))
