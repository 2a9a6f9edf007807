import copy
import json
import pickle

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from transformers import GPT2Config, LlamaConfig, Qwen3Config

from forge import TuningConfig, get_preset
from forge.errors import ConflictError
from forge.tuning.search.priors import priors, published_rate
from forge.tuning.search.space import SearchSpace

TINY = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 64}


def preset_of(config=None, **overrides):
    return get_preset("lora", hardware="cpu", model=config or LlamaConfig(**TINY), **overrides)


def test_the_default_space_is_a_decade_around_the_published_rate():
    preset = preset_of(LlamaConfig(**{**TINY, "hidden_size": 2000}))
    bound = SearchSpace().bind(preset)
    found = bound.distributions
    assert set(found) == {"learning_rate", "lora_r", "lora_dropout", "warmup_steps", "effective_batch_size"}
    rate = found["learning_rate"]
    assert rate.log
    assert rate.high / rate.low == pytest.approx(10)
    assert (rate.low * rate.high) ** 0.5 == pytest.approx(5e-4) == pytest.approx(published_rate(preset))
    assert found["lora_r"].choices == (4, 8, 16, 32, 64)
    assert found["lora_dropout"].choices == (0.0, 0.05)
    assert found["effective_batch_size"].choices == (8, 16, 32)


@pytest.mark.parametrize(
    ("config", "rate"),
    [
        (LlamaConfig(hidden_size=4096), 5e-4 * (2000 / 4096) ** 0.781),
        (LlamaConfig(hidden_size=64), 5e-4 * (2000 / 1024) ** 0.781),  # narrower than what was fitted
        (Qwen3Config(hidden_size=1024), 5e-4 * (2000 / 1024) ** 0.0775),
        (GPT2Config(), None),
    ],
)
def test_the_published_rate_depends_on_family_and_width(config, rate):
    found = published_rate(preset_of(config))
    assert found == (None if rate is None else pytest.approx(rate))
    if rate is None:  # then the preset's own is the middle
        range_ = SearchSpace().bind(preset_of(config)).distributions["learning_rate"]
        assert (range_.low * range_.high) ** 0.5 == pytest.approx(2e-4)


def test_alpha_is_held_kept_in_ratio_or_searched():
    preset = preset_of()
    raw = {"learning_rate": 1e-4, "lora_r": 64, "lora_dropout": 0.0, "warmup_steps": 0.0, "effective_batch_size": 8}
    held = SearchSpace().bind(preset).params(raw)
    assert preset.replace(**held).choices["lora_alpha"].value == 32
    assert SearchSpace(alpha="ratio").bind(preset).params(raw)["lora_alpha"] == 128
    searched = SearchSpace(alpha=[16, 32]).bind(preset)
    assert searched.distributions["lora_alpha"].choices == (16, 32)
    assert searched.params({**raw, "lora_alpha": 16})["lora_alpha"] == 16


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([8, 16], CategoricalDistribution([8, 16])),
        ({"low": 4, "high": 64}, IntDistribution(4, 64)),
        ({"low": 4, "high": 64, "log": True}, IntDistribution(4, 64, log=True)),
        ({"low": 4, "high": 64, "step": 4}, IntDistribution(4, 64, step=4)),
        (IntDistribution(4, 64, step=4), IntDistribution(4, 64, step=4)),
        (CategoricalDistribution([4, 8]), CategoricalDistribution([4, 8])),
        (range(4, 7), CategoricalDistribution([4, 5, 6])),
    ],
)
def test_a_dimension_may_be_said_in_many_ways(given, expected):
    assert SearchSpace(lora_r=given).bind(preset_of()).distributions["lora_r"] == expected


def test_ranges_of_shares_are_of_shares():
    bound = SearchSpace(lora_dropout=FloatDistribution(0.0, 0.1), others={"weight_decay": {"low": 0.0, "high": 0.1}})
    found = bound.bind(preset_of()).distributions
    assert found["lora_dropout"] == found["weight_decay"] == FloatDistribution(0.0, 0.1)


def test_what_has_one_value_is_set_and_not_searched():
    bound = SearchSpace(lora_r=8, lora_dropout=[0.0], freeze_ratio=0.5, others={"weight_decay": 0.1}).bind(preset_of())
    assert not {"lora_r", "lora_dropout", "freeze_ratio", "weight_decay"} & set(bound.distributions)
    raw = {"learning_rate": 1e-4, "warmup_steps": 0.0, "effective_batch_size": 8}
    assert bound.params(raw) == {**raw, "lora_r": 8, "lora_dropout": 0.0, "freeze_ratio": 0.5, "weight_decay": 0.1}


