"""The ledger: who gets which trial, what is written, and what a second call changes: nothing."""

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from forge.errors import ConflictError, ForgeError, NonFiniteError, UnknownNameError
from forge.tuning.study.keeper import LeaseLostError
from forge.tuning.study.ledger import Asked, Ledger
from forge.tuning.study.processes import Process
from forge.tuning.study.storage import close_storage, open_storage
from tuning.study.toy_worker import PRIORS, make_sampler, space


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
def storage(tmp_path: Path, empty: Path) -> Iterator[Any]:
    shutil.copy(empty, tmp_path)
    opened = open_storage(None, tmp_path)
    yield opened
    close_storage(opened)


@pytest.fixture
def begin(storage: Any) -> Iterator[Callable[..., Ledger]]:
    ledgers: list[Ledger] = []

    def begin(**changed: Any) -> Ledger:
        fields: dict[str, Any] = {
            "direction": "minimize",
            "n_trials": 4,
            "space_distributions": space(),
            "make_sampler": make_sampler,
            "seed": 1,
            "priors": PRIORS,
            "settings": {"model": "toy", "data": {"rows": 7}},
        }
        ledgers.append(Ledger.open(storage, "toy", **{**fields, **changed}))
        return ledgers[-1]

    yield begin
    for ledger in ledgers:
        ledger.close()


def ask(ledger: Ledger, crew: Any, **more: Any) -> Asked:
    asked = ledger.ask(crew, **more)
    assert asked is not None
    return asked


def attrs(ledger: Ledger, number: int) -> dict[str, Any]:
    return dict(ledger.study.trials[number].user_attrs)


def test_priors_come_first_and_are_enqueued_once(begin: Any) -> None:
    ledger = begin()
    begin()
    crew = ledger.claim()
    asked = [ask(ledger, crew) for _ in range(4)]
    assert ledger.ask(crew) is None
    assert [one.prior for one in asked] == ["preset", "scaling", "", ""]
    assert [one.number for one in asked] == [0, 1, 2, 3]
    assert asked[0].params == PRIORS[0][1]
    assert list(asked[1].params) == list(space())
    assert asked[1].params["learning_rate"] == 5e-4
    assert ledger.running(crew) == asked
    assert ledger.unfinished() == [0, 1, 2, 3]
    again = begin()
    assert again.ask(again.claim()) is None
    attributes = ledger.study.user_attrs
    assert attributes["forge_study"] == 1
    assert attributes["rungs"] == [25, 50, 100]
    assert attributes["settings"]["data"] == {"rows": 7}


def test_priors_that_a_killed_process_left_out_are_added(storage: Any, begin: Any, monkeypatch) -> None:
    import optuna

    enqueue = optuna.study.Study.enqueue_trial

    def die(self: Any, params: Any, **more: Any) -> None:
        if more["user_attrs"]["prior"] == "scaling":
            raise KeyboardInterrupt
        enqueue(self, params, **more)

    with monkeypatch.context() as patch:
        patch.setattr(optuna.study.Study, "enqueue_trial", die)
        with pytest.raises(KeyboardInterrupt):
            begin()
    ledger = begin()
    assert [trial.user_attrs["prior"] for trial in ledger.study.trials] == ["preset", "scaling"]


def test_another_study_is_not_gone_on_with(storage: Any, begin: Any) -> None:
    from optuna.distributions import CategoricalDistribution

    begin()
    one = CategoricalDistribution([4])
    with pytest.raises(ConflictError, match=r'model was "toy" and is now "real"'):
        begin(settings={"model": "real", "data": {"rows": 7}})
    with pytest.raises(ConflictError, match=r"data\.rows was 7 and is now 8; seed was 1 and is now 2"):
        begin(settings={"model": "toy", "data": {"rows": 8}}, seed=2)
    with pytest.raises(ConflictError, match=r"direction was .* extra was nothing and is now 1"):
        begin(settings={"model": "toy", "data": {"rows": 7}, "extra": 1}, direction="maximize")
    with pytest.raises(
        ConflictError, match=r"space\.lora_r\.attributes\.choices was \[4, 8, 16, 32\] and is now \[4\]"
    ):
        begin(space_distributions={**space(), "lora_r": one}, priors=[])
    begin(n_trials=9)


def test_a_study_that_forge_did_not_begin_is_refused(storage: Any, begin: Any) -> None:
    import optuna

    optuna.create_study(storage=storage, study_name="toy").add_trial(
        optuna.trial.create_trial(params={}, distributions={}, value=1.0)
    )
    with pytest.raises(ConflictError, match="that forge did not begin"):
        begin()


