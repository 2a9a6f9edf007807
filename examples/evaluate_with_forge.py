"""Is the tuned model better than its base? Held-out loss, BERTScore with its interval, and the answers side by side.

    python examples/evaluate_with_forge.py
    python examples/evaluate_with_forge.py --model Qwen/Qwen2.5-7B-Instruct --adapter my-adapter --data test.jsonl

Both are asked the same questions: those that train_with_forge.py held out, unless `--data` names others. `--judge`
names an LLM judge; without it nothing is sent anywhere.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from forge import BertScore, compare_results, evaluate_model, get_preset
from forge.assets import minilm, smollm2


def main() -> None:
    """Load, ask the base and the tuned model, compare, save a report."""
    options = parse_options()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("forge").setLevel(logging.INFO)
    started = time.perf_counter()
    model_id = options.model or str(smollm2())
    tokenizer = AutoTokenizer.from_pretrained(model_id)
    data = options.data or options.adapter / "held_out.jsonl"
    kwargs = get_preset("qlora" if options.quantized else "lora", model=model_id).model_kwargs()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_id, **kwargs), options.adapter)

    encoder = BertScore(options.encoder) if options.encoder else BertScore(minilm(), num_layers=6)
    wanted = {
        "bert_score": encoder,
        "judge": options.judge,
        "max_eval_samples": options.samples,
        "judge_samples": options.judge_samples,
        "max_new_tokens": options.max_new_tokens,
        "batch_size": options.batch_size,
    }
    with model.disable_adapter():
        base = evaluate_model(model, tokenizer, data, name="base", **wanted)
    tuned = evaluate_model(model, tokenizer, data, name="tuned", **wanted)

    found = compare_results(base, tuned)
    found.print()
    for before, after in list(zip(base.answered, tuned.answered, strict=True))[:3]:
        print(f"\nasked      {before.question}\nreference  {before.reference}")
        print(f"base       {before.answer}\ntuned      {after.answer}")
    print(f"\nreport: {found.save(options.output)}; {time.perf_counter() - started:.0f} s")


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a hub id or a folder")
    parser.add_argument("--adapter", type=Path, default=Path("outputs/train_with_forge"), help="its folder")
    parser.add_argument("--data", help="held-out data: a file or the id of a data set")
    parser.add_argument(
        "--quantized", action="store_true", help="load the base in 4 bits, as the preset qlora trains it"
    )
    parser.add_argument("--encoder", help="BERTScore's encoder: a hub id or a folder (all-MiniLM-L6-v2 without it)")
    parser.add_argument("--judge", help="openai, gemini, gigachat or local")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--judge-samples", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path("outputs/evaluate_with_forge"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
