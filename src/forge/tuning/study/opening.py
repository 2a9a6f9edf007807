"""Create a study, or find the same one again: with its settings, its space, and its priors enqueued once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from ...errors import ConflictError, ForgeError, UnknownNameError
from .agreement import as_json, check_same
from .storage import quiet

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.storages import BaseStorage
    from optuna.study import Study

FORMAT = 1
RUNGS = [25, 50, 100]
Direction = Literal["minimize", "maximize"]
Prior = tuple[str, Mapping[str, Any]]


def open_study(
    storage: BaseStorage,
    name: str,
    *,
    direction: Direction,
    space: Mapping[str, BaseDistribution],
    seed: int,
    priors: Sequence[Prior],
    settings: Mapping[str, Any],
) -> Study:
    """The study of that name. Only one worker at a time may be in here.

    What says that it is complete is written last: a process that is killed in between leaves the rest to the next one.

    Args:
        storage: Optuna's.
        name: of the study.
        direction: of its values.
        space: what is searched.
        seed: of the samplers.
        priors: configurations to begin with, each with a name.
        settings: what must be the same to go on.

    Raises:
        ConflictError: it was begun with other settings, or by something else than forge.
        UnknownNameError: a prior names what the space does not have.
        ForgeError: a prior lies outside the space.
    """
    import optuna

    agreed = {**as_json(settings), "direction": direction, "seed": seed, "space": _space_as_json(space)}
    for prior, params in priors:
        _check_prior(prior, params, space)
    with quiet():
        existing = name in optuna.get_all_study_names(storage)
        if existing:
            # Without a direction: that of a study that is not ours would be refused in Optuna's words.
            study = optuna.load_study(study_name=name, storage=storage)
        else:
            study = optuna.create_study(study_name=name, storage=storage, direction=direction)
        known = study.user_attrs
        if "forge_study" in known:
            if known["forge_study"] != FORMAT:
                raise ConflictError(
                    f"The study {name!r} was written in format {known['forge_study']}, and this version of forge reads "
                    f"format {FORMAT}. Choose another study_name, or go on with the version that began it."
                )
            check_same(name, known["settings"], agreed)
            return study
        enqueued = {trial.user_attrs.get("prior") for trial in study.get_trials(deepcopy=False)}
        if None in enqueued:
            raise ConflictError(
                f"The database holds a study {name!r} that forge did not begin. Choose another study_name."
            )
        study.set_user_attr("settings", agreed)
        study.set_user_attr("rungs", RUNGS)
        for prior, params in priors:
            if prior not in enqueued:
                study.enqueue_trial(dict(params), user_attrs={"prior": prior})
        study.set_user_attr("forge_study", FORMAT)
    return study


def _space_as_json(space: Mapping[str, BaseDistribution]) -> dict[str, Any]:
    import json

    from optuna.distributions import distribution_to_json

    return {name: json.loads(distribution_to_json(distribution)) for name, distribution in space.items()}


def _check_prior(prior: str, params: Mapping[str, Any], space: Mapping[str, BaseDistribution]) -> None:
    for name, value in params.items():
        if name not in space:
            raise UnknownNameError.among(f"parameter of the prior {prior!r}:", name, space)
        if not contains(space[name], value):
            raise ForgeError(
                f"The prior {prior!r} sets {name}={value!r}, which is not in {space[name]}. Clip it to the space."
            )


def contains(distribution: BaseDistribution, value: Any) -> bool:
    """Whether a value is one of the distribution's.

    Args:
        distribution: Optuna's.
        value: as `get_preset` takes it.

    >>> from optuna.distributions import IntDistribution
    >>> contains(IntDistribution(1, 4), 4), contains(IntDistribution(1, 4), 5)
    (True, False)
    """
    try:
        return bool(distribution._contains(distribution.to_internal_repr(value)))
    except ValueError:  # not among the choices
        return False
