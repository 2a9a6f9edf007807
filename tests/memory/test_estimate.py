"""The public estimate: its keys, what it reads from models, presets and options, and what it refuses."""

import dataclasses
import logging
from collections.abc import Mapping

import pytest
import torch
import trl.trainer.utils
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig

from forge import ConflictError, ForgeError, UnknownNameError, UnsupportedError, estimate_model_memory, get_preset
from forge.memory import overheads
from forge.memory.part import PARTS

SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 8000,
}
GB = 2**30


@pytest.fixture(scope="module")
def config():
    return LlamaConfig(**SIZES)


def _preset(config, name="lora", **changes):
    return get_preset(name, model=config, hardware="ampere", **changes)


def test_the_keys_are_the_contract(config):
    memory = estimate_model_memory(config, batch_size=2, sequence_length=256, preset="lora")
    assert isinstance(memory, Mapping)
    assert list(memory) == [
        *(f"{part}_gb" for part in PARTS),
        "cuda_context_gb",
        "allocated_peak_gb",
        "reserved_peak_gb",
        "total_estimated_gb",
        "low_gb",
        "high_gb",
        "peak_phase",
        "engine",
        "assumptions",
    ]
    assert dict(memory)["engine"] == memory["engine"] == "trace"
    assert len(memory) == len(list(memory))


@pytest.mark.parametrize("name", ["qlora", "lora", "sft", "dpo"])
def test_the_parts_sum_to_the_peak(config, name):
    memory = estimate_model_memory(config, 2, 256, preset=_preset(config, name))
    parts = sum(memory[f"{part}_gb"] for part in PARTS)
    assert parts == pytest.approx(memory["allocated_peak_gb"], rel=1e-12)
    assert memory["allocated_peak_gb"] <= memory["reserved_peak_gb"]
    assert memory["total_estimated_gb"] == pytest.approx(memory["reserved_peak_gb"] + memory["cuda_context_gb"])
    assert memory["low_gb"] < memory["total_estimated_gb"] < memory["high_gb"]


def test_weights_weigh_what_they_weigh(config):
    """By hand: bf16 is two bytes, nf4 half a byte and, doubly quantised, 8.127 bits per 64 weights."""
    counted = LlamaForCausalLM(config).num_parameters()
    rank = {"lora_r": 8, "target_modules": ["q_proj"]}
    adapters = 8 * 8 * (512 + 512) * 4
    plain = estimate_model_memory(config, preset=_preset(config, **rank))
    assert plain["parameters_gb"] * GB == pytest.approx(2 * counted + adapters, rel=1e-3)
    packed = estimate_model_memory(config, preset=_preset(config, "qlora", **rank))
    linear = 8 * (512 * 512 * 2 + 2 * 512 * 256 + 3 * 512 * 1024)
    assert packed["parameters_gb"] * GB == pytest.approx(linear / 2 + 2 * (counted - linear) + adapters, rel=1e-3)
    assert plain["quantization_gb"] == 0
    assert packed["quantization_gb"] * GB >= linear / 64 * 8.127 / 8


def test_full_fine_tuning_holds_four_fp32_numbers_per_weight(config):
    memory = estimate_model_memory(
        config, preset=_preset(config, "sft", effective_batch_size=2, per_device_train_batch_size=1)
    )
    counted = LlamaForCausalLM(config).num_parameters()
    assert memory["parameters_gb"] * GB == pytest.approx(4 * counted, rel=1e-3)
    assert memory["optimizer_gb"] * GB == pytest.approx(8 * counted, rel=1e-3)
    assert memory["allocated_peak_gb"] * GB > 16 * counted


def test_no_preset_means_full_fine_tuning_and_says_so(config):
    memory = estimate_model_memory(config)
    assert any("full fine-tuning" in said for said in memory["assumptions"])
    counted = LlamaForCausalLM(config).num_parameters()
    assert memory["parameters_gb"] * GB == pytest.approx(4 * counted, rel=1e-3)


def test_a_config_a_folder_and_a_live_model_agree(config, tmp_path):
    config.save_pretrained(tmp_path)
    preset = _preset(config)
    expected = dict(estimate_model_memory(config, 2, 128, preset=preset))
    assert dict(estimate_model_memory(tmp_path, 2, 128, preset=preset)) == expected
    assert dict(estimate_model_memory(str(tmp_path), 2, 128, preset=preset)) == expected
    live = LlamaForCausalLM(config).to(torch.bfloat16)
    found = estimate_model_memory(live, 2, 128, preset=preset)
    assert found["allocated_peak_gb"] == pytest.approx(expected["allocated_peak_gb"], rel=1e-3)


