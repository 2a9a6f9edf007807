"""A study on a real PostgreSQL server: workers are killed, and the server is restarted under them."""

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forge.errors import ForgeError
from forge.tuning.study.leases import Leases
from forge.tuning.study.processes import Process
from forge.tuning.study.storage import close_storage, open_storage
from support.postgres_server import PostgresServer, missing
from tuning.study.test_study_kills import chaos, check_whole, run_to_the_end
from tuning.study.toy_worker import Nursery, Plan, story

pytestmark = [pytest.mark.long, pytest.mark.skipif(bool(missing()), reason=missing())]


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    pytest.importorskip("psycopg")
    with PostgresServer() as server:
        yield server


@pytest.fixture
def storage(server: PostgresServer, tmp_path: Path) -> Iterator[Any]:
    opened = open_storage(server.url, tmp_path)
    yield opened
    close_storage(opened)


def test_it_is_spoken_to_through_psycopg_3(storage: Any, server: PostgresServer, tmp_path: Path) -> None:
    assert storage.engine.driver == "psycopg"
    wrong = server.url.replace("s3cret", "guess")
    began = time.monotonic()
    with pytest.raises(ForgeError, match="password authentication failed") as caught:
        open_storage(wrong, tmp_path)
    assert time.monotonic() - began < 20  # it is not waited for
    assert "guess" not in str(caught.value)
    with pytest.raises(ForgeError, match="does not exist"):
        open_storage(server.url + "2", tmp_path)


def test_many_open_it_at_the_same_moment(server: PostgresServer, tmp_path: Path) -> None:
    opened, errors = [], []

    def one() -> None:
        try:
            opened.append(open_storage(server.url, tmp_path))
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=one) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    with opened[0].engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM alembic_version").scalar() == 1
    for storage in opened:
        close_storage(storage)


def test_leases(storage: Any, monkeypatch) -> None:
    monkeypatch.setattr(Process, "is_gone", property(lambda self: False))
    leases = Leases(storage.engine, "study")
    together, got = threading.Barrier(8), []

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
    assert leases.renew("a", got[0], 60)
    assert not leases.acquire("a", "you", 60)
    with storage.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE forge_leases SET ends = ends - 61")
    assert leases.acquire("a", "you", 60)
    assert not leases.renew("a", got[0], 60)
    leases.release("a", "you")
    assert leases.holders() == {}
    with leases.lock("ask") as lock:
        lock.confirm()


def test_concurrent_workers_launch_no_more_than_n_trials(nursery, server: PostgresServer, tmp_path: Path) -> None:
    plan = Plan(str(tmp_path), server.url, n_trials=11)
    for pid in [nursery.start(plan) for _ in range(4)]:
        assert nursery.wait(pid) == 0, [path.read_text() for path in tmp_path.glob("error-*.txt")]
    check_whole(tmp_path, 11, kills=0, url=server.url)


def test_the_resumed_study_is_the_uninterrupted_one(nursery, server: PostgresServer, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    run_to_the_end(nursery, Plan(str(whole), n_trials=8))  # on SQLite: the database does not matter either
    chance, kills = random.Random(7), 0
    for _ in range(10):
        plan = Plan(str(killed), server.url, n_trials=8, die_at=chance.randint(20, 600))
        kills += nursery.wait(nursery.start(plan)) == -signal.SIGKILL
    run_to_the_end(nursery, Plan(str(killed), server.url, n_trials=8))
    check_whole(killed, 8, kills, url=server.url)
    assert story(killed, server.url) == story(whole)


@pytest.mark.parametrize("how", ["fast", "immediate", "killed"])
def test_kills_while_the_server_is_restarted(nursery, server: PostgresServer, tmp_path: Path, how: str) -> None:
    plan = Plan(str(tmp_path), server.url, n_trials=24, train_s=0.05)
    restarted = threading.Event()

    def restart() -> None:
        time.sleep(4)
        server.kill() if how == "killed" else server.stop(how)
        time.sleep(3)
        server.start()
        restarted.set()

    other = threading.Thread(target=restart)
    other.start()
    kills = chaos(nursery, plan, workers=4, kills=10, chance=random.Random(3), longest_s=1.5)
    other.join()
    assert restarted.is_set()
    assert kills == 10
    assert not list(tmp_path.glob("error-*.txt"))
    check_whole(tmp_path, 24, kills, url=server.url)


def test_a_server_that_is_away_for_long_costs_nobody_a_crew(nursery, server: PostgresServer, tmp_path: Path) -> None:
    plan = Plan(str(tmp_path), server.url, n_trials=8, train_s=0.1)
    pids = [nursery.start(plan) for _ in range(2)]
    time.sleep(4)
    server.stop("immediate")
    time.sleep(8)
    assert not any(nursery.has_ended(pid) for pid in pids)
    server.start()
    for pid in pids:
        assert nursery.wait(pid) == 0, [path.read_text() for path in tmp_path.glob("error-*.txt")]
    check_whole(tmp_path, 8, kills=0, url=server.url)
    assert all(trial["user_attrs"].get("crew", 0) in (0, 1) for trial in story(tmp_path, server.url))


def test_the_server_that_is_started_here_is_stopped() -> None:
    with PostgresServer() as server:
        pid = int((server.folder / "data" / "postmaster.pid").read_text().splitlines()[0])
        os.kill(pid, 0)
    assert not server.folder.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
