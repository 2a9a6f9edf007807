"""How large the cache of a dataset will be, and how fast its disk must be."""

from __future__ import annotations

import shutil
from collections.abc import Sized
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ConflictError, ForgeError
from ...models.layers import text_attribute, unwrap
from ...models.truncation import truncated_layers
from .room import reserve_of

if TYPE_CHECKING:
    import torch
    from torch import nn

_GB = 2**30


@dataclass(frozen=True)
class CacheSize:
    """What a `PrefixCache` will take.

    Args:
        tokens: of the dataset, without padding.
        bytes_per_token: the hidden size times the bytes of a number.
        total_gb: GiB for all of them.
        max_gb: GiB that the cache may take.
        free_gb: GiB that are free on its disk, without what is left free for checkpoints.
        prefix_flops_per_token: FLOPs that a token does not cost once it is cached: 2 per weight of the frozen layers
            that it passes (Kaplan et al. 2020, arXiv:2001.08361), attention scores aside.
    """

    tokens: int
    bytes_per_token: int
    total_gb: float
    max_gb: float
    free_gb: float
    prefix_flops_per_token: float

    @property
    def fits(self) -> bool:
        """Whether all of it will be cached."""
        return self.total_gb <= min(self.max_gb, self.free_gb)

    def break_even_gb_per_s(self, flop_per_s: float) -> float:
        """The speed of reading, in GiB/s, at which reading takes as long as computing; the cache pays above it.

        >>> size = CacheSize(10**7, 8192, 76.3, 100, 500, 2 * 3.5e9)  # half of an 8B model, 16 bits
        >>> f"{size.break_even_gb_per_s(200e12):.2f} GiB/s"
        '0.22 GiB/s'

        Args:
            flop_per_s: what the device really does on this model (not its data sheet).
        """
        return self.bytes_per_token * flop_per_s / self.prefix_flops_per_token / _GB

    def __str__(self) -> str:
        verdict = "all of it fits" if self.fits else f"{min(self.max_gb, self.free_gb) / self.total_gb:.0%} of it fits"
        return (
            f"{self.tokens:,} tokens x {self.bytes_per_token:,} bytes = {self.total_gb:.2f} GiB; {verdict} "
            f"(max_gb={self.max_gb:g}, {self.free_gb:.1f} GiB free)"
        )


def size_of(model: nn.Module, dataset: Any, *, path: Path, max_gb: float, dtype: torch.dtype | None) -> CacheSize:
    """See `PrefixCache.estimate`."""
    if truncated_layers(model) == 0:
        raise ConflictError("No layer of the model is frozen: call setup_lp_lora_style(model, freeze_ratio=0.5) first.")
    base: Any = unwrap(model)
    width = int(text_attribute(base.config, "hidden_size"))
    # The residual stream has the embeddings' dtype, whatever the layers multiply in.
    bytes_per_token = width * (dtype or base.get_input_embeddings().weight.dtype).itemsize
    tokens = int(dataset) if isinstance(dataset, Integral) else _count(dataset)
    if tokens < 1:
        raise ForgeError(f"The dataset has {tokens} tokens: give trainer.train_dataset, or how many tokens it has.")
    disk = shutil.disk_usage(next(p for p in (path, *path.resolve().parents) if p.exists()))
    return CacheSize(
        tokens=tokens,
        bytes_per_token=bytes_per_token,
        total_gb=tokens * bytes_per_token / _GB,
        max_gb=max_gb,
        free_gb=max(0, disk.free - reserve_of(disk.total)) / _GB,
        prefix_flops_per_token=_flops(model),
    )


def _count(dataset: Any) -> int:
    """The tokens that the decoder will see; of a preference pair, the prompt twice."""
    columns = getattr(dataset, "column_names", None)
    if columns is None and isinstance(dataset, Sized) and len(dataset) and isinstance(dataset[0], dict):  # type: ignore[index]
        columns = list(dataset[0])  # type: ignore[index]
    names = columns or ()
    if "prompt_ids" in names and "chosen_ids" in names:
        times = {"prompt_ids": 2, "chosen_ids": 1, "rejected_ids": 1}
    elif "input_ids" in names:
        times = {"input_ids": 1}
    else:
        raise ForgeError(
            f"The dataset has no token ids ({', '.join(names) or type(dataset).__name__}). Pass trainer.train_dataset "
            "of a trainer that has tokenised it, or the number of its tokens."
        )
    total = 0
    for row in dataset:
        mask = row.get("attention_mask")
        own = sum(mask) if mask is not None and "input_ids" in times else None
        total += own if own is not None else sum(count * len(row[name]) for name, count in times.items())
    return int(total)


def _flops(model: nn.Module) -> float:
    from ...models import training_flops

    return training_flops(model).prefix_per_token
