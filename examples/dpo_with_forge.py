"""Preference tuning with forge: the human's reply is chosen, the model's own sample is rejected.

    python examples/dpo_with_forge.py
    python examples/dpo_with_forge.py --model Qwen/Qwen2.5-1.5B-Instruct --pairs 500

The pairs are made here: for the first messages of real conversations, the model answers as it stands, and what the
person really answered is preferred. The preset is DPO with LoRA on a 4-bit base; the base with its adapter switched off
is the reference, so that no second model is kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import DPOTrainer

from forge import get_preset
from forge.assets import conversations, smollm2


def main() -> None:
    """Make the pairs, train, and say how much more often the human's reply is preferred."""
    options = parse_options()
    set_seed(42)
    model_id = options.model or str(smollm2())

    preset = get_preset("dpo", model=model_id, precision="nf4", max_length=192, effective_batch_size=4, logging_steps=2)
    print(f"learning rate: {preset.explain('learning_rate')}")

    tokenizer = AutoTokenizer.from_pretrained(model_id)
    tokenizer.padding_side = "left"
    model = AutoModelForCausalLM.from_pretrained(model_id, **preset.model_kwargs())
    pairs = preference_pairs(model, tokenizer, options.pairs).train_test_split(test_size=0.25, seed=42)

    args = preset.get_dpo_config()
    args.output_dir = str(options.output)
    trainer = DPOTrainer(
        model=model,
        args=args,
        train_dataset=pairs["train"],
        eval_dataset=pairs["test"],
        processing_class=tokenizer,
        peft_config=preset.get_lora_config(),
        callbacks=preset.get_callbacks(),
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    trainer.save_model(options.output)
    for name in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies"):
        print(f"{name}: {before[name]:.4f} before, {after[name]:.4f} after")
    print(f"saved in {options.output}")


@torch.no_grad()
def preference_pairs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int) -> Dataset:
    """Rows of prompt, chosen (what the person said) and rejected (what the model samples now)."""
    chats = [chat for chat in conversations(limit=2000) if len(chat[1]["content"]) > 20][:count]
    rows = []
    for start in range(0, len(chats), 8):
        batch = chats[start : start + 8]
        prompts = tokenizer.apply_chat_template(
            [chat[:1] for chat in batch],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        ).to(model.device)
        outputs = model.generate(**prompts, max_new_tokens=32, do_sample=True, temperature=0.8)
        samples = tokenizer.batch_decode(outputs[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
        rows += [
            {
                "prompt": chat[:1],
                "chosen": [chat[1]],
                "rejected": [{"role": "assistant", "content": sample.strip()}],
            }
            for chat, sample in zip(batch, samples, strict=True)
        ]
    return Dataset.from_list(rows)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a hub id or a folder")
    parser.add_argument("--pairs", type=int, default=32, help="how many preference pairs to make")
    parser.add_argument("--output", type=Path, default=Path("outputs/dpo_with_forge"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
