"""Many trainings in a row on one base: nothing piles up, nothing is changed, nobody warns."""

import gc
import logging

import pytest
import torch
from adapter_state import assert_same, live, state_of

from forge.adapters import attach_adapter, cleanup_peft_model
from support.models import checkpointing, lora, nf4_model

CONFIGS = {
    "plain": lora(),
    "bias": lora(bias="all"),
    "pissa": lora(init_lora_weights="pissa"),
    "modules_to_save": lora(modules_to_save=["lm_head"], target_modules=["q_proj"]),
    "nf4": lora(),
}
ROUNDS = 30


@pytest.mark.parametrize("name", CONFIGS)
def test_sft(text_model, make_trainer, tmp_path, warning_recorder, caplog, name):
    base = nf4_model(tmp_path / "model", layers=2) if name == "nf4" else text_model("qwen2", layers=2)
    before, config, found, losses = state_of(base), CONFIGS[name], [], set()
    caplog.set_level(logging.INFO, logger="forge.adapters")
    for _ in range(ROUNDS):
        torch.manual_seed(0)
        trainer = make_trainer("sft", attach_adapter(base, config), rows=4, **checkpointing())
        losses.add(trainer.train().training_loss)
        cleanup_peft_model(trainer)
        del trainer
        found.append(live())
    assert_same(before, state_of(base))
    assert len(losses) == 1, losses  # each run is the first
    assert all(each == found[2] for each in found[2:]), found
    assert found[0]["modules"] == found[2]["modules"]
    assert caplog.text.count("memory has been returned") == ROUNDS
    warning_recorder.assert_clean()


def test_dpo(text_model, make_trainer, warning_recorder):
    base, found = text_model("qwen2", layers=2), []
    before = state_of(base)
    for _ in range(ROUNDS):
        trainer = make_trainer("dpo", attach_adapter(base, lora()), rows=4, **checkpointing())
        trainer.train()
        cleanup_peft_model(trainer)
        del trainer
        found.append(live())
    assert_same(before, state_of(base))
    assert all(each == found[2] for each in found[2:]), found
    warning_recorder.assert_clean()


def test_the_count_would_see_a_leak(text_model, make_trainer):
    """The same with what people do today: PEFT's own unload leaves the trainers' hooks in the base."""
    import peft

    base, found = text_model("qwen2", layers=2), []
    for _ in range(3):
        trainer = make_trainer("sft", peft.get_peft_model(base, lora()), rows=4, **checkpointing())
        trainer.train()
        trainer.model.unload()
        del trainer
        gc.collect()
        found.append(live())
    assert found[0]["hooks"] < found[1]["hooks"] < found[2]["hooks"]
