"""The cells of the memory group, and which of them are held out.

A cell is what a user would say of a run: model, trainer, method, rows x length, and what deviates from the preset. No
constant of the estimate may be fitted to a held-out cell. Nobody picks them: a cell is held out when the SHA-256 of its
key, without `held_out`, is divisible by three; a test pins which cells that makes. Other parts of forge add theirs with
`cell(...)`, which applies the same rule.

`card` makes a cell one of a smaller GPU: the process gets no more memory than that one has, and `fits` is asked for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from benchmarks.runner import key

METHODS = ("full", "full-bf16", "lora", "dora", "nf4", "nf4-single", "fp4", "int8", "nf4-dora")
GB_16, GB_24, GB_40 = "RTX 5070 Ti", "RTX 4090", "A100-40GB"


def cell(model: str, method: str, rows: int, length: int, *, trainer: str = "sft", **deviations: Any) -> dict[str, Any]:
    """The settings of a cell.

    Args:
        model: name of a shape.
        method: one of METHODS: all weights (in fp32 or bf16), or adapters on a base of that kind; "nf4-single" is
            without double quantisation.
        rows: in a micro-batch; pairs under DPO.
        length: tokens in a row.
        trainer: "sft", "dpo" or "plain".
        **deviations: from the preset, as far as the cell differs: `checkpointing` ("off", "reentrant",
            "non_reentrant"), `attention`, `data` ("padded" or "packed"), `dropout`, `lora_r`, `optim`, `accumulation`,
            `ema` ("device" or "cpu"), `reference` ("copy", "precomputed", "adapter_off"), `frozen_layers`, and `card`.
    """
    made = {"group": "memory", "model": model, "trainer": trainer, "method": method, "rows": rows, "length": length}
    made |= deviations
    return made | {"held_out": held_out(made)}


def held_out(settings: dict[str, Any]) -> bool:
    """Whether a cell is kept from all fitting: one in three, by a hash of its settings."""
    text = key({name: value for name, value in settings.items() if name != "held_out"})
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big") % 3 == 0


def cells() -> Iterator[dict[str, Any]]:
    """All cells; those of a model next to each other, and the models that tell most first."""
    yield from _small()
    yield from _large()
    yield from _other_models()


def _small() -> Iterator[dict[str, Any]]:
    """One model through every dimension."""
    sft = ("llama-1b", "lora", 4, 1024)
    yield cell(*sft)
    yield cell(*sft, checkpointing="off")
    yield cell(*sft, checkpointing="reentrant")
    yield cell(*sft, attention="eager")
    yield cell(*sft, attention="eager", checkpointing="off")
    yield cell(*sft, attention="flash_attention_2")
    yield cell(*sft, data="padded")
    yield cell(*sft, data="packed")
    yield cell(*sft, dropout=0.1, checkpointing="off")
    yield cell(*sft, lora_r=128)
    yield cell(*sft, accumulation=4)
    yield cell(*sft, ema="device")
    yield cell("llama-1b", "lora", 1, 8192)
    for method in ("nf4", "nf4-single", "fp4", "int8", "dora"):
        yield cell("llama-1b", method, 4, 1024)
    for method in ("nf4", "int8", "dora"):
        yield cell("llama-1b", method, 4, 1024, checkpointing="off")
    yield cell("llama-1b", "nf4", 4, 1024, optim="adamw_torch_fused", data="padded")
    full = ("llama-1b", "full", 4, 1024)
    yield cell(*full)
    yield cell(*full, checkpointing="off")
    yield cell("llama-1b", "full-bf16", 4, 1024)
    for optim in ("adamw_torch", "adamw_8bit", "paged_adamw_8bit", "adafactor"):
        yield cell(*full, optim=optim)
    yield cell(*full, accumulation=4)
    yield cell(*full, ema="device")
    yield cell(*full, ema="cpu")
    yield cell(*full, data="packed")
    for method in ("lora", "nf4"):
        yield cell("llama-1b", method, 4, 1024, trainer="plain")
    yield cell(*full, trainer="plain", checkpointing="off")
    yield cell("llama-1b", "lora", 4, 1024, trainer="plain", data="padded", attention="eager")
    yield cell("llama-1b", "lora", 2, 1024, trainer="dpo", reference="adapter_off")
    yield cell("llama-1b", "lora", 2, 1024, trainer="dpo", reference="adapter_off", checkpointing="off")
    yield cell("llama-1b", "lora", 2, 1024, trainer="dpo", reference="precomputed")
    yield cell("llama-1b", "nf4", 2, 1024, trainer="dpo", reference="adapter_off")
    yield cell("llama-1b", "full", 2, 1024, trainer="dpo", reference="copy")
    yield cell("llama-1b", "full", 2, 1024, trainer="dpo", reference="precomputed")
    yield cell(*full, card=GB_16)
    yield cell(*full, card=GB_24)
    yield cell("llama-1b", "lora", 8, 1024, checkpointing="off", card=GB_24)
    yield cell("llama-1b", "full", 2, 1024, trainer="dpo", reference="copy", card=GB_24)


def _large() -> Iterator[dict[str, Any]]:
    """Where it matters most whether a run fits."""
    yield cell("llama-8b", "nf4", 4, 2048)
    yield cell("llama-8b", "nf4", 1, 8192)
    yield cell("llama-8b", "lora", 1, 2048)
    yield cell("llama-8b", "lora", 4, 2048, checkpointing="off")
    yield cell("llama-8b", "lora", 8, 2048, checkpointing="off")
    yield cell("llama-8b", "int8", 2, 2048)
    yield cell("llama-8b", "nf4-dora", 1, 2048)
    yield cell("llama-8b", "nf4", 1, 1024, trainer="dpo", reference="adapter_off")
    yield cell("llama-8b", "full-bf16", 1, 1024, optim="adamw_8bit")
    yield cell("llama-8b", "full", 1, 1024)
    yield cell("llama-8b", "nf4", 4, 2048, card=GB_16)
    yield cell("llama-8b", "lora", 1, 1024, card=GB_16)
    yield cell("llama-8b", "lora", 1, 2048, card=GB_24)
    yield cell("llama-8b", "lora", 2, 2048, checkpointing="off", card=GB_40)
    yield cell("llama-8b", "nf4", 1, 2048, checkpointing="off", card=GB_24)
    yield cell("llama-8b", "nf4", 2, 2048, checkpointing="off", card=GB_24)
    yield cell("llama-3b", "nf4", 4, 2048)
    yield cell("llama-3b", "lora", 2, 2048, checkpointing="off")
    yield cell("llama-3b", "full", 1, 2048)
    yield cell("llama-3b", "full", 1, 2048, optim="adafactor")
    yield cell("llama-3b", "lora", 2, 1024, trainer="dpo", reference="adapter_off")
    yield cell("llama-3b", "full", 1, 1024, card=GB_40)
    yield cell("llama-3b", "lora", 2, 2048, checkpointing="off", card=GB_24)


def _other_models() -> Iterator[dict[str, Any]]:
    """Large vocabularies, sliding windows, fused projections, experts, GPT-2's Conv1D and dropout."""
    for method in ("lora", "full", "nf4"):
        yield cell("qwen2.5-0.5b", method, 4, 2048)
    yield cell("qwen2.5-0.5b", "lora", 4, 2048, trainer="plain", checkpointing="off")
    yield cell("qwen2.5-0.5b", "full", 2, 1024, trainer="dpo", reference="copy")
    yield cell("qwen2.5-0.5b", "lora", 8, 1024, trainer="plain", checkpointing="off", card=GB_24)
    for method in ("lora", "full", "nf4"):
        yield cell("qwen3-moe-2b", method, 2, 1024)
    yield cell("gemma3-1b", "lora", 4, 1024)
    yield cell("gemma3-1b", "full", 2, 1024, checkpointing="off")
    yield cell("qwen3-0.6b", "lora", 4, 1024, data="padded")
    yield cell("qwen3-0.6b", "full", 4, 1024)
    yield cell("phi3-mini", "nf4", 2, 2048)
    yield cell("phi3-mini", "lora", 1, 2048, checkpointing="off", card=GB_16)
    yield cell("gpt2-medium", "full", 4, 1024, checkpointing="off")
    yield cell("gpt2-medium", "lora", 4, 1024)


def smoke_cells() -> Iterator[dict[str, Any]]:
    """Every path through the code, with shapes that a CPU trains in a second."""
    yield cell("llama-tiny", "lora", 2, 64, data="padded", checkpointing="reentrant", ema="device")
    yield cell("llama-tiny", "nf4", 2, 64, data="packed", dropout=0.1, accumulation=2)
    yield cell("qwen3-moe-tiny", "full", 2, 64, attention="eager", optim="adafactor")
    yield cell("gpt2-tiny", "full", 2, 64, trainer="plain", data="padded", checkpointing="off")
    yield cell("llama-tiny", "lora", 2, 64, trainer="dpo", reference="precomputed")
    yield cell("llama-tiny", "full", 2, 64, trainer="dpo", reference="copy")
