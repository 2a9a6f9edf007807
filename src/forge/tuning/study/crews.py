"""Crews: who trains what, through kills and restarts.

A crew is a durable identity with a number and a folder of its own. A process claims one; if it is killed, another one
claims the same crew, finds its checkpoint and its trials, and goes on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .keeper import Lease
    from .leases import Holder, Leases

logger = logging.getLogger("forge.tuning")

TTL_S = 120.0
"""Seconds after which a worker on another machine that was not heard of counts as dead."""
SETTLE_S = 4.0
"""A lease whose time is over is looked at again after this: when a database was away, its holders come back first."""
_PREFIX = "crew-"


class Crew:
    """A crew that this process has claimed; its lease is renewed until `release`.

    Args:
        number: of the crew.
        lease: on it.
        heartbeat: records Optuna's own sign of life for a trial.
    """

    def __init__(self, number: int, lease: Lease, heartbeat: Callable[[int], None]) -> None:
        self.number = number
        self.lease = lease
        self.trials: set[int] = set()
        """Optuna's ids of its trials that are on the way."""
        self._heartbeat = heartbeat
        lease.on_beat = self._signs_of_life

    @property
    def folder(self) -> str:
        """Where its checkpoint lies, in the study's folder."""
        return f"crews/{self.number}"

    @property
    def lost(self) -> bool:
        """Whether another worker has taken it over, or may have."""
        return self.lease.lost

    def confirm(self) -> None:
        """See in the database that it is still one's own; before a checkpoint is written, for two must not write it.

        Raises:
            LeaseLostError: another worker has it.
            StorageAwayError: the database was away for too long.
        """
        self.lease.confirm()

    def beat(self) -> None:
        """Renew the lease and give all signs of life now; a thread does so several times in the lease's time."""
        if self.lease.beat():
            self._signs_of_life()

    def release(self) -> None:
        """Give it back: another worker may claim it at once."""
        self.lease.release()

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"Crew(number={self.number}, trials={len(self.trials)})"

    def _signs_of_life(self) -> None:
        for trial_id in sorted(self.trials):
            with suppress(Exception):  # for Optuna's tools alone
                self._heartbeat(trial_id)


def claim(
    leases: Leases, busy: Callable[[], Mapping[int, int]], *, only_dead: bool = False, ttl_s: float = TTL_S
) -> tuple[int, Lease] | None:
    """Claim a crew: a dead one with trials on the way, else a dead one, else a new one.

    Args:
        leases: of the study.
        busy: gives all crews that ever had a trial, with the number of their trials that are on the way.
        only_dead: none but a dead one with trials on the way.
        ttl_s: seconds of the lease.

    Returns:
        Its number and the lease; None where there is no such crew.
    """
    _let_settle(leases, busy, only_dead)
    with leases.lock("crews"):
        trials, holders = dict(busy()), _holders(leases)
        known = sorted({*trials, *holders}, key=lambda number: (not trials.get(number), number))
        for number in known:
            holder = holders.get(number)
            if (only_dead and not trials.get(number)) or not _is_free(holder):
                continue
            lease = leases.keep(_PREFIX + str(number), ttl_s, instead_of=holder.owner if holder else None)
            if lease is not None:
                if trials.get(number):
                    logger.info("Crew %d goes on with %d trials that were on the way.", number, trials[number])
                return number, lease
        if only_dead:
            return None
        number = max(known, default=-1) + 1
        new = leases.keep(_PREFIX + str(number), ttl_s)
        # The lock is ours and the number is nobody's.
        return None if new is None else (number, new)


def _holders(leases: Leases) -> dict[int, Holder]:
    return {int(name[len(_PREFIX) :]): holder for name, holder in leases.holders(_PREFIX).items()}


def _is_free(holder: Holder | None) -> bool:
    if holder is None or holder.is_dead:
        return True
    # A process of this machine that lives is not dead, however long it slept.
    return holder.left_s <= 0 and not holder.is_near


def _let_settle(leases: Leases, busy: Callable[[], Mapping[int, int]], only_dead: bool) -> None:
    """Wait a moment where the time of a lease is over and nothing else speaks for its holder's death."""
    expired = [
        number
        for number, holder in _holders(leases).items()
        if holder.left_s <= 0 and not holder.is_dead and not holder.is_near
    ]
    if expired and (not only_dead or any(busy().get(number) for number in expired)):
        time.sleep(SETTLE_S)
