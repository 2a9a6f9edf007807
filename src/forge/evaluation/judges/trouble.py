"""What can go wrong between a question and its answer, and what follows from it.

Trouble        this sample has no score
├── Passing    ask again after a while
└── Permanent  no sample will have one: stop asking
"""

from __future__ import annotations

import email.utils
import math
import time
from collections.abc import Iterable, Mapping

_EXCERPT = 200


class Trouble(Exception):  # noqa: N818  (it never reaches a user, only its text does)
    """A judgement that will be missing; the text says why and contains no key."""


class Passing(Trouble):
    """What may be over soon: a rate limit, a server that restarts.

    Args:
        message: What happened.
        retry_after_s: How long the server asked to wait, if it did.
        fatal: Whether it means that no sample can be judged, if it does not pass.
    """

    def __init__(self, message: str, *, retry_after_s: float | None = None, fatal: bool = False) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.fatal = fatal


class Permanent(Trouble):
    """What holds for every sample: a wrong key, an unknown model."""


class Stopped(Exception):  # noqa: N818  (a signal between threads)
    """Nobody waits for the answer any more."""


def from_status(
    status: int, said: str, *, headers: Mapping[str, str] | None = None, key: str, model: str, secrets: Iterable[str]
) -> Trouble:
    """The trouble behind an HTTP status.

    Args:
        status: of the response.
        said: its message.
        headers: of the response, with `Retry-After` perhaps.
        key: how the user passes the key, for the message.
        model: how the user passes the model and the address, for the message.
        secrets: what must not appear in the message.
    """
    said = without(secrets, " ".join(said.split()))[:_EXCERPT]
    answer = f"the server answered {status}" + (f" ({said})" if said else "")
    if status in (401, 403):
        return Permanent(f"{answer}: check {key}")
    if status == 402 or (status == 429 and "insufficient_quota" in said):
        return Permanent(f"{answer}: the account is used up")
    if status in (404, 405):
        return Permanent(f"{answer}: check {model}")
    if status in (408, 409, 425, 429) or status >= 500:
        # Servers word these differently each time (request ids, seconds to wait); the status is the reason.
        return Passing(f"the server answered {status}", retry_after_s=retry_after(headers or {}))
    return Trouble(answer)


def from_transport(error: Exception, *, timeout_s: float, where: str) -> Trouble | None:
    """The trouble behind an exception of httpx, or of its fork httpx2 that some packages use; None for others."""
    kinds = {kind.__name__ for kind in type(error).__mro__ if kind.__module__.partition(".")[0] in ("httpx", "httpx2")}
    if "TimeoutException" in kinds:
        return Passing(f"no answer within {timeout_s:g} s")
    return Passing(f"{where} cannot be reached", fatal=True) if "TransportError" in kinds else None


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds that a response asks to wait, from `Retry-After` in seconds or as a date, or `retry-after-ms`.

    >>> retry_after({"retry-after": "1.5"}), retry_after({"retry-after": "soon"})
    (1.5, None)
    """
    lower = {name.lower(): value for name, value in headers.items()}
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            seconds = float(lower[name]) / unit
        except (KeyError, ValueError):
            continue
        return max(seconds, 0.0) if math.isfinite(seconds) else None
    try:
        return max(email.utils.parsedate_to_datetime(lower["retry-after"]).timestamp() - time.time(), 0.0)
    except (KeyError, ValueError, TypeError):
        return None


def without(secrets: Iterable[str], text: str) -> str:
    """The text without any of the secrets."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, "[key]")
    return text
