"""Judgements on disk: what was paid for once is not paid for again.

A SQLite file, one connection an operation: threads, processes and forks share it, and a process that is killed in the
middle of a write leaves the file as it was before that write. Only scores are kept: a judge that failed is asked again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ...errors import ConflictError
from .fence import LAYOUT, Sample
from .judgement import Judgement

_log = logging.getLogger(__name__)
_CREATE = "CREATE TABLE IF NOT EXISTS judgements (key TEXT PRIMARY KEY, score REAL NOT NULL, reason TEXT NOT NULL)"
_PATIENCE_S = 60.0  # for another process's write, which takes milliseconds


class Cache:
    """The judgements of one file.

    Args:
        path: The file, or a folder for it; made if it is missing.

    Raises:
        ConflictError: No such file can be opened or made.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path).expanduser()
        self._warned = False
        self.path = path if path.suffix in {".sqlite", ".db", ".sqlite3"} else path / "judgements.sqlite"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._open() as connection:
                connection.execute(_CREATE)
        except (OSError, sqlite3.Error) as error:
            raise ConflictError(
                f"The cache of judgements {self.path} cannot be used: {error}. Delete the file, or pass cache=False or "
                "cache=<another folder>."
            ) from error

    def __repr__(self) -> str:
        return f"Cache({str(self.path)!r})"

    def read(self, keys: Sequence[str]) -> dict[str, Judgement]:
        """Those of the keys that are known."""
        found = {}
        try:
            with self._open() as connection:
                for key in keys:
                    row = connection.execute("SELECT score, reason FROM judgements WHERE key = ?", (key,)).fetchone()
                    if row is not None:
                        found[key] = Judgement(*row)
        except sqlite3.Error as error:
            _log.warning("The cache of judgements %s could not be read, so the judge is asked: %s", self.path, error)
        return found

    def write(self, key: str, judgement: Judgement) -> None:
        """Keep one judgement. A full disk costs the cache's use, not the evaluation, and is told once."""
        try:
            with self._open() as connection:
                connection.execute(
                    "INSERT OR REPLACE INTO judgements VALUES (?, ?, ?)", (key, judgement.score, judgement.reason)
                )
        except (OSError, ValueError, sqlite3.Error) as error:
            if not self._warned:
                self._warned = True
                _log.warning("Judgements cannot be kept in %s: %s", self.path, error)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self.path, timeout=_PATIENCE_S)
        try:
            with connection:  # commits, or rolls back
                yield connection
        finally:
            connection.close()


def key_of(identity: Sequence[str], rubric: str, sample: Sample) -> str:
    """A digest of all that a judgement depends on.

    Args:
        identity: Of the judge: its name, model and address. Never its key.
        rubric: The rubric's digest.
        sample: What is judged.
    """
    parts = [LAYOUT, list(identity), rubric, sample.prompt, sample.reference, sample.answer]
    return hashlib.sha256(json.dumps(parts).encode("utf-8", "surrogatepass")).hexdigest()