def test_a_live_model_is_estimated_as_it_stands(lora, config):
    from peft import get_peft_model

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES | {"num_hidden_layers": 2})).to(torch.bfloat16)
    adapted = get_peft_model(model, lora(r=8))
    before = {name: (p.requires_grad, p.dtype, p.data_ptr()) for name, p in adapted.named_parameters()}
    memory = estimate_model_memory(adapted, 2, 128)
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert memory["optimizer_gb"] * GB == pytest.approx(8 * trainable, rel=0.05)
    assert any("as it stands" in said for said in memory["assumptions"])
    assert before == {name: (p.requires_grad, p.dtype, p.data_ptr()) for name, p in adapted.named_parameters()}
    adapted.gradient_checkpointing_enable({"use_reentrant": True})
    checkpointed = estimate_model_memory(adapted, 2, 128)
    assert checkpointed["allocated_peak_gb"] < memory["allocated_peak_gb"]
    assert checkpointed.described.scenario.checkpointing == "reentrant"


@pytest.fixture
def lora():
    from support.models import lora as make

    return make


def test_what_each_dimension_does(config):
    """Every dimension that the estimate depends on moves it, in the direction that a person expects."""

    def need(name="lora", batch=4, length=512, changes=None, **options):
        preset = _preset(config, name, **(changes or {}))
        return estimate_model_memory(config, batch, length, preset=preset, **options)["allocated_peak_gb"]

    plain = need()
    assert need(batch=8) > plain
    assert need(length=1024) > plain
    assert need("qlora") < plain
    assert need("qlora", changes={"bnb_4bit_use_double_quant": False}) > need("qlora")
    assert need("qlora", changes={"precision": "int8"}) > need("qlora")
    assert need(changes={"activation_checkpointing": False}) > plain
    assert need(changes={"attn_implementation": "eager"}) > plain
    assert need(changes={"lora_r": 64}) > plain
    assert need(changes={"use_dora": True}) > plain
    assert need(changes={"lora_dropout": 0.1, "activation_checkpointing": False}) > need(
        changes={"activation_checkpointing": False}
    )
    assert need(padded=True) > plain
    assert need(ema="device") > need(ema="cpu") == plain
    assert need(freeze_ratio=0.5) < plain
    assert need(frozen_layers=4) == need(freeze_ratio=0.5)
    assert need(trainer="plain") >= plain
    if hasattr(trl.trainer.utils, "add_fused_lm_head"):  # older TRL builds whole logits too
        assert need(trainer="plain") > plain
    full = need("sft")
    assert need("sft", changes={"optim": "adamw_8bit"}) < full
    assert need("sft", changes={"optim": "adafactor"}) < full
    assert need("sft", trainer="dpo", reference="copy") > need("sft", trainer="dpo", reference="precomputed")
    assert need("sft", sharding="zero3", world_size=4) < need("sft", sharding="zero1", world_size=4) < full
    assert need("sft", sharding="ddp", world_size=4) > full


def test_a_paged_optimizer_is_not_in_the_allocator(config):
    eight = estimate_model_memory(config, 4, 512, preset=_preset(config, "sft", optim="adamw_8bit"))
    paged = estimate_model_memory(config, 4, 512, preset=_preset(config, "sft", optim="paged_adamw_8bit"))
    assert paged["optimizer_gb"] < eight["optimizer_gb"]
    assert any("managed memory" in said for said in paged["assumptions"])


def test_a_preset_for_absent_hardware(config):
    small = estimate_model_memory(config, preset=get_preset("lora", model=config, hardware="turing"))
    large = estimate_model_memory(config, preset=get_preset("lora", model=config, hardware="hopper"))
    workspaces = overheads.CUBLAS_WORKSPACE["hopper"] - overheads.CUBLAS_WORKSPACE["turing"]
    assert large["workspace_gb"] - small["workspace_gb"] == pytest.approx(2 * workspaces / GB, rel=1e-3)


def test_an_estimate_for_a_cpu_does_not_speak_of_gpus(config):
    memory = estimate_model_memory(config, preset=get_preset("lora", model=config, hardware="cpu"))
    assert memory["cuda_context_gb"] == 0
    with pytest.raises(ConflictError, match='hardware="ampere"'):
        memory.fits("24GB")


