"""One training step on the CPU in fp32 and in bf16: why the CPU profile computes in fp32.

SmolLM2-135M, 1 row of 32 and 4 rows of 128 tokens of real conversations, QLoRA and LoRA presets, through SFTTrainer. A
cell is ended after CAP_S: that, too, is an answer. All on one thread: two threads that share two busy cores with others
wait for each other, and took 47 s for a step that one did in 12.
`python -m benchmarks.cpu_dtypes` writes results/cpu_dtypes.jsonl.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from benchmarks.runner import Suite, main

CAP_S = 300
CELLS = tuple(
    {"preset": preset, "compute": compute, "rows": rows, "length": length, "warm_up": 1, "timed": 2, "threads": 1}
    for rows, length in ((1, 32), (4, 128))
    for preset in ("qlora", "lora")
    for compute in ("fp32", "bf16")
)
SUITE = Suite("cpu_dtypes", "benchmarks.cpu_dtypes:measure", CELLS, timeout_s=CAP_S)


def measure(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Time a few steps."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTTrainer

    from benchmarks.steps import StepClock
    from forge import get_preset
    from forge.assets import conversations, smollm2

    torch.set_num_threads(settings["threads"])
    folder, steps = smollm2(), settings["warm_up"] + settings["timed"]
    long = sorted(conversations(), key=lambda talk: -sum(len(m["content"]) for m in talk))
    clock = StepClock(warm_up=settings["warm_up"], tokens=settings["rows"] * settings["length"])
    with tempfile.TemporaryDirectory() as output:
        preset = get_preset(
            settings["preset"],
            model=folder,
            hardware="cpu",
            bf16=settings["compute"] == "bf16",
            max_length=settings["length"],
            max_steps=steps,
            per_device_train_batch_size=settings["rows"],
            gradient_accumulation_steps=1,
            save_strategy="no",
            logging_steps=1,
            output_dir=output,
        )
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder, **preset.model_kwargs()),
            args=preset.get_sft_config(),
            train_dataset=Dataset.from_dict({"messages": long[: settings["rows"] * steps]}),
            peft_config=preset.get_lora_config(),
            processing_class=AutoTokenizer.from_pretrained(folder),
            callbacks=[*preset.get_callbacks(), clock],
        )
        trainer.train()
    losses = [round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry]
    return {
        **{name: value for name, value in clock.result.items() if value is not None},
        "losses": losses,
        "base_dtype": str(trainer.model.get_base_model().get_input_embeddings().weight.dtype),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "mkldnn_bf16": torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    }


if __name__ == "__main__":
    sys.exit(main(SUITE))
