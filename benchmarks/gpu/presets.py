"""Every preset against TRL's own defaults, at the same micro-batch and length, through the real trainers.

"trl" is the shortest call that does the same thing: `SFTTrainer("folder")` or `DPOTrainer("folder")`, with
`peft_config=LoraConfig()` for adapters and `BitsAndBytesConfig(load_in_4bit=True)` for 4 bits. It is no equal of the
preset's work: TRL loads fp32 and PEFT's default adapts q and v at rank 8, the preset all linear layers at 16.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.gpu.models import checkpoint, make_tokenizer, preferences, texts

PRESETS = ("qlora", "lora", "sft", "dpo")


def cells(
    models: tuple[str, ...], *, sft: tuple[int, int], dpo: tuple[int, int], steps: tuple[int, int] = (3, 5)
) -> Iterator[dict[str, Any]]:
    """The cells, those of a pair next to each other.

    Args:
        models: names of shapes.
        sft: micro-batch and length of the supervised presets.
        dpo: the same of preference tuning, which has two sequences per row.
        steps: to warm up, and to time.
    """
    for model in models:
        for preset in PRESETS:
            micro, length = dpo if preset == "dpo" else sft
            for by in ("forge", "trl"):
                yield {
                    "group": "presets",
                    "model": model,
                    "preset": preset,
                    "by": by,
                    "micro_batch": micro,
                    "length": length,
                    "warm_up": steps[0],
                    "timed": steps[1],
                }


def measure(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train a few steps; return their time, tokens per second, memory and losses."""
    import time

    import torch
    from transformers import PrinterCallback

    from benchmarks.steps import GB, StepClock

    dpo, micro, length = settings["preset"] == "dpo", settings["micro_batch"], settings["length"]
    folder = checkpoint(settings["model"])
    begin = time.perf_counter()
    clock = StepClock(warm_up=settings["warm_up"], tokens=micro * length * (2 if dpo else 1))
    with tempfile.TemporaryDirectory() as output:
        common = {
            "output_dir": output,
            "max_steps": settings["warm_up"] + settings["timed"],
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": 1,
            "max_length": length,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        data = (preferences if dpo else texts)(micro * common["max_steps"], length=length)
        build = _by_forge if settings["by"] == "forge" else _by_trl
        trainer = build(settings["preset"], str(folder), common, train_dataset=data)
        trainer.add_callback(clock)
        trainer.remove_callback(PrinterCallback)
        loaded = time.perf_counter()
        load_peak = torch.cuda.max_memory_allocated() / GB if torch.cuda.is_available() else None
        trainer.train()
    parameters = list(trainer.model.parameters())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        **clock.result,
        "losses": [round(loss, 4) for loss in losses],
        "load_s": round(loaded - begin, 1),
        "load_peak_gb": load_peak and round(load_peak, 3),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "trainable_dtypes": sorted({str(p.dtype) for p in parameters if p.requires_grad}),
        "frozen_dtypes": sorted({str(p.dtype) for p in parameters if not p.requires_grad}),
        "optimizer": trainer.args.optim,
    }


def _by_forge(name: str, folder: str, common: dict[str, Any], **data: Any) -> Any:
    """The six lines that the README shows."""
    from transformers import AutoModelForCausalLM
    from trl import DPOTrainer, SFTTrainer

    from forge import get_preset

    preset = get_preset(name, model=folder, **common)
    model = AutoModelForCausalLM.from_pretrained(folder, **preset.model_kwargs())
    trainer, args = (DPOTrainer, preset.get_dpo_config()) if name == "dpo" else (SFTTrainer, preset.get_sft_config())
    return trainer(
        model=model,
        args=args,
        peft_config=preset.get_lora_config(),
        callbacks=preset.get_callbacks(),
        processing_class=make_tokenizer(),
        **data,
    )


def _by_trl(name: str, folder: str, common: dict[str, Any], **data: Any) -> Any:
    import torch
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    trainer, config = (DPOTrainer, DPOConfig) if name == "dpo" else (SFTTrainer, SFTConfig)
    return trainer(
        model=folder,
        args=config(**common, use_cpu=not torch.cuda.is_available()),
        quantization_config=BitsAndBytesConfig(load_in_4bit=True) if name == "qlora" else None,
        peft_config=None if name == "sft" else LoraConfig(),
        **data,
    )