def test_the_presets_own_batch_is_mentioned(config):
    memory = estimate_model_memory(config, 1, 128, preset=_preset(config))
    assert any("the preset itself trains batch_size=4, sequence_length=2048" in said for said in memory["assumptions"])
    exact = estimate_model_memory(config, 4, 2048, preset=_preset(config))
    assert not any("the preset itself" in said for said in exact["assumptions"])


def test_another_adapter_than_loras(config):
    from peft import IA3Config

    targets = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    memory = estimate_model_memory(
        config, preset=_preset(config), peft_config=IA3Config(**targets, task_type="CAUSAL_LM")
    )
    assert memory["engine"] == "trace"
    assert memory["optimizer_gb"] < estimate_model_memory(config, preset=_preset(config))["optimizer_gb"]


def test_a_mixture_of_experts():
    config = Qwen3MoeConfig(
        hidden_size=128, num_hidden_layers=6, num_experts=8, moe_intermediate_size=64, vocab_size=1000, head_dim=32
    )
    memory = estimate_model_memory(config, 2, 128, preset=_preset(config))
    assert memory["engine"] == "trace"


@pytest.mark.parametrize(
    ("arguments", "options", "error", "says"),
    [
        ((0, 512), {}, ForgeError, "batch_size=0: it must be a whole number"),
        ((1.5, 512), {}, ForgeError, "batch_size=1.5"),
        ((True, 512), {}, ForgeError, "batch_size=True"),
        ((1, -3), {}, ForgeError, "sequence_length=-3"),
        ((1, 1), {}, ForgeError, "no next token"),
        ((1, 8), {"preset": "qlorra"}, UnknownNameError, "Did you mean 'qlora'"),
        ((1, 8), {"preset": 3}, UnknownNameError, "Unknown preset '3'"),
        ((1, 8), {"paded": True}, UnknownNameError, "Did you mean 'padded'"),
        ((1, 8), {"trainer": "grpo"}, UnknownNameError, "Known: dpo, plain, sft"),
        ((1, 8), {"freeze_ratio": 1.0}, ForgeError, "at least 0 and less than 1"),
        ((1, 8), {"frozen_layers": 8}, ForgeError, "less than the model's 8 layers"),
        ((1, 8), {"freeze_ratio": 0.5, "frozen_layers": 4}, ConflictError, "twice"),
        ((1, 8), {"sharding": "zero3"}, ConflictError, "needs world_size"),
        ((1, 8), {"world_size": 0}, ForgeError, "world_size=0"),
        ((1, 8), {"reference": "copy"}, ConflictError, 'belongs to trainer="dpo"'),
        ((1, 8), {"packed": True, "padded": True}, ConflictError, "contradict"),
        ((1, 8), {"packed": True, "trainer": "plain"}, ConflictError, "does not pack"),
        ((1, 8), {"trainer": "dpo", "reference": "adapter_off"}, ConflictError, "no adapter to switch off"),
    ],
)
def test_bad_input_is_refused_with_the_value_and_the_rule(config, arguments, options, error, says):
    with pytest.raises(error, match=says):
        estimate_model_memory(config, *arguments, **options)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="not for a int"):
        estimate_model_memory(3)
    with pytest.raises(ForgeError, match="There is no folder"):
        estimate_model_memory(tmp_path / "nothing")
    with pytest.raises(UnsupportedError, match="not for a Linear"):
        estimate_model_memory(torch.nn.Linear(2, 2))


def test_nothing_to_train_is_refused(config):
    model = LlamaForCausalLM(LlamaConfig(**SIZES | {"num_hidden_layers": 1})).requires_grad_(False)
    with pytest.raises(UnsupportedError, match="Nothing of this model trains"):
        estimate_model_memory(model)


def test_an_unknown_optimizer_is_refused(config):
    preset = _preset(config, "sft")
    scenario_of = estimate_model_memory(config, 1, 64, preset=preset).described
    broken = dataclasses.replace(scenario_of, scenario=dataclasses.replace(scenario_of.scenario, optim="galore_adamw"))
    from forge.memory.estimate import estimate_described

    with pytest.raises(UnsupportedError, match="does not know what this optimizer keeps"):
        estimate_described(broken)


def test_what_cannot_be_traced_is_estimated_by_formulas(config, monkeypatch):
    from forge.memory import tracing

    traced = estimate_model_memory(config, 2, 512, preset=_preset(config))

    def fails(*_args, **_kwargs):
        raise tracing.UntraceableError("a kernel without shapes")

    monkeypatch.setattr(tracing, "trace", fails)
    memory = estimate_model_memory(config, 2, 512, preset=_preset(config))
    assert memory["engine"] == "analytic"
    assert any("a kernel without shapes" in said for said in memory["assumptions"])
    assert memory["high_gb"] - memory["low_gb"] > traced["high_gb"] - traced["low_gb"]
    assert memory["low_gb"] <= traced["total_estimated_gb"] <= memory["high_gb"]
    assert sum(memory[f"{part}_gb"] for part in PARTS) == pytest.approx(memory["allocated_peak_gb"])


