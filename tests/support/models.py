"""Tiny models that fit the tiny tokenizer, and tiny trainers of the three standard kinds around them.

PEFT and TRL are imported where they are used: a killed and resumed program imports this module each time it starts.
"""

from pathlib import Path
from typing import Any

import torch
import transformers

from support import data
from support.families import tiny_config
from support.tokenizer import tiny_tokenizer

VOCAB_SIZE = 256
_SPECIAL_IDS = ("image_token_id", "image_token_index", "video_token_id", "boi_token_index", "eoi_token_index")


def text_model(family: str = "llama", *, layers: int = 4, seed: int = 0) -> transformers.PreTrainedModel:
    """Make a tiny model of the family with a vocabulary for `tiny_tokenizer` and this many decoder layers."""
    config = tiny_config(family)
    text = config.get_text_config()
    text.vocab_size, text.num_hidden_layers = VOCAB_SIZE, layers
    for name in ("layer_types", "mlp_layer_types"):
        if kinds := getattr(text, name, None):
            setattr(text, name, [kinds[index % len(kinds)] for index in range(layers)])
    for index, name in enumerate(_SPECIAL_IDS):  # those of the tokenizer end at 245
        if getattr(config, name, None) is not None:
            setattr(config, name, VOCAB_SIZE - 1 - index)
    multimodal = hasattr(config, "vision_config")
    auto = transformers.AutoModelForImageTextToText if multimodal else transformers.AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return auto.from_config(config)


def lora(**changes: Any) -> Any:
    """Make a small LoraConfig over all linear layers."""
    import peft

    return peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes})


def nf4_model(folder: Path, family: str = "llama", **changes: Any) -> transformers.PreTrainedModel:
    """Save a tiny model to the folder and load it in nf4 on the CPU."""
    text_model(family, **changes).save_pretrained(folder)
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, device_map={"": "cpu"}
    )


def checkpointing(enabled: bool = True, *, use_reentrant: bool | None = None) -> dict[str, Any]:
    """Return the trainer arguments that switch checkpointing on or off, by the name that this transformers wants."""
    fields = transformers.TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    kind = {} if use_reentrant is None else {f"{name}_kwargs": {"use_reentrant": use_reentrant}}
    return {name: enabled, **kind}


def trainer(
    kind: str,
    output_dir: Path,
    model: Any = None,
    *,
    rows: int = 16,
    trainer_options: dict[str, Any] | None = None,
    **args: Any,
) -> transformers.Trainer:
    """Make a "plain", "sft" or "dpo" trainer that runs on the CPU in fp32 without checkpointing or reports.

    Args:
        kind: which trainer.
        output_dir: where it writes.
        model: by default a tiny llama; without `peft_config` a DPO run gets a reference copy.
        rows: how many training samples.
        trainer_options: more arguments of the trainer (`peft_config`, `callbacks`, `train_dataset`, ...).
        args: fields of its arguments object.
    """
    model = text_model() if model is None else model
    common = {
        "use_cpu": True,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        **checkpointing(False),
        **({} if kind == "plain" else {"bf16": False, "max_length": 64}),
        **args,
    }
    make, arguments, rows_of = _kind(kind)
    options = {"processing_class": tiny_tokenizer(), **(trainer_options or {})}
    options.setdefault("train_dataset", rows_of(rows))
    if kind == "dpo" and options.get("peft_config") is None and not hasattr(model, "peft_config"):
        options.setdefault("ref_model", _copy(model))
    return make(model=model, args=arguments(str(output_dir), **common), **options)


def _kind(kind: str) -> tuple[Any, Any, Any]:
    if kind == "plain":
        return transformers.Trainer, transformers.TrainingArguments, data.lm_tokens
    import trl

    return {
        "sft": (trl.SFTTrainer, trl.SFTConfig, data.sft_messages),
        "dpo": (trl.DPOTrainer, trl.DPOConfig, data.dpo_preferences),
    }[kind]


def _copy(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    return copy
