"""Thirty LoRA trainings in a row on one SmolLM2-135M, by forge and by what people do today.

- `forge`: `attach_adapter`, `SFTTrainer`, `cleanup_peft_model(trainer)`.
- `peft`: `get_peft_model`, `SFTTrainer`, `model.unload()`, the trainer deleted, `gc.collect()`.

After each training: resident memory, how many tensors, modules and hooks are alive, the milliseconds of a forward pass
of the base, and whether its weights and its training flags are those from before. Each cell is a process of its own.
"""

from __future__ import annotations

import gc
import resource
import sys
import tempfile
import time
from typing import Any

from benchmarks.runner import Suite, main

TRAININGS = 30
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "pissa": {"init_lora_weights": "pissa_niter_4"},
    "modules_to_save": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
}


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """All trainings of one way with one adapter."""
    import psutil
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from forge.adapters import attach_adapter, cleanup_peft_model
    from forge.assets import conversations, smollm2

    torch.set_num_threads(2)
    forges, rows, folder = settings["way"] == "forge", [], smollm2()
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = Dataset.from_list([{"messages": list(each)} for each in conversations()[:4]])
    before, flags = _weights(base), _flags(base)
    config = LoraConfig(
        r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **ADAPTERS[settings["adapter"]]
    )
    ids = torch.arange(8)[None]
    for _ in range(TRAININGS):
        begin = time.perf_counter()
        model = (attach_adapter if forges else get_peft_model)(base, config)
        attached = time.perf_counter() - begin
        with tempfile.TemporaryDirectory() as output:
            args = SFTConfig(
                output,
                **{"use_cpu": True, "bf16": False, "max_steps": 1, "per_device_train_batch_size": 1},
                **{"max_length": 32, "report_to": [], "save_strategy": "no", "disable_tqdm": True},
                **{"learning_rate": 1e-3, "activation_checkpointing": True},
            )
            trainer = SFTTrainer(model, args=args, train_dataset=data, processing_class=tokenizer)
            trainer.train()
        begin = time.perf_counter()
        if forges:
            cleanup_peft_model(trainer)
        else:
            model.unload()
        unloaded = time.perf_counter() - begin
        del trainer, model
        gc.collect()
        row = _alive() | {
            "rss_mib": round(psutil.Process().memory_info().rss / 2**20, 1),
            "weights_as_before": _weights(base) == before,
            "flags_as_before": _flags(base) == flags,
            "attach_s": round(attached, 3),
            "unload_s": round(unloaded, 3),
        }
        with torch.no_grad():
            base(ids)
            begin = time.perf_counter()
            for _ in range(3):
                base(ids)
            row["forward_ms"] = round((time.perf_counter() - begin) / 3 * 1000, 1)
        rows.append(row)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {"trainings": rows, "peak_rss_mib": round(peak, 1), "summary": _summary(rows)}


def _weights(model: Any) -> list[tuple[str, int]]:
    import xxhash

    return [(name, xxhash.xxh3_64_intdigest(p.detach().numpy())) for name, p in model.named_parameters()]


def _flags(model: Any) -> list[Any]:
    """requires_grad of each parameter; training, checkpointing and hooks of each module; use_cache; forward."""
    trained = [parameter.requires_grad for parameter in model.parameters()]
    modules = [
        (module.training, getattr(module, "gradient_checkpointing", None), len(module._forward_hooks))
        for module in model.modules()
    ]
    return [trained, modules, model.config.use_cache, "forward" in vars(model)]


def _alive() -> dict[str, int]:
    import torch

    found = {"tensors": 0, "modules": 0, "hooks": 0}
    for each in gc.get_objects():
        if issubclass(type(each), torch.nn.Module):
            found["modules"] += 1
            found["hooks"] += len(each._forward_hooks)
        elif issubclass(type(each), torch.Tensor):
            found["tensors"] += 1
    return found


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The third training beside the last, and what of the base was as before after all of them."""
    keys = ("rss_mib", "tensors", "modules", "hooks", "forward_ms")
    summary: dict[str, Any] = {key: [rows[2][key], rows[-1][key]] for key in keys}
    for key in ("weights_as_before", "flags_as_before"):
        summary[key] = sum(row[key] for row in rows)
    for key in ("attach_s", "unload_s"):
        summary[key] = sorted(row[key] for row in rows)[len(rows) // 2]
    print(summary, flush=True)
    return summary


SUITE = Suite(
    "adapters",
    "benchmarks.adapters:measure",
    tuple({"adapter": adapter, "way": way} for adapter in ADAPTERS for way in ("forge", "peft")),
    timeout_s=1200,
)

if __name__ == "__main__":
    sys.exit(main(SUITE))
