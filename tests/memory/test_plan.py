"""Plans: what fits as it is, what has to change, and that the plan's own numbers are those of a new estimate."""

import pytest
from transformers import LlamaConfig

from forge import ConflictError, ForgeError, UnknownNameError, estimate_model_memory, get_preset, plan_training
from forge.memory.levers import Settings, pulls

GB = 2**30


@pytest.fixture(scope="module")
def config():
    return LlamaConfig(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        vocab_size=16000,
        max_position_embeddings=2048,
    )


def test_what_fits_needs_no_change(config):
    preset = get_preset("lora", model=config, hardware="ampere")
    plan = plan_training(config, gpu="24GB", preset=preset)
    assert plan.fits
    assert plan.applied == ()
    assert plan.preset == preset
    assert "It fits" in str(plan)


@pytest.mark.parametrize("name", ["lora", "sft", "dpo"])
def test_a_plan_makes_it_fit_and_says_what_it_costs(config, name):
    preset = get_preset(name, model=config, hardware="ampere")
    micro, length = preset.choices["per_device_train_batch_size"].value, preset.choices["max_length"].value
    before = estimate_model_memory(config, micro, length, preset=preset)
    room = int((before["cuda_context_gb"] + 0.25 + 0.55 * before["reserved_peak_gb"]) * GB)
    plan = plan_training(config, gpu=room, preset=preset)
    assert plan.fits
    assert plan.applied
    again = estimate_model_memory(config, plan.batch_size, plan.sequence_length, preset=plan.preset, **plan.options)
    assert dict(again) == dict(plan.estimate)
    assert again.fits(room)
    for lever in plan.levers:
        saved = before["total_estimated_gb"] - lever.estimate["total_estimated_gb"]
        assert lever.saved_gb == pytest.approx(saved)
    assert [lever.saved_gb for lever in plan.levers] == sorted((lever.saved_gb for lever in plan.levers), reverse=True)
    effective = plan.preset.choices["effective_batch_size"].value
    assert effective == preset.choices["effective_batch_size"].value
    text = str(plan)
    assert "it fits" in text
    for change in plan.applied:
        assert change.partition("=")[0] in text


def test_no_change_is_made_that_is_not_needed(config):
    preset = get_preset("lora", model=config, hardware="ampere")
    before = estimate_model_memory(config, 4, 2048, preset=preset)
    plan = plan_training(config, gpu=int((before["high_gb"] - 0.05) * GB), preset=preset)
    assert plan.applied == ("per_device_train_batch_size=2, gradient_accumulation_steps=8",)


def test_what_nothing_can_make_fit(config):
    plan = plan_training(config, gpu=int(0.6 * GB), preset="qlora")
    assert not plan.fits
    assert "does not fit" in str(plan)


def test_every_lever_is_reachable(config):
    """From a run that has everything switched the expensive way."""
    preset = get_preset("sft", model=config, hardware="ampere", activation_checkpointing=False)
    names = [pull.name for pull in pulls(Settings(preset, 4, 2048, {"trainer": "dpo"}))]
    assert names == [
        "activation checkpointing",
        "smaller micro-batch",
        "8-bit optimizer",
        "precomputed reference",
        "LoRA",
        "LP-LoRA",
        "shorter sequences",
    ]
    lora = get_preset("lora", model=config, hardware="ampere")
    assert "QLoRA" in [pull.name for pull in pulls(Settings(lora, 1, 2048, {}))]


def test_bad_input(config, monkeypatch):
    with pytest.raises(UnknownNameError, match="preset"):
        plan_training(config, gpu="24GB", preset="qlorra")
    with pytest.raises(UnknownNameError):
        plan_training(config, gpu="RTX 9999")
    with pytest.raises(ConflictError, match="says nothing of a GPU"):
        plan_training(config, gpu="24GB", preset=get_preset("lora", model=config, hardware="cpu"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ForgeError, match="no GPU to plan for"):
        plan_training(config)


def test_the_plans_preset_is_the_plan(config):
    """With a length of one's own, and for another trainer than the preset's."""
    preset = get_preset("qlora", model=config, hardware="ampere")
    plan = plan_training(config, gpu="24GB", preset=preset, sequence_length=512)
    assert plan.preset.choices["max_length"].value == plan.sequence_length == 512
    dpo = plan_training(config, gpu="24GB", preset=preset, trainer="dpo")
    table = preset.tables["dpo"]
    assert dpo.sequence_length == table["max_length"].value
    assert dpo.batch_size == table["per_device_train_batch_size"].value
