"""In which order the rows come: the same for every trial of a study, and for every engine."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

# Rows are dealt out in rounds of so many micro-batches, from short to long, so that what comes at the same place of a
# round is of like length: trials that stand at different rounds of their training then pad each other little.
ROUND = 8


def row_order(lengths: Sequence[int], *, micro_batch: int, epochs: float, seed: int) -> list[int]:
    """The rows of a training in order, all epochs one after the other; a step takes the next of them.

    Each epoch is cut into micro-batches of rows of like length, which are dealt out in rounds: a round holds
    micro-batches of all lengths, always in the same sequence of lengths. Which rows meet, and in which round, is drawn
    anew each epoch.

    >>> row_order([5, 1, 4, 2], micro_batch=2, epochs=1, seed=0)
    [1, 3, 2, 0]
    >>> len(row_order([3] * 10, micro_batch=4, epochs=2.5, seed=0))
    25

    Args:
        lengths: tokens in each row.
        micro_batch: rows that go through the model together.
        epochs: how often each row comes; of a fraction of an epoch the first rows of its order.
        seed: of the order.

    Returns:
        `ceil(epochs * len(lengths))` row numbers.
    """
    drawn = random.Random(seed)
    wanted = math.ceil(epochs * len(lengths) - 1e-9)
    order: list[int] = []
    while len(order) < wanted:
        order += _epoch(lengths, micro_batch, drawn)
    return order[:wanted]


def _epoch(lengths: Sequence[int], micro_batch: int, drawn: random.Random) -> list[int]:
    rows = list(range(len(lengths)))
    drawn.shuffle(rows)  # so that rows of one length meet others in every epoch
    rows.sort(key=lambda row: lengths[row])
    rest = len(rows) % micro_batch
    # What fills no micro-batch is drawn from all lengths, and comes last.
    last = {rows[place] for place in drawn.sample(range(len(rows)), rest)}
    rows = [row for row in rows if row not in last]
    batches = [rows[start : start + micro_batch] for start in range(0, len(rows), micro_batch)]
    buckets = [batches[len(batches) * place // ROUND : len(batches) * (place + 1) // ROUND] for place in range(ROUND)]
    for bucket in buckets:
        drawn.shuffle(bucket)
    # Neighbours in a round differ in length, or a step of a few micro-batches would see one length only.
    sequence = [0, 4, 2, 6, 1, 5, 3, 7]
    dealt = [
        buckets[place][turn]
        for turn in range(max(map(len, buckets), default=0))
        for place in sequence
        if turn < len(buckets[place])
    ]
    return [row for batch in dealt for row in batch] + sorted(last)
