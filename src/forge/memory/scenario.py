"""What will run, as one value: the model's storage, what trains, the trainer's step, and the shape of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

TrainerKind = Literal["plain", "sft", "dpo"]
Checkpointing = Literal["off", "reentrant", "non_reentrant"]
Attention = Literal["sdpa", "eager", "flash"]
Reference = Literal["none", "adapter_off", "copy", "precomputed"]
Sharding = Literal["none", "ddp", "zero1", "zero2", "zero3", "fsdp"]


@dataclass(frozen=True)
class Scenario:
    """A training run, as far as memory depends on it; made from a preset or a live model by `describe.py`.

    Args:
        batch_size: rows in a micro-batch; of pairs under DPO.
        sequence_length: tokens in a row.
        device: "cuda" or "cpu": whose kernels and whose autocast.
        trainer: whose step: `Trainer`, `SFTTrainer` or `DPOTrainer`.
        dtype: of the base weights, by torch's name; None leaves a live model as it is.
        autocast: "bf16", "fp16" or None.
        quantization: the BitsAndBytesConfig for a base that is not packed yet, or None.
        peft_config: the adapter for a base that has none yet, or None.
        fp32_trainable: whether trainable parameters are cast to fp32, as presets do.
        attention: the kernel.
        flash_kernel: whether torch has a flash kernel for the GPU: from compute capability 8.0 on.
        checkpointing: of activations.
        optim: transformers' name of the optimizer.
        max_grad_norm: gradients are clipped to it where it is above 0.
        accumulation: micro-batches per optimizer step; two stand for any number above one.
        padded: rows differ in length, so that attention takes a mask.
        packed: rows are joined to one, without padding.
        reference: of DPO.
        ema: where the shadow of an exponential moving average lives, "none" without one.
        frozen_layers: how many of the lowest decoder layers neither train nor are visited by backward.
        prefix_cache: whether what those compute is read from a full `PrefixCache`, and none of them runs.
        offload_prefix: whether their weights have left the GPU.
        sharding: how `world_size` processes share the state.
        world_size: processes.
        settings: what else the trainer reads, by the names of its arguments.
    """

    batch_size: int = 1
    sequence_length: int = 512
    device: Literal["cuda", "cpu"] = "cuda"
    trainer: TrainerKind = "sft"
    dtype: str | None = "bfloat16"
    autocast: Literal["bf16", "fp16"] | None = "bf16"
    quantization: Any = None
    peft_config: Any = None
    fp32_trainable: bool = True
    attention: Attention = "sdpa"
    flash_kernel: bool = True
    checkpointing: Checkpointing = "off"
    optim: str = "adamw_torch_fused"
    max_grad_norm: float = 1.0
    accumulation: int = 1
    padded: bool = False
    packed: bool = False
    reference: Reference = "none"
    ema: Literal["none", "device", "cpu"] = "none"
    frozen_layers: int = 0
    prefix_cache: bool = False
    offload_prefix: bool = False
    sharding: Sharding = "none"
    world_size: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def rows(self) -> int:
        """Sequences in a forward pass: two for each pair."""
        return self.batch_size * (2 if self.trainer == "dpo" else 1)
