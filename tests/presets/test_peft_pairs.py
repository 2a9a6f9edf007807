"""Pairs that PEFT refuses are contradictions here; pairs that it accepts pass. Both columns are run against PEFT."""

import warnings

import pytest
from peft import LoraConfig, get_peft_model

from forge import ConflictError, get_preset
from support.models import nf4_model, text_model

LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

REFUSED = [
    ("llama", "nf4", {"init_lora_weights": "pissa"}),
    ("llama", "nf4", {"init_lora_weights": "pissa_niter_4"}),
    ("llama", "fp32", {"target_modules": "all-linear", "layers_to_transform": [0]}),
    ("mixtral", "fp32", {"lora_dropout": 0.1}),
    ("mixtral", "fp32", {"use_dora": True}),
    ("mixtral", "fp32", {"lora_bias": True}),
    ("mixtral", "fp32", {"init_lora_weights": "pissa"}),
    ("qwen3_moe", "fp32", {"init_lora_weights": "olora"}),
    ("gpt_oss", "fp32", {"init_lora_weights": "orthogonal"}),
]
ACCEPTED = [
    ("llama", "fp32", {"init_lora_weights": "pissa"}),
    ("llama", "fp32", {"init_lora_weights": "olora"}),
    ("llama", "nf4", {"init_lora_weights": "olora"}),
    ("llama", "nf4", {"init_lora_weights": "gaussian"}),
    ("llama", "nf4", {"use_dora": True}),
    ("llama", "nf4", {"use_rslora": True, "lora_dropout": 0.1}),
    ("llama", "fp32", {"bias": "all"}),
    ("llama", "fp32", {"layers_to_transform": [0, 1]}),
    ("llama", "fp32", {"use_dora": True, "lora_dropout": 0.1}),
    ("mixtral", "fp32", {"use_rslora": True}),
    ("mixtral", "fp32", {"target_parameters": None, "target_modules": ["q_proj"], "lora_dropout": 0.1}),
]


def base(family, precision, folder):
    return nf4_model(folder, family) if precision == "nf4" else text_model(family)


@pytest.mark.parametrize(("family", "precision", "override"), REFUSED)
def test_what_peft_refuses_is_a_contradiction(family, precision, override, tmp_path):
    model = base(family, precision, tmp_path)
    with pytest.raises(ConflictError) as caught:
        get_preset("lora", hardware="cpu", model=model, precision=precision, **override)
    assert next(iter(override)) in str(caught.value) or "layers_to_transform" in str(caught.value)
    # PEFT itself would have raised, after the model had been loaded.
    targets = get_preset("lora", hardware="cpu", model=model).get_lora_config()
    kwargs = {"target_modules": targets.target_modules, "target_parameters": targets.target_parameters, **override}
    warnings.simplefilter("ignore")  # it may warn first
    with pytest.raises((ValueError, TypeError, AttributeError)):
        get_peft_model(model, LoraConfig(**kwargs))


@pytest.mark.parametrize(("family", "precision", "override"), ACCEPTED)
@pytest.mark.usefixtures("no_foreign_warnings")
def test_what_peft_accepts_passes(family, precision, override, tmp_path):
    model = base(family, precision, tmp_path)
    preset = get_preset("lora", hardware="cpu", model=model, precision=precision, **override)
    assert get_peft_model(model, preset.get_lora_config()).peft_config["default"].task_type == "CAUSAL_LM"


def test_a_pattern_cannot_be_limited_to_layers():
    with pytest.raises(ConflictError, match=r"get_preset\(\.\.\., model=\.\.\.\)"):
        get_preset("lora", hardware="cpu", layers_to_transform=[0])


def test_own_targets_replace_the_anatomy_s():
    preset = get_preset("lora", hardware="cpu", model=text_model("gpt2"), target_modules=["c_attn"])
    config = preset.get_lora_config()
    assert (config.target_modules, config.fan_in_fan_out) == ({"c_attn"}, True)
    assert get_preset("lora", hardware="cpu", model=text_model()).get_lora_config().target_modules == set(LLAMA_TARGETS)


def test_layers_to_transform_would_be_ignored_by_experts():
    with pytest.raises(ConflictError, match="layers_to_transform"):
        get_preset("lora", hardware="cpu", model=text_model("mixtral"), layers_to_transform=[0])
