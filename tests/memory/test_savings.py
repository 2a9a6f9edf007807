"""What freezing saves, by hand and by trace."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from forge import UnsupportedError, get_memory_savings_estimate
from forge.freezing import setup_lp_lora_style
from forge.models.truncation import truncation_of
from support.models import lora

GB = 2**30
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "vocab_size": 512}


def _model(layers=8):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **SIZES))


def test_nothing_frozen_saves_nothing():
    saved = get_memory_savings_estimate(_model())
    assert saved["total_saved_gb"] == saved["frozen_percentage"] == saved["frozen_parameters"] == 0


def test_half_of_a_plain_model():
    model = _model()
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[:4].requires_grad_(False)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    saved = get_memory_savings_estimate(model, batch_size=2, sequence_length=64)
    assert saved["frozen_parameters"] == frozen
    assert saved["trainable_parameters"] == sum(p.numel() for p in model.parameters()) - frozen
    assert saved["gradient_saved_gb"] * GB == pytest.approx(4 * frozen, rel=1e-3)
    assert saved["optimizer_saved_gb"] * GB == pytest.approx(8 * frozen, rel=1e-3)
    assert saved["activation_saved_gb"] > 0
    parts = ("gradient_saved_gb", "optimizer_saved_gb", "activation_saved_gb")
    assert saved["total_saved_gb"] == pytest.approx(sum(saved[part] for part in parts))


def test_what_lora_froze_anyway_is_not_credited():
    from peft import get_peft_model

    adapted = get_peft_model(_model(), lora(r=4))
    assert get_memory_savings_estimate(adapted)["total_saved_gb"] == 0
    everything = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    for layer in adapted.get_base_model().model.layers[:4]:
        layer.requires_grad_(False)
    saved = get_memory_savings_estimate(adapted)
    assert saved["frozen_parameters"] == everything // 2
    assert saved["frozen_percentage"] == 50
    assert saved["gradient_saved_gb"] * GB == pytest.approx(4 * everything // 2, rel=1e-3)


def _trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _adapted(model):
    from peft import get_peft_model

    return get_peft_model(model, lora(exclude_modules="lm_head"))


def _with_a_frozen_head(model):
    model.lm_head.requires_grad_(False)
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("prepared", [_adapted, lambda model: model, _with_a_frozen_head])
def test_lp_lora_is_held_against_the_model_before(prepared, checkpointing):
    model = prepared(_model())
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    before = _trainable(model)
    report = setup_lp_lora_style(model, 0.5)
    saved = get_memory_savings_estimate(model, batch_size=4, sequence_length=256)
    assert (saved["trainable_parameters"], saved["frozen_parameters"]) == (
        _trainable(model),
        before - _trainable(model),
    )
    assert saved["frozen_parameters"] == report.frozen_parameters > 0
    assert saved["gradient_saved_gb"] * GB == pytest.approx(4 * report.frozen_parameters, rel=1e-3)
    assert saved["activation_saved_gb"] > 0


def test_experts_that_lost_their_adapters():
    """Their config names parameters, which the freezing has spelt out for the layers that are left."""
    from peft import get_peft_model

    from support.models import text_model

    experts = {"target_parameters": ["mlp.experts.gate_up_proj"], "target_modules": ["q_proj"]}
    model = get_peft_model(text_model("qwen3_moe", layers=4), lora(**experts))
    before = _trainable(model)
    setup_lp_lora_style(model, 0.5)
    saved = get_memory_savings_estimate(model)
    assert saved["trainable_parameters"] + saved["frozen_parameters"] == before
    assert saved["frozen_percentage"] == 50


def test_adapters_that_were_never_below_the_boundary():
    """Nothing more is frozen, and checkpointing keeps nothing of the prefix any more."""
    from peft import get_peft_model

    model = get_peft_model(_model(), lora(layers_to_transform=range(4, 8), target_modules=["q_proj", "up_proj"]))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert get_memory_savings_estimate(model, 4, 256)["total_saved_gb"] == 0
    setup_lp_lora_style(model, 0.5)
    saved = get_memory_savings_estimate(model, 4, 256)
    assert saved["frozen_parameters"] == saved["gradient_saved_gb"] == saved["optimizer_saved_gb"] == 0
    assert saved["activation_saved_gb"] > 0


def test_a_cache_is_known(monkeypatch):
    from forge.memory import tracing

    traced, trace = [], tracing.trace
    monkeypatch.setattr(tracing, "trace", lambda source, scenario: traced.append(scenario) or trace(source, scenario))
    model = _adapted(_model())
    setup_lp_lora_style(model, 0.5)
    alone = get_memory_savings_estimate(model, 4, 256)
    truncation_of(model).shortcut = SimpleNamespace(served=1.0)
    cached = get_memory_savings_estimate(model, 4, 256)
    assert [(each.frozen_layers, each.prefix_cache) for each in traced] == [
        (0, False),
        (4, False),
        (0, False),
        (4, True),
    ]
    assert cached["gradient_saved_gb"] == alone["gradient_saved_gb"]
    states = 4 * 256 * 128 * 4 / GB  # the batch of states beside the embeddings, which plain weights here hold in fp32
    assert cached["activation_saved_gb"] == pytest.approx(alone["activation_saved_gb"], abs=states)


def test_nothing_trains():
    with pytest.raises(UnsupportedError, match="Nothing of this model trains"):
        get_memory_savings_estimate(_model(2).requires_grad_(False))
