"""What hides gradients or parameters from a callback, refused before the first step."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NoReturn

from ..errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import TrainingArguments


def refuse_hidden_gradients(args: TrainingArguments, callback: str) -> None:
    """Raise where parameters or gradients are not those of the model that a callback is handed.

    Args:
        args: The trainer's arguments.
        callback: Who refuses.

    Raises:
        UnsupportedError: FSDP, DeepSpeed, or an optimizer that steps inside backward.
    """
    if args.fsdp or _is_on("ACCELERATE_USE_FSDP"):
        refuse(callback, "FSDP shards parameters and gradients over the processes", "Train with DDP (torchrun)")
    if args.deepspeed or _is_on("ACCELERATE_USE_DEEPSPEED"):
        refuse(callback, "DeepSpeed keeps parameters and gradients of its own", "Train with DDP (torchrun)")
    name = str(getattr(args.optim, "value", args.optim))
    if "lomo" in name or "layerwise" in name:
        refuse(callback, f"optim={name!r} steps inside backward, before any callback", 'Use optim="adamw_torch"')


def refuse(callback: str, why: str, remedy: str) -> NoReturn:
    """Raise UnsupportedError in one form."""
    raise UnsupportedError(f"{callback} cannot do its work here: {why}. {remedy}, or take it out of the callbacks.")


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")
