"""A study's database, opened so that nothing can be written to it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from ...errors import ForgeError, UnknownNameError
from .storage import FILE, close_storage, open_storage, quiet

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import RDBStorage


@contextmanager
def open_to_read(folder: Path, *, url: str | None = None, name: str | None = None) -> Iterator[Study]:
    """Optuna's study of a folder, for as long as the block runs.

    An SQLite file is opened read-only: a look from another terminal disturbs no worker.

    Args:
        folder: the study's; the database file itself will do.
        url: SQLAlchemy's address, where the study lies elsewhere.
        name: of the study, where there are several.

    Raises:
        ForgeError: there is no study, or none of that name.
    """
    import optuna
    from sqlalchemy import make_url

    if url is not None and url.startswith("sqlite"):
        folder, url = Path(make_url(url).database or ""), None
    storage = _read_only(folder) if url is None else open_storage(url, folder)
    try:
        with quiet():
            names = sorted(optuna.get_all_study_names(storage))
            study = optuna.load_study(study_name=_chosen(names, name), storage=storage)
        yield study
    finally:
        close_storage(storage)


def _chosen(names: list[str], name: str | None) -> str:
    if name is not None:
        if name not in names:
            raise UnknownNameError.among("study", name, names)
        return name
    if len(names) != 1:
        found = f"{len(names)} studies ({', '.join(names[:8])}): name one with --study" if names else "no study yet"
        raise ForgeError(f"The database holds {found}.")
    return names[0]


def _read_only(folder: Path) -> RDBStorage:
    from optuna.exceptions import StorageInternalError
    from optuna.storages import RDBStorage
    from sqlalchemy import URL
    from sqlalchemy.exc import SQLAlchemyError

    path = folder if folder.is_file() else folder / FILE
    if not path.is_file():
        raise ForgeError(
            f"{folder} holds no {FILE}. Name the study's folder, or give --storage where it lies elsewhere."
        )
    # A finished study in a folder that cannot be written to has no log, and SQLite could not make one.
    log = Path(f"{path}-wal")
    still = {} if log.is_file() or os.access(path.parent, os.W_OK) else {"immutable": "1"}
    query = {"mode": "ro", "uri": "true", **still}
    address = URL.create("sqlite", database=f"file:{quote(str(path.resolve()))}", query=query)
    options: dict[str, Any] = {"connect_args": {"timeout": 30}}
    # Optuna fills a template in: braces in a folder's name are none of its business.
    text = address.render_as_string().replace("{", "{{").replace("}", "}}")
    skip: dict[str, Any] = {"skip_compatibility_check": True, "skip_table_creation": True}
    try:
        with quiet():
            return RDBStorage(text, engine_kwargs=options, **skip)
    except (StorageInternalError, SQLAlchemyError) as error:
        raise ForgeError(
            f"{path} holds no study that can be read ({_reason(error)}); one that just begins can be soon."
        ) from error


def _reason(error: Exception) -> str:
    """What SQLite said, without the statement around it."""
    inner = error.__cause__ or error
    return str(getattr(inner, "orig", inner))
