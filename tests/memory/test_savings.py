"""What freezing saves, by hand and by trace."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from forge import UnsupportedError, get_memory_savings_estimate
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


def test_nothing_trains():
    with pytest.raises(UnsupportedError, match="Nothing of this model trains"):
        get_memory_savings_estimate(_model(2).requires_grad_(False))
