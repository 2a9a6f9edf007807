import optuna
import pytest

from forge.errors import UnknownNameError
from forge.tuning.search.samplers import SAMPLERS, make_sampler

SPACE = {
    "learning_rate": optuna.distributions.FloatDistribution(1e-5, 1e-3, log=True),
    "lora_r": optuna.distributions.CategoricalDistribution([4, 8, 16]),
}


def study_of(count, seed=0):
    """A study whose trials, some infeasible, were made at random."""
    study = optuna.create_study()
    for number in range(count):
        sampler = optuna.samplers.RandomSampler(seed=seed + number)
        own = optuna.create_study(sampler=sampler).ask(SPACE)
        trial = optuna.trial.create_trial(
            params=own.params, distributions=SPACE, value=abs(own.params["learning_rate"] - 2e-4) * 1e4
        )
        trial.set_constraint("memory", 1.0 if own.params["lora_r"] == 16 else -1.0)
        study.add_trial(trial)
    return study


def asked(study, name, seed, number):
    study.sampler = make_sampler(name, seed, number)
    return study.ask(SPACE).params


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_is_asked_depends_on_the_records_the_seed_and_the_number_alone(name):
    first = [asked(study_of(14), name, 7, number) for number in (14, 14, 15)]
    assert first[0] == first[1]
    assert first[0] != first[2]
    assert asked(study_of(14), name, 8, 14) != first[0]


@pytest.mark.parametrize("name", ["tpe", "gp"])
def test_they_learn_where_it_is_good_and_what_does_not_fit(name):
    study = study_of(40)
    found = []
    for number in range(40, 52):
        study.sampler = make_sampler(name, 0, number)
        trial = study.ask(SPACE)
        trial.set_constraint("memory", 1.0 if trial.params["lora_r"] == 16 else -1.0)
        study.tell(trial, abs(trial.params["learning_rate"] - 2e-4) * 1e4)
        found.append(trial.params)
    rates = sorted(one["learning_rate"] for one in found)
    assert 1e-4 < rates[len(rates) // 2] < 4e-4
    assert sum(one["lora_r"] == 16 for one in found) <= 3


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(UnknownNameError, match="gp, random, tpe"):
        make_sampler("cma", 0, 0)