def test_a_prior_outside_the_space_is_refused(begin: Any) -> None:
    with pytest.raises(ForgeError, match=r"'wide' sets learning_rate=0.5"):
        begin(priors=[("wide", {"learning_rate": 0.5})])
    with pytest.raises(ForgeError, match="sets lora_r=5"):
        begin(priors=[("odd", {"lora_r": 5})])
    with pytest.raises(UnknownNameError, match="Did you mean 'lora_r'"):
        begin(priors=[("typo", {"lora_rr": 8})])


def test_n_trials_is_the_total_and_may_be_raised(begin: Any) -> None:
    ledger = begin(n_trials=3)
    crew = ledger.claim()
    for _ in range(3):
        ledger.finish(ask(ledger, crew).number, "failed", why="x")
    assert ledger.ask(crew) is None
    ledger.close()
    more = begin(n_trials=4)
    crew = more.claim()
    assert ask(more, crew).number == 3
    assert more.ask(crew) is None
    assert begin(n_trials=1).ask(crew) is None


def test_what_does_not_fit_is_recorded_and_does_not_count(begin: Any, monkeypatch) -> None:
    monkeypatch.setattr("forge.tuning.study.ledger.MOST_INFEASIBLE", 5)
    ledger = begin(n_trials=3, priors=[("big", {"lora_r": 32}), ("small", {"lora_r": 4})])
    crew = ledger.claim()
    asked = []
    while (one := ledger.ask(crew, excess_gb=lambda params: params["lora_r"] - 16.5)) is not None:
        asked.append(one)
    assert len(asked) == 3
    assert asked[0].prior == "small"
    trials = ledger.study.trials
    assert trials[0].state.name == "PRUNED"
    assert trials[0].constraints == {"memory": 15.5}
    assert trials[0].user_attrs["status"] == "infeasible"
    assert "15.50 GiB more" in trials[0].user_attrs["why"]
    assert "crew" not in trials[0].user_attrs
    for one in asked:
        assert trials[one.number].constraints["memory"] <= 0
    with pytest.raises(ForgeError, match="5 configurations in a row"):
        begin(n_trials=4).ask(crew, excess_gb=lambda params: 3.0)
    assert sum(trial.user_attrs.get("status") == "infeasible" for trial in ledger.study.trials) >= 6
    assert ask(begin(n_trials=4), crew, excess_gb=lambda params: math.nan).number == len(ledger.study.trials) - 1


@pytest.mark.parametrize(
    ("sampler", "prior", "written"),
    [("tpe", False, 0), ("tpe", False, 2), ("random", False, 1), ("random", False, 3), ("random", True, 1)],
)
def test_an_orphan_is_completed_to_the_same_parameters(
    tmp_path: Path, empty: Path, monkeypatch, written: int, sampler: str, prior: bool
) -> None:
    from optuna.samplers import RandomSampler
    from optuna.trial import create_trial

    class Killed(BaseException):
        pass

    def study(folder: str, die: bool) -> list[Any]:
        (tmp_path / folder).mkdir()
        shutil.copy(empty, tmp_path / folder)
        opened = open_storage(None, tmp_path / folder)
        make = make_sampler if sampler == "tpe" else lambda seed, number: RandomSampler(seed * 100 + number)
        fields = {"direction": "minimize", "n_trials": 6, "space_distributions": space(), "make_sampler": make}
        ledger = Ledger.open(opened, "s", **fields, seed=3, priors=PRIORS[1:] if prior else [])
        crew = ledger.claim()
        for number in range(0 if prior else 4):  # TPE has something to go by
            params = {"learning_rate": 1e-4 * (1 + number), "lora_r": 4, "lora_dropout": 0.02 * number}
            ledger.study.add_trial(create_trial(params=params, distributions=space(), value=1.0 + number))
        if die:
            left = [written]
            storage = type(ledger._storage)
            write, give = storage.set_trial_param, storage.set_trial_user_attr

            def set_param(*args: Any) -> None:
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
                write(*args)

            def set_attr(*args: Any) -> None:
                if args[2] == "crew":
                    raise Killed
                give(*args)

            with monkeypatch.context() as patch:
                patch.setattr(storage, "set_trial_param", set_param)
                patch.setattr(storage, "set_trial_user_attr", set_attr)
                with pytest.raises(Killed):
                    ledger.ask(crew)
            assert ledger.study.trials[-1].state.name == "RUNNING"
            assert "crew" not in ledger.study.trials[-1].user_attrs
            assert ledger.unfinished() == []
        told = [ask(ledger, crew), ask(ledger, crew), [trial.system_attrs for trial in ledger.study.trials]]
        ledger.close()
        close_storage(opened)
        return told

    assert study("killed", die=True) == study("whole", die=False)


