"""How far the formulas behind an estimate are from the trace, for several models and presets; no GPU is involved.

`python -m benchmarks.memory_formulas` writes results/memory_formulas.jsonl: reserved GiB by either, the formulas'
error, and what the replay of the trace reserves on top of what is allocated.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from benchmarks.memory_tables import config_of
from benchmarks.runner import Suite, main

GB = 2**30
MODELS = ("llama-1b", "llama-8b", "phi3-mini", "gpt2-medium", "qwen3-moe-2b")
PRESETS = ("qlora", "lora", "sft", "dpo")
CELLS = tuple(
    {"model": model, "preset": preset, "checkpointing": on, "rows": 2, "length": 1024}
    for model in MODELS
    for preset in PRESETS
    for on in (True, False)
)
SUITE = Suite("memory_formulas", "benchmarks.memory_formulas:measure", CELLS, timeout_s=None)


def measure(settings: Mapping[str, Any]) -> dict[str, Any]:
    """One run by both engines."""
    from forge import estimate_model_memory, get_preset
    from forge.memory.analytic import formulas

    config = config_of(settings["model"])
    changes = {"activation_checkpointing": settings["checkpointing"]}
    preset = get_preset(settings["preset"], model=config, hardware="ampere", **changes)
    traced = estimate_model_memory(config, settings["rows"], settings["length"], preset=preset)
    _, reserved, _, _ = formulas(traced.described)
    by_trace = traced["reserved_peak_gb"]
    return {
        "engine": traced["engine"],
        "traced_gb": round(by_trace, 4),
        "formulas_gb": round(reserved / GB, 4),
        "error": round(reserved / GB / by_trace - 1, 4),
        "reserved_over_allocated": round(by_trace / traced["allocated_peak_gb"] - 1, 4),
    }


if __name__ == "__main__":
    sys.exit(main(SUITE))