def test_target_modules_are_lists_of_names():
    sets = [["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"]]
    bound = SearchSpace(target_modules=sets, use_rslora=[True, False]).bind(preset_of())
    assert bound.distributions["target_modules"].choices == ("q_proj+v_proj", "q_proj+k_proj+v_proj+o_proj")
    raw = {
        **{"learning_rate": 1e-3, "lora_r": 8, "lora_dropout": 0.0, "warmup_steps": 0.0, "effective_batch_size": 8},
        **{"target_modules": "q_proj+v_proj", "use_rslora": True},
    }
    params = bound.params(raw)
    assert params["target_modules"] == ["q_proj", "v_proj"]
    assert bound.raw(params) == raw


WRONG = {
    "lora_r": ([0, 8], -1, "8", [], {"low": 1}, {"low": 8, "high": 4}, {"low": 4, "high": 8, "base": 2}, object()),
    "learning_rate": ({"low": 0, "high": 1e-3, "log": True}, {"low": 1e-5, "high": float("nan")}, -1.0, "big"),
    "lora_dropout": ([0.0, 1.5], {"low": 0.0, "high": 2.0}),
    "freeze_ratio": ([0.0, 1.0], -0.1, "half", True),
    "alpha": ("doubled", [0]),
    "warmup_steps": ([-0.1],),
    "others": (3, {"weight_decai": [0.1]}, {"weight_decay": {"low": 0.1, "high": 0.2, "log": True, "step": 0.1}}),
}


@pytest.mark.parametrize(("name", "given"), [(name, one) for name, many in WRONG.items() for one in many])
def test_wrong_spaces_are_refused_with_name_and_rule(name, given):
    with pytest.raises(ConflictError, match=r"SearchSpace: 1 value will not do\.\n  "):
        SearchSpace(**{name: given})


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(ConflictError, match=r"(?s)3 values.*lora_r.*lora_dropout.*freeze_ratio"):
        SearchSpace(lora_r=[0], lora_dropout=[2.0], freeze_ratio=[1.0])


def test_a_space_is_a_value():
    space = SearchSpace(lora_r=[8, 16], others={"weight_decay": {"low": 0.0, "high": 0.1}})
    again = SearchSpace.from_dict(json.loads(json.dumps(space.to_dict())))
    assert space == again == copy.deepcopy(space) == pickle.loads(pickle.dumps(space))
    assert hash(space) == hash(again)
    assert SearchSpace().to_dict() == {}
    assert SearchSpace.from_dict({"lora_r": [8], "weight_decay": [0.0, 0.1]}).others["weight_decay"] == (0.0, 0.1)


def test_a_space_stands_in_a_config_and_in_its_file(tmp_path):
    config = TuningConfig(space={"lora_r": [8, 16], "weight_decay": [0.0, 0.1]})
    assert isinstance(config.space, SearchSpace)
    assert TuningConfig.from_file(config.to_file(tmp_path / "config.yaml")) == config


def test_the_priors_come_first_and_lie_within_the_space():
    preset = preset_of(LlamaConfig(**{**TINY, "hidden_size": 2048}))
    bound = SearchSpace().bind(preset)
    found = priors(preset, bound)
    assert [name for name, _ in found] == ["preset lora", "LoRA Without Regret", "QLoRA", "low rank"]
    for name, raw in found:
        assert set(raw) == set(bound.distributions), name
        for dimension, value in raw.items():
            assert bound.distributions[dimension]._contains(bound.distributions[dimension].to_internal_repr(value))
    assert found[0][1]["learning_rate"] == 2e-4
    assert found[1][1]["learning_rate"] == pytest.approx(published_rate(preset))
    assert found[2][1]["lora_r"] == 64
    assert found[3][1]["lora_r"] == 4


def test_priors_are_clipped_and_no_two_are_alike():
    bound = SearchSpace(lora_r=[2, 8], learning_rate={"low": 1e-6, "high": 1e-5, "log": True}, lora_dropout=0.0)
    preset = preset_of()
    found = priors(preset, bound.bind(preset))
    raws = [raw for _, raw in found]
    assert all(raw["learning_rate"] == 1e-5 for raw in raws)
    assert len({json.dumps(raw, sort_keys=True) for raw in raws}) == len(raws) < 4
