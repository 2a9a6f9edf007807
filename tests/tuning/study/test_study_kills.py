"""Workers killed with SIGKILL, at any moment: no trial is lost, none completed twice, little done again."""

import functools
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tuning.study.toy_worker import RUNGS, Nursery, Plan, story, trained


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


def run_to_the_end(nursery: Nursery, plan: Plan) -> None:
    code = nursery.wait(nursery.start(plan))
    errors = [path.read_text() for path in Path(plan.folder).glob("error-*.txt")]
    assert code == 0, errors
    assert not errors


def check_whole(folder: Path, n_trials: int, kills: int, url: str | None = None, slots: int = 2) -> None:
    """No trial lost, none completed twice, at most one rung done again for each kill, n_trials exact."""
    told = story(folder, url)
    assert [trial["number"] for trial in told] == list(range(len(told)))
    launched = [trial for trial in told if trial["user_attrs"].get("status") != "infeasible"]
    assert len(launched) == n_trials
    statuses = {"COMPLETE": {"completed"}, "PRUNED": {"stopped", "infeasible"}}
    for trial in told:
        assert trial["user_attrs"]["status"] in statuses[trial["state"]], trial
        assert len(trial["params"]) == 3
        rungs = [rung for rung in RUNGS if rung <= trial["user_attrs"].get("steps", 0)]
        assert sorted(trial["intermediate"]) == rungs, trial
    params = [tuple(trial["params"].values()) for trial in told]
    assert len(set(params)) == len(params)  # nothing was failed and copied
    assert [trial["user_attrs"].get("prior") for trial in told[:3]] == ["preset", "scaling", None]
    done = Counter((line["number"], line["percent"]) for line in trained(folder))
    for trial in launched:
        assert all(done[trial["number"], percent] for percent in range(25, trial["user_attrs"]["steps"] + 1, 25))
    again = sum(count - 1 for count in done.values())
    assert again <= kills * slots, (again, kills)


def killed_at_statements(nursery: Nursery, folder: Path, statements: list[int], n_trials: int) -> int:
    """How many of the workers died; each one goes on where the one before it was killed."""
    kills = 0
    for statement in statements:
        code = nursery.wait(nursery.start(Plan(str(folder), n_trials=n_trials, die_at=statement)))
        assert code in (0, -signal.SIGKILL), [path.read_text() for path in folder.glob("error-*.txt")]
        kills += code != 0
    run_to_the_end(nursery, Plan(str(folder), n_trials=n_trials))
    return kills


@pytest.fixture(scope="module")
def uninterrupted(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, Any]]]:
    @functools.cache
    def whole(n_trials: int) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp("whole")
        run_to_the_end(nursery, Plan(str(folder), n_trials=n_trials))
        check_whole(folder, n_trials, kills=0)
        return story(folder)

    return whole


def test_a_chain_of_kills_changes_nothing(nursery, uninterrupted, tmp_path: Path) -> None:
    chance = random.Random(0)
    statements = [chance.randint(20, 500) for _ in range(7)]
    kills = killed_at_statements(nursery, tmp_path, statements, n_trials=5)
    assert kills >= 4
    check_whole(tmp_path, 5, kills)
    assert story(tmp_path) == uninterrupted(5)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 11))
def test_ten_kills_of_one_worker_change_nothing(nursery, uninterrupted, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    statements = [chance.randint(1, 700) for _ in range(10)]
    kills = killed_at_statements(nursery, tmp_path, statements, n_trials=12)
    check_whole(tmp_path, 12, kills)
    assert story(tmp_path) == uninterrupted(12)


@pytest.mark.long
def test_a_kill_before_every_seventeenth_statement_changes_nothing(nursery, uninterrupted, tmp_path: Path) -> None:
    for statement in range(1, 10_000, 17):
        folder = tmp_path / str(statement)
        folder.mkdir()
        kills = killed_at_statements(nursery, folder, [statement], n_trials=5)
        check_whole(folder, 5, kills)
        assert story(folder) == uninterrupted(5), statement
        if not kills:
            return


def chaos(
    nursery: Nursery, plan: Plan, *, workers: int, kills: int, chance: random.Random, longest_s: float = 0.7
) -> int:
    """Kill workers at random moments and start others in their place; gives the number of kills."""
    pids = [nursery.start(plan) for _ in range(workers)]
    killed = 0
    end = time.monotonic() + 300
    while killed < kills and time.monotonic() < end:
        time.sleep(chance.uniform(0.05, longest_s))
        lucky = chance.randrange(workers)
        if not nursery.has_ended(pids[lucky]):
            os.kill(pids[lucky], signal.SIGKILL)
            killed += 1
        nursery.wait(pids[lucky])
        pids[lucky] = nursery.start(plan)
    for pid in pids:
        assert nursery.wait(pid) == 0, [path.read_text() for path in Path(plan.folder).glob("error-*.txt")]
    run_to_the_end(nursery, plan)  # what the last one to be killed left, when all others had gone
    return killed


@pytest.mark.long
@pytest.mark.parametrize(("workers", "seed"), [(1, 0), (1, 1), (4, 0), (4, 1), (4, 2)])
def test_kills_at_random_moments(nursery, tmp_path: Path, workers: int, seed: int) -> None:
    plan = Plan(str(tmp_path), n_trials=24, train_s=0.03)
    kills = chaos(nursery, plan, workers=workers, kills=10, chance=random.Random(seed))
    assert kills == 10
    check_whole(tmp_path, 24, kills)


@pytest.mark.long
def test_four_workers_begin_at_the_same_moment_and_launch_no_more_than_n_trials(nursery, tmp_path: Path) -> None:
    plan = Plan(str(tmp_path), n_trials=13)
    for pid in [nursery.start(plan) for _ in range(4)]:
        assert nursery.wait(pid) == 0, [path.read_text() for path in tmp_path.glob("error-*.txt")]
    check_whole(tmp_path, 13, kills=0)
    told = story(tmp_path)
    assert len({trial["user_attrs"]["crew"] for trial in told if "crew" in trial["user_attrs"]}) > 1
    assert [trial["user_attrs"]["prior"] for trial in told if "prior" in trial["user_attrs"]] == ["preset", "scaling"]
