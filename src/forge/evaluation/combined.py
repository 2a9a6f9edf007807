"""One number from BERTScore and a judge."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from ..errors import ForgeError

BERT_WEIGHT = 0.4
JUDGE_WEIGHT = 0.6
"""The judge counts for more: it reads what is said, where BERTScore sees how alike the words are to a reference's."""

# Cosines of a text with itself come out as 1.0000002.
_ROUNDING = 1e-4


def combined_score(bert_score: float, judge_score: float | None = None) -> float:
    """0.4 BERTScore + 0.6 judge / 100, or BERTScore alone.

    The two are different quantities: a number with a judge says nothing beside one without, and `rank` never puts them
    in one order.

    >>> round(combined_score(0.823, 78.5), 3)
    0.8
    >>> combined_score(0.823)
    0.823

    Args:
        bert_score: At most 1. One that is rescaled with a baseline may be far below 0, so nothing bounds it there.
        judge_score: 0 to 100; None where there is none.

    Raises:
        ForgeError: What is no such score: NaN, True, a BERTScore in percent.
    """
    check_bert_score("bert_score", bert_score)
    if judge_score is None:
        return float(bert_score)
    check_judge_score("judge_score", judge_score)
    return BERT_WEIGHT * float(bert_score) + JUDGE_WEIGHT * float(judge_score) / 100


def describe_scores(bert_score: float, judge_score: float | None = None) -> str:
    """The scores and what they make together, as a line for a log.

    >>> describe_scores(0.823, 78.5)
    'BERTScore 0.823, judge 78.5, combined 0.800'
    >>> describe_scores(0.823)
    'BERTScore 0.823'
    """
    combined = combined_score(bert_score, judge_score)
    if judge_score is None:
        return f"BERTScore {bert_score:.3f}"
    return f"BERTScore {bert_score:.3f}, judge {judge_score:.1f}, combined {combined:.3f}"


def check_bert_score(name: str, value: Any) -> None:
    """Refuse what is no BERTScore."""
    if not is_finite_number(value) or float(value) > 1 + _ROUNDING:
        raise ForgeError(f"{name}={value!r}: a BERTScore is a number of at most 1 (not a percentage).")


def check_judge_score(name: str, value: Any) -> None:
    """Refuse what is no judge's score."""
    if not is_finite_number(value) or not 0 <= float(value) <= 100:
        raise ForgeError(f"{name}={value!r}: a judge's score is a number from 0 to 100, and None where there is none.")


def is_finite_number(value: Any) -> bool:
    """Whether it is a number, and no truth value, NaN or infinity."""
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)
