"""Which share of the LoRA weights moves at all, with the preset's callbacks (fp32 adapters) and without (bf16).

SFTTrainer and DPOTrainer cast the adapters of a quantised model to bf16, where an update below about 1/256 of a weight
is rounded away. Real weights (SmolLM2-135M in nf4), real conversations, on the CPU; one step is one row of 64 tokens.
`python -m benchmarks.adapter_precision` writes results/adapter_precision.jsonl.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from benchmarks.runner import Suite, main

STEPS, MAX_LENGTH = 10, 64
CELLS = tuple(
    {"method": method, "learning_rate": rate, "callbacks": callbacks, "steps": STEPS, "max_length": MAX_LENGTH}
    for method, rate in (("dpo", 5e-6), ("sft", 2e-4))
    for callbacks in (True, False)
)
SUITE = Suite("adapter_precision", "benchmarks.adapter_precision:measure", CELLS, timeout_s=900)


def measure(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train; return the share of the entries of lora_A and lora_B that differ from where they began."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOTrainer, SFTTrainer

    from forge import get_preset
    from forge.assets import smollm2

    class Snapshot(TrainerCallback):
        """The adapters as training finds them, after every cast."""

        def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
            self.before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    folder, snapshot, dpo = smollm2(), Snapshot(), settings["method"] == "dpo"
    with tempfile.TemporaryDirectory() as output:
        preset = get_preset(
            "qlora",
            model=folder,
            hardware="cpu",
            learning_rate=settings["learning_rate"],
            max_length=settings["max_length"],
            max_steps=settings["steps"],
            per_device_train_batch_size=1,
            gradient_accumulation_steps=1,
            save_strategy="no",
            logging_steps=1,
            output_dir=output,
        )
        trainer = (DPOTrainer if dpo else SFTTrainer)(
            model=AutoModelForCausalLM.from_pretrained(folder, **preset.model_kwargs()),
            args=preset.get_dpo_config() if dpo else preset.get_sft_config(),
            train_dataset=(_preferences if dpo else _conversations)(settings["steps"]),
            peft_config=preset.get_lora_config(),
            processing_class=AutoTokenizer.from_pretrained(folder),
            callbacks=[*(preset.get_callbacks() if settings["callbacks"] else []), snapshot],
        )
        trainer.train()
    shares = _moved(snapshot.before, dict(trainer.model.named_parameters()))
    log = trainer.state.log_history
    return {**shares, "losses": [round(entry["loss"], 4) for entry in log if "loss" in entry]}


def _moved(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"dtypes": sorted({str(p.dtype) for p in before.values()})}
    for kind in ("lora_A", "lora_B"):
        names = [name for name in before if kind in name]
        moved = sum((after[name] != before[name]).sum().item() for name in names)
        found[f"moved_{kind}"] = round(moved / sum(before[name].numel() for name in names), 5)
    return found


def _conversations(rows: int) -> Any:
    from datasets import Dataset

    from forge.assets import conversations

    return Dataset.from_dict({"messages": conversations(rows)})


def _preferences(rows: int) -> Any:
    """Chosen: the answer that was given; rejected: the one to another conversation."""
    from datasets import Dataset

    from forge.assets import conversations

    openings = [talk[:2] for talk in conversations(10 * rows) if len(talk) > 1 and len(talk[0]["content"]) < 80]
    return Dataset.from_list(
        [
            {"prompt": [question], "chosen": [answer], "rejected": [other[1]]}
            for (question, answer), other in pairwise(openings[: rows + 1])
        ]
    )


if __name__ == "__main__":
    sys.exit(main(SUITE))
