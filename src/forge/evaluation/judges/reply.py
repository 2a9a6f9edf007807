"""What a judge replied, read strictly: one JSON object with a reason and a score, or nothing."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from numbers import Real
from typing import Any

SCHEMA = {
    "type": "object",
    "properties": {"reason": {"type": "string"}, "score": {"type": "number"}},
    "required": ["reason", "score"],
    "additionalProperties": False,
}
"""The reason first: a model that explains before it decides decides better. Bounds are left to the parser, since not
every server knows them."""

_FENCED = re.compile(r"```(?:json)?[ \t]*\n(.*)\n[ \t]*```", re.DOTALL)


@dataclass(frozen=True)
class Reply:
    """What came back for one question.

    Args:
        text: The judge's words.
        prompt_tokens: What was read for it; None where the server does not say.
        completion_tokens: What was written for it, hidden thoughts included; None where the server does not say.
        cut: Whether a limit of length ended it.
    """

    text: str
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cut: bool = False


class Unreadable(Exception):  # noqa: N818  (nothing of forge's went wrong)
    """The reply is not what was asked for; the text says why, in words that are the same for all such replies."""


def read(text: str) -> tuple[float, str]:
    """The score and the reason of a reply.

    It must be one JSON object, alone or in one Markdown fence, with these two keys, each once. No number is ever picked
    out of prose: a judge that talks has perhaps only repeated what it was shown.

    >>> read('{"reason": "Right.", "score": 90}')
    (90.0, 'Right.')

    Args:
        text: The judge's words.

    Raises:
        Unreadable: It is anything else.
    """
    text = text.strip()
    if not text:
        raise Unreadable("the reply is empty")
    fenced = _FENCED.fullmatch(text)
    try:
        found = json.loads(fenced.group(1) if fenced else text, object_pairs_hook=_once, parse_constant=_no_constant)
    except Unreadable:
        raise
    except (ValueError, RecursionError) as error:
        raise Unreadable("the reply is not one JSON object") from error
    if not isinstance(found, dict) or set(found) != {"reason", "score"}:
        raise Unreadable('the reply is not an object with just "reason" and "score"')
    score, reason = found["score"], found["reason"]
    if not isinstance(reason, str):
        raise Unreadable("the reason is not a text")
    return check(score), reason


def check(score: Any) -> float:
    """A score as a float.

    Raises:
        Unreadable: It is no finite number from 0 to 100.
    """
    if hasattr(score, "item") and getattr(score, "ndim", None) == 0:  # NumPy's and torch's numbers
        score = score.item()
    is_number = isinstance(score, Real) and not isinstance(score, bool)
    if not is_number:
        raise Unreadable("the score is not a number")
    if not 0 <= score <= 100 or not math.isfinite(score):
        raise Unreadable("the score is not within 0 and 100")
    return float(score)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Unreadable("the reply names a key twice")
    return found


def _no_constant(name: str) -> float:
    raise Unreadable(f"the reply contains {name}")
