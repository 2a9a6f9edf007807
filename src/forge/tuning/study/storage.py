"""Where a study lies: an SQLite file in its folder, or a database server that many machines reach.

Optuna's own RDBStorage is what comes out, so that everything made for Optuna works on it. What is done here is what a
study needs that many processes write to: SQLite with a write-ahead log and writers that wait for each other, a server's
connections that are checked before they are used, and opening it at the same moment from all of them.
"""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ConflictError, ForgeError, UnknownNameError, UnsupportedError
from ...reporting.private import without_credentials
from .leases import Leases
from .patience import is_away, reason

if TYPE_CHECKING:
    from optuna.storages import RDBStorage
    from sqlalchemy import URL

FILE = "study.db"
HEARTBEAT_S = 60
"""Between two signs of life of a trial, for Optuna's tools; its trials count as abandoned after twice that."""
_OPENING_S = 30.0
_LOCKED_S = 60.0
# A line that breaks without a word is noticed after a minute, and not after the two hours of TCP's own.
_POSTGRESQL = {"connect_timeout": 10, "keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
# What a server says that is just being stopped or started; another FATAL is about the address or the password.
_PASSING = ("starting up", "shutting down", "recovery", "too many clients", "connection slots", "terminating")


def open_storage(url: str | None, folder: Path) -> RDBStorage:
    """Open a study's database, and create its tables where there are none.

    Args:
        url: SQLAlchemy's; None is `study.db` in the folder. "postgresql://" is spoken to through psycopg 3.
        folder: the study's.

    Returns:
        Optuna's storage; `close_storage` closes it.

    Raises:
        ConflictError: a database in memory, which no other process can see and which ends with this one.
        UnsupportedError: the database's driver is not installed.
        ForgeError: it is no address, or the database cannot be opened; the message holds no credentials.

    >>> from tempfile import mkdtemp
    >>> storage = open_storage(None, Path(mkdtemp()))
    >>> storage.engine.dialect.name
    'sqlite'
    >>> close_storage(storage)
    """
    address = _address(url, folder)
    if address.get_backend_name() == "sqlite" and url is None:
        folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    while True:
        try:
            return _open(address)
        except Exception as error:  # noqa: PERF203
            if time.monotonic() - began < _OPENING_S and _may_pass(error):
                time.sleep(random.uniform(0.05, 0.3))
                continue
            if (known := _explained(error, address)) is None:
                raise
            raise known from None


def close_storage(storage: RDBStorage) -> None:
    """Give its connections back.

    Args:
        storage: open.
    """
    storage.remove_session()
    storage.engine.dispose()


@contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's notes about what is experimental and what it has created."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(before, optuna.logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


def _address(url: str | None, folder: Path) -> URL:
    from sqlalchemy import URL, exc, make_url

    if url is None:
        return URL.create("sqlite", database=str(folder.resolve() / FILE))
    try:
        # SQLAlchemy does not know the shorter name that many servers' own pages show.
        address = make_url(url.replace("postgres://", "postgresql://", 1) if url.startswith("postgres://") else url)
    except exc.ArgumentError:
        raise ForgeError(
            f"storage={without_credentials(url)!r} is no address of a database. Write 'sqlite:////folder/study.db' or "
            "'postgresql://user:password@host/database'; None is a file in the study's folder."
        ) from None
    if address.drivername == "postgresql":
        return address.set(drivername="postgresql+psycopg")
    if address.get_backend_name() == "sqlite" and _in_memory(address):
        raise ConflictError(
            f"storage={url!r} lies in memory: no other worker can see it, and it ends with this process. "
            "Name a file ('sqlite:////folder/study.db'), or leave it out for one in the study's folder."
        )
    return address


def _in_memory(address: URL) -> bool:
    database = address.database or ""
    return database in ("", ":memory:", "file:") or ":memory:" in database or address.query.get("mode") == "memory"


def _open(address: URL) -> RDBStorage:
    from optuna.storages import RDBStorage
    from sqlalchemy import create_engine

    options: dict[str, Any] = {}
    if address.get_backend_name() == "sqlite":
        # How long a writer waits for the others. Python begins a transaction with its first write, so that none has to
        # give up in the middle because of what it has read.
        options["connect_args"] = {"timeout": _LOCKED_S}
    elif address.get_backend_name() == "postgresql":
        options["pool_pre_ping"] = True
        if address.get_driver_name() in ("psycopg", "psycopg2"):
            options["connect_args"] = _POSTGRESQL
    # Optuna fills a template in: braces in a folder's name or a password are to come out of that as they were.
    text = address.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
    engine = create_engine(address, **options)
    try:
        with engine.connect() as connection:
            if address.get_backend_name() == "sqlite":
                # With a log, readers do not wait for writers; the file remembers it.
                connection.exec_driver_sql("PRAGMA journal_mode=WAL")
        # One at a time: Optuna does not expect that others create its tables at the same moment.
        with Leases(engine, "").lock("tables"), quiet():
            return RDBStorage(text, engine_kwargs=options, heartbeat_interval=HEARTBEAT_S)
    finally:
        engine.dispose()


def _may_pass(error: Exception) -> bool:
    """Whether it is a server that is just starting, or a file that somebody else is opening."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy import exc

    inner = error.__cause__ if isinstance(error, StorageInternalError) else error
    if not isinstance(inner, exc.DBAPIError):
        return False
    said = str(inner.orig)
    return is_away(inner) and ("FATAL" not in said or any(word in said for word in _PASSING))


def _explained(error: Exception, address: URL) -> ForgeError | None:
    from optuna.exceptions import StorageInternalError
    from sqlalchemy import exc

    place = without_credentials(address.render_as_string(hide_password=True))
    if isinstance(error, exc.NoSuchModuleError):
        return UnknownNameError(
            f"storage={place!r}: SQLAlchemy knows no database {address.drivername!r}. "
            "forge is tested with 'sqlite:///...' and 'postgresql://...'."
        )
    if isinstance(error, ImportError):
        postgres = address.drivername == "postgresql+psycopg"
        remedy = "pip install 'transformers-forge[postgres]'" if postgres else "install the driver that it names"
        return UnsupportedError(f"storage={place!r} needs a driver that is not installed: {remedy}.")
    if isinstance(error, RuntimeError) and "optuna" in str(error):  # the tables are another version's
        return UnsupportedError(f"storage={place!r}: {error}")
    if isinstance(error, (exc.SQLAlchemyError, StorageInternalError)):
        return ForgeError(
            f"storage={place!r} cannot be opened: {reason(error)}. "
            "See that the server runs and the address is right; of a file, that its folder is there and writable."
        )
    return None
