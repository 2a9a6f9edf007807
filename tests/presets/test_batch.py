import pytest

from forge import ConflictError, get_preset
from forge.presets.batch import resolve_batch

PREFERRED = {"preferred": (16, 4)}


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, (16, 4, 4, 1)),
        ({"micro": 2}, (16, 2, 8, 1)),
        ({"accumulation": 2}, (16, 8, 2, 1)),
        ({"effective": 6}, (6, 3, 2, 1)),
        ({"effective": 7}, (7, 1, 7, 1)),
        ({"micro": 3, "accumulation": 5}, (15, 3, 5, 1)),
        ({"world_size": 8}, (16, 2, 1, 8)),
        ({"world_size": 2, "micro": 4}, (16, 4, 2, 2)),
        ({"world_size": 3, "effective": 12}, (12, 4, 1, 3)),
    ],
)
def test_what_is_not_said_follows(said, expected):
    said = {"effective": None, "micro": None, "accumulation": None, "world_size": 1, **said}
    batch = resolve_batch(**said, **PREFERRED)
    assert (batch.effective, batch.micro, batch.accumulation, batch.world_size) == expected
    assert batch.micro * batch.accumulation * batch.world_size == batch.effective


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ({"per_device_train_batch_size": 32}, "effective_batch_size=32"),
        ({"per_device_train_batch_size": 3}, "effective_batch_size=15"),
        ({"gradient_accumulation_steps": 5}, "effective_batch_size=15"),
        ({"world_size": 32}, "effective_batch_size=32"),
        ({"world_size": 3}, "effective_batch_size=15"),
        (
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "effective_batch_size": 16},
            "Leave one of them out",
        ),
        ({"per_device_train_batch_size": 0}, "at least 1"),
        ({"gradient_accumulation_steps": 2.5}, "at least 1"),
        ({"effective_batch_size": "16"}, "at least 1"),
    ],
)
def test_impossible_products_say_what_would_be_possible(said, remedy):
    with pytest.raises(ConflictError, match=remedy):
        get_preset("lora", hardware="cpu", **said)


def test_the_remedy_works():
    preset = get_preset("lora", hardware="cpu", per_device_train_batch_size=32, effective_batch_size=32)
    assert preset.get_training_args().gradient_accumulation_steps == 1


def test_world_size_is_read_from_the_launcher(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    preset = get_preset("lora", hardware="ampere")
    assert preset.choices["gradient_accumulation_steps"].value == 1
    assert "4 x 1 x 4 = 16" in str(preset.explain("effective_batch_size"))


def test_a_run_with_other_processes_than_the_preset_was_built_for_is_refused():
    preset = get_preset("lora", hardware="cpu", world_size=2)
    with pytest.raises(ConflictError, match="world_size=1"):
        preset.get_training_args()
    assert preset.replace(world_size=1).get_training_args().gradient_accumulation_steps == 4
