"""What is written about a trial, and read again: losses at the rungs, attributes, what became of it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

from ...errors import NonFiniteError
from .asking import CREW, INFEASIBLE, STATUS, constrain
from .patience import patient

if TYPE_CHECKING:
    from optuna.storages import RDBStorage
    from optuna.study import Study
    from optuna.trial import FrozenTrial

    from .crews import Crew
    from .leases import Leases

Status = Literal["completed", "stopped", "diverged", "infeasible", "out_of_memory", "failed"]
_STATES = {
    "completed": "COMPLETE",
    "stopped": "PRUNED",
    "diverged": "PRUNED",
    "infeasible": "PRUNED",
    "out_of_memory": "PRUNED",
    "failed": "FAIL",
}


class Entries:
    """The ledger's pages.

    Args:
        storage: from `open_storage`.
        study: Optuna's.
        leases: of the study.
    """

    def __init__(self, storage: RDBStorage, study: Study, leases: Leases) -> None:
        import optuna

        self.name = study.study_name
        self.leases = leases
        self._storage = optuna.storages.get_storage(storage)
        self._study_id = self._storage.get_study_id_from_name(self.name)
        self._maximize = study.direction == optuna.study.StudyDirection.MAXIMIZE
        self._crews: dict[int, Crew] = {}

    @property
    def study(self) -> Study:
        """Optuna's study, for whoever reads it; what is written goes through the ledger."""
        import optuna

        return optuna.load_study(study_name=self.name, storage=self._storage)

    @patient
    def unfinished(self) -> list[int]:
        """The trials that are on the way, of all crews; empty when the search is over and `ask` gives None."""
        return sorted(trial.number for trial in self._trials("RUNNING") if CREW in trial.user_attrs)

    @patient
    def report(self, number: int, percent: int, loss: float) -> None:
        """Write down the held-out loss at a rung; what was written first stays.

        Args:
            number: of the trial.
            percent: the rung.
            loss: in nats per token.

        Raises:
            LeaseLostError: another worker has the trial's crew.
        """
        from optuna.exceptions import UpdateFinishedTrialError

        trial = self._trial(number)
        if trial.state.is_finished() or percent in trial.intermediate_values:
            return
        self._fence(trial)
        with suppress(UpdateFinishedTrialError):  # this very moment
            self._storage.set_trial_intermediate_value(self._id(number), percent, self._signed(float(loss)))

    @patient
    def losses_at(self, percent: int, without: Collection[int] = ()) -> list[float]:
        """The held-out losses of all trials that came to a rung, in order of number.

        Args:
            percent: the rung.
            without: numbers of trials to leave out.
        """
        return [
            self._signed(trial.intermediate_values[percent])
            for trial in sorted(self._trials(), key=lambda trial: trial.number)
            if percent in trial.intermediate_values and trial.number not in without
        ]

    @patient
    def note(self, number: int, **attrs: Any) -> bool:
        """Write attributes of a trial that is on the way; the same again replaces them.

        Args:
            number: of the trial.
            **attrs: as JSON knows them; NaN becomes None.

        Returns:
            False where the trial is finished, and nothing was written.
        """
        from optuna.exceptions import UpdateFinishedTrialError

        trial = self._trial(number)
        if trial.state.is_finished():
            return False
        self._fence(trial)
        trial_id = self._id(number)
        try:
            for name, value in attrs.items():
                self._storage.set_trial_user_attr(trial_id, name, _plain(value))
        except UpdateFinishedTrialError:  # this very moment
            return False
        return True

    @patient
    def finish(
        self, number: int, status: Status, *, value: float | None = None, excess_gb: float = 1.0, **attrs: Any
    ) -> bool:
        """Finish a trial. Who is first decides; its state is written last.

        Args:
            number: of the trial.
            status: what became of it.
            value: the objective's, of a completed one.
            excess_gb: by how many GiB one that ran out of memory exceeded it, as far as one knows.
            **attrs: as JSON knows them; NaN becomes None.

        Returns:
            Whether this call finished it; False where it was finished before.

        Raises:
            NonFiniteError: a completed trial needs a value that is a number.
            LeaseLostError: another worker has the trial's crew.
        """
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        if status != "completed":
            value = None
        elif value is None or not math.isfinite(value):
            raise NonFiniteError(
                f"Trial {number} was completed with the value {value}, and needs a finite one. "
                "Finish it as 'diverged' if its loss is no number, or as 'failed'."
            )
        # A second worker may take the first one for dead. Then one of them writes everything, and the other nothing.
        with self.leases.lock(f"finish-{number}"):
            trial = self._trial(number)
            if trial.state.is_finished():
                self._off_the_way(number)
                return False
            self._fence(trial)
            trial_id = self._id(number)
            values = self._last_value(trial, status) if value is None else [value]
            try:
                for name, said in {**attrs, STATUS: status}.items():
                    self._storage.set_trial_user_attr(trial_id, name, _plain(said))
                if status in (INFEASIBLE, "out_of_memory"):
                    constrain(self.study, self._storage, trial_id, max(excess_gb, 1e-9))
                done = self._storage.set_trial_state_values(trial_id, TrialState[_STATES[status]], values)
            except UpdateFinishedTrialError:  # by another tool, this very moment
                done = False
        self._off_the_way(number)
        return done

    @patient
    def score(self, number: int, **scores: float) -> None:
        """Write the scores of a finished trial, whose own attributes Optuna does not change any more.

        Args:
            number: of the trial.
            **scores: by name; they stand in the study's attribute `scores:NUMBER`.
        """
        key = f"scores:{number}"
        known = self._storage.get_study_user_attrs(self._study_id).get(key, {})
        self._storage.set_study_user_attr(self._study_id, key, {**known, **_plain(scores)})

    @patient
    def scores(self) -> dict[int, dict[str, float]]:
        """What `score` wrote, by the trials' numbers."""
        attrs = self._storage.get_study_user_attrs(self._study_id)
        found = {int(key.removeprefix("scores:")): said for key, said in attrs.items() if key.startswith("scores:")}
        return dict(sorted(found.items()))

    @patient
    def settle(self, **attrs: Any) -> None:
        """Write attributes of the study, such as `base_loss`, `winner` and `finalists`."""
        for name, value in attrs.items():
            self._storage.set_study_user_attr(self._study_id, name, _plain(value))

    def _fence(self, trial: FrozenTrial) -> None:
        crew = self._crews.get(trial.user_attrs.get(CREW, -1))
        if crew is not None and crew.lost:
            crew.confirm()

    def _last_value(self, trial: FrozenTrial, status: Status) -> list[float] | None:
        """Of a trial that was stopped, what Optuna's own `tell` gives it."""
        if status == "failed" or trial.last_step is None:
            return None
        last = trial.intermediate_values[trial.last_step]
        return None if math.isnan(last) else [last]

    def _off_the_way(self, number: int) -> None:
        trial_id = self._id(number)
        for crew in self._crews.values():
            crew.trials = crew.trials - {trial_id}

    def _signed(self, loss: float) -> float:
        return -loss if self._maximize else loss

    def _id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)

    def _trial(self, number: int) -> FrozenTrial:
        return self._storage.get_trial(self._id(number))

    def _trials(self, state: str | None = None) -> list[FrozenTrial]:
        from optuna.trial import TrialState

        states = None if state is None else (TrialState[state],)
        return self._storage.get_all_trials(self._study_id, deepcopy=False, states=states)


def _plain(value: Any) -> Any:
    """As every reader of JSON knows it."""
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if hasattr(value, "item"):  # NumPy's, torch's
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
