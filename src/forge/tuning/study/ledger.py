"""The ledger: Optuna's study with forge's rules, and the one source of truth of a search.

Any number of workers write to it, and each of them may be killed between any two of its statements. Three things make
that harmless: every method may be called again and then changes nothing; what makes something count is written last;
and only who holds a crew writes for its trials.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import ForgeError
from . import crews
from .asking import CREW, INFEASIBLE, PRIOR, WHY, complete_params, constrain, launched, next_number
from .crews import Crew
from .entries import Entries
from .failures import error_of, same_failures
from .leases import Lease, Leases
from .opening import Direction, Prior, open_study
from .patience import patient, patiently

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.storages import RDBStorage
    from optuna.study import Study

MOST_INFEASIBLE = 50


@dataclass(frozen=True)
class Asked:
    """A trial to be trained.

    Args:
        number: of the trial.
        params: raw, one for each dimension of the space.
        prior: the name of the prior that it was enqueued from; empty for what the sampler said.
    """

    number: int
    params: Mapping[str, Any]
    prior: str = ""


class _OvertakenError(Exception):
    """Another worker has the lock by now."""


class Ledger(Entries):
    """What was tried, by whom, and what became of it. `Ledger.open` makes one.

    Attributes:
        name: of the study.
        n_trials: how many trials are launched in all.
        leases: of the study; `ledger.lock("base")` guards what one worker alone is to do.
    """

    def __init__(
        self,
        storage: RDBStorage,
        study: Study,
        leases: Leases,
        *,
        n_trials: int,
        space: Mapping[str, BaseDistribution],
        make_sampler: Callable[[int, int], BaseSampler],
        seed: int,
    ) -> None:
        super().__init__(storage, study, leases)
        self.n_trials = n_trials
        self._backend = storage
        self._space = dict(space)
        self._make_sampler = make_sampler
        self._seed = seed
        # A study that was stopped for them is started again by somebody who mended the cause.
        self._forgiven = {trial.number for trial in same_failures(self._trials())}

    @classmethod
    @patient
    def open(
        cls,
        storage: RDBStorage,
        name: str,
        *,
        direction: Direction,
        n_trials: int,
        space_distributions: Mapping[str, BaseDistribution],
        make_sampler: Callable[[int, int], BaseSampler],
        seed: int,
        priors: Sequence[Prior] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> Ledger:
        """Begin a study, or join it.

        Args:
            storage: from `open_storage`.
            name: of the study.
            direction: of the values that `finish` is given: "minimize" for a loss, "maximize" for a score.
            n_trials: how many are launched in all; may be another number each time.
            space_distributions: Optuna's distribution of each dimension.
            make_sampler: gives the sampler for (seed, number of the trial).
            seed: of the study.
            priors: configurations to begin with, each with a name; they are enqueued once.
            settings: what must be the same to go on, as JSON knows it.

        Raises:
            ConflictError: the study was begun with other settings, or by something else than forge.
            ForgeError: a prior that is not in the space.
        """
        import optuna

        leases = Leases(storage.engine, name)
        with leases.lock("open"):
            study = open_study(
                optuna.storages.get_storage(storage),
                name,
                direction=direction,
                space=space_distributions,
                seed=seed,
                priors=priors,
                settings=settings or {},
            )
        return cls(
            *(storage, study, leases),
            n_trials=n_trials,
            space=space_distributions,
            make_sampler=make_sampler,
            seed=seed,
        )

    def lock(self, name: str, *, timeout_s: float = 600.0) -> AbstractContextManager[Lease]:
        """Have a lock of the study while the block runs."""
        return self.leases.lock(name, timeout_s=timeout_s)

    def claim(self) -> Crew:
        """Claim a crew: a dead one with trials on the way, else a dead one, else a new one.

        Returns:
            The crew; its lease is renewed by a thread until `crew.release()`, or the end of the process.
        """
        while (found := crews.claim(self.leases, self._busy)) is None:
            pass  # it was given to somebody else between two statements; there is always another number
        return self._crew(*found)

    def claim_dead(self) -> Crew | None:
        """Claim a dead crew with trials on the way; None where there is none."""
        found = crews.claim(self.leases, self._busy, only_dead=True)
        return None if found is None else self._crew(*found)

    @patient
    def ask(self, crew: Crew, *, excess_gb: Callable[[Mapping[str, Any]], float] | None = None) -> Asked | None:
        """The next trial for a crew.

        Args:
            crew: that is to train it.
            excess_gb: by how many GiB the raw parameters exceed the memory; 0 or less where they fit. What does not fit
                is recorded as infeasible and does not count.

        Returns:
            The trial, which is the crew's from now on; None when `n_trials` were launched.

        Raises:
            LeaseLostError: another worker has the crew.
            ForgeError: fifty trials in a row do not fit.
        """
        from optuna.exceptions import UpdateFinishedTrialError

        while True:
            with self.leases.lock("ask") as lock:
                crew.confirm()
                try:
                    return self._ask(lock, crew, excess_gb or _everything_fits)
                except (_OvertakenError, UpdateFinishedTrialError):
                    # Away for so long that another worker has the lock, and goes on with the trial that was begun here.
                    continue

    @patient
    def running(self, crew: Crew) -> list[Asked]:
        """The trials of a crew that are on the way, in order of number."""
        found = [trial for trial in self._trials("RUNNING") if trial.user_attrs.get(CREW) == crew.number]
        crew.trials = {self._id(trial.number) for trial in found}
        return [
            Asked(
                trial.number,
                {name: trial.params[name] for name in self._space},
                str(trial.user_attrs.get(PRIOR, "")),
            )
            for trial in sorted(found, key=lambda trial: trial.number)
        ]

    @patient
    def should_stop(self) -> str | None:
        """Why no more trials should be launched: the last three to finish failed alike. None where they did not."""
        alike = same_failures(self._trials(), forgiven=self._forgiven)
        if not alike:
            return None
        numbers = ", ".join(str(trial.number) for trial in alike)
        said = (
            error_of(str(alike[-1].user_attrs.get("trace") or "")) or alike[-1].user_attrs.get(WHY) or "no reason given"
        )
        return f"Trials {numbers} failed alike, one after the other: {said}"

    def close(self) -> None:
        """Give all crews of this ledger back; the storage stays open."""
        for crew in self._crews.values():
            crew.release()
        self._crews.clear()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, lock: Lease, crew: Crew, excess_gb: Callable[[Mapping[str, Any]], float]) -> Asked | None:
        import optuna

        excess = 0.0
        for _ in range(MOST_INFEASIBLE):
            trials = self._trials()
            if launched(trials) >= self.n_trials:
                return None
            number = next_number(self._storage, self._study_id, trials)
            trial_id = self._id(number)
            # A new one each time: a study remembers what it has read for a sampler.
            sampler = self._make_sampler(self._seed, number)
            study = optuna.load_study(study_name=self.name, storage=self._storage, sampler=sampler)
            params = complete_params(study, self._storage, trial_id, self._space)
            excess = float(excess_gb(params))
            constrain(study, self._storage, trial_id, excess)
            if excess > 0:
                why = f"The estimate says that it needs {excess:.2f} GiB more than there are."
                self.finish(number, INFEASIBLE, why=why, excess_gb=excess)
                continue
            if not patiently(lock.beat):
                raise _OvertakenError
            crew.confirm()
            self._storage.set_trial_user_attr(trial_id, CREW, crew.number)
            self._on_the_way(crew, trial_id)
            return Asked(number, params, self._prior(trial_id))
        raise ForgeError(
            f"{MOST_INFEASIBLE} configurations in a row do not fit into the memory; the last one needs {excess:.2f} "
            "GiB more than there are. Search smaller ranks and batches, shorten max_length, or quantise the base."
        )

    def _crew(self, number: int, lease: Lease) -> Crew:
        crew = Crew(number, lease, self._backend.record_heartbeat)
        self._crews[number] = crew
        self.running(crew)
        crew.beat()
        return crew

    @patient
    def _busy(self) -> dict[int, int]:
        """How many trials of each crew are on the way."""
        found: dict[int, int] = {}
        for trial in self._trials():
            if CREW in trial.user_attrs:
                crew = int(trial.user_attrs[CREW])
                found[crew] = found.get(crew, 0) + (not trial.state.is_finished())
        return found

    def _on_the_way(self, crew: Crew, trial_id: int) -> None:
        crew.trials = {*crew.trials, trial_id}
        self._backend.record_heartbeat(trial_id)

    def _prior(self, trial_id: int) -> str:
        return str(self._storage.get_trial_user_attrs(trial_id).get(PRIOR, ""))


def _everything_fits(_: Mapping[str, Any]) -> float:
    return 0.0