def test_printed(config, capsys):
    memory = estimate_model_memory(config, 2, 256, preset="lora")
    memory.print()
    text = capsys.readouterr().out
    for word in ("parameters", "activations", "allocated", "CUDA context", "engine: trace", "assumed:"):
        assert word in text
    assert "reference_model" not in text  # nothing that is zero


@pytest.mark.real
def test_the_real_model(smollm2):
    """SmolLM2-135M in nf4: 109.8 MB of weights, as transformers counts them loaded (shared/facts of the project)."""
    memory = estimate_model_memory(smollm2, 4, 128, preset=get_preset("qlora", model=smollm2, hardware="ampere"))
    adapters = 4_884_480 * 4
    assert memory["parameters_gb"] * GB == pytest.approx(109_777_792 + adapters, rel=1e-3)


def test_nothing_is_logged_or_warned(config, caplog, recwarn):
    before = {name: logging.getLogger(name).level for name in ("transformers", "trl", "peft")}
    estimate_model_memory(config, 2, 128, preset=_preset(config), trainer="plain")
    assert not caplog.records
    assert not list(recwarn)
    assert before == {name: logging.getLogger(name).level for name in before}


def test_arguments_that_are_not_traced_are_named(config):
    preset = _preset(config, activation_offloading=True, use_liger_kernel=True)
    said = estimate_model_memory(config, 1, 64, preset=preset)["assumptions"]
    assert any(text.startswith("activation_offloading:") for text in said)
    assert any(text.startswith("use_liger_kernel:") for text in said)
    assert not any(text.startswith("torch_compile") for text in said)


def test_the_preset_of_a_turing_gpu_is_traced_in_sixteen_bits(config):
    turing = estimate_model_memory(config, 2, 1024, preset=get_preset("qlora", model=config, hardware="turing"))
    ampere = estimate_model_memory(config, 2, 1024, preset=_preset(config, "qlora"))
    assert turing["engine"] == "trace"
    assert turing["parameters_gb"] == pytest.approx(ampere["parameters_gb"])
    assert turing["allocated_peak_gb"] > ampere["allocated_peak_gb"]  # grouped queries without a flash kernel


def test_moments_of_embeddings_are_never_in_eight_bits(config):
    memory = estimate_model_memory(config, 1, 64, preset=_preset(config, "sft", optim="adamw_8bit"))
    model = LlamaForCausalLM(config)
    wide = model.model.embed_tokens.weight.numel()
    rest = model.num_parameters() - wide
    assert memory["optimizer_gb"] * GB == pytest.approx(8 * wide + rest * (2 + 8 / 256), rel=0.01)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"peft_config": "lora"}, ForgeError, "it must be a PeftConfig"),
        ({"peft_config": None}, ForgeError, "it must be a PeftConfig"),
        ({"optim": "adafactor"}, UnknownNameError, "belongs to the preset"),
        ({"padded": "yes"}, ForgeError, "True or False"),
        ({"preset": {}}, UnknownNameError, "Unknown preset"),
    ],
)
def test_more_bad_input(config, options, error, says):
    with pytest.raises(error, match=says):
        estimate_model_memory(config, **{"preset": "lora"} | options)


def test_an_adapter_that_peft_refuses_is_no_estimate(config, lora):
    with pytest.raises(ConflictError, match="PEFT cannot give this model the adapter"):
        estimate_model_memory(config, preset="lora", peft_config=lora(target_modules=["nothing"]))


def test_a_live_model_with_an_adapter_is_not_packed_any_more(lora):
    from peft import get_peft_model

    adapted = get_peft_model(LlamaForCausalLM(LlamaConfig(**SIZES | {"num_hidden_layers": 2})), lora(r=8))
    memory = estimate_model_memory(adapted, preset=_preset(adapted.config, "qlora"))
    assert memory["optimizer_gb"] > 0
    assert any("not packed any more" in said for said in memory["assumptions"])


def test_another_batch_brings_its_own_assumptions(config):
    preset = _preset(config)
    said = estimate_model_memory(config, 1, 128, preset=preset).at(batch_size=4, sequence_length=2048)["assumptions"]
    assert not any("the preset itself" in text for text in said)
