"""The preset and the trainer of a cell of the memory group, made as a user would make them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.gpu.models import make_tokenizer, preferences, texts

Settings = Mapping[str, Any]
STEPS = 3
_PRESET = {"full": "sft", "full-bf16": "sft", "lora": "lora", "dora": "lora"}  # the others are "qlora"
_METHOD: dict[str, dict[str, Any]] = {
    "full": {"use_peft": False},
    "full-bf16": {"use_peft": False, "dtype": "bfloat16"},
    "dora": {"use_dora": True},
    "nf4": {"precision": "nf4"},
    "nf4-single": {"precision": "nf4", "bnb_4bit_use_double_quant": False},
    "nf4-dora": {"precision": "nf4", "use_dora": True},
    "fp4": {"precision": "fp4"},
    "int8": {"precision": "int8"},
}
_CHECKPOINTING: dict[str, dict[str, Any]] = {
    "off": {"activation_checkpointing": False},
    "reentrant": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
    "non_reentrant": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
}
_RENAMED = {
    "attention": "attn_implementation",
    "dropout": "lora_dropout",
    "accumulation": "gradient_accumulation_steps",
}


def preset_of(settings: Settings, model: Any, output: str, **hardware: str) -> Any:
    """The preset with what the cell says, for this machine or for the `hardware` named.

    Args:
        settings: of the cell.
        model: a folder or a config.
        output: the folder for what training writes.
        **hardware: `hardware`, a profile.
    """
    from forge import get_preset

    name = "dpo" if settings["trainer"] == "dpo" else _PRESET.get(settings["method"], "qlora")
    overrides: dict[str, Any] = {
        "output_dir": output,
        "max_steps": STEPS,
        "per_device_train_batch_size": settings["rows"],
        "gradient_accumulation_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",  # so that the longest row is in every batch
    }
    if settings["trainer"] != "plain":
        overrides["max_length"] = settings["length"]
    overrides |= _METHOD.get(settings["method"], {})
    overrides |= _CHECKPOINTING.get(settings.get("checkpointing", ""), {})
    overrides |= {theirs: settings[mine] for mine, theirs in _RENAMED.items() if mine in settings}
    overrides |= {name: settings[name] for name in ("optim", "lora_r") if name in settings}
    if settings.get("data") == "packed":
        overrides["packing"] = True
    if "reference" in settings:
        overrides["precompute_ref_log_probs"] = settings["reference"] == "precomputed"
    return get_preset(name, model=model, **hardware, **overrides)


def load(preset: Any, folder: str) -> Any:
    """The model, as the preset wants it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **preset.model_kwargs())


def trainer_of(settings: Settings, preset: Any, model: Any, *callbacks: Any) -> Any:
    """The standard trainer with the preset's arguments and the cell's data."""
    from transformers import PrinterCallback

    from forge import EMACallback

    chosen = [*preset.get_callbacks(), *callbacks]
    if "ema" in settings:
        chosen.append(EMACallback(device="cpu" if settings["ema"] == "cpu" else None, half_life_steps=STEPS))
    build = _plain if settings["trainer"] == "plain" else _trl
    trainer = build(settings, preset, model, callbacks=chosen, processing_class=make_tokenizer())
    trainer.remove_callback(PrinterCallback)
    return trainer


def _trl(settings: Settings, preset: Any, model: Any, **common: Any) -> Any:
    from trl import DPOTrainer, SFTTrainer

    dpo = settings["trainer"] == "dpo"
    trainer, args = (DPOTrainer, preset.get_dpo_config()) if dpo else (SFTTrainer, preset.get_sft_config())
    return trainer(
        model=model, args=args, peft_config=preset.get_lora_config(), train_dataset=_data(settings), **common
    )


def _plain(settings: Settings, preset: Any, model: Any, **common: Any) -> Any:
    from peft import get_peft_model
    from transformers import DataCollatorForLanguageModeling, Trainer

    if (adapter := preset.get_lora_config()) is not None:
        model = get_peft_model(model, adapter)
    tokenizer = common["processing_class"]

    def tokenize(row: dict[str, str]) -> dict[str, Any]:
        return dict(tokenizer(row["text"], truncation=True, max_length=settings["length"], return_token_type_ids=False))

    data = _data(settings).map(tokenize, remove_columns="text")
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return Trainer(model=model, args=preset.get_training_args(), train_dataset=data, data_collator=collator, **common)


def _data(settings: Settings) -> Any:
    """Rows of the length asked for; "padded": every second one is half as long; "packed": four texts make a row."""
    from datasets import concatenate_datasets

    length, count = settings["length"], settings["rows"] * settings.get("accumulation", 1) * STEPS
    make = preferences if settings["trainer"] == "dpo" else texts
    if settings.get("data") == "packed":
        return make(4 * count, length=length // 4 - 1)  # SFTTrainer ends each with a token of its own
    if settings.get("data") != "padded":
        return make(count, length=length)
    whole, half = make(count, length=length), make(count, length=length // 2)
    return concatenate_datasets([whole.select([i]) if i % 2 == 0 else half.select([i]) for i in range(count)])


def said_beside_the_preset(settings: Settings) -> dict[str, Any]:
    """What the estimate must be told that no preset says."""
    said = {name: settings[name] for name in ("trainer", "ema", "reference", "frozen_layers") if name in settings}
    return said | ({"padded": True} if settings.get("data") == "padded" else {})
