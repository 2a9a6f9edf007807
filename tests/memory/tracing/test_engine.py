"""The traced step is the real one: hollow = real = torch's profiler, by phase and by category; and it leaves no trace.

What may differ, all below 0.1%: whether any row is padded is read from hollow masks as told by the scenario, so that a
scalar more or less is made; the CPU's layer norm keeps statistics in its input's dtype, CUDA's (and meta's) in fp32.
"""

from __future__ import annotations

import gc
import random
from dataclasses import replace
from itertools import product
from typing import Any

import peft
import pytest
import torch
from transformers import BitsAndBytesConfig

from forge.errors import ConflictError, UnknownNameError, UnsupportedError
from forge.memory.scenario import Scenario
from forge.memory.tracing import Traced, UntraceableError, trace
from forge.memory.tracing.tape import PHASE
from support.models import lora, nf4_model, text_model
from support.steps import hollow_step, largest_difference, real_step, source

TINY = Scenario(device="cpu", batch_size=2, sequence_length=32)
NF4 = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16"
)
NF4_ONCE = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")
FP4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype="float32")
INT8 = BitsAndBytesConfig(load_in_8bit=True)


def adapter(name: str, **fields: Any) -> Any:
    return getattr(peft, name)(task_type="CAUSAL_LM", **fields)


EXPERTS = {"target_parameters": ["mlp.experts.gate_up_proj"], "target_modules": ["q_proj"]}

CACHED: dict[str, Any] = {"frozen_layers": 1, "prefix_cache": True}

# Each value of each dimension stands in a row, and most pairs do: the full product is the long test.
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("llama", {}),
    "lora-dropout-reentrant-packed": (
        "qwen3",
        {"peft_config": lora(lora_dropout=0.1), "checkpointing": "reentrant", "packed": True},
    ),
    "plain-non-reentrant-padded": (
        "gemma3",
        {"trainer": "plain", "checkpointing": "non_reentrant", "padded": True, "optim": "adafactor"},
    ),
    "eager-packed": ("gemma3", {"attention": "eager", "packed": True, "peft_config": lora()}),
    "dora": ("mistral", {"peft_config": lora(use_dora=True), "checkpointing": "non_reentrant", "padded": True}),
    "dpo-copy": ("phi3", {"trainer": "dpo", "reference": "copy", "optim": "sgd", "attention": "eager"}),
    "dpo-adapter-off": (
        "llama",
        {
            "trainer": "dpo",
            "reference": "adapter_off",
            "peft_config": lora(),
            "checkpointing": "reentrant",
            "padded": True,
        },
    ),
    "dpo-precomputed": (
        "qwen3",
        {"trainer": "dpo", "reference": "precomputed", "fp32_trainable": False, "optim": "adamw_torch"},
    ),
    "moe-full": ("qwen3_moe", {"optim": "rmsprop"}),
    "moe-plain": ("qwen3_moe", {"trainer": "plain", "checkpointing": "reentrant", "padded": True}),
    "moe-bf16": ("mixtral", {"fp32_trainable": False, "packed": True}),
    "moe-lora-on-experts": ("qwen3_moe", {"peft_config": lora(**EXPERTS), "checkpointing": "non_reentrant"}),
    "moe-dense-prefix": ("deepseek_v3", {"checkpointing": "non_reentrant"}),
    "residual-dropout": ("gpt2", {"trainer": "plain", "padded": True}),
    "no-autocast": ("llama", {"autocast": None, "dtype": "float32", "attention": "eager"}),
    "qlora": ("llama", {"quantization": NF4, "peft_config": lora(), "checkpointing": "reentrant"}),
    "fp4": ("phi3", {"quantization": FP4, "peft_config": lora(lora_dropout=0.05), "padded": True}),
    "qdora": ("qwen3", {"quantization": NF4_ONCE, "peft_config": lora(use_dora=True), "packed": True}),
    "int8": ("mistral", {"quantization": INT8, "peft_config": lora()}),
    "int8-dora": ("llama", {"quantization": INT8, "peft_config": lora(use_dora=True), "attention": "eager"}),
    "frozen-full": ("llama", {"frozen_layers": 1, "checkpointing": "reentrant"}),
    "frozen-lora": ("qwen3", {"frozen_layers": 1, "peft_config": lora(), "checkpointing": "non_reentrant"}),
    "frozen-positions": ("gpt2", {"frozen_layers": 1, "trainer": "plain", "checkpointing": "reentrant"}),
    "frozen-dpo": (
        "gemma3",
        {
            "frozen_layers": 1,
            "peft_config": lora(),
            "trainer": "dpo",
            "reference": "adapter_off",
            "checkpointing": "non_reentrant",
        },
    ),
    "cached-full": ("llama", {**CACHED, "checkpointing": "reentrant"}),
    "cached-tuples": ("falcon_7b", {**CACHED, "peft_config": lora()}),
    "cached-dpo": (
        "phi3",
        {**CACHED, "peft_config": lora(), "trainer": "dpo", "reference": "adapter_off", "padded": True},
    ),
    "cached-offloaded": (
        "qwen3",
        {
            **CACHED,
            "offload_prefix": True,
            "quantization": NF4,
            "peft_config": lora(),
            "checkpointing": "non_reentrant",
            "accumulation": 2,
        },
    ),
    "cached-moe": (
        "qwen3_moe",
        {**CACHED, "peft_config": lora(**EXPERTS), "settings": {"router_aux_loss_coef": 0.0}, "packed": True},
    ),
    "ema-8bit-unclipped": (
        "llama",
        {"ema": "device", "peft_config": lora(), "optim": "adamw_8bit", "max_grad_norm": 0.0},
    ),
    "ema-accumulated": ("mistral", {"ema": "device", "accumulation": 4, "optim": "adagrad"}),
    "vision-language": ("gemma3_vl", {"peft_config": lora()}),
    "ia3": (
        "llama",
        {
            "peft_config": adapter(
                "IA3Config", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
            )
        },
    ),
    "vera": ("llama", {"peft_config": adapter("VeraConfig", target_modules=["q_proj", "o_proj"], r=8)}),
    "loha": ("llama", {"peft_config": adapter("LoHaConfig", target_modules=["q_proj"], r=4)}),
    "oft": ("llama", {"peft_config": adapter("OFTConfig", target_modules=["q_proj"], r=0, oft_block_size=4)}),
    "layer-norms": ("llama", {"peft_config": adapter("LNTuningConfig", target_modules=["input_layernorm"])}),
    "prompt": ("llama", {"peft_config": adapter("PromptTuningConfig", num_virtual_tokens=8)}),
    "prefix": ("llama", {"peft_config": adapter("PrefixTuningConfig", num_virtual_tokens=8)}),
    "tokens": ("llama", {"peft_config": lora(trainable_token_indices=[3, 4])}),
    "saved-head": ("llama", {"peft_config": lora(modules_to_save=["lm_head"]), "checkpointing": "reentrant"}),
    "pissa": ("llama", {"peft_config": lora(init_lora_weights="pissa")}),
}


