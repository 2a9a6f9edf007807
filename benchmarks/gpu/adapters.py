"""Many adapters on one base, one after another: does the GPU's memory come back, and what does the way back cost?

A cell loads one random-init model in bf16, and attaches, trains (plain Trainer, two steps) and unloads an adapter of
one kind again and again: with `attach_adapter` and `cleanup_peft_model` ("forge"), or with `get_peft_model` and
`unload`, as people do without ("peft"). After each round: `allocated_gb` and `reserved_gb` that stay, `modules`,
`hooks`, and whether the base's weights are what they were (`same`); `attach_s` and `unload_s`, in which forge digests
the weights, and their `share` of the round. `growth_mb` is what the last round left more than the second one. No TRL,
data sets or quantisation are needed.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.gpu.shapes import shape_config

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": "all"},
    "pissa": {"init_lora_weights": "pissa_niter_4"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def cells(
    models: tuple[str, ...], *, batch: tuple[int, int], rounds: int, kinds: tuple[str, ...] = tuple(KINDS)
) -> Iterator[dict[str, Any]]:
    """The cells.

    Args:
        models: names of shapes.
        batch: rows and length.
        rounds: how many adapters.
        kinds: of adapters.
    """
    for model in models:
        for kind in kinds:
            for by in ("forge", "peft"):
                yield {
                    "group": "adapters",
                    "model": model,
                    "kind": kind,
                    "by": by,
                    "micro_batch": batch[0],
                    "length": batch[1],
                    "rounds": rounds,
                }


def measure(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Attach, train, unload, again and again."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(shape_config(settings["model"]), dtype=torch.bfloat16)
    sums = _sums(base)
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(settings["rounds"]):
            torch.manual_seed(number)
            base, found = _round(base, settings, folder)
            rounds.append({**found, **_left(base), "same": _sums(base) == sums})
    second = rounds[min(1, len(rounds) - 1)]["allocated_gb"]
    return {
        "rounds": rounds,
        "same": all(one["same"] for one in rounds),
        "growth_mb": None if second is None else (rounds[-1]["allocated_gb"] - second) * 1024,
        "modules": [rounds[0]["modules"], rounds[-1]["modules"]],
        "hooks": [rounds[0]["hooks"], rounds[-1]["hooks"]],
        **{name: statistics.median(one[name] for one in rounds) for name in ("attach_s", "unload_s", "share")},
    }


def _round(base: Any, settings: Mapping[str, Any], folder: str) -> tuple[Any, dict[str, float]]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import PrinterCallback, Trainer, TrainingArguments

    from forge import attach_adapter, cleanup_peft_model
    from forge.compat import checkpointing_names

    config = LoraConfig(r=16, target_modules=LINEAR, task_type="CAUSAL_LM", **KINDS[settings["kind"]])
    began = time.perf_counter()
    model = (attach_adapter if settings["by"] == "forge" else get_peft_model)(base, config)
    attached = _now()
    arguments = TrainingArguments(
        output_dir=folder,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        max_steps=2,
        per_device_train_batch_size=settings["micro_batch"],
        **checkpointing_names({"activation_checkpointing": True}),
        learning_rate=1e-4,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    ids = torch.randint(3, base.config.vocab_size, (2 * settings["micro_batch"], settings["length"]))
    rows = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trained = _now()
    if settings["by"] == "forge":
        cleanup_peft_model(trainer)
    else:
        base = model.unload()
    del trainer, model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    ended = _now()
    attach_s, unload_s = attached - began, ended - trained
    return base, {"attach_s": attach_s, "unload_s": unload_s, "share": (attach_s + unload_s) / (ended - began)}


def _now() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _left(base: Any) -> dict[str, Any]:
    import torch

    cuda = torch.cuda.is_available()
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "allocated_gb": torch.cuda.memory_allocated() / 2**30 if cuda else None,
        "reserved_gb": torch.cuda.memory_reserved() / 2**30 if cuda else None,
        "modules": sum(1 for _ in base.modules()),
        "hooks": sum(len(getattr(module, name)) for module in base.modules() for name in hooks),
    }


def _sums(base: Any) -> dict[str, float]:
    """A sum of each weight's bits by name: enough to see that one changed."""
    import torch

    return {
        name: tensor.detach().contiguous().view(torch.uint8).to(torch.int64).sum().item()
        for name, tensor in base.state_dict().items()
    }
