"""Evaluating on real weights: what a batch changes and saves, and whether a short training shows.

`batching`: SmolLM2-135M in float32 answers the same 64 questions of real conversations, one at a time and in batches;
`differing` counts the answers that are not those of the batches of one, `of_single` is the time as a share of theirs.
`tuned`: LoRA by forge's preset on the conversations, with 64 samples held out by content; then base and tuned model on
them: held-out loss, BERTScore F1 (all-MiniLM-L6-v2, its last layer), what a paired bootstrap says of the difference,
and the first answers. `python -m benchmarks.evaluation` writes results/evaluation.jsonl.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from benchmarks.runner import Suite, main

SAMPLES, NEW_TOKENS, LENGTH, THREADS = 64, 48, 128, 1
CELLS = (
    {"what": "batching", "samples": SAMPLES, "new_tokens": NEW_TOKENS, "threads": THREADS},
    *({"what": "tuned", "steps": steps, "samples": SAMPLES, "seed": 0, "threads": 2} for steps in (16, 64)),
)
SUITE = Suite("evaluation", "benchmarks.evaluation:measure", CELLS, timeout_s=2400)


def measure(settings: Mapping[str, Any]) -> dict[str, Any]:
    """One cell."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from forge.assets import smollm2

    torch.set_num_threads(settings["threads"])
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    return {"batching": batching, "tuned": tuned}[settings["what"]](settings, model, tokenizer)


def batching(settings: Mapping[str, Any], model: Any, tokenizer: Any) -> dict[str, Any]:
    """The same questions in batches of several sizes."""
    from forge.assets import conversations
    from forge.evaluation.generation import generate

    long = [chat for chat in conversations() if len(chat) >= 6][: settings["samples"]]
    prompts = [chat[: 1 + 2 * (place % 3)] for place, chat in enumerate(long)]
    found: dict[str, Any] = {}
    answers, seconds = {}, {}
    for size in (1, 4, 16, 64):
        began = time.perf_counter()
        answers[size] = generate(model, tokenizer, prompts, max_new_tokens=settings["new_tokens"], batch_size=size)
        seconds[size] = time.perf_counter() - began
        found[f"batch_{size}"] = {
            "differing": sum(one != other for one, other in zip(answers[size], answers[1], strict=True)),
            "of_single": seconds[size] / seconds[1],
            "answers_per_s": len(prompts) / seconds[size],
        }
    return found | {"cut": sum(one.cut for one in answers[1]), "distinct": len({one.text for one in answers[1]})}


def tuned(settings: Mapping[str, Any], model: Any, tokenizer: Any) -> dict[str, Any]:
    """Train, then judge base and tuned model alike."""
    from trl import SFTTrainer

    from forge import BertScore, compare_results, evaluate_model, get_preset, prepare_dataset
    from forge.assets import conversations, minilm, smollm2

    chats = [{"messages": chat[:4]} for chat in conversations() if len(chat) >= 4]
    # Some more than are asked: of a few nothing is left to learn after max_length.
    data = prepare_dataset(chats, tokenizer, max_length=LENGTH, validation=settings["samples"] + 8)
    preset = get_preset(
        "lora", model=str(smollm2()), hardware="cpu", max_steps=settings["steps"], effective_batch_size=8,
        max_length=LENGTH, seed=settings["seed"],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        args = preset.get_sft_config()
        args.output_dir, args.save_strategy, args.report_to = folder, "no", []
        trainer = SFTTrainer(
            model, args=args, train_dataset=data.train, processing_class=tokenizer,
            peft_config=preset.get_lora_config(), callbacks=preset.get_callbacks(),
        )  # fmt: skip
        began = time.perf_counter()
        trainer.train()
        training_s = time.perf_counter() - began
    encoder = BertScore(minilm(), num_layers=6)
    began = time.perf_counter()
    options: dict[str, Any] = {"bert_score": encoder, "max_new_tokens": NEW_TOKENS, "batch_size": 16, "progress": False}
    options["max_eval_samples"] = settings["samples"]
    with trainer.model.disable_adapter():
        base = evaluate_model(trainer.model, tokenizer, data, name="base", **options)
    after = evaluate_model(trainer.model, tokenizer, data, name="tuned", **options)
    compared = compare_results(base, after)
    return {
        "training_s": training_s,
        "evaluation_s": time.perf_counter() - began,
        "learning_rate": args.learning_rate,
        "learnt_tokens": sum(base.loss.tokens),
        "base": base.figures(),
        "tuned": after.figures(),
        "conclusions": compared.conclusions(),
        "answers": [
            [one.question, one.reference, one.answer, other.answer]
            for one, other in zip(base.answered[:5], after.answered[:5], strict=True)
        ],
    }


if __name__ == "__main__":
    sys.exit(main(SUITE))
