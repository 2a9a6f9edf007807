import pytest

from forge import TuningConfig
from forge.errors import ConflictError
from forge.tuning.search.objective import Objective


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, "bert_score"),
        ({"judge": "local"}, "combined"),
        ({"judge": "local", "objective": "bert_score"}, "bert_score"),
        ({"bert_score": False}, "loss"),
        ({"bert_score": False, "judge": "local"}, "loss"),
        ({"objective": "loss", "judge": "local"}, "loss"),
    ],
)
def test_what_can_be_measured_decides(fields, name):
    assert Objective.of(TuningConfig(**fields)).name == name


@pytest.mark.parametrize(
    ("fields", "remedy"),
    [
        ({"objective": "combined"}, "a judge: set judge='local'"),
        ({"objective": "combined", "judge": "local", "bert_score": False}, "an encoder: set bert_score=True"),
        ({"objective": "bert_score", "bert_score": False}, "set bert_score=True"),
    ],
)
def test_what_nothing_measures_is_refused(fields, remedy):
    with pytest.raises(ConflictError, match=remedy):
        Objective.of(TuningConfig(**fields))


@pytest.mark.parametrize(
    ("name", "every", "direction"),
    [
        ("loss", False, "minimize"),
        ("loss", True, "minimize"),
        ("bert_score", False, "minimize"),
        ("bert_score", True, "maximize"),
        ("combined", True, "maximize"),
    ],
)
def test_the_study_sees_losses_unless_every_trial_is_scored(name, every, direction):
    assert Objective(name, every).direction == direction
