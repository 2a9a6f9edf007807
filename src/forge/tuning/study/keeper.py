"""A lease in somebody's hands: a thread renews it, and it knows when it may have been lost."""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ...errors import ForgeError
from .patience import is_away, patiently

if TYPE_CHECKING:
    from .leases import Leases

_AGAIN_S = 1.0
"""Between two attempts while the database is away: workers come back before they look at each other's leases."""


class LeaseLostError(ForgeError):
    """Another worker has taken over what this one had: it was not heard of for too long."""


class Lease:
    """A lease that is renewed until it is released, or its process ends.

    Args:
        leases: of the study.
        name: of the lease.
        owner: the word with which it was taken.
        ttl_s: seconds for which it is given each time.
        since: `time.monotonic()` before it was taken.
    """

    def __init__(self, leases: Leases, name: str, owner: str, ttl_s: float, *, since: float) -> None:
        self.name = name
        self.owner = owner
        self.ttl_s = ttl_s
        self.on_beat: Callable[[], None] | None = None
        """What else is done each time that it is renewed."""
        self._leases = leases
        self._sure_until = since + ttl_s
        self._taken = False
        self._stop = threading.Event()
        atexit.register(self._stop.set)
        self._thread = threading.Thread(target=self._keep, name=f"forge lease {name}", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        """Whether somebody else has it, or may have it: the database was not reached for the lease's whole time."""
        return self._taken or time.monotonic() > self._sure_until

    def confirm(self) -> None:
        """See in the database that it is still one's own; wait for the database if it is away.

        Raises:
            LeaseLostError: somebody else has it.
            StorageAwayError: the database was away for too long.
        """
        if not patiently(self.beat):
            raise LeaseLostError(
                f"Another worker has taken over {self.name!r} of the study: this one was not heard of for more than "
                f"{self.ttl_s:.0f} s. It stops here; start it again, and it takes on other work."
            )

    def beat(self) -> bool:
        """Renew it now, once.

        Returns:
            Whether it is still one's own.
        """
        asked = time.monotonic()
        if self._taken or self._stop.is_set():
            return False
        if self._leases.renew(self.name, self.owner, self.ttl_s):
            self._sure_until = asked + self.ttl_s
        else:
            self._taken = True
        return not self._taken

    def release(self) -> None:
        """Give it back; if the database is away, a thread does so when it is there again."""
        if self._stop.is_set():
            return
        self._stop.set()
        atexit.unregister(self._stop.set)
        if not self._taken and not self._give_back():
            threading.Thread(target=self._give_back_later, name=f"forge release {self.name}", daemon=True).start()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _keep(self) -> None:
        wait = self.ttl_s / 4
        while not self._stop.wait(wait) and not self._taken:
            wait = self.ttl_s / 4
            try:
                self.beat()
                if self.on_beat is not None and not self._taken:
                    self.on_beat()
            except Exception:  # noqa: BLE001 - a thread has nobody to tell; `lost` does when its time is over
                wait = min(_AGAIN_S, wait)

    def _give_back(self) -> bool:
        try:
            self._leases.release(self.name, self.owner)
        except Exception as error:
            if not is_away(error):
                raise
            return False
        return True

    def _give_back_later(self) -> None:
        """Others would otherwise wait for the end of a lease whose holder lives and does not need it."""
        end = time.monotonic() + self.ttl_s
        while time.monotonic() < end:
            time.sleep(_AGAIN_S / 2)
            try:
                if self._give_back():
                    return
            except Exception:  # noqa: BLE001 - nobody to tell; it ends by itself
                return
