"""K adapters in one pass against one after another on a GPU: where does packing pay, and where does it give nothing?

A cell has one base in bf16 or nf4, K slots and so many tokens for each; see benchmarks/packing.py for what is compared.
Beside it the peak of the memory. No TRL and no data sets are needed; bitsandbytes for nf4 alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.gpu.models import checkpoint

ROUNDS = 8


def cells(
    models: tuple[str, ...],
    *,
    slots: tuple[int, ...],
    tokens: tuple[int, ...],
    precisions: tuple[str, ...] = ("bf16", "nf4"),
    rounds: int = ROUNDS,
) -> Iterator[dict[str, Any]]:
    """The cells.

    Args:
        models: names of shapes.
        slots: numbers of adapters.
        tokens: of each adapter's row.
        precisions: of the base.
        rounds: of steps in turns.
    """
    for model in models:
        for precision in precisions:
            for length in tokens:
                for width in slots:
                    yield {
                        "group": "packing",
                        "model": model,
                        "precision": precision,
                        "tokens": length,
                        "slots": width,
                        "rounds": rounds,
                    }


def measure(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Load the base, and compare."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from benchmarks.packing import compare

    options: dict[str, Any] = {"dtype": torch.bfloat16}
    if settings["precision"] == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_use_double_quant=True,
        )
    if torch.cuda.is_available():
        options["device_map"] = {"": 0}
    model = AutoModelForCausalLM.from_pretrained(checkpoint(settings["model"]), **options)
    return compare(model, slots=settings["slots"], tokens=settings["tokens"], rounds=settings["rounds"], autocast=True)
