"""Leases: one holder at a time, by the database's clock, and a dead one is noticed."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forge.errors import ForgeError, UnsupportedError
from forge.tuning.study import leases as leases_module
from forge.tuning.study.keeper import LeaseLostError
from forge.tuning.study.leases import Leases
from forge.tuning.study.processes import Process
from forge.tuning.study.storage import close_storage, open_storage


@pytest.fixture(autouse=True)
def _nothing_foreign_warns(warning_recorder: Any) -> Iterator[None]:
    yield
    warning_recorder.assert_clean(besides="forge.tuning")


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with its tables, to be copied: creating them takes longer than most tests."""
    folder = tmp_path_factory.mktemp("empty")
    close_storage(open_storage(None, folder))
    return folder / "study.db"


@pytest.fixture
def engine(tmp_path: Path, empty: Path) -> Iterator[Any]:
    shutil.copy(empty, tmp_path)
    storage = open_storage(None, tmp_path)
    yield storage.engine
    close_storage(storage)


@pytest.fixture
def leases(engine: Any) -> Leases:
    return Leases(engine, "study")


@pytest.fixture
def elsewhere(monkeypatch) -> None:
    """Holders are on another machine, of whose processes nothing is known."""
    monkeypatch.setattr(Process, "is_gone", property(lambda self: False))


def age(leases: Leases, name: str, seconds: float) -> None:
    """Let a lease grow older than it is."""
    with leases.engine.begin() as connection:
        connection.exec_driver_sql(
            f"UPDATE forge_leases SET ends = ends - {seconds} WHERE name = '{leases._full(name)}'"
        )


def test_one_owner_at_a_time(leases: Leases) -> None:
    assert leases.acquire("a", "me", 60)
    assert leases.acquire("a", "me", 60)  # again, for an answer may get lost
    assert not leases.acquire("a", "you", 60)
    assert leases.acquire("b", "you", 60)
    assert leases.renew("a", "me", 60)
    assert not leases.renew("a", "you", 60)
    leases.release("a", "you")
    assert not leases.acquire("a", "you", 60)
    leases.release("a", "me")
    assert leases.holder("a") is None
    assert leases.acquire("a", "you", 60)
    assert not leases.renew("a", "me", 60)


def test_it_ends_by_the_databases_clock(leases: Leases, elsewhere: None, monkeypatch) -> None:
    assert leases.acquire("a", "me", 60)
    monkeypatch.setattr(time, "time", lambda: 4e9)  # this machine's clock has nothing to say
    assert not leases.acquire("a", "you", 60)
    holder = leases.holder("a")
    assert holder is not None
    assert 50 < holder.left_s <= 60
    age(leases, "a", 61)
    assert leases.renew("a", "me", 60)  # nobody took it meanwhile
    age(leases, "a", 61)
    assert leases.acquire("a", "you", 60)
    assert not leases.renew("a", "me", 60)


