"""Which settings made the difference, by Optuna's PED-ANOVA."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

from .reading import StudyRecord

ENOUGH = 10
"""Fewer trials than that say nothing about any one of several settings."""


def importances(study: StudyRecord) -> tuple[dict[str, float], str]:
    """How much each setting matters for being among the better quarter, from 0 to 1, and what that rests on.

    Completed trials alone are the few that were chosen because they were good. So trials are compared where most of
    them still are: at the first rung. PED-ANOVA: Watanabe, Bansal and Hutter, IJCAI 2023.

    Args:
        study: whose trials are compared.

    Returns:
        The settings, the most important first, and a sentence; no settings where the trials are too few.
    """
    rung = min(study.rungs, default=100)
    found = {trial.number: trial.losses[rung] for trial in study.trials if rung in trial.losses}
    where = f"held-out loss at {rung}% of the steps"
    if not found:
        done = [trial for trial in study.trials if trial.value is not None]
        sign = -1.0 if study.direction == "maximize" else 1.0
        found, where = {trial.number: sign * (trial.value or 0.0) for trial in done}, "the study's values"
    varied = _varied(study, found)
    if len(found) < ENOUGH or not varied:
        return {}, (
            f"{len(found)} trials to compare; from {ENOUGH} on this chart says something."
            if len(found) < ENOUGH
            else "All trials had the same settings."
        )
    weights = _ped_anova(study, found, varied)
    return weights, f"{len(found)} trials, {where}"


def _varied(study: StudyRecord, found: Mapping[int, float]) -> list[str]:
    """The settings that all of these trials have, and not all the same."""
    params = [trial.params for trial in study.trials if trial.number in found]
    return [
        name
        for name in study.parameters
        if all(name in one for one in params) and len({repr(one[name]) for one in params}) > 1
    ]


def _ped_anova(study: StudyRecord, found: Mapping[int, float], names: list[str]) -> dict[str, float]:
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    distributions = {name: _distribution(study, name, found) for name in names}
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            again = optuna.create_study()
            for trial in study.trials:
                if trial.number in found:
                    params = {name: trial.params[name] for name in names}
                    again.add_trial(
                        optuna.trial.create_trial(value=found[trial.number], params=params, distributions=distributions)
                    )
            said = get_param_importances(again, evaluator=PedAnovaImportanceEvaluator(target_quantile=0.25))
    finally:
        optuna.logging.set_verbosity(before)
    return {name: float(value) if math.isfinite(value) else 0.0 for name, value in said.items()}


def _distribution(study: StudyRecord, name: str, found: Mapping[int, float]) -> Any:
    """What was searched; as wide as the trials where nobody said, or where one lies outside."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    values = [trial.params[name] for trial in study.trials if trial.number in found]
    said = study.space.get(name, {})
    if "choices" in said or not all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in values):
        return CategoricalDistribution(list(dict.fromkeys([*map(_key, said.get("choices", [])), *map(_key, values)])))
    low, high = min([said.get("low", math.inf), *values]), max([said.get("high", -math.inf), *values])
    log = bool(said.get("log")) and low > 0
    if all(isinstance(one, int) for one in [*values, low, high]):
        return IntDistribution(low, high, log=log)
    return FloatDistribution(low, high, log=log)


def _key(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