@pytest.mark.parametrize("cell", CELLS)
def test_the_traced_step_costs_what_the_real_one_does(cell: str) -> None:
    family, changes = CELLS[cell]
    _same(source(family), replace(TINY, **changes))


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "checkpointing", "trainer", "attention"),
    list(
        product(
            ["llama", "qwen3", "gemma3", "mistral", "phi3", "qwen3_moe"],
            ["off", "reentrant", "non_reentrant"],
            ["plain", "sft", "dpo"],
            ["sdpa", "eager"],
        )
    ),
)
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_the_full_product(family: str, checkpointing: Any, trainer: Any, attention: Any, method: str) -> None:
    adapters: dict[str, Any] = {} if method == "full" else {"peft_config": lora()}
    if method == "qlora":
        adapters["quantization"] = NF4
    reference: Any = {"dpo": "adapter_off" if adapters else "copy"}.get(trainer, "none")
    ways = {"checkpointing": checkpointing, "trainer": trainer, "attention": attention, "reference": reference}
    _same(source(family), replace(TINY, **adapters, **ways))


def _same(model: Any, scenario: Scenario) -> None:
    traced, real = hollow_step(model, scenario), real_step(model, scenario)
    difference, where = largest_difference(traced, real)
    assert difference <= 0.001, where
    ours, theirs = traced.peak(), real.peak()
    assert (ours.phase, ours.layer) == (theirs.phase, theirs.layer)
    for category, size in theirs.parts.items():
        assert ours.parts[category] == pytest.approx(size, rel=0.001, abs=0.0001 * theirs.total), category


@pytest.mark.parametrize("cell", ["full", "dpo-adapter-off", "moe-full", "qlora"])
def test_the_peak_is_the_one_that_torchs_profiler_sees(cell: str) -> None:
    family, changes = CELLS[cell]
    scenario = replace(TINY, **changes)
    model = source(family)
    gc.collect()  # what an earlier test left behind would be released under the profiler
    with torch.profiler.profile(profile_memory=True) as profiler:
        real_step(model, scenario)
    highest = max(_alive(profiler))  # the weights too are allocated under the profiler: what is there begins at zero
    if scenario.checkpointing != "off":  # the host's generator, kept for each layer; no operation of a GPU
        highest -= model.config.num_hidden_layers * torch.get_rng_state().nbytes
    assert hollow_step(model, scenario).peak().total == pytest.approx(highest, rel=0.001)


