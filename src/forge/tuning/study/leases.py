"""Who holds what: a table of leases in the study's own database.

A lease is a row that only one owner can have. It ends by the database's clock, for the machines' clocks differ; each
change is one statement that says what it expects to find, so that two who try at the same moment cannot both succeed.
The holder's process stands in the row: on the same machine a killed holder is noticed at once, not when its lease ends.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import ForgeError, UnsupportedError
from .keeper import Lease, LeaseLostError
from .patience import is_away, patient, patiently
from .processes import Process

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine, Table

TABLE = "forge_leases"
LOCK_TTL_S = 60.0
_NOW = {
    "sqlite": "(julianday('now') - 2440587.5) * 86400.0",
    "postgresql": "extract(epoch from clock_timestamp())",
    "mysql": "unix_timestamp(now(6))",
    "mariadb": "unix_timestamp(now(6))",
}


@dataclass(frozen=True)
class Holder:
    """Who has a lease, as the database says.

    Args:
        name: of the lease.
        owner: its word, another one each time that a lease is taken.
        process: that took it.
        left_s: seconds until it ends; negative when it has ended.
    """

    name: str
    owner: str
    process: Process
    left_s: float

    @property
    def is_dead(self) -> bool:
        """Whether its process surely lives no more."""
        return self.process.is_gone

    @property
    def is_near(self) -> bool:
        """Whether its process is on this machine, where one can see that it lives."""
        return self.process.machine == Process.this().machine


class Leases:
    """The leases of a study.

    Args:
        engine: of the study's database.
        scope: the study's name; others in the same database do not meet its leases.

    Raises:
        UnsupportedError: nobody has said how this database tells the time.
    """

    def __init__(self, engine: Engine, scope: str) -> None:
        if engine.dialect.name not in _NOW:
            raise UnsupportedError(
                f"A study cannot lie in {engine.dialect.name}: forge can share work through {', '.join(sorted(_NOW))}."
            )
        from sqlalchemy import literal_column

        self.engine = engine
        self._scope = scope
        self._table = _table()
        self._now: Any = literal_column(_NOW[engine.dialect.name])
        self._create()

    def acquire(self, name: str, owner: str, ttl_s: float, *, instead_of: str | None = None) -> bool:
        """Take a lease that nobody has, or whose time is over, or whose holder is dead.

        Args:
            name: of the lease.
            owner: a word of one's own; who has the lease already, gets it again.
            ttl_s: seconds for which it is given.
            instead_of: the owner from whom it is taken in any case, if it is still that one's.

        Returns:
            Whether one has it now.
        """
        from sqlalchemy import exc, or_

        with self.engine.begin() as connection:
            mine = or_(self._table.c.owner == owner, self._table.c.ends <= self._now)
            if instead_of is not None:
                mine = or_(mine, self._table.c.owner == instead_of)
            if self._take(connection, name, owner, ttl_s, mine):
                return True
        holder = self.holder(name)
        if holder is None:
            try:
                with self.engine.begin() as connection:
                    row = {"name": self._full(name), **self._values(owner, ttl_s)}
                    connection.execute(self._table.insert().values(row))
            except exc.IntegrityError:  # somebody was faster
                return False
            return True
        if not holder.is_dead:
            return False
        with self.engine.begin() as connection:
            return self._take(connection, name, owner, ttl_s, self._table.c.owner == holder.owner)

    def renew(self, name: str, owner: str, ttl_s: float) -> bool:
        """Have it for longer.

        Args:
            name: of the lease.
            owner: the word with which it was taken.
            ttl_s: seconds from now.

        Returns:
            False where somebody else has it by now; one whose time was over and that nobody took is still one's own.
        """
        with self.engine.begin() as connection:
            return self._take(connection, name, owner, ttl_s, self._table.c.owner == owner)

    def release(self, name: str, owner: str) -> None:
        """Give it back; nothing happens when somebody else has it by now."""
        mine = (self._table.c.name == self._full(name)) & (self._table.c.owner == owner)
        with self.engine.begin() as connection:
            connection.execute(self._table.delete().where(mine))

    def holder(self, name: str) -> Holder | None:
        """Who has it; None where nobody does."""
        return self.holders(name).get(name)

    @patient
    def holders(self, prefix: str = "") -> dict[str, Holder]:
        """Who has the leases whose names begin like this, by name."""
        from sqlalchemy import select

        columns = self._table.c
        query = select(*columns, (columns.ends - self._now).label("left_s"))
        start = self._full(prefix)
        with self.engine.connect() as connection:
            rows = connection.execute(query.where(columns.name.startswith(start, autoescape=True))).all()
        found: dict[str, Holder] = {}
        for row in rows:
            if not row.name.startswith(start):  # SQLite's LIKE takes A for a
                continue
            process = Process(row.machine, row.pid, row.started)
            name = row.name[len(self._full("")) :]
            found[name] = Holder(name, row.owner, process, float(row.left_s))
        return found

    def keep(self, name: str, ttl_s: float, *, instead_of: str | None = None) -> Lease | None:
        """Take a lease and have it renewed by a thread for as long as it is not released.

        Args:
            name: of the lease.
            ttl_s: seconds for which it is given each time.
            instead_of: as for `acquire`.

        Returns:
            The lease, or None where somebody else has it.
        """
        owner = uuid.uuid4().hex
        asked = time.monotonic()
        # The same word each time: an attempt whose answer got lost may have succeeded.
        if not patiently(lambda: self.acquire(name, owner, ttl_s, instead_of=instead_of)):
            return None
        return Lease(self, name, owner, ttl_s, since=asked)

    @contextmanager
    def lock(self, name: str, *, ttl_s: float = LOCK_TTL_S, timeout_s: float = 600.0) -> Iterator[Lease]:
        """Have it while the block runs; wait for it until then.

        Args:
            name: of the lock.
            ttl_s: seconds after which a holder on another machine counts as dead.
            timeout_s: seconds to wait for it.

        Raises:
            ForgeError: it was held for longer.
        """
        end = time.monotonic() + timeout_s
        wait = 0.01
        while (lease := self.keep(name, ttl_s)) is None:
            if time.monotonic() > end:
                raise ForgeError(
                    f"Another worker has held the lock {name!r} of the study for {timeout_s:.0f} s: {self._who(name)}. "
                    "End that process; its work is then done by others."
                )
            time.sleep(random.uniform(wait / 2, wait))
            wait = min(1.5 * wait, 0.25)
        with lease:
            yield lease

    def _who(self, name: str) -> str:
        holder = self.holder(name)
        if holder is None:
            return "given back this moment"
        return f"process {holder.process.pid} on {holder.process.machine.split()[0]}"

    def _take(self, connection: Connection, name: str, owner: str, ttl_s: float, expected: Any) -> bool:
        ours = (self._table.c.name == self._full(name)) & expected
        changed = connection.execute(self._table.update().where(ours).values(self._values(owner, ttl_s)))
        return changed.rowcount == 1

    def _values(self, owner: str, ttl_s: float) -> dict[str, Any]:
        this = Process.this()
        return {
            "owner": owner,
            "machine": this.machine,
            "pid": this.pid,
            "started": this.started,
            "ends": self._now + ttl_s,
        }

    def _full(self, name: str) -> str:
        return f"{self._scope}/{name}"

    @patient
    def _create(self) -> None:
        from sqlalchemy import exc

        try:
            self._table.metadata.create_all(self.engine)
        except exc.DBAPIError as error:
            if is_away(error):
                raise
            time.sleep(0.5)  # another worker creates it at this moment
            self._table.metadata.create_all(self.engine)


def _table() -> Table:
    from sqlalchemy import Column, Float, Integer, MetaData, String, Table

    return Table(
        TABLE,
        MetaData(),
        Column("name", String(512), primary_key=True),
        Column("owner", String(32), nullable=False),
        Column("machine", String(512), nullable=False),
        Column("pid", Integer, nullable=False),
        Column("started", Float(53), nullable=False),
        Column("ends", Float(53), nullable=False),
    )


__all__ = ["Holder", "Lease", "LeaseLostError", "Leases"]
