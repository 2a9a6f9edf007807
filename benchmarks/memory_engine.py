"""What an estimate costs on one CPU core, and what it says of well-known models, beside two other estimators and facts.

`cost`: seconds of the first estimate of a process whose imports are done, and of the same one again; and how far its
resident memory rose above what the imports left. The goal is 5 s and 1 GB, for any model up to 70B.
`says`: forge's estimate for an H100 beside fitcheck's (the whole process) and accelerate's (the model, times four where
all weights are trained), for the same config. None of them is measured here: the GPU matrix does that.
`fact`: sizes of loaded models that others reported (`get_memory_footprint()`: packed weights without their scales),
beside forge's `parameters_gb` less its adapters.

`python -m benchmarks.memory_engine` writes results/memory_engine.jsonl; the peers live apart (benchmarks/gpu/peers.py).
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.runner import Suite, main

GB = 2**30
COST = ("qwen2.5-0.5b", "llama-1b", "qwen2.5-7b", "llama-8b", "qwen2.5-32b", "mixtral-8x7b", "llama-70b")
SAYS = (
    ("llama-1b", "full", 4, 1024),
    ("llama-1b", "lora", 4, 2048),
    ("phi3-mini", "nf4", 4, 2048),
    ("qwen2.5-7b", "nf4", 4, 2048),
    ("llama-8b", "nf4", 4, 2048),
    ("llama-8b", "lora", 4, 2048),
    ("llama-8b", "int8", 4, 2048),
    ("llama-8b", "full", 4, 2048),
    ("mixtral-8x7b", "nf4", 1, 2048),
    ("llama-70b", "nf4", 1, 2048),
)
_ONE_7B = "dev.to/sumanpro/qlora-fine-tuning-a-7b-model-on-a-16gb-gpu-it-shrank-to-54gb-in-front-of-me-28n4"
_PHI = "commonly reported for Phi-3-mini; by whom first is not known"
# model, method, the number, the bytes of its unit, who says so
FACTS = (
    ("qwen2.5-7b", "nf4", 5.44, 10**9, _ONE_7B),
    ("phi3-mini", "nf4", 2.21, 10**9, _PHI),
    ("phi3-mini", "lora", 7.2, 2**30, _PHI + "; taken as GiB, since 3,821,079,552 weights of 2 bytes are 7.64e9"),
)


def cells() -> Iterator[dict[str, Any]]:
    """Cost, statements, facts."""
    for model in COST:
        for method in ("nf4", "full"):
            yield {"measures": "cost", "model": model, "method": method, "trainer": "sft", "rows": 4, "length": 2048}
    yield {"measures": "cost", "model": "llama-8b", "method": "lora", "trainer": "dpo", "rows": 2, "length": 1024}
    for model, method, rows, length in SAYS:
        yield {"measures": "says", "model": model, "method": method, "trainer": "sft", "rows": rows, "length": length}
    for model, method, reported, _, _ in FACTS:
        yield {"measures": "fact", "model": model, "method": method, "reported_gb": reported}


SUITE = Suite("memory_engine", "benchmarks.memory_engine:measure", tuple(cells()), timeout_s=300)


def measure(settings: Mapping[str, Any]) -> dict[str, Any]:
    """One of the three kinds of cell."""
    return {"cost": _cost, "says": _says, "fact": _fact}[settings["measures"]](settings)


def _cost(settings: Mapping[str, Any]) -> dict[str, Any]:
    _one_core()
    begin = time.perf_counter()
    _import_all()
    imported = time.perf_counter()
    _peak_gb()
    before = _peak_gb()
    config, preset = _model_and_preset(settings)
    made = time.perf_counter()
    first = _estimate(settings, config, preset)
    done = time.perf_counter()
    risen = _peak_gb() - before
    _estimate(settings, config, preset)
    return {
        "import_s": round(imported - begin, 2),
        "preset_s": round(made - imported, 2),
        "estimate_s": round(done - made, 2),
        "again_s": round(time.perf_counter() - done, 2),
        "resident_before_gb": round(before, 3),
        "resident_rise_gb": round(risen, 3),
        "engine": first["engine"],
        "estimate": _rounded(first),
    }


def _says(settings: Mapping[str, Any]) -> dict[str, Any]:
    from benchmarks.gpu.memory import estimates

    _import_all()
    config, preset = _model_and_preset(settings)
    return estimates(settings, preset, config, config)


def _fact(settings: Mapping[str, Any]) -> dict[str, Any]:
    from peft import LoraConfig

    smallest = LoraConfig(r=1, target_modules="all-linear", layers_to_transform=None, task_type="CAUSAL_LM")
    config, preset = _model_and_preset({"trainer": "sft", "rows": 1, "length": 2, **settings})
    from forge import estimate_model_memory

    made = estimate_model_memory(config, 1, 2, preset=preset, peft_config=smallest)
    adapters = _adapter_bytes(config, smallest)
    said = (settings["model"], settings["method"], settings["reported_gb"])
    unit, source = next((unit, source) for *fact, unit, source in FACTS if tuple(fact) == said)
    found = (made["parameters_gb"] * GB - adapters) / unit
    error = round(found / settings["reported_gb"] - 1, 4)
    return {"source": source, "unit_bytes": unit, "forge_gb": round(found, 3), "error": error}


def _adapter_bytes(config: Any, adapter: Any) -> int:
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = get_peft_model(AutoModelForCausalLM.from_config(config), adapter)
    return sum(4 * p.numel() for p in model.parameters() if p.requires_grad)


def _model_and_preset(settings: Mapping[str, Any]) -> tuple[Any, Any]:
    from benchmarks.gpu.memory_training import preset_of
    from benchmarks.gpu.shapes import shape_config

    config = shape_config(settings["model"])
    return config, preset_of(settings, config, "unused", hardware="hopper")


def _estimate(settings: Mapping[str, Any], config: Any, preset: Any) -> Any:
    from forge import estimate_model_memory

    rows, length = settings["rows"], settings["length"]
    return estimate_model_memory(config, rows, length, preset=preset, trainer=settings["trainer"])


def _rounded(made: Mapping[str, Any]) -> dict[str, Any]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in made.items()}


def _import_all() -> None:
    """What any fine-tuning script imports, and the room of the estimate."""
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers
    from trl import DPOTrainer, SFTTrainer  # noqa: F401

    import forge.memory.tracing  # noqa: F401

    transformers.AutoModelForCausalLM  # noqa: B018  (transformers imports when it is asked)


def _one_core() -> None:
    import torch

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)


def _peak_gb() -> float:
    """The peak of resident memory since the last call; where there is no procfs, since the beginning."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB
    peak = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    return int(peak) * 1024 / GB


if __name__ == "__main__":
    sys.exit(main(SUITE))
