"""All cells of the GPU matrix.

To add a group: a module with `cells` and `measure(settings)`, an entry in GROUPS, and its cells in SUITE and, tiny, in
SMOKE_CELLS. Every cell names its group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.gpu import adapters, callbacks, evaluation, freezing, memory, memory_cells, packing, presets, tuning
from benchmarks.runner import Suite

GROUPS = {
    "presets": presets,
    "callbacks": callbacks,
    "freezing": freezing,
    "memory": memory,
    "evaluation": evaluation,
    "adapters": adapters,
    "tuning": tuning,
    "packing": packing,
}
TARGET = "benchmarks.gpu.matrix:measure"

# Micro-batch x length are the presets' own. The sft cells at 8B need about 128 GB and are there to run out of memory.
CELLS = (*presets.cells(("llama-1b", "llama-8b"), sft=(4, 2048), dpo=(2, 1024)),)
CALLBACK_CELLS = (*callbacks.cells(("llama-1b", "llama-8b"), sft=(4, 2048)), *callbacks.update_cells())
FREEZING_CELLS = tuple(freezing.cells(("llama-1b", "llama-8b"), batch=(2, 2048)))
EVALUATION_CELLS = tuple(
    evaluation.cells(("llama-1b", "llama-8b"), prompts=64, new_tokens=64, sizes=(1, 8, 32), length=2048)
)
ADAPTER_CELLS = (
    *adapters.cells(("llama-1b",), batch=(2, 1024), rounds=30),
    *adapters.cells(("llama-8b",), batch=(1, 1024), rounds=5, kinds=("plain",)),
)
TUNING_CELLS = tuple(tuning.cells(("llama-1b", "llama-8b"), ("qlora", "lora"), length=2048, steps=8))
PACKING_CELLS = tuple(packing.cells(("llama-1b", "llama-3b"), slots=(1, 4, 8, 16, 32), tokens=(64, 256, 1024)))
MEMORY_CELLS = tuple(memory_cells.cells())  # other parts append theirs, made with memory_cells.cell
SMOKE_CELLS = (
    *presets.cells(("llama-tiny",), sft=(2, 64), dpo=(2, 64), steps=(1, 2)),
    *callbacks.cells(("llama-tiny",), sft=(2, 64), steps=(1, 2), rounds=2),
    *freezing.cells(("llama-tiny",), batch=(2, 64), steps=(1, 2), rounds=1),
    *memory_cells.smoke_cells(),
    *adapters.cells(("llama-tiny",), batch=(2, 64), rounds=2),
    *tuning.cells(("llama-tiny",), ("qlora",), length=64, steps=2, rows=16),
    *packing.cells(("llama-tiny",), slots=(2,), tokens=(16,), precisions=("bf16",), rounds=2),
    *evaluation.cells(("llama-tiny",), prompts=4, new_tokens=4, sizes=(1, 2), length=64),
)

SUITE = Suite(
    "gpu",
    TARGET,
    (
        *(*CELLS, *CALLBACK_CELLS, *FREEZING_CELLS, *MEMORY_CELLS, *EVALUATION_CELLS),
        *(*ADAPTER_CELLS, *TUNING_CELLS, *PACKING_CELLS),
    ),
    timeout_s=480,
)
SMOKE = Suite("gpu-smoke", TARGET, SMOKE_CELLS, timeout_s=None)


def measure(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a cell's group makes of it."""
    return GROUPS[settings["group"]].measure(settings)
