"""Estimates of models that `setup_lp_lora_style` has changed or would change, with and without a prefix cache."""

from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from forge import ConflictError, ForgeError, estimate_model_memory, get_preset, plan_training
from forge.freezing import setup_lp_lora_style
from forge.memory.part import PARTS
from forge.models.truncation import truncation_of
from support.families import tiny_config
from support.models import lora, text_model

BYTES = [f"{part}_gb" for part in PARTS] + ["reserved_peak_gb"]
OFF = {"activation_checkpointing": False}


def config_of(family, layers=8):
    return text_model(family, layers=layers).config


def live(config, preset):
    """As the preset loads it, with its adapter."""
    model = AutoModelForCausalLM.from_config(config, dtype=preset.model_kwargs()["dtype"])
    adapter = preset.get_lora_config()
    return model if adapter is None else get_peft_model(model, adapter)


def same(one, other):
    assert {key: one[key] for key in [*BYTES, "peak_phase", "engine"]} == {
        key: other[key] for key in [*BYTES, "peak_phase", "engine"]
    }


CELLS = [
    *(("llama", name, changes) for name in ("lora", "sft", "dpo") for changes in ({}, OFF)),
    ("gpt2", "lora", OFF),
    ("gpt2", "sft", {}),
    ("gpt2", "dpo", {}),
    ("gemma3", "lora", {}),
    ("gemma3", "sft", OFF),
    ("gemma3", "dpo", OFF),
    ("qwen3_moe", "lora", {}),
    ("qwen3_moe", "sft", OFF),
]


@pytest.mark.parametrize(("family", "name", "changes"), CELLS, ids=str)
def test_a_model_that_is_set_up_costs_what_was_estimated(family, name, changes):
    config = config_of(family)
    preset = get_preset(name, model=config, hardware="ampere", **changes)
    expected = estimate_model_memory(config, 2, 64, preset=preset, freeze_ratio=0.5)
    model = live(config, preset)
    setup_lp_lora_style(model, 0.5)
    same(estimate_model_memory(model, 2, 64, preset=preset), expected)
    assert expected["engine"] == "trace"


def test_a_model_is_left_as_it_was():
    model = get_peft_model(text_model(), lora())
    report = setup_lp_lora_style(model, 0.5)
    truncation = truncation_of(model)
    truncation.shortcut = SimpleNamespace(served=0.0)
    before = [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()]
    estimate_model_memory(model, 1, 16)
    assert before == [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()]
    assert truncation_of(model) is truncation
    assert truncation.shortcut is not None
    report.undo()
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 4 * 7


@pytest.mark.parametrize("frozen", [[0, 3], [0, 1, 2, 4, 6], [2, 3]], ids=str)
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_frozen_layers_above_the_boundary_are_told_from_their_neighbours(frozen, adapters):
    from forge.memory.tracing import trace

    model = text_model(layers=14)
    model = get_peft_model(model, lora()) if adapters else model
    setup_lp_lora_style(model, frozen_layers=frozen)
    run = estimate_model_memory(model, 2, 64).described
    short, whole = trace(run.source, run.scenario), trace(run.source, run.scenario, all_layers=True)
    assert short.layers < whole.layers == 14
    assert short.peak.total == pytest.approx(whole.peak.total, rel=0.001)
    assert short.peak.phase == whole.peak.phase
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert whole.recording.when("2.clip")["gradients"] == 4 * trained


@pytest.mark.parametrize("option", [{"frozen_layers": 1}, {"freeze_ratio": 0.25}, {"freeze_ratio": 0.0}])
def test_options_that_contradict_the_model(option):
    model = text_model(layers=4)
    setup_lp_lora_style(model, 0.5)
    (name, value), *_ = option.items()
    with pytest.raises(
        ConflictError, match=rf"{name}={value} freezes . layers.*below layer 2.*\(model, {name}={value}\)"
    ):
        estimate_model_memory(model, 1, 16, **option)
    assert estimate_model_memory(model, 1, 16, freeze_ratio=0.5).bytes == estimate_model_memory(model, 1, 16).bytes


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"prefix_cache": True}, ConflictError, "no layer is frozen.*freeze_ratio=0.5"),
        ({"prefix_cache": True, "freeze_ratio": 0.1}, ConflictError, "no layer is frozen"),
        ({"freeze_ratio": 0.5, "offload_prefix": True}, ConflictError, "prefix_cache=True"),
        ({"freeze_ratio": 0.5, "prefix_cache": False, "offload_prefix": True}, ConflictError, "prefix_cache=True"),
        ({"freeze_ratio": 0.5, "prefix_cache": 1}, ForgeError, "prefix_cache=1: it must be True or False"),
        ({"freeze_ratio": 0.5, "prefix_cache": True, "offload_prefix": "yes"}, ForgeError, "offload_prefix='yes'"),
    ],
)
def test_what_no_cache_does(options, error, says):
    with pytest.raises(error, match=says):
        estimate_model_memory(config_of("llama", 4), 1, 16, preset="lora", **options)


def test_a_share_is_that_of_the_set_up():
    """0.29 of a hundred layers are 29, whatever floats make of it."""
    config = config_of("llama", 4)
    config.num_hidden_layers = 100
    assert estimate_model_memory(config, 1, 16, preset="lora", freeze_ratio=0.29).described.scenario.frozen_layers == 29


