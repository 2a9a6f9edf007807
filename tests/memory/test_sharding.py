"""Shards, by division."""

import pytest
from transformers import LlamaConfig

from forge import estimate_model_memory

CONFIG = LlamaConfig(
    hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4, vocab_size=2000
)


@pytest.mark.parametrize(
    ("kind", "divided"),
    [
        ("zero1", {"optimizer"}),
        ("zero2", {"optimizer", "gradients"}),
        ("zero3", {"optimizer", "gradients", "parameters"}),
        ("fsdp", {"optimizer", "gradients", "parameters"}),
    ],
)
def test_each_stage_divides_what_it_should(kind, divided):
    whole = estimate_model_memory(CONFIG, 2, 64, preset="sft")
    shard = estimate_model_memory(CONFIG, 2, 64, preset="sft", sharding=kind, world_size=4)
    for part in ("parameters", "gradients", "optimizer", "activations", "logits"):
        share = 1 / 4 if part in divided else 1
        assert shard[f"{part}_gb"] == pytest.approx(share * whole[f"{part}_gb"], rel=0.01, abs=1e-5)
    assert any(kind in said for said in shard["assumptions"])


def test_ddp_keeps_a_flat_copy_of_the_gradients():
    whole = estimate_model_memory(CONFIG, 2, 64, preset="sft")
    ddp = estimate_model_memory(CONFIG, 2, 64, preset="sft", sharding="ddp", world_size=2)
    assert ddp["gradients_gb"] == pytest.approx(2 * whole["gradients_gb"])
