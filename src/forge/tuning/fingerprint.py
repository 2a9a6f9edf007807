"""What data and weights are, in a few letters: to tell whether a run that goes on is still the same."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

_WEIGHTS = {".safetensors", ".bin", ".gguf", ".pt"}
_SAMPLES, _BLOCK = 64, 4096
# What a trainer learns from: tokens and labels, or the texts of preferences, which it tokenises itself.
_LEARNT = ("input_ids", "labels", "prompt", "chosen", "rejected")


def fingerprint_of(rows: Dataset) -> str:
    """A digest of what is learnt from prepared rows, in their order.

    >>> from datasets import Dataset
    >>> one = Dataset.from_dict({"input_ids": [[1, 2], [3]], "labels": [[1, 2], [3]]})
    >>> fingerprint_of(one) == fingerprint_of(one.select([1, 0]))
    False

    Args:
        rows: what `prepare_dataset` made.
    """
    import xxhash

    tokens = "input_ids" in rows.column_names
    columns = [name for name in (_LEARNT[:2] if tokens else _LEARNT[2:]) if name in rows.column_names]
    digest = xxhash.xxh3_128(f"{columns} {len(rows)}".encode())
    for batch in rows.select_columns(columns).iter(1000):
        for name in columns:
            digest.update(_numbers(batch[name]) if tokens else json.dumps(batch[name], sort_keys=True).encode())
    return str(digest.hexdigest())


def weights_of(model: Any, config: Any) -> str | None:
    """A digest of samples of a model's weights: of other weights it is another one, though not every byte is read.

    Args:
        model: an id, a folder or a live model.
        config: the model's; of an id it knows the commit.
    """
    import xxhash

    digest = xxhash.xxh3_64()
    if not isinstance(model, (str, os.PathLike)):
        for name, tensor in model.state_dict().items():
            step = max(1, tensor.numel() // _SAMPLES)
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().reshape(-1)[::step].float().cpu().numpy().tobytes())
        return str(digest.hexdigest())
    if not Path(model).is_dir():
        return getattr(config, "_commit_hash", None)
    for path in sorted(path for path in Path(model).iterdir() if path.suffix in _WEIGHTS):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for block in range(_SAMPLES):
                file.seek(block * size // _SAMPLES)
                digest.update(file.read(_BLOCK))
    return str(digest.hexdigest())


def _numbers(rows: list[list[int]]) -> Any:
    """The rows' lengths and numbers, one after the other."""
    from itertools import chain

    import numpy as np

    return np.fromiter(chain(map(len, rows), chain.from_iterable(rows)), dtype=np.int64)
