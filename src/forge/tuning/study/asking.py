"""Which trial is next, and what it tries: a function of what the storage holds, and of nothing else.

The sampler is made anew from the study's seed and the trial's number, and all that it says is computed before any of it
is written. So a process that is killed in the middle leaves a trial that the next one completes to the same parameters.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .opening import contains

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage
    from optuna.study import Study
    from optuna.trial import FrozenTrial

logger = logging.getLogger("forge.tuning")

CREW, PRIOR, STATUS, WHY = "crew", "prior", "status", "why"
INFEASIBLE = "infeasible"
MEMORY = "memory"


def launched(trials: Sequence[FrozenTrial]) -> int:
    """How many of the trials were given to a crew, whatever became of them.

    Args:
        trials: all of the study's.
    """
    return sum(CREW in trial.user_attrs for trial in trials)


def next_number(storage: BaseStorage, study_id: int, trials: Sequence[FrozenTrial]) -> int:
    """The number of a trial that is RUNNING and nobody's: one left by a killed process, one that waits, or a new one.

    Args:
        storage: Optuna's.
        study_id: Optuna's.
        trials: all of the study's, as they are now.
    """
    from optuna.trial import TrialState

    orphans = [trial.number for trial in trials if trial.state == TrialState.RUNNING and CREW not in trial.user_attrs]
    if orphans:
        return min(orphans)
    for number in sorted(trial.number for trial in trials if trial.state == TrialState.WAITING):
        trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, number)
        if storage.set_trial_state_values(trial_id, TrialState.RUNNING):
            return number
    return storage.get_trial_number_from_id(storage.create_new_trial(study_id))


def complete_params(
    study: Study, storage: BaseStorage, trial_id: int, space: Mapping[str, BaseDistribution]
) -> dict[str, Any]:
    """Sample what the trial tries, write what of it is not yet written, and give it all.

    Args:
        study: with the sampler that was made for this trial.
        storage: Optuna's.
        trial_id: Optuna's.
        space: what is searched.

    Returns:
        The raw parameters, in the order of the space.
    """
    trial = storage.get_trial(trial_id)
    if missing := [name for name in space if name not in trial.params]:
        sampled = _sample(study, trial, space)
        for name in missing:
            storage.set_trial_param(trial_id, name, space[name].to_internal_repr(sampled[name]), space[name])
        trial = storage.get_trial(trial_id)
    return {name: trial.params[name] for name in space}


def _sample(study: Study, trial: FrozenTrial, space: Mapping[str, BaseDistribution]) -> dict[str, Any]:
    """As Optuna's own Trial does it, but from the beginning, and without writing."""
    blank = copy.deepcopy(trial)
    blank.params, blank.distributions = {}, {}
    fixed: Mapping[str, Any] = trial.system_attrs.get("fixed_params", {})
    sampler: BaseSampler = study.sampler
    sampler.before_trial(study, blank)
    relative_space = sampler.infer_relative_search_space(study, blank)
    relative = sampler.sample_relative(study, blank, relative_space)
    values: dict[str, Any] = {}
    for name, distribution in space.items():
        if name in fixed and contains(distribution, fixed[name]):
            values[name] = fixed[name]
        elif distribution.single():
            values[name] = distribution.to_external_repr(_only(distribution))
        elif name in relative:
            values[name] = relative[name]
        else:
            values[name] = sampler.sample_independent(study, blank, name, distribution)
        if name in fixed and values[name] != fixed[name]:
            logger.warning(
                "Trial %d was enqueued with %s=%r, which is not in %s: it is sampled.",
                *(trial.number, name, fixed[name], distribution),
            )
        blank.params = {**blank.params, name: values[name]}
        blank.distributions = {**blank.distributions, name: distribution}
    return values


def _only(distribution: BaseDistribution) -> float:
    from optuna.distributions import CategoricalDistribution

    return 0.0 if isinstance(distribution, CategoricalDistribution) else float(distribution.low)  # type: ignore[attr-defined]


def constrain(study: Study, storage: BaseStorage, trial_id: int, excess_gb: float) -> None:
    """Tell the sampler by how much the trial exceeds the memory; what was said before is replaced.

    Args:
        study: of the trial.
        storage: Optuna's.
        trial_id: Optuna's.
        excess_gb: 0 or less where it fits.
    """
    from optuna.trial import Trial

    excess = float(excess_gb) if excess_gb == excess_gb else 0.0  # noqa: PLR0124 - NaN: nobody knows
    for key in storage.get_trial_system_attrs(trial_id):
        if key.endswith(f":{MEMORY}"):  # set_constraint sets each but once
            storage.set_trial_system_attr(trial_id, key, excess)
            return
    Trial(study, trial_id).set_constraint(MEMORY, excess)
