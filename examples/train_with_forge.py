"""Fine-tune a chat model with forge: the whole path, from a model id and conversations to a checked adapter.

    python examples/train_with_forge.py
    python examples/train_with_forge.py --model Qwen/Qwen2.5-7B-Instruct --data chats.jsonl --max-length 2048

`--data` is a JSON-lines, CSV or Parquet file, or the id of a data set on the hub: chats, ShareGPT, Alpaca, prompts and
completions, or plain text; without it, the conversations that come with the examples. The preset is QLoRA unless you
say otherwise. examples/evaluate_with_forge.py then compares the tuned model with its base.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTTrainer

from forge import (
    EMACallback,
    ForgeError,
    MonitorCallback,
    PreparedData,
    estimate_model_memory,
    get_preset,
    prepare_dataset,
    setup_lp_lora_style,
)
from forge.assets import conversations, smollm2

SMALL_RUN = {
    "max_steps": 16,
    "effective_batch_size": 8,
    "max_length": 128,
    "logging_steps": 4,
}  # minutes on two cores, not hours


def main() -> None:
    """Choose a preset, see what it needs, look at the data, train under watch, compare, save the average, reload."""
    options = parse_options()
    started = time.perf_counter()
    model_id = options.model or str(smollm2())
    overrides = {} if options.model or options.data else dict(SMALL_RUN)
    overrides |= {name: value for name in ("max_steps", "max_length") if (value := getattr(options, name))}

    preset = get_preset(options.preset, model=model_id, **overrides)
    preset.print_info()
    args = preset.get_sft_config()
    rows, length = args.per_device_train_batch_size, args.max_length
    tokenizer = AutoTokenizer.from_pretrained(model_id)
    data = load_data(options.data, tokenizer, length)
    data.report.print()
    data.preview(0).print()  # what the model will learn from the first sample
    held_out = data.validation
    watched = held_out.select(range(min(32, len(held_out))))  # the loss of all would take longer than the training

    frozen = {"freeze_ratio": options.freeze_ratio}
    estimate_model_memory(model_id, rows, length, preset=preset, ema="device", **frozen).print()

    model = AutoModelForCausalLM.from_pretrained(model_id, **preset.model_kwargs())

    args.output_dir = str(options.output)
    ema, monitor = EMACallback(), MonitorCallback(report_dir=options.output / "report", preset=preset)
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=watched,
        processing_class=tokenizer,
        peft_config=preset.get_lora_config(),
        callbacks=[*preset.get_callbacks(), ema, monitor],
    )
    if options.freeze_ratio:
        setup_lp_lora_style(trainer.model, **frozen).print()
    monitor.attach(trainer)

    questions = first_messages(watched)
    loss_before, replies_before = trainer.evaluate()["eval_loss"], replies(trainer.model, tokenizer, questions)
    trainer.train()
    ema.apply_ema(trainer.model)  # from here on the model is the average of its last steps
    loss_after, replies_after = trainer.evaluate()["eval_loss"], replies(trainer.model, tokenizer, questions)

    for question, before, after in zip(questions, replies_before, replies_after, strict=True):
        print(f"\nuser    {question}\nbefore  {before}\nafter   {after}")
    print(f"\nheld-out loss: {loss_before:.3f} before, {loss_after:.3f} after ({len(watched)} samples)")

    trainer.save_model(options.output)
    held_out.remove_columns(["input_ids", "labels"]).to_json(options.output / "held_out.jsonl")
    if preset.get_lora_config():
        check_reload(trainer.model, model_id, preset.model_kwargs(), tokenizer, options.output)
    print(f"report: {options.output / 'report' / 'report.html'}")
    print(f"saved in {options.output}; {time.perf_counter() - started:.0f} s, peak memory {peak_memory_gb():.2f} GiB")


def load_data(name: str | None, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> PreparedData:
    """What is learnt and what is held out, tokenised: 72 of the demo's conversations, a tenth of your own data."""
    # Four messages, so that a sample fits into the demo's length.
    chats = [{"messages": chat[:4]} for chat in conversations(limit=800) if len(chat) >= 4]
    try:
        return prepare_dataset(name or chats, tokenizer, max_length=max_length, validation=0.1 if name else 72)
    except ForgeError as error:
        raise SystemExit(f"error: {error}") from None


def first_messages(data: Dataset, count: int = 3) -> list[str]:
    """What the user says first in a few held-out conversations; none when the data are not conversations."""
    if "messages" not in data.column_names:
        return []
    return [row["messages"][0]["content"] for row in data.select(range(min(count, len(data))))]


@torch.no_grad()
def replies(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: list[str]) -> list[str]:
    """The model's greedy replies."""
    model.eval()
    answers = []
    for question in questions:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        output = model.generate(**prompt, max_new_tokens=32, do_sample=False)
        answers.append(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return answers


@torch.no_grad()
def check_reload(
    trained: PreTrainedModel, model_id: str, model_kwargs: dict, tokenizer: PreTrainedTokenizerBase, adapter: Path
) -> None:
    """Load base and adapter afresh; their logits must be those of the model that was trained, bit for bit."""
    base = AutoModelForCausalLM.from_pretrained(model_id, **model_kwargs)
    reloaded = PeftModel.from_pretrained(base, adapter).eval()
    inputs = tokenizer("How are you today?", return_tensors="pt").to(trained.device)
    same = torch.equal(trained.eval()(**inputs).logits, reloaded(**inputs).logits)
    print("reloaded adapter: logits " + ("identical" if same else "DIFFER"))
    if not same:
        raise SystemExit(1)


def peak_memory_gb() -> float:
    """Peak memory in GiB: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a hub id or a folder")
    parser.add_argument("--data", help="a JSON-lines file or the id of a data set")
    parser.add_argument("--preset", default="qlora", choices=["qlora", "lora", "sft"])
    parser.add_argument("--freeze-ratio", type=float, default=0.0, help="the share of the lowest layers to freeze")
    parser.add_argument("--output", type=Path, default=Path("outputs/train_with_forge"))
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--max-length", type=int)
    return parser.parse_args()


if __name__ == "__main__":
    main()
