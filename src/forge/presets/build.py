"""From the table of choices to the real objects of transformers, PEFT and TRL."""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from .. import compat
from ..errors import ConflictError, UnsupportedError
from ..hardware import Hardware
from ..models import ModelAnatomy
from .choice import Choice
from .names import TRAINING_OBJECTS, fields_by_object, owners
from .recipes import ONE_DEVICE

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, TrainingArguments

Choices = Mapping[str, Choice]

_INSTEAD = {
    "max_length": "a plain Trainer truncates nothing: pass max_length to your tokenizer, or use get_sft_config()",
    "packing": "only SFTTrainer packs: use get_sft_config()",
    "beta": "it belongs to DPO: use get_dpo_config()",
}


def training_kwargs(kind: str, choices: Choices) -> dict[str, Any]:
    """The arguments for `kind`, one of TRAINING_OBJECTS, under the names that the installed version has.

    Raises:
        UnsupportedError: The user set a field that this object does not have and none but its siblings have.
    """
    known = fields_by_object()[kind]
    for name, choice in choices.items():
        siblings = set(owners(name)) if choice.overridden else set()
        if name not in known and siblings and siblings <= set(TRAINING_OBJECTS):
            remedy = _INSTEAD.get(name, f"leave it out, or build a {' or '.join(sorted(siblings))}")
            raise UnsupportedError(f"{kind} has no field {name!r} (you set {name}={choice.value!r}): {remedy}.")
    return compat.checkpointing_names(_values(choices, known))


def build_training_args(kind: str, choices: Choices, hardware: Hardware) -> TrainingArguments:
    """TrainingArguments, SFTConfig or DPOConfig, checked against the machine and against the effective batch.

    Raises:
        UnsupportedError: This machine cannot run the preset's hardware profile, or a field does not exist here.
        ConflictError: The processes that transformers counts are not those that the batch was split over.
    """
    import transformers
    import trl

    kwargs = training_kwargs(kind, choices)
    if missing := hardware.missing_here():
        raise UnsupportedError(
            f"{kind}: {missing}, so transformers would refuse its arguments. To train here, build the preset with "
            'hardware="cpu", or leave hardware out to detect it. (Explaining, saving and estimating work anywhere.)'
        )
    args = getattr(trl if hasattr(trl, kind) else transformers, kind)(**kwargs)
    _check_batch(args, choices)
    return args


def _check_batch(args: TrainingArguments, choices: Choices) -> None:
    wanted = choices["effective_batch_size"].value
    processes = args.world_size * max(1, args.n_gpu)
    real = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    if real != wanted:
        raise ConflictError(
            f"The preset's effective batch is {wanted}, for world_size={choices['world_size'].value}; this run has "
            f"{args.world_size} processes with {max(1, args.n_gpu)} GPU each, which makes it {real}. Build the preset "
            f"with world_size={processes}, or make one GPU visible (CUDA_VISIBLE_DEVICES=0)."
        )


def build_bnb_config(choices: Choices) -> BitsAndBytesConfig | None:
    """The quantisation, None when the base is not quantised."""
    if not (_value(choices, "load_in_4bit") or _value(choices, "load_in_8bit")):
        return None
    import torch
    from transformers import BitsAndBytesConfig

    kwargs = _values(choices, fields_by_object()["BitsAndBytesConfig"])
    for name in ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"):
        if isinstance(kwargs.get(name), str):
            kwargs[name] = getattr(torch, kwargs[name])
    return BitsAndBytesConfig(**kwargs)


def build_lora_config(choices: Choices) -> LoraConfig | None:
    """The adapter, None when all weights are trained."""
    if not choices["use_peft"].value:
        return None
    from peft import LoraConfig

    kwargs = _values(choices, fields_by_object()["LoraConfig"])
    kwargs["r"] = kwargs.pop("lora_r")
    return LoraConfig(**kwargs)


def build_model_kwargs(choices: Choices, hardware: Hardware, anatomy: ModelAnatomy | None) -> dict[str, Any]:
    """The arguments for `from_pretrained`."""
    import torch

    kwargs = _values(choices, fields_by_object()["from_pretrained"])
    kwargs["dtype"] = "auto" if kwargs["dtype"] == "auto" else getattr(torch, kwargs["dtype"])
    if kwargs["device_map"] == ONE_DEVICE:
        kwargs["device_map"] = _this_device(hardware)
    quantized_already = anatomy is not None and anatomy.quantization == choices["precision"].value
    if not quantized_already and (bnb := build_bnb_config(choices)) is not None:
        kwargs["quantization_config"] = bnb
    elif anatomy and anatomy.quantization == "mxfp4":
        # Packed MXFP4 weights have no backward; gpt-oss is trained from the unpacked ones.
        from transformers import Mxfp4Config

        kwargs["quantization_config"] = Mxfp4Config(dequantize=True)
    return {name: value for name, value in kwargs.items() if value is not None}


def _this_device(hardware: Hardware) -> dict[str, str | int] | None:
    """Where this process's model goes; sharded by FSDP or DeepSpeed, the launcher decides."""
    if any(os.environ.get(name) == "true" for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")):
        return None
    return {"": int(os.environ.get("LOCAL_RANK", "0")) if hardware.device == "cuda" else "cpu"}


def _values(choices: Choices, names: Collection[str]) -> dict[str, Any]:
    """Copies: what a caller does to the object that it gets must not change the preset."""
    return {name: copy.deepcopy(choice.value) for name, choice in choices.items() if name in names}


def _value(choices: Choices, name: str) -> Any:
    return choices[name].value if name in choices else None