def test_many_at_once_and_one_gets_it(leases: Leases) -> None:
    together = threading.Barrier(8)
    got: list[str] = []

    def one(owner: str) -> None:
        together.wait()
        if leases.acquire("a", owner, 60):
            got.append(owner)

    threads = [threading.Thread(target=one, args=(f"t{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    holder = leases.holder("a")
    assert holder is not None
    assert holder.owner == got[0]


def test_a_dead_holder_on_this_machine_is_noticed_at_once(leases: Leases, tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from forge.tuning.study.storage import open_storage;"
        "from forge.tuning.study.leases import Leases;"
        f"Leases(open_storage(None, Path({str(tmp_path)!r})).engine, 'study').acquire('a', 'other', 3600);"
        "print('taken', flush=True); sys.stdin.readline()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(part for part in sys.path if part)},
    )
    assert other.stdout is not None
    assert other.stdout.readline() == b"taken\n"
    assert not leases.acquire("a", "me", 60)
    other.kill()
    end = time.monotonic() + 20
    while not leases.acquire("a", "me", 60) and time.monotonic() < end:
        time.sleep(0.01)
    holder = leases.holder("a")
    assert holder is not None
    assert holder.owner == "me"  # though the other one is a zombie: nobody has waited for it
    other.communicate()


def test_a_process_number_that_was_given_again_is_another_process(monkeypatch) -> None:
    this = Process.this()
    assert not this.is_gone
    assert Process(this.machine, this.pid, this.started - 1000).is_gone
    assert not Process("another machine", 1, 0.0).is_gone
    assert Process(this.machine, 2**22 + 1, 0.0).is_gone


def test_studies_in_one_database_do_not_meet(engine: Any) -> None:
    one, other = Leases(engine, "study"), Leases(engine, "STUDY")
    under, percent = Leases(engine, "st_dy"), Leases(engine, "%")
    for leases in (one, other, under, percent):
        assert leases.acquire("crew-1", "me", 60)
        assert list(leases.holders("crew-")) == ["crew-1"]


def test_it_is_renewed_until_it_is_released(leases: Leases) -> None:
    lease = leases.keep("a", 0.4)
    assert lease is not None
    beats: list[float] = []
    lease.on_beat = lambda: beats.append(time.monotonic())
    end = time.monotonic() + 20
    while len(beats) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    assert len(beats) >= 3
    lease.confirm()
    assert not lease.lost
    assert leases.keep("a", 60) is None
    lease.release()
    lease.release()
    assert leases.holder("a") is None
    lease._thread.join(5)
    assert not lease._thread.is_alive()


def test_who_was_taken_for_dead_learns_it(leases: Leases, elsewhere: None) -> None:
    lease = leases.keep("a", 60)
    assert lease is not None
    age(leases, "a", 61)
    assert leases.acquire("a", "you", 60)
    assert not lease.lost  # not yet asked
    with pytest.raises(LeaseLostError, match="taken over 'a'"):
        lease.confirm()
    assert lease.lost
    lease.release()
    holder = leases.holder("a")
    assert holder is not None
    assert holder.owner == "you"


def test_a_database_that_is_away_costs_the_lease_only_after_its_time(leases: Leases, monkeypatch) -> None:
    from sqlalchemy import exc

    asked: list[int] = []
    renew = leases.renew

    def away(*_: Any) -> bool:
        asked.append(1)
        raise exc.OperationalError("UPDATE", {}, RuntimeError("away"))

    lease = leases.keep("a", 2.0)
    assert lease is not None
    assert lease.beat()
    monkeypatch.setattr(leases, "renew", away)
    end = time.monotonic() + 20
    while len(asked) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    assert len(asked) >= 2  # it keeps trying
    while not lease.lost and time.monotonic() < end:
        time.sleep(0.01)
    assert lease.lost
    monkeypatch.setattr(leases, "renew", renew)
    lease.confirm()  # nobody else took it
    assert not lease.lost
    lease.release()


def test_what_cannot_be_given_back_is_given_back_later(leases: Leases, monkeypatch) -> None:
    from sqlalchemy import exc

    release, asked = leases.release, []

    def away_at_first(*args: str) -> None:
        asked.append(args)
        if len(asked) < 3:
            raise exc.OperationalError("DELETE", {}, RuntimeError("away"))
        release(*args)

    monkeypatch.setattr(leases, "release", away_at_first)
    with leases.lock("ask"):
        pass
    assert leases.holder("ask") is not None
    end = time.monotonic() + 20
    while leases.holder("ask") is not None and time.monotonic() < end:
        time.sleep(0.02)
    assert leases.holder("ask") is None
    assert len(asked) == 3


def test_a_lock_is_waited_for(leases: Leases, monkeypatch) -> None:
    inside: list[int] = []
    most: list[int] = []

    def one(number: int) -> None:
        with leases.lock("ask"):
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.005)
            inside.remove(number)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 6
    with leases.lock("ask"), pytest.raises(ForgeError, match=f"process {os.getpid()} on"):  # noqa: SIM117
        with leases.lock("ask", timeout_s=0.1):
            pass
    with pytest.raises(RuntimeError, match="inside"), leases.lock("ask"):
        raise RuntimeError("inside")
    assert leases.holder("ask") is None


def test_a_database_whose_clock_nobody_knows_is_refused(engine: Any, monkeypatch) -> None:
    monkeypatch.delitem(leases_module._NOW, "sqlite")
    with pytest.raises(UnsupportedError, match="cannot lie in sqlite"):
        Leases(engine, "study")
