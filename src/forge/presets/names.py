"""Which names a preset answers to, and which Hugging Face object each belongs to."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache
from typing import Any

from ..errors import ConflictError, UnknownNameError

OWN_NAMES = {
    "precision": "the base weights: nf4, fp4, int8, bf16, fp16 or fp32",
    "use_peft": "LoRA adapters (True) or all weights (False)",
    "effective_batch_size": "sequences per optimizer step, over all processes",
    "world_size": "processes that share an optimizer step",
}
MODEL_KWARGS = ("dtype", "attn_implementation", "device_map", "revision", "trust_remote_code")
ALIASES = {
    "r": "lora_r",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
"""Names of one thing: LoraConfig's `r` is too short to stand alone, and transformers 5 renamed its checkpointing."""

GONE = {
    "warmup_ratio": "warmup_steps (a float below 1 is a share of all steps)",
    "evaluation_strategy": "eval_strategy",
    "group_by_length": 'train_sampling_strategy="group_by_length"',
    "no_cuda": "use_cpu",
    "max_seq_length": "max_length",
    "max_prompt_length": "max_length",
    "overwrite_output_dir": "nothing: transformers 5 always writes into output_dir",
    "logging_dir": "output_dir, or your tracker's own environment variable",
    "save_safetensors": "nothing: transformers 5 always saves safetensors",
    "rpo_alpha": 'loss_type=["sigmoid", "sft"] with loss_weights',
    "tokenizer": "the trainer's processing_class",
    "batch_size": "per_device_train_batch_size or effective_batch_size",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "rank": "lora_r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "torch_dtype": "dtype",
    "epoch": "num_train_epochs",
    "lora_rank": "lora_r",
    "micro_batch_size": "per_device_train_batch_size",
    "context_length": "max_length",
    "max_tokens": "max_length",
    "warmup": "warmup_steps",
    "scheduler": "lr_scheduler_type",
    "neftune": "neftune_noise_alpha",
    "attn_impl": "attn_implementation",
    "use_flash_attention_2": 'attn_implementation="flash_attention_2"',
    "peft_config": "LoraConfig's own fields (lora_r, target_modules, ...)",
    "quantization_config": "precision, and bitsandbytes' own fields (bnb_4bit_use_double_quant, ...)",
    "cache_dir": "the environment variable HF_HOME",
    "max_memory": "from_pretrained's own argument, beside **preset.model_kwargs()",
}
"""Names that people still type, and what to type instead."""

TRAINING_OBJECTS = ("TrainingArguments", "SFTConfig", "DPOConfig")


@lru_cache(maxsize=1)
def fields_by_object() -> dict[str, frozenset[str]]:
    """The field names of the objects that a preset produces, as installed; `lora_r` stands for LoraConfig's `r`."""
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, TrainingArguments
    from trl import DPOConfig, SFTConfig

    found = {c.__name__: frozenset(f.name for f in fields(c)) for c in (TrainingArguments, SFTConfig, DPOConfig)}
    found["LoraConfig"] = frozenset({f.name for f in fields(LoraConfig)} - {"r"} | {"lora_r"})
    bnb = inspect.signature(BitsAndBytesConfig.__init__).parameters
    found["BitsAndBytesConfig"] = frozenset(set(bnb) - {"self", "kwargs"})
    found["from_pretrained"] = frozenset(MODEL_KWARGS)
    # Under whichever of its two names transformers knows checkpointing, a preset knows the newer.
    for name in TRAINING_OBJECTS:
        found[name] |= {ALIASES[old] for old in found[name] & ALIASES.keys()}
    return found


def owners(name: str) -> tuple[str, ...]:
    """The objects that have a field of this name; none for forge's own names and for unknown ones."""
    return tuple(owner for owner, names in fields_by_object().items() if name in names)


def canonical(overrides: Mapping[str, Any], recipe_names: frozenset[str]) -> dict[str, Any]:
    """The overrides under the names that a preset uses, dtypes by name.

    Args:
        overrides: As the user typed them.
        recipe_names: Names that need no looking up in the installed libraries.

    Raises:
        UnknownNameError: A name that none of the objects has; the message names the nearest.
        ConflictError: Two names of one thing, with different values.
    """
    found: dict[str, Any] = {}
    for typed, value in overrides.items():
        name = ALIASES.get(typed, typed)
        if name not in recipe_names and name not in OWN_NAMES and not owners(name):
            raise _unknown(typed)
        plain = _plain_dtype(value)
        if name in found and found[name] != plain:
            raise ConflictError(f"{name} is given twice, as {found[name]!r} and {plain!r}: leave one of them out.")
        found[name] = plain
    return found


def _unknown(name: str) -> UnknownNameError:
    if name in GONE:
        return UnknownNameError(f"{name!r} is not a name that transformers 5, TRL or PEFT know. Use {GONE[name]}.")
    known = set().union(*fields_by_object().values(), OWN_NAMES, ALIASES)
    return UnknownNameError.among("setting", name, known)


def _plain_dtype(value: Any) -> Any:
    """torch.bfloat16 -> "bfloat16", by its looks: torch need not be imported to handle a string."""
    text = str(value)
    return text.removeprefix("torch.") if type(value).__name__ == "dtype" and text.startswith("torch.") else value
