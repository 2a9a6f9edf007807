"""Where a study lies: SQLite in its folder, a server, and what is refused."""

import logging
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forge.errors import ConflictError, ForgeError, UnknownNameError, UnsupportedError
from forge.tuning.study.patience import StorageAwayError, is_away, patiently, reason
from forge.tuning.study.storage import HEARTBEAT_S, close_storage, open_storage


@pytest.fixture(autouse=True)
def _nothing_foreign_warns(warning_recorder: Any) -> Iterator[None]:
    yield
    warning_recorder.assert_clean(besides="forge.tuning")


def test_it_is_a_file_in_the_studys_folder_with_a_log_and_heartbeats(tmp_path: Path, capsys, caplog) -> None:
    caplog.set_level(logging.INFO)
    storage = open_storage(None, tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder" / "study.db").is_file()
    assert storage.get_heartbeat_interval() == HEARTBEAT_S
    with storage.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 60_000
    close_storage(storage)
    assert capsys.readouterr() == ("", "")
    assert not caplog.records


@pytest.mark.parametrize("name", ["a b", "50%?#x", "{SCHEMA_VERSION}{x}", "ü:@&="])
def test_any_name_of_a_folder_will_do(tmp_path: Path, name: str) -> None:
    storage = open_storage(None, tmp_path / name)
    close_storage(storage)
    assert (tmp_path / name / "study.db").is_file()


def test_a_writer_waits_for_another_one_instead_of_failing(tmp_path: Path) -> None:
    storage = open_storage(None, tmp_path)
    other = sqlite3.connect(tmp_path / "study.db", check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")

    def give_up() -> None:
        other.rollback()
        other.close()

    later = threading.Timer(0.5, give_up)
    later.start()
    from optuna.study import StudyDirection

    assert storage.create_new_study([StudyDirection.MINIMIZE], "late") == 1
    later.join()
    close_storage(storage)


def test_many_open_it_at_the_same_moment(tmp_path: Path) -> None:
    opened, errors = [], []

    def one() -> None:
        try:
            opened.append(open_storage(None, tmp_path))
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=one) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for storage in opened:
        close_storage(storage)
    with sqlite3.connect(tmp_path / "study.db") as connection:
        assert connection.execute("SELECT count(*) FROM alembic_version").fetchone() == (1,)
    connection.close()


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite:///file:x?mode=memory&uri=true"])
def test_memory_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConflictError, match="lies in memory"):
        open_storage(url, tmp_path)


def test_what_cannot_be_opened_is_said_without_credentials(tmp_path: Path) -> None:
    with pytest.raises(ForgeError, match="is no address of a database"):
        open_storage("study.db", tmp_path)
    with pytest.raises(UnknownNameError, match="knows no database 'redis'"):
        open_storage("redis://ada:s3cret@host/0", tmp_path)
    with pytest.raises(ForgeError, match="cannot be opened: unable to open database file"):
        open_storage(f"sqlite:///{tmp_path}/none/study.db", tmp_path)
    with pytest.raises(ForgeError) as caught:
        open_storage("ada:s3cret@host", tmp_path)
    assert "s3cret" not in str(caught.value).replace("ada:s3cret@host", "")


def test_a_server_that_is_not_there_is_waited_for_and_then_named_without_the_password(tmp_path, monkeypatch) -> None:
    pytest.importorskip("psycopg")
    monkeypatch.setattr("forge.tuning.study.storage._OPENING_S", 0.5)
    for scheme in ("postgres", "postgresql", "postgresql+psycopg"):
        with pytest.raises(ForgeError, match=r"cannot be opened: .*refused") as caught:
            open_storage(f"{scheme}://ada:s3cret@127.0.0.1:1/db", tmp_path)
        assert "postgresql+psycopg://127.0.0.1:1/db" in str(caught.value)
        assert "s3cret" not in str(caught.value)
        assert "ada" not in str(caught.value)


def test_a_missing_driver_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "psycopg", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'transformers-forge\[postgres\]'") as caught:
        open_storage("postgresql://ada:s3cret@127.0.0.1/db", tmp_path)
    assert "s3cret" not in str(caught.value)
    with pytest.raises(UnsupportedError, match="install the driver"):
        open_storage("postgresql+pg8000://ada@127.0.0.1/db", tmp_path)


def test_other_drivers_are_optunas(tmp_path: Path) -> None:
    storage = open_storage(f"sqlite+pysqlite:///{tmp_path}/own.db", tmp_path)
    assert storage.engine.driver == "pysqlite"
    close_storage(storage)
    assert (tmp_path / "own.db").is_file()


def away() -> Exception:
    from sqlalchemy import exc

    return exc.OperationalError("SELECT 1", {}, RuntimeError("server at ada:x@host closed\nthe connection"))


def test_patience_waits_and_says_so(monkeypatch, caplog) -> None:
    clock = [0.0]
    monkeypatch.setattr("forge.tuning.study.patience.time.monotonic", lambda: clock[0])
    monkeypatch.setattr(
        "forge.tuning.study.patience.time.sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds)
    )
    left = [10]

    def work() -> str:
        left[0] -= 1
        if left[0]:
            raise away()
        return "done"

    with caplog.at_level("INFO", "forge.tuning"):
        assert patiently(work) == "done"
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "does not answer" in said[0]
    assert "answers again" in said[1]

    left[0] = 10**9
    with pytest.raises(StorageAwayError, match=r"has not answered for 6. s"):
        patiently(work, patience_s=60)


def test_what_does_not_pass_is_not_waited_for() -> None:
    from optuna.exceptions import StorageInternalError
    from sqlalchemy import exc

    def wrapped(error: Exception) -> Exception:
        outer = StorageInternalError("An exception is raised during the commit.")
        outer.__cause__ = error
        return outer

    def of_sqlite(message: str) -> Exception:
        return exc.OperationalError("UPDATE", {}, sqlite3.OperationalError(message))

    assert is_away(away())
    assert is_away(wrapped(away()))
    assert is_away(of_sqlite("database is locked"))
    assert is_away(exc.TimeoutError("the pool"))
    assert is_away(wrapped(exc.PendingRollbackError("can't reconnect")))
    for error in (
        of_sqlite("database or disk is full"),
        wrapped(of_sqlite("attempt to write a readonly database")),
        exc.IntegrityError("INSERT", {}, RuntimeError("twice")),
        exc.ProgrammingError("SELECT", {}, RuntimeError("no such table")),
        StorageInternalError("no cause"),
        ValueError("x"),
    ):
        assert not is_away(error)
    assert reason(wrapped(of_sqlite("database or disk is full"))) == "database or disk is full"
