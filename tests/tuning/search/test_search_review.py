import random

import pytest
from transformers import LlamaConfig

from forge import get_preset
from forge.errors import ConflictError
from forge.tuning.search.halving import diverged
from forge.tuning.search.space import ATTENTION, SearchSpace

WIDE = LlamaConfig(hidden_size=4096, num_hidden_layers=2)
RAW = {"learning_rate": 1e-4, "lora_r": 8, "lora_dropout": 0.0, "warmup_steps": 0.0, "effective_batch_size": 8}


def preset_of(name="lora", **overrides):
    return get_preset(name, hardware="ampere", model=WIDE, **overrides)


@pytest.mark.parametrize(
    ("preset", "middle"),
    [
        (("lora", {"learning_rate": 1e-6}), 1e-6),  # asked for
        (("sft", {}), 2e-5),  # all weights: LoRA's rate is ten times too high
        (("dpo", {}), 5e-6),
    ],
)
def test_the_published_rate_gives_way_where_it_does_not_hold(preset, middle):
    name, overrides = preset
    rate = SearchSpace().bind(preset_of(name, **overrides)).distributions["learning_rate"]
    assert (rate.low * rate.high) ** 0.5 == pytest.approx(middle)


def test_a_rate_of_zero_has_no_range_around_it():
    with pytest.raises(ConflictError, match="learning_rate=0"):
        SearchSpace().bind(preset_of(learning_rate=0))


@pytest.mark.parametrize("name", ["learning_rate", "lora_r", "alpha", "lora_dropout", "warmup_steps"])
def test_none_leaves_what_the_preset_has(name):
    bound = SearchSpace(**{name: None}).bind(preset_of())
    assert name not in bound.distributions
    assert name not in bound.params(RAW)
    assert "lora_alpha" not in bound.params(RAW)


def test_a_batch_of_none_is_the_presets_own():
    bound = SearchSpace(effective_batch_size=None).bind(preset_of())
    assert "effective_batch_size" not in bound.distributions
    assert bound.params(RAW)["effective_batch_size"] == 16


def test_a_ratio_without_ranks_leaves_the_presets_alpha():
    assert "lora_alpha" not in SearchSpace(lora_r=None, alpha="ratio").bind(preset_of()).params(RAW)


def test_attention_is_a_set_of_targets():
    preset = preset_of()
    assert SearchSpace(target_modules="attention").bind(preset).params(RAW)["target_modules"] == list(ATTENTION)
    found = SearchSpace(target_modules=["attention", "all-linear"]).bind(preset)
    for raw in found.distributions["target_modules"].choices:
        preset.replace(**found.params({**RAW, "target_modules": raw})).get_lora_config()


@pytest.mark.parametrize(
    "given",
    [
        {"lora_r": {"low": 4, "high": 63, "step": 4}},
        {"lora_dropout": {"low": 0.0, "high": 0.1, "step": 0.03}},
        {"num_train_epochs": {"low": 1, "high": 3, "step": 0.3}},
        {"effective_batch_size": [0, 8]},
        {"effective_batch_size": [1.5]},
        {"target_modules": [1, 2]},
        {"others": {"lora_r": [4, 8]}},
        {"others": {"r": [4, 8]}},
    ],
)
def test_what_would_fail_later_or_be_read_twice_is_refused(given):
    with pytest.raises(ConflictError, match="SearchSpace: 1 value will not do"):
        SearchSpace(**given)


@pytest.mark.parametrize("spread", [0.6, 1.0, 1.5])
def test_the_noise_of_small_batches_is_no_divergence(spread):
    drawn = random.Random(0)
    stopped = 0
    for _ in range(200):
        losses = [max(0.05, drawn.gauss(2.5, spread)) for _ in range(50)]
        stopped += any(diverged(losses[: count + 1]) for count in range(50))
    assert stopped <= 4


@pytest.mark.parametrize("spread", [0.1, 0.6, 1.0])
def test_a_rise_out_of_the_noise_is_still_seen(spread):
    drawn = random.Random(1)
    for _ in range(50):
        losses = [max(0.05, drawn.gauss(2.5, spread)) for _ in range(15)]
        losses += [drawn.gauss(9.0, spread) for _ in range(20)]
        assert diverged(losses)
