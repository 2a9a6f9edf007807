"""A validation set in which nothing is asked that training answers.

Rows that ask the same belong together, so it is the questions that are dealt out, in the order of their hashes: no
random numbers, and neither the order of the rows nor a second run changes the sides.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import ConflictError
from .lengths import counted
from .rows import Sample


def wanted_rows(validation: float | int, rows: int) -> int:
    """How many rows a share or a number of them is.

    >>> wanted_rows(0.1, 500), wanted_rows(64, 500)
    (50, 64)

    Args:
        validation: a share between 0 and 1, or a number of rows.
        rows: how many there are.

    Raises:
        ConflictError: not a size, or nothing would be left on one side.
    """
    if isinstance(validation, bool) or (isinstance(validation, float) and not 0 < validation < 1):
        raise ConflictError(
            f"validation={validation!r} is neither a share of the rows (a float between 0 and 1) nor a number of them "
            "(an int). Pass 0.05, or 64."
        )
    wanted = round(validation * rows) if isinstance(validation, float) else validation
    if not 0 < wanted < rows:
        raise ConflictError(
            f"validation={validation!r} of {rows:,} usable rows is {wanted:,} for validation and {rows - wanted:,} for "
            "training; both need one at least. Pass another size, or validation=None."
        )
    return wanted


def split(samples: Sequence[Sample], wanted: int) -> tuple[list[Sample], list[Sample]]:
    """Training and validation rows in their order, with as near to `wanted` rows for validation as the questions allow.

    Args:
        samples: the rows.
        wanted: how many to hold out.

    Raises:
        ConflictError: all rows ask the same, so one side would be empty.
    """
    keys = keys_of(samples)
    sizes: dict[str, int] = {}
    for key in keys:
        sizes[key] = sizes.get(key, 0) + 1
    held: set[str] = set()
    total = 0
    for key in sorted(sizes):
        # A question asked so often that taking it would miss the size by more than leaving it stays in training.
        if abs(total + sizes[key] - wanted) < abs(total - wanted):
            held.add(key)
            total += sizes[key]
    if not held or len(held) == len(sizes):
        raise ConflictError(
            f"No split of {len(samples):,} rows comes near {wanted:,} for validation: rows that ask the same stay on "
            f"one side, and they ask only {counted(len(sizes), 'different question')} (the most "
            f"frequent {counted(max(sizes.values()), 'time')}). Pass a validation set of your own, or another size."
        )
    train = [sample for sample, key in zip(samples, keys, strict=True) if key not in held]
    return train, [sample for sample, key in zip(samples, keys, strict=True) if key in held]


def without_leakage(train: Sequence[Sample], validation: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """The training rows that ask nothing that validation asks, and the others."""
    keys = keys_of([*train, *validation])
    asked = set(keys[len(train) :])
    kept: list[Sample] = []
    leaking: list[Sample] = []
    for sample, key in zip(train, keys, strict=False):
        (leaking if key in asked else kept).append(sample)
    return kept, leaking


def keys_of(samples: Sequence[Sample]) -> list[str]:
    """What each row asks. Where system prompts hold what rows ask about (documents), they are part of it.

    They do when there are more different system prompts than different questions.
    """
    questions, systems = [sample.key for sample in samples], [sample.system for sample in samples]
    if len(set(systems)) <= len(set(questions)):
        return questions
    return [system + question for system, question in zip(systems, questions, strict=True)]
