"""What data are, in a few letters: to tell whether a run that goes on still learns the same."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

# What a trainer learns from: tokens and labels, or the texts of preferences, which it tokenises itself.
_LEARNT = ("input_ids", "labels", "prompt", "chosen", "rejected")


def fingerprint_of(rows: Dataset) -> str:
    """A digest of what is learnt from prepared rows, in their order.

    >>> from datasets import Dataset
    >>> one = Dataset.from_dict({"input_ids": [[1, 2], [3]], "labels": [[1, 2], [3]]})
    >>> fingerprint_of(one) == fingerprint_of(one.select([1, 0]))
    False

    Args:
        rows: what `prepare_dataset` made.
    """
    import xxhash

    tokens = "input_ids" in rows.column_names
    columns = [name for name in (_LEARNT[:2] if tokens else _LEARNT[2:]) if name in rows.column_names]
    digest = xxhash.xxh3_128(f"{columns} {len(rows)}".encode())
    for batch in rows.select_columns(columns).iter(1000):
        for name in columns:
            digest.update(_numbers(batch[name]) if tokens else json.dumps(batch[name], sort_keys=True).encode())
    return str(digest.hexdigest())


def _numbers(rows: list[list[int]]) -> Any:
    """The rows' lengths and numbers, one after the other."""
    from itertools import chain

    import numpy as np

    return np.fromiter(chain(map(len, rows), chain.from_iterable(rows)), dtype=np.int64)