@pytest.mark.parametrize("fits", [True, False])
def test_who_lost_the_lock_in_the_middle_of_ask_asks_again(storage: Any, begin: Any, fits: bool) -> None:
    slow, other = begin(priors=[]), begin(priors=[])
    crews, taken = [slow.claim(), other.claim()], []

    def excess_gb(_: Any) -> float:
        if not taken:  # away for longer than the lock is given
            with storage.engine.begin() as connection:
                connection.exec_driver_sql("UPDATE forge_leases SET ends = 0 WHERE name LIKE '%/ask'")
            taken.append(other.ask(crews[1], excess_gb=lambda _: 0.0 if fits else 1.0 - len(other.study.trials) // 2))
        return 0.0

    asked = ask(slow, crews[0], excess_gb=excess_gb)
    assert [asked] == slow.running(crews[0])
    assert taken == other.running(crews[1])
    assert taken[0].number == (0 if fits else 1)
    assert asked.number == taken[0].number + 1


def test_what_finishes_this_very_moment_raises_nothing(begin: Any, monkeypatch) -> None:
    ledger, other = begin(), begin()
    number = ask(ledger, ledger.claim()).number
    before = ledger._trial(number)
    other.finish(number, "failed", why="first")
    monkeypatch.setattr(ledger, "_trial", lambda _: before)
    ledger.report(number, 25, 1.0)
    assert not ledger.note(number, steps=1)
    assert not ledger.finish(number, "completed", value=1.0)
    assert other.study.trials[number].intermediate_values == {}


def test_what_is_asked_depends_on_the_storage_alone(begin: Any) -> None:
    made: list[tuple[int, int]] = []

    def make(seed: int, number: int) -> Any:
        made.append((seed, number))
        return make_sampler(seed, number)

    one, other = begin(make_sampler=make), begin(make_sampler=make)
    crews = [one.claim(), other.claim()]
    asked = [ask(ledger, crew) for ledger, crew in zip((one, other, one), (*crews, crews[0]), strict=True)]
    assert [crew.number for crew in crews] == [0, 1]
    assert made == [(1, 0), (1, 1), (1, 2)]
    assert [asked[0], asked[2]] == one.running(crews[0])
    assert [asked[1]] == other.running(crews[1])


def test_what_somebody_enqueued_is_tried_and_what_is_outside_is_sampled(begin: Any, caplog) -> None:
    ledger = begin(priors=[])
    crew = ledger.claim()
    ledger.study.enqueue_trial({"lora_r": 4, "learning_rate": 7.0, "unknown": 1})
    with caplog.at_level("WARNING", "forge.tuning"):
        asked = ask(ledger, crew)
    assert asked.params["lora_r"] == 4
    assert 1e-5 <= asked.params["learning_rate"] <= 1e-3
    assert set(asked.params) == set(space())
    assert "learning_rate=7.0" in caplog.text


def test_reports_and_their_sign(begin: Any) -> None:
    ledger = begin()
    crew = ledger.claim()
    for loss in (2.5, 1.5, math.nan):
        ledger.report(ask(ledger, crew).number, 25, loss)
    ledger.report(0, 25, 99.0)  # a second time
    ledger.report(0, 50, 2.25)
    assert ledger.losses_at(25, without=[2]) == [2.5, 1.5]
    assert ledger.losses_at(25, without={0, 2}) == [1.5]
    assert math.isnan(ledger.losses_at(25)[-1])
    assert ledger.losses_at(50) == [2.25]
    assert ledger.losses_at(100) == []
    assert ledger.study.trials[0].intermediate_values == {25: 2.5, 50: 2.25}


def test_a_score_is_maximised_and_losses_are_still_losses(begin: Any) -> None:
    ledger = begin(direction="maximize")
    crew = ledger.claim()
    number = ask(ledger, crew).number
    ledger.report(number, 25, 2.5)
    assert ledger.study.trials[0].intermediate_values == {25: -2.5}
    assert ledger.losses_at(25) == [2.5]
    assert ledger.finish(number, "completed", value=0.8, loss=2.0, bert_score=0.8)
    assert ledger.study.best_value == 0.8
    assert attrs(ledger, number)["loss"] == 2.0


@pytest.mark.parametrize(
    ("status", "state", "value", "constraint"),
    [
        ("completed", "COMPLETE", 1.75, 0.0),
        ("stopped", "PRUNED", 2.5, 0.0),
        ("diverged", "PRUNED", 2.5, 0.0),
        ("out_of_memory", "PRUNED", 2.5, 1.0),
        ("failed", "FAIL", None, 0.0),
    ],
)
def test_who_finishes_first_decides(begin: Any, status: Any, state: str, value: Any, constraint: float) -> None:
    ledger = begin()
    crew = ledger.claim()
    number = ask(ledger, crew).number
    ledger.report(number, 25, 2.5)
    assert ledger.note(number, steps=3, curve=[[1.0, math.nan]])
    assert ledger.finish(number, status, value=1.75, why="so", loss=math.inf)
    before = ledger.study.trials[number]
    for other in ("completed", "stopped", "failed", status):
        assert not ledger.finish(number, other, value=3.0, why="no")
    ledger.report(number, 50, 9.0)
    assert not ledger.note(number, steps=4)
    after = ledger.study.trials[number]
    assert after == before
    assert after.state.name == state
    assert after.value == value
    assert after.constraints == {"memory": constraint}
    assert after.user_attrs["status"] == status
    assert after.user_attrs["why"] == "so"
    assert after.user_attrs["loss"] is None
    assert after.user_attrs["steps"] == 3
    assert after.user_attrs["curve"] == [[1.0, None]]
    assert ledger.running(crew) == []


def test_a_completed_trial_needs_a_value(begin: Any) -> None:
    ledger = begin()
    number = ask(ledger, ledger.claim()).number
    for value in (None, math.nan, math.inf):
        with pytest.raises(NonFiniteError, match="needs a finite one"):
            ledger.finish(number, "completed", value=value)
    assert ledger.unfinished() == [number]


def test_scores_of_finished_trials_stand_beside_them(begin: Any) -> None:
    ledger = begin()
    crew = ledger.claim()
    for number in range(2):
        ledger.finish(ask(ledger, crew).number, "completed", value=1.0)
        ledger.score(number, bert_score=0.5 + number / 10)
    ledger.score(1, combined_score=0.9)
    ledger.settle(winner=1, finalists=[0, 1], base_loss=math.nan)
    assert ledger.scores() == {0: {"bert_score": 0.5}, 1: {"bert_score": 0.6, "combined_score": 0.9}}
    assert ledger.study.user_attrs["winner"] == 1
    assert ledger.study.user_attrs["base_loss"] is None


def test_crews_are_claimed_by_one_each(begin: Any) -> None:
    ledger, other = begin(n_trials=9), begin(n_trials=9)
    first, second = ledger.claim(), other.claim()
    assert (first.number, second.number) == (0, 1)
    assert first.folder == "crews/0"
    assert ledger.claim_dead() is None
    ask(ledger, first)
    third = ledger.claim()
    assert third.number == 2
    third.release()
    ask(other, second)
    first.release()
    second.release()
    assert other.claim().number == 0  # with trials on the way, and the lowest
    assert len(other.running(other._crews[0])) == 1
    dead = ledger.claim_dead()
    assert dead is not None
    assert dead.number == 1
    assert ledger.claim_dead() is None
    ledger.finish(1, "completed", value=1.0)
    ledger.close()
    assert other.claim_dead() is None  # it has no work left
    assert other.claim().number == 1


def test_a_worker_elsewhere_is_dead_when_it_was_not_heard_of(storage: Any, begin: Any, monkeypatch) -> None:
    from forge.tuning.study import crews

    slept: list[float] = []
    monkeypatch.setattr(crews.time, "sleep", slept.append)
    ledger, other = begin(), begin()
    crew = ledger.claim()
    ask(ledger, crew)

    def older(seconds: int) -> None:
        with storage.engine.begin() as connection:
            connection.exec_driver_sql(f"UPDATE forge_leases SET ends = ends - {seconds}")

    older(121)
    assert other.claim_dead() is None  # its process is on this machine, and lives
    assert slept == []
    monkeypatch.setattr(Process, "this", classmethod(lambda cls: cls("another machine", 1, 0.0)))
    crew.beat()
    assert other.claim_dead() is None
    older(121)
    with storage.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE forge_leases SET machine = 'a third one'")
    taken = other.claim_dead()
    assert slept == [crews.SETTLE_S]
    assert taken is not None
    assert taken.number == crew.number
    for stale in (lambda: ledger.ask(crew), crew.confirm):
        with pytest.raises(LeaseLostError):
            stale()
    assert crew.lost
    with pytest.raises(LeaseLostError):
        ledger.report(0, 25, 1.0)
    with pytest.raises(LeaseLostError):
        ledger.finish(0, "stopped")
    other.report(0, 25, 2.0)
    assert other.finish(0, "stopped")
    assert not ledger.finish(0, "stopped")  # what is finished needs no crew


def test_a_holder_that_comes_back_after_an_outage_is_let_be(storage: Any, begin: Any, monkeypatch) -> None:
    from forge.tuning.study import crews

    ledger, other = begin(), begin()
    crew = ledger.claim()
    ask(ledger, crew)
    with storage.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE forge_leases SET ends = ends - 121, machine = 'elsewhere'")
    monkeypatch.setattr(crews.time, "sleep", lambda _: crew.beat())
    assert other.claim_dead() is None
    crew.confirm()


def test_heartbeats_are_recorded_for_optunas_tools(storage: Any, begin: Any) -> None:
    import optuna

    ledger = begin()
    crew = ledger.claim()
    number = ask(ledger, crew).number
    ask(ledger, crew)
    with storage.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE trial_heartbeats SET heartbeat = '2020-01-01 00:00:00'")
    assert len(storage._get_stale_trial_ids(1)) == 2
    crew.beat()
    assert storage._get_stale_trial_ids(1) == []
    with pytest.warns(optuna.exceptions.ExperimentalWarning):
        optuna.storages.fail_stale_trials(ledger.study)
    assert ledger.unfinished() == [0, 1]
    ledger.finish(number, "failed", why="x")
    assert len(crew.trials) == 1


TRACE = 'Traceback (most recent call last):\n  File "a.py", line {n}, in f\n    g()\n    ~^^\n{error}\nthe rest'


@pytest.mark.parametrize(
    ("ends", "stops"),
    [
        (["KeyError: 'layer 7'", "KeyError: 'layer 8'", "KeyError: 'layer 19'"], True),
        (["KeyError: 'a'", "KeyError: 'a'", "ValueError: a"], False),
        (["KeyError: 'a'", "KeyError: 'a'", "KeyError: 'b'"], False),
        (["KeyError: 'a'", "KeyError: 'a'"], False),
        (["KeyError: 'a'", "KeyError: 'a'", None, "KeyError: 'a'"], False),
        ([None, "x.Error: 0xab12 at 3.5e-4", "x.Error: 0xff at 1", "x.Error: 0x0 at 2"], True),
    ],
)
def test_three_failures_alike_in_a_row_stop_it(begin: Any, ends: list[str | None], stops: bool) -> None:
    ledger = begin(n_trials=9)
    crew = ledger.claim()
    for number, error in enumerate(ends):
        assert ledger.should_stop() is None
        ask(ledger, crew, excess_gb=lambda params: 0)
        if error is None:
            ledger.finish(number, "completed", value=1.0)
        else:
            ledger.finish(number, "failed", why="it raised", trace=TRACE.format(n=number, error=error))
    said = ledger.should_stop()
    assert (said is not None) == stops
    if said:
        numbers = ", ".join(str(number) for number in range(len(ends) - 3, len(ends)))
        assert said == f"Trials {numbers} failed alike, one after the other: {ends[-1]}"
        assert begin(n_trials=9).should_stop() is None  # started again by somebody who mended it


def test_failures_without_a_trace_are_compared_by_what_was_said(begin: Any) -> None:
    ledger = begin(n_trials=9)
    crew = ledger.claim()
    for _ in range(3):
        ledger.finish(ask(ledger, crew).number, "failed", why="no space left on the disk")
    assert "no space left" in str(ledger.should_stop())


def test_a_database_that_was_away_is_waited_for(begin: Any, monkeypatch) -> None:
    from sqlalchemy import exc

    ledger = begin()
    crew = ledger.claim()
    away = [3]
    create = type(ledger._storage).create_new_trial

    def sometimes(*args: Any) -> int:
        number = create(*args)
        if away[0]:
            away[0] -= 1
            raise exc.OperationalError("INSERT", {}, RuntimeError("the answer got lost"))
        return number

    monkeypatch.setattr(type(ledger._storage), "create_new_trial", sometimes)
    asked = [ask(ledger, crew) for _ in range(4)]
    assert [one.number for one in asked] == [0, 1, 2, 3]
    assert len(ledger.study.trials) == 4


def test_the_ledger_imports_nothing_heavy() -> None:
    import subprocess
    import sys

    program = (
        "import sys, forge.tuning.study.ledger, forge.tuning.study.storage;"
        "assert not {'torch', 'transformers', 'optuna', 'sqlalchemy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
