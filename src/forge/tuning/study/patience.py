"""A database that is away for a while is waited for: a server restarts, a file is locked, a line breaks."""

from __future__ import annotations

import functools
import logging
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from ...errors import ForgeError
from ...reporting.private import without_credentials

logger = logging.getLogger("forge.tuning")

T = TypeVar("T")
PATIENCE_S = 1800.0
"""How long the database may be away before a worker gives up; what it has done by then is kept all the same."""
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.05, 5.0


class StorageAwayError(ForgeError):
    """The study's database did not answer for longer than one wants to wait."""


def patiently(work: Callable[[], T], *, patience_s: float = PATIENCE_S, jitter: random.Random | None = None) -> T:
    """What `work()` gives, tried again for as long as the database is away.

    Args:
        work: may be done twice, for nobody knows whether it was done when the answer is missing.
        patience_s: seconds until it is given up.
        jitter: spreads the waiting of many workers; by default at random.

    Raises:
        StorageAwayError: it was away for longer.

    >>> patiently(lambda: 42)
    42
    """
    spread = (jitter or random.Random()).uniform
    began, wait, warned = time.monotonic(), _FIRST_WAIT_S, False
    while True:
        try:
            done = work()
        except Exception as error:  # noqa: PERF203
            if not is_away(error):
                raise
            said = reason(error)
            away_s = time.monotonic() - began
            if away_s > patience_s:
                raise StorageAwayError(
                    f"The study's database has not answered for {away_s:.0f} s ({said}). "
                    "What was done is kept there: start the worker again when the database is back."
                ) from None
            if not warned and away_s > 1:
                logger.warning("The study's database does not answer (%s); waiting for it.", said)
                warned = True
            time.sleep(spread(wait / 2, wait))
            wait = min(2 * wait, _LONGEST_WAIT_S)
        else:
            if warned:
                logger.info("The study's database answers again after %.0f s.", time.monotonic() - began)
            return done


def patient(method: Callable[..., T]) -> Callable[..., T]:
    """A method that is safe to repeat, and waits for the database."""

    @functools.wraps(method)
    def waiting(*args: Any, **kwargs: Any) -> T:
        return patiently(lambda: method(*args, **kwargs))

    return waiting


def is_away(error: BaseException) -> bool:
    """Whether the database could not be reached, or was busy: the same may succeed a little later.

    Args:
        error: of SQLAlchemy, or Optuna's around it.
    """
    from optuna.exceptions import StorageInternalError
    from sqlalchemy import exc

    if isinstance(error, StorageInternalError):  # says no more than that something was wrong
        return error.__cause__ is not None and is_away(error.__cause__)
    # The pool's connections are all in use; or Optuna asked once more over a connection that had just broken.
    if isinstance(error, (exc.TimeoutError, exc.PendingRollbackError)):
        return True
    if not isinstance(error, exc.DBAPIError):
        return False
    if _is_of_sqlite(error):
        # Its other operational errors (a full disk, a read-only file) do not pass by themselves.
        return any(word in str(error.orig) for word in ("locked", "busy"))
    return error.connection_invalidated or isinstance(error, (exc.OperationalError, exc.InterfaceError))


def reason(error: BaseException) -> str:
    """What went wrong, in one line without credentials.

    Args:
        error: of SQLAlchemy, or Optuna's around it.

    >>> reason(ValueError("no route to postgresql://ada:s3cret@host/db"))
    'no route to postgresql://host/db'
    """
    inner = error.__cause__ if type(error).__name__ == "StorageInternalError" and error.__cause__ else error
    said = str(getattr(inner, "orig", None) or inner).strip() or type(inner).__name__
    return without_credentials(said.splitlines()[0])


def _is_of_sqlite(error: Any) -> bool:
    return type(error.orig).__module__.startswith("sqlite3")
