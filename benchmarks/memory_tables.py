"""The table and the chart of docs/memory.md: what well-known models need, and where it goes during a step.

`python -m benchmarks.memory_tables` estimates every cell (results/memory_tables.jsonl); with `write` it puts the table
and the chart into docs/. Nothing here is measured on a GPU: these are the estimates that the GPU matrix is to check.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.shapes import SHAPES, shape_config
from benchmarks.provenance import ROOT
from benchmarks.runner import RESULTS, Suite, add_options, last_rows, run_as_asked

GB = 2**30
PRESETS = ("qlora", "lora", "sft")
ROWS, LENGTH = 1, 2048
CARDS_GB = (8, 12, 16, 24, 32, 48, 80, 141)
DOCS = ROOT / "docs"
BEGIN, END = "<!-- table: benchmarks/memory_tables.py -->", "<!-- end of table -->"

# What stands in the config.json of the model named, beside those of benchmarks/gpu/shapes.py.
MORE: dict[str, dict[str, Any]] = {
    "mistral-7b": {
        "model_type": "mistral",
        "vocab_size": 32768,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "sliding_window": None,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
    },
    "qwen2.5-14b": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
    },
}
MODELS = {
    "qwen2.5-0.5b": "Qwen2.5-0.5B",
    "llama-1b": "Llama-3.2-1B",
    "gemma3-1b": "Gemma-3-1B",
    "llama-3b": "Llama-3.2-3B",
    "phi3-mini": "Phi-3-mini 3.8B",
    "mistral-7b": "Mistral-7B v0.3",
    "qwen2.5-7b": "Qwen2.5-7B",
    "llama-8b": "Llama-3.1-8B",
    "qwen3-8b": "Qwen3-8B",
    "qwen2.5-14b": "Qwen2.5-14B",
    "qwen2.5-32b": "Qwen2.5-32B",
    "mixtral-8x7b": "Mixtral-8x7B",
    "llama-70b": "Llama-3.1-70B",
}


def cells() -> Iterator[dict[str, Any]]:
    """Every model with every preset."""
    for model in MODELS:
        for preset in PRESETS:
            yield {"model": model, "preset": preset, "rows": ROWS, "length": LENGTH}


SUITE = Suite("memory_tables", "benchmarks.memory_tables:measure", tuple(cells()), timeout_s=None)


def config_of(model: str) -> Any:
    """Its transformers config."""
    from transformers import AutoConfig

    if model in SHAPES:
        return shape_config(model)
    return AutoConfig.for_model(**MORE[model], pad_token_id=0, bos_token_id=1, eos_token_id=2)


def measure(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The estimate of one cell, in GiB."""
    from forge import estimate_model_memory, get_preset
    from forge.models import read_anatomy

    config = config_of(settings["model"])
    preset = get_preset(settings["preset"], model=config, hardware="hopper")
    estimate = estimate_model_memory(config, settings["rows"], settings["length"], preset=preset)
    found = {key: round(value, 4) if isinstance(value, float) else value for key, value in estimate.items()}
    return {**found, "num_parameters": read_anatomy(config).num_parameters}


def write() -> None:
    """Put table and chart into docs."""
    rows = last_rows(RESULTS / "memory_tables.jsonl")
    page = DOCS / "memory.md"
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}")
    chart(DOCS / "memory_step.png")


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a line per model, for each preset the total and the smallest class of card that surely holds it."""
    found = {
        (r["settings"]["model"], r["settings"]["preset"]): r["result"] for r in rows.values() if r["status"] == "ok"
    }
    lines = ["| model | parameters | QLoRA | LoRA | full |", "|---|---:|---:|---:|---:|"]
    for model, name in MODELS.items():
        numbers = [found[model, preset] for preset in PRESETS]
        billions = numbers[0]["num_parameters"] / 1e9
        lines.append(f"| {name} | {billions:.2f}B | {' | '.join(map(_cell, numbers))} |")
    return "\n".join(lines)


def _cell(found: Mapping[str, Any]) -> str:
    from forge import find_card

    usable = ((gb, find_card(f"{gb}GB").usable_bytes / GB) for gb in CARDS_GB)
    card = next((f"{gb} GB" for gb, usable_gb in usable if found["high_gb"] <= usable_gb), "several")
    engine = "" if found["engine"] == "trace" else " (formulas)"
    return f"{found['total_estimated_gb']:.1f} ({card}){engine}"


def chart(path: Path) -> None:
    """What is alive in the course of one step, by part."""
    from forge import estimate_model_memory, get_preset
    from forge.memory.tracing import trace
    from forge.reporting import Chart, Series

    config = config_of("llama-8b")
    preset = get_preset("qlora", model=config, hardware="hopper")
    run = estimate_model_memory(config, 4, LENGTH, preset=preset).described
    timeline = trace(run.source, run.scenario).recording.timeline("2.forward.embed", points=200)
    share = [100 * index / (len(timeline) - 1) for index in range(len(timeline))]
    names = ("parameters", "activations", "quantization", "gradients", "logits")
    series = tuple(Series(name, share, [instant[name] / GB for instant in timeline]) for name in names)
    Chart(
        "QLoRA on Llama-3.1-8B, 4 x 2048 tokens: what is alive during a step",
        series,
        y_label="GiB",
        x_label="share of the step's allocations, %",
    ).save(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    parser.add_argument("command", nargs="?", choices=["write"])
    options = parser.parse_args()
    if options.command == "write":
        write()
    else:
        sys.exit(run_as_asked(SUITE, options))
