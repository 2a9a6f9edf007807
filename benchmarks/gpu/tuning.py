"""A whole LoRATuner run: is the memory what was estimated before loading, and what of the time is not training?

A cell makes a random-init checkpoint, and tunes it with a preset on random words: `estimated_gb`, `peak_gb` (reserved,
of the training), `error` (their difference over the peak), and the seconds of the run and of its training. Needs TRL,
data sets and, for qlora, bitsandbytes.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.models import WORDS, checkpoint


def cells(
    models: tuple[str, ...], presets: tuple[str, ...], *, length: int, steps: int, rows: int = 64
) -> Iterator[dict[str, Any]]:
    """The cells.

    Args:
        models: names of shapes.
        presets: names.
        length: words in a row.
        steps: of the optimizer.
        rows: to train on.
    """
    for model in models:
        for preset in presets:
            yield {
                "group": "tuning",
                "model": model,
                "preset": preset,
                "length": length,
                "steps": steps,
                "rows": rows,
            }


def measure(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Tune once."""
    import torch

    from forge import LoRATuner, TuningConfig

    rng = random.Random(0)
    rows = [
        {"text": " ".join(f"w{rng.randrange(WORDS)}" for _ in range(settings["length"]))}
        for _ in range(settings["rows"])
    ]
    with tempfile.TemporaryDirectory() as folder:
        config = TuningConfig(
            max_length=settings["length"],
            overrides={"max_steps": settings["steps"], "logging_steps": 1},
            bert_score=False,
            max_eval_samples=8,
            output_dir=str(Path(folder, "run")),
        )
        model = str(checkpoint(settings["model"]))
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        result = LoRATuner(model, rows, 8, preset=settings["preset"], config=config).run()
        seconds = time.perf_counter() - began
    metrics = result.metrics
    peak = metrics.get("peak_memory_gb")
    return {
        "estimated_gb": metrics["estimated_memory_gb"],
        "peak_gb": peak,
        "error": None if peak is None else metrics["estimated_memory_gb"] / peak - 1,
        "left_gb": torch.cuda.memory_allocated() / 2**30 if torch.cuda.is_available() else None,
        "run_s": seconds,
        "train_s": metrics["train_runtime_s"],
        "steps": metrics["steps"],
        "loss": [metrics["base_loss"], metrics["loss"]],
    }
