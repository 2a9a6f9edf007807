"""The guide's script, step for step, on real weights with the plain Trainer.

The only edits to it: the imports, `processing_class`, the data collator, the padding token (the guide's `pad = eos`
would mask every end of turn), `hardware="cpu"`, so that the test does the same on every machine, and the length: the
guide pads every row to 2,048 tokens, which takes many minutes on a CPU and is done in the long tests.
"""

import json

import pytest
import torch
from datasets import load_dataset
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, Trainer

from forge import (
    EMACallback,
    MonitorCallback,
    estimate_model_memory,
    get_memory_savings_estimate,
    get_preset,
    setup_lp_lora_style,
)

# What the guide's own steps cause, whatever the preset says; nothing else may warn.
OF_THE_GUIDE = (
    "use_reentrant parameter should be passed",  # prepare_model_for_kbit_training does not say which kind
    "The tokenizer has new PAD/BOS/EOS tokens",  # the script sets the padding token
    "decay=0.999 spans more than this run",  # and so it does: three steps
    "MonitorCallback has no trainer",  # the guide knows no attach()
)


@pytest.mark.parametrize("max_length", [128, pytest.param(2048, marks=pytest.mark.long)])
def test_train_with_forge(smollm2, conversations, tmp_path, capsys, warning_recorder, max_length):
    model_name, output_dir = str(smollm2), tmp_path / "output"
    files = write_dataset(tmp_path, conversations)

    # 1. The preset
    preset = get_preset("qlora", hardware="cpu", lora_r=32, lora_alpha=64, learning_rate=2e-4, num_train_epochs=3)
    preset.print_info()
    assert "lora_alpha" in capsys.readouterr().out

    # 1b. What it needs
    memory = estimate_model_memory(model_name, batch_size=1, sequence_length=max_length, preset=preset)
    assert 0 < memory["parameters_gb"] < memory["total_estimated_gb"]

    # 2. The model
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    tokenizer.pad_token = "<|endoftext|>"
    model = AutoModelForCausalLM.from_pretrained(
        model_name, quantization_config=preset.get_bnb_config(), device_map="auto"
    )

    # 3. Its preparation
    model = prepare_model_for_kbit_training(model)
    model = get_peft_model(model, preset.get_lora_config())

    # 3b. LP-LoRA
    setup_lp_lora_style(model, freeze_ratio=0.5)
    savings = get_memory_savings_estimate(model)
    assert savings["gradient_saved_gb"] > 0
    assert savings["frozen_parameters"] == savings["trainable_parameters"]

    # 4. The data
    dataset = load_dataset("json", data_files=files)

    def tokenize(example):
        return tokenizer(example["text"], truncation=True, max_length=max_length, padding="max_length")

    dataset = dataset.map(tokenize, batched=True, remove_columns=["text"])

    # 5. to 7. The trainer
    training_args = preset.get_training_args()
    training_args.output_dir = str(output_dir)
    training_args.disable_tqdm = True
    ema = EMACallback(decay=0.999)
    monitor = MonitorCallback(check_gradients=True)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=dataset["train"],
        eval_dataset=dataset.get("validation"),
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[*preset.get_callbacks(), ema, monitor],
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    raw = {name: value.clone() for name, value in model.named_parameters() if value.requires_grad}
    after = trainer.evaluate()["eval_loss"]
    assert trainer.state.global_step == 3
    assert after < before  # a little: of such an average 99.7% are still the weights it began with

    # 7b. The average
    ema.apply_ema(model)
    assert trainer.evaluate()["eval_loss"] == after
    assert any(not torch.equal(value, raw[name]) for name, value in model.named_parameters() if name in raw)
    assert monitor.events == []
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry["grad_norm/lora_B"] > 0 and entry["update_ratio"] > 0 for entry in logged)

    # 8. Saving, and what a user does next
    model.save_pretrained(output_dir / "final_model")
    tokenizer.save_pretrained(output_dir / "final_model")
    base = AutoModelForCausalLM.from_pretrained(
        model_name, quantization_config=preset.get_bnb_config(), device_map="auto"
    )
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    reloaded = PeftModel.from_pretrained(base, output_dir / "final_model").eval()
    inputs = tokenizer("How are you today?", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).logits, reloaded(**inputs).logits)

    foreign = [str(warning) for warning in warning_recorder.foreign]
    assert not [text for text in foreign if not any(part in text for part in OF_THE_GUIDE)], foreign


def write_dataset(folder, conversations):
    """A text column, as the guide's tokenise function expects, with a validation split."""
    turns = ["\n".join(f"{m['role']}: {m['content']}" for m in chat[:4]) for chat in conversations[:3]]
    files = {}
    for split, texts in {"train": turns[:2], "validation": turns[2:]}.items():
        files[split] = str(folder / f"{split}.jsonl")
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return files