def _alive(profiler: Any) -> list[int]:
    """Bytes alive after each of the profiler's allocations and releases on the CPU, in order."""
    found, total = [], 0
    changes = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(changes, key=lambda e: e.start_ns()):
        total += event.nbytes()
        found.append(total)
    return found


def test_more_rows_and_longer_ones_cost_more() -> None:
    model = source("llama", layers=2)
    for name, values in {"batch_size": (1, 2, 5), "sequence_length": (16, 17, 200)}.items():
        for changes in ({}, {"peft_config": lora(), "checkpointing": "reentrant", "quantization": NF4}):
            scenario = replace(TINY, device="cuda", trainer="plain", **changes)
            traced = [trace(model, replace(scenario, **{name: value})) for value in values]
            totals = [each.peak.total for each in traced]
            assert totals == sorted(set(totals)), (name, changes)
            assert [each.reserved for each in traced] == sorted(each.reserved for each in traced)


@pytest.mark.parametrize("kind", ["full", "peft", "nf4", "nf4-peft", "trained", "vision-language"])
def test_a_live_model_is_left_as_it_was(kind: str, tmp_path: Any, make_trainer: Any) -> None:
    model = nf4_model(tmp_path, layers=7) if "nf4" in kind else text_model(layers=7)
    if kind == "vision-language":
        model = text_model("gemma3_vl", layers=3)
    if "peft" in kind:
        model = peft.get_peft_model(model, lora())
    if kind == "trained":
        trainer = make_trainer(
            "sft", model, bf16=True, gradient_checkpointing=True, trainer_options={"peft_config": lora()}
        )
        trainer.train()
        model = trainer.model
    before, random_numbers, python_numbers = _state(model), torch.get_rng_state(), random.getstate()
    trace(model, replace(TINY, device="cuda", dtype=None))
    assert _state(model) == before
    assert torch.equal(torch.get_rng_state(), random_numbers)
    assert random.getstate() == python_numbers


def _state(model: Any) -> Any:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        {name: (t.data_ptr(), t.dtype, t.requires_grad, t._version) for name, t in tensors},
        [(name, type(m), m.training, sorted(vars(m))) for name, m in model.named_modules()],
        [[list(getattr(m, hook)) for hook in hooks] for m in model.modules()],
        model.config.to_dict(),
    )


def test_what_a_trainer_left_behind_costs_nothing(make_trainer: Any) -> None:
    scenario = replace(TINY, device="cuda", dtype=None)
    fresh = trace(peft.get_peft_model(text_model(layers=7), lora()), scenario)
    trainer = make_trainer(
        "sft", text_model(layers=7), gradient_checkpointing=True, trainer_options={"peft_config": lora()}
    )
    trainer.train()
    assert trace(trainer.model, scenario).peak == fresh.peak


def test_a_live_packed_model_costs_what_its_config_says(tmp_path: Any) -> None:
    packed = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    scenario = replace(TINY, device="cuda", dtype=None)
    live = trace(peft.get_peft_model(nf4_model(tmp_path, layers=7), lora()), scenario)
    config = trace(text_model(layers=7), replace(scenario, quantization=packed, peft_config=lora()))
    assert live.peak.parts == config.peak.parts


@pytest.mark.parametrize(
    "around",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda: torch.device("meta"),
    ],
)
def test_the_callers_modes_change_nothing(around: Any) -> None:
    model, scenario = source(layers=3), replace(TINY, device="cuda")
    alone = trace(model, scenario)
    with around():
        before = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()
        assert trace(model, scenario).peak == alone.peak
        assert (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()) == before


def test_deterministic_algorithms_change_nothing() -> None:
    model, scenario = source("qwen3_moe", layers=3), replace(TINY, device="cuda")
    alone = trace(model, scenario)
    torch.use_deterministic_algorithms(True)
    try:
        assert trace(model, scenario).peak == alone.peak
    finally:
        torch.use_deterministic_algorithms(False)


def test_nothing_stays_alive() -> None:
    model, scenario = source(layers=3), replace(TINY, device="cuda", peft_config=lora())
    counts = []
    for _ in range(3):
        trace(model, scenario)
        gc.collect()
        counts.append(sum(type(each) in {torch.Tensor, torch.nn.Parameter} for each in gc.get_objects()))
    assert counts[1] == counts[2]