def test_an_attached_cache_is_known():
    model = get_peft_model(text_model(layers=4), lora())
    setup_lp_lora_style(model, 0.5)
    without = estimate_model_memory(model, 2, 64)
    truncation_of(model).shortcut = SimpleNamespace(served=0.0)
    cached = estimate_model_memory(model, 2, 64)
    assert cached.described.scenario.prefix_cache
    assert cached.first_epoch.bytes == without.bytes
    assert estimate_model_memory(model, 2, 64, prefix_cache=False).bytes == without.bytes
    assert without.first_epoch is None
    config = estimate_model_memory(model.get_base_model().config, 2, 64, preset="lora", freeze_ratio=0.5)
    assert config.first_epoch is None


@pytest.fixture(scope="module")
def wide():
    """Four layers of a few MB each, so that what is loaded and what is not shows in what the allocator holds."""
    config = tiny_config("llama")
    for name, value in {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 8}.items():
        setattr(config, name, value)
    config.head_dim = 128
    return config


def test_the_epoch_that_fills_the_cache_has_to_fit_too(wide):
    preset = get_preset("lora", model=wide, hardware="ampere")
    options = {"preset": preset, "freeze_ratio": 0.75, "prefix_cache": True}
    plain = estimate_model_memory(wide, 1, 64, preset=preset, freeze_ratio=0.75)
    cached = estimate_model_memory(wide, 1, 64, **options)
    offloaded = estimate_model_memory(wide, 1, 64, **options, offload_prefix=True)
    layer = 3 * 512 * 4096 + 2 * 512 * 512 + 2 * 512 * 256 + 2 * 512
    assert (cached["parameters_gb"] - offloaded["parameters_gb"]) * 2**30 == 6 * 2 * layer
    assert cached["parameters_gb"] == plain["parameters_gb"]
    for estimate in (cached, offloaded):
        assert estimate.first_epoch.bytes == plain.bytes
        figure = f"{plain['total_estimated_gb']:.2f} GiB (at most {plain['high_gb']:.2f})"
        assert any(figure in said and "prefix cache" in said for said in estimate.assumptions)
    between = (offloaded.bytes.high + plain.bytes.high) // 2
    assert offloaded.bytes.high < between < plain.bytes.high
    assert offloaded.fits(_card(between)) == plain.fits(_card(between)) == "uncertain"
    assert offloaded.heaviest is offloaded.first_epoch
    assert offloaded.max_batch_size("8GB", limit=64) == plain.max_batch_size("8GB", limit=64)
    assert offloaded.at(batch_size=2).first_epoch.batch_size == 2
    assert offloaded.first_epoch.at(batch_size=2).bytes == offloaded.at(batch_size=2).first_epoch.bytes
    assert offloaded.calibration_callback().estimate is offloaded.first_epoch


def _card(usable):
    """Bytes of a card that has so many to use."""
    from forge.memory.cards import find_card

    return usable + (10 * 2**30 - find_card(10 * 2**30).usable_bytes)


def test_a_plan_freezes_nothing_twice(wide):
    model = get_peft_model(AutoModelForCausalLM.from_config(wide, dtype=torch.bfloat16), lora())
    setup_lp_lora_style(model, frozen_layers=2)
    preset = get_preset("lora", model=wide, hardware="ampere", per_device_train_batch_size=1)
    plan = plan_training(model, gpu=_card(2**28), preset=preset, sequence_length=64)
    assert not plan.fits
    assert "LP-LoRA" not in {lever.name for lever in plan.levers}
    assert plan.options == {"frozen_layers": 2}


def test_a_plan_leaves_out_what_the_model_refuses():
    """Layers below a tower that trains cannot be frozen."""
    config = config_of("gemma3_vl", 4)
    preset = get_preset("sft", model=config, hardware="ampere", per_device_train_batch_size=1)
    plan = plan_training(config, gpu=_card(2**28), preset=preset, sequence_length=64)
    assert "LP-LoRA" not in {lever.name for lever in plan.levers}
    assert {"LoRA", "8-bit optimizer"} <= {lever.name for lever in plan.levers}


@pytest.mark.parametrize("name", ["lora", "sft"])
def test_the_formulas_know_them_too(name, wide, monkeypatch):
    from forge.memory import tracing

    def refuse(*_, **__):
        raise tracing.UntraceableError("no")

    monkeypatch.setattr(tracing, "trace", refuse)
    steps = {"freeze_ratio": 0.75}, {"prefix_cache": True}, {"offload_prefix": True}
    options, found = {}, []
    for step in ({}, *steps):
        options |= step
        found.append(estimate_model_memory(wide, 1, 64, preset=name, **options))
    whole, frozen, cached, offloaded = found
    assert all(each["engine"] == "analytic" for each in found)
    assert whole["optimizer_gb"] > 2 * frozen["optimizer_gb"]
    assert whole["parameters_gb"] >= frozen["parameters_gb"] == cached["parameters_gb"] > 2 * offloaded["parameters_gb"]
    assert cached["activations_gb"] >= frozen["activations_gb"]
