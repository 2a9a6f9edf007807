"""Whether a text says what messages say: a template may leave out, move or rewrite any of it."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import Any

from .tokens import Messages


def says_only(messages: Messages, index: int, written: str, control: re.Pattern[str]) -> bool:
    """Whether a stretch of text says all that the answer says, and nothing that another message after it says.

    White space makes no difference, since templates write their own around thoughts; nor do control tokens, whose
    spelling may hold what somebody says.

    >>> messages = [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "end"}]
    >>> [says_only(messages, 0, written, re.compile("<end>")) for written in ("Yes.<end>", "Yes. end<end>")]
    [True, False]
    """
    message, rest, written = messages[index], squeezed(control.sub("", written)), squeezed(written)
    said, calls = squeezed(message["content"]), called(message)
    if not (said or calls) or said not in written or not all(squeezed(name) in written for name in calls):
        return False
    others = [squeezed(other["content"]) for other in messages[index + 1 :]]
    known = squeezed(
        "\n".join(str(other["content"]) for other in messages[: index + 1]) + json.dumps(message, default=str)
    )
    return not any(len(other) > 2 and other in rest and other not in known for other in others)


def unwritten(messages: Messages, whole: str) -> int:
    """How many messages say something that is not in the text, as it is or as JSON."""
    lost, whole = 0, squeezed(whole)
    for message in messages:
        said = str(message["content"]).strip()
        spellings = (said, json.dumps(said)[1:-1], json.dumps(said, ensure_ascii=False)[1:-1])
        there = any(squeezed(spelling) in whole for spelling in spellings)
        with suppress(TypeError, ValueError):  # results of tools are JSON that some templates write anew
            there = there or all(squeezed(value) in whole for value in dict(json.loads(said)).values())
        lost += not (there and all(squeezed(name) in whole for name in called(message)))
    return lost


def called(message: dict[str, Any]) -> list[str]:
    """The names of the functions that a message calls."""
    calls = [call.get("function", call) for call in message.get("tool_calls") or () if isinstance(call, dict)]
    return [str(call["name"]) for call in calls if isinstance(call, dict) and "name" in call]


def shared(left: str, right: str) -> int:
    """How many characters two texts begin with in common.

    >>> shared("abc", "abd")
    2
    """
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def squeezed(said: Any) -> str:
    """A text without its white space."""
    return "".join(str(said).split())
