"""The tape of a few layers, unrolled, is the tape of them all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import peft
import pytest
from transformers import BitsAndBytesConfig

from forge.memory.scenario import Scenario
from forge.memory.tracing import Traced, trace
from forge.memory.tracing.tape import ALLOCATED, FREED, PHASE, Recording
from forge.memory.tracing.unroll import IrregularError, runs_of, shortened, unroll
from support.models import lora
from support.steps import largest_difference, source

BASE = Scenario(batch_size=2, sequence_length=256)
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")
WIDE = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 512}
QLORA = {"peft_config": lora(), "quantization": NF4, "checkpointing": "reentrant"}

CELLS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "full": ("llama", 9, {}),
    "qlora": ("llama", 12, QLORA),
    "padded": ("qwen3", 8, {"padded": True, "checkpointing": "non_reentrant", "trainer": "plain"}),
    "packed": ("phi3", 9, {"packed": True, "peft_config": lora(lora_dropout=0.1)}),
    "gpt2": ("gpt2", 8, {"trainer": "plain", "checkpointing": "reentrant"}),
    "falcon": ("falcon_7b", 8, {"peft_config": lora(), "optim": "paged_adamw_8bit"}),
    "moe": ("qwen3_moe", 8, {}),
    "moe-qlora": ("mixtral", 8, QLORA),
    "dense-prefix": ("deepseek_v3", 9, {"checkpointing": "non_reentrant"}),
    "frozen-prefix": ("llama", 14, {"frozen_layers": 7, "checkpointing": "reentrant"}),
    "cached-prefix": ("llama", 18, {"frozen_layers": 9, "prefix_cache": True, "peft_config": lora()}),
    "cached-offloaded": ("falcon_7b", 16, {"frozen_layers": 7, "prefix_cache": True, "offload_prefix": True, **QLORA}),
    "frozen-few": ("llama", 9, {"frozen_layers": 2, "peft_config": lora()}),
    "dpo-copy": ("llama", 8, {"trainer": "dpo", "reference": "copy", "checkpointing": "reentrant"}),
    "dpo-adapter-off": ("qwen2", 8, {"trainer": "dpo", "reference": "adapter_off", "peft_config": lora()}),
    "accumulated-ema": ("mistral", 8, {"accumulation": 4, "ema": "device", "optim": "adamw_torch"}),
    "eager": ("olmo2", 8, {"attention": "eager", "optim": "adafactor"}),
}


@pytest.mark.parametrize("cell", CELLS)
def test_unrolled_is_the_whole_depth(cell: str) -> None:
    family, layers, changes = CELLS[cell]
    scenario = replace(BASE, **changes)
    model = source(family, layers, **(WIDE if family in {"llama", "qwen3", "phi3", "olmo2"} else {}))
    short, whole = trace(model, scenario), trace(model, scenario, all_layers=True)
    assert short.layers < whole.layers == short.depth == layers
    assert short.peak.total == pytest.approx(whole.peak.total, rel=0.001)
    assert (short.peak.phase, short.peak.layer) == (whole.peak.phase, whole.peak.layer)
    # Where a model is tiny one segment more or less, by a counter in another place, is a few per cent.
    assert short.reserved == pytest.approx(whole.reserved, rel=0.01, abs=2 * 2**20)
    assert short.paged == whole.paged
    difference, where = largest_difference(short.recording, whole.recording)
    assert difference <= 0.001, where
    for category, size in whole.peak.parts.items():
        assert short.peak.parts[category] == pytest.approx(size, rel=0.001, abs=4096), category


@pytest.mark.parametrize("changes", [{"peft_config": lora()}, {"checkpointing": "non_reentrant"}, QLORA])
def test_kinds_that_take_turns_are_unrolled_by_the_turn(changes: dict[str, Any]) -> None:
    kinds = ["sliding_attention", "full_attention"] * 9 + ["sliding_attention"]
    model = source("gemma3", 19, layer_types=kinds, sliding_window=64)
    scenario = replace(BASE, **changes)
    short, whole = trace(model, scenario), trace(model, scenario, all_layers=True)
    assert (short.layers, whole.layers) == (11, 19)
    assert short.peak.total == pytest.approx(whole.peak.total, rel=0.001)
    assert short.peak.phase == whole.peak.phase
    assert short.reserved == pytest.approx(whole.reserved, rel=0.01, abs=2 * 2**20)


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss"])
def test_layers_that_alternate_are_all_traced(family: str) -> None:
    traced = trace(source(family, 8), replace(BASE, peft_config=lora()))
    assert traced.layers == traced.depth == 8


def test_a_prefix_for_all_layers_is_traced_for_all() -> None:
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=32)
    traced = trace(source(layers=8), replace(BASE, peft_config=prefix))
    assert traced.layers == traced.depth == 8


def test_runs_and_what_is_traced_of_them() -> None:
    runs = runs_of([1, 1, 2, 2, 2, 2, 2, 2, 2])
    assert runs == [[0, 1], [2, 3, 4, 5, 6, 7, 8]]
    assert shortened(runs) == [0, 1, 2, 3, 4, 7, 8]
    assert shortened([list(range(5))]) == [0, 1, 2, 3, 4]


def test_layers_that_differ_are_refused() -> None:
    events: list[Any] = []
    for layer in range(5):
        events += [
            (PHASE, "1.forward.layer", layer),
            (ALLOCATED, layer + 1, 64 * (1 + layer % 2), "activations", layer),
        ]
    with pytest.raises(IrregularError, match="differ"):
        unroll(Recording(events), [list(range(9))])


def test_each_copy_hands_over_to_the_next() -> None:
    events: list[Any] = [(PHASE, "1.forward.embed", None), (ALLOCATED, 100, 8, "activations", None)]
    for layer in range(5):
        events += [(PHASE, "1.forward.layer", layer), (ALLOCATED, layer + 1, 8, "activations", layer)]
        events += [(FREED, layer)] if layer else []
    longer = unroll(Recording(events), [list(range(40))])
    assert longer.peak().total == 24  # the embedding, one layer's output and the next one's
    assert sum(event[0] == ALLOCATED for event in longer.events) == 41
    assert {event[4] for event in longer.events if event[0] == ALLOCATED} == {None, *range(40)}


def test_an_irregular_model_is_traced_at_full_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    from forge.memory.tracing import engine

    def refuse(*_: Any) -> Any:
        raise IrregularError("layers 2 and 3 differ")

    model, expected = source(layers=7), _whole(7)
    monkeypatch.setattr(engine, "unroll", refuse)
    traced = trace(model, BASE)
    assert traced.layers == 7
    assert traced.peak == expected.peak


def _whole(layers: int) -> Traced:
    return trace(source(layers=layers), BASE, all_layers=True)
