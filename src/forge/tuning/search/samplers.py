"""Optuna's samplers, made anew for each trial, so that what they say depends on the study's records alone."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from ...errors import UnknownNameError, UnsupportedError

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

SAMPLERS = ("tpe", "gp", "random")
# What is at random before a sampler believes its model; the priors count.
STARTUP = 10


def make_sampler(name: str, seed: int, number: int) -> BaseSampler:
    """The sampler of one trial.

    Args:
        name: "tpe" (multivariate, with liars for trials that are on the way), "gp" (a Gaussian process), "random".
        seed: of the study.
        number: of the trial.

    Raises:
        UnknownNameError: another name.
        UnsupportedError: "gp" without SciPy.
    """
    import optuna

    own = (seed * 1_000_003 + number) % 2**32
    if name == "random":
        return optuna.samplers.RandomSampler(seed=own)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of what was chosen on purpose
        if name == "tpe":
            return optuna.samplers.TPESampler(multivariate=True, constant_liar=True, n_startup_trials=STARTUP, seed=own)
        if name == "gp":
            try:
                return optuna.samplers.GPSampler(n_startup_trials=STARTUP, seed=own)
            except ImportError as error:
                raise UnsupportedError(f"sampler='gp' needs SciPy: pip install scipy ({error}).") from error
    raise UnknownNameError.among("sampler", name, SAMPLERS)