def peaks(model: Any, **changes: Any) -> tuple[Traced, ...]:
    """Frozen, frozen with a full cache, and that with the prefix taken off the GPU."""
    frozen = replace(TINY, frozen_layers=4, peft_config=lora(), **changes)
    ways = {}, {"prefix_cache": True}, {"prefix_cache": True, "offload_prefix": True}
    return tuple(trace(model, replace(frozen, **way), all_layers=True) for way in ways)


@pytest.mark.parametrize("changes", [{}, {"checkpointing": "reentrant"}, {"quantization": NF4}])
def test_what_a_cache_leaves_of_the_prefix(changes: dict[str, Any]) -> None:
    """No layer below the boundary runs; a batch of states is there; the weights go or stay."""
    model = source(layers=6)
    frozen, cached, offloaded = peaks(model, **changes)
    assert _ran(frozen) == set(range(6))
    assert _ran(cached) == _ran(offloaded) == {4, 5}
    states = 2 * 32 * 32 * 2  # rows, length, width, bytes
    kept = frozen.recording.when("1.backward.loss")["activations"]
    assert cached.recording.when("1.backward.loss")["activations"] - kept in (0, states)  # embeddings stay anyway
    weights = [each.recording.when("1.forward.embed") for each in (frozen, cached, offloaded)]
    assert weights[0] == weights[1]
    gone = sum(
        weights[1][category] - weights[2][category] for category in ("parameters", "quantization")
    )  # of four layers of six
    per_layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    if not changes.get("quantization"):
        assert gone == 4 * per_layer * 2
    assert 0 < gone < 4 * per_layer * 2 + 1


def _ran(traced: Traced) -> set[int]:
    return {event[2] for event in traced.recording.events if event[0] == PHASE and event[2] is not None}


@pytest.mark.parametrize("checkpointing", ["off", "reentrant", "non_reentrant"])
def test_a_frozen_prefix_keeps_nothing(checkpointing: Any) -> None:
    """With half of the layers frozen, what waits for backward is what a model of the other half keeps."""
    scenario = replace(TINY, peft_config=lora(), checkpointing=checkpointing)
    half = trace(source(layers=3), replace(scenario, frozen_layers=0), all_layers=True)
    frozen = trace(source(layers=6), replace(scenario, frozen_layers=3), all_layers=True)
    kept, expected = (each.recording.when("2.backward.loss")["activations"] for each in (frozen, half))
    assert kept == pytest.approx(expected, abs=2 * 32 * 32 * 2 * 2)  # one layer's input, which is no embedding here


def test_a_mixture_whose_routers_are_all_learnt_from_has_no_cache() -> None:
    with pytest.raises(ConflictError, match=r"router_aux_loss_coef=0\.0"):
        trace(source("qwen3_moe"), replace(TINY, **CACHED))


@pytest.mark.parametrize(
    ("family", "changes", "what"),
    [
        ("gemma3_vl", {"peft_config": lora()}, "vision_tower"),
        ("llama", {"peft_config": lora(trainable_token_indices=[3])}, "embed_tokens.*trainable_tokens"),
        ("llama", {"peft_config": adapter("PromptTuningConfig", num_virtual_tokens=8)}, "the adapter 'default'"),
    ],
)
def test_what_trains_below_frozen_layers_is_refused(family: str, changes: dict[str, Any], what: str) -> None:
    with pytest.raises(ConflictError, match=f"{what}.* trains below the 1 frozen layers"):
        trace(source(family), replace(TINY, frozen_layers=1, **changes))


def test_an_unknown_optimizer_is_named() -> None:
    with pytest.raises(UnknownNameError, match="adamw_torch_fused"):
        trace(source(), replace(TINY, optim="adamw_torch_fussed"))
    with pytest.raises(UnsupportedError, match="galore_adamw"):
        trace(source(), replace(TINY, optim="galore_adamw"))


def test_what_cannot_be_traced_says_so() -> None:
    model = text_model(layers=2)

    def by_value(*_: Any, **__: Any) -> Any:
        raise RuntimeError("needs the values\nof a tensor")

    model.__class__ = type("Stubborn", (type(model),), {"forward": by_value})
    with pytest.raises(UntraceableError, match=r"RuntimeError: needs the values$") as raised:
        trace(model, replace(TINY, trainer="plain"))
    assert isinstance(raised.value.__cause__, RuntimeError)


def test_an_adapter_for_some_layers_is_traced_on_all() -> None:
    model = source(layers=8)
    some = trace(model, replace(TINY, peft_config=lora(layers_to_transform=[4, 5], target_modules=["q_proj"])))
    every = trace(model, replace(TINY, peft_config=lora(target_modules=["q_proj"])))
    assert some.layers == some.depth == 8
    assert every.layers == 5
    assert some.peak.parts["optimizer"] * 4 == pytest.approx(every.peak.parts["optimizer"], rel=0.01)
