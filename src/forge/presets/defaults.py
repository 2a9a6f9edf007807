"""What the installed classes do when a preset says nothing."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from typing import Any

from .names import ALIASES


def default_of(owner: str, name: str) -> Any:
    """The default of a field, under whichever of its names the installed version has; enums by their value.

    Args:
        owner: The name of the class: "TrainingArguments", "SFTConfig", "DPOConfig", "LoraConfig", "BitsAndBytesConfig".
        name: The field, as a preset calls it.
    """
    import peft
    import transformers
    import trl

    cls = next((getattr(module, owner) for module in (transformers, peft, trl) if hasattr(module, owner)), None)
    if cls is None:  # from_pretrained
        return None
    if owner == "BitsAndBytesConfig":
        return inspect.signature(cls.__init__).parameters[name].default
    older = {new: old for old, new in ALIASES.items()}
    found = [f for f in fields(cls) if f.name in (name, older.get(name))]
    values = [f.default_factory() if f.default_factory is not MISSING else f.default for f in found]
    # Where an option stands under its old and its new name, the default is the one that is set.
    value = next((value for value in values if value is not None), None)
    return getattr(value, "value", value)
