"""LoRA targets that the user names, held against the model: a misspelt one must not pass in silence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import ForgeError, UnknownNameError
from ..models import ModelAnatomy

PEFT_SHORTHANDS = ("all-linear",)


def check_targets(anatomy: ModelAnatomy, overrides: Mapping[str, Any]) -> None:
    """Refuse `target_modules` and `layers_to_transform` that match nothing in this model.

    PEFT raises only when nothing at all matches, and trains what is left when one name of a list is misspelt.

    Raises:
        UnknownNameError: A name in a list that no linear layer of the model has; the message names the nearest.
        ForgeError: A pattern that matches none, an empty list, or layers that the model does not have.
    """
    if "target_modules" in overrides:
        _check_modules(anatomy, overrides["target_modules"])
    layers = overrides.get("layers_to_transform")
    chosen = [layers] if isinstance(layers, int) else layers or ()
    if outside := [layer for layer in chosen if not 0 <= layer < anatomy.num_hidden_layers]:
        raise ForgeError(
            f"layers_to_transform={layers!r}: the model has layers 0 to {anatomy.num_hidden_layers - 1}, not {outside}."
        )


def _check_modules(anatomy: ModelAnatomy, targets: Any) -> None:
    if isinstance(targets, str):
        if targets in PEFT_SHORTHANDS:
            return
        # A string is a regular expression for PEFT; it is held against the names of every layer.
        names = [n.replace("*", str(i)) for n in anatomy.linear_layers for i in range(anatomy.num_hidden_layers)]
        if not any(re.fullmatch(targets, name) for name in names):
            hint = f" Did you mean target_modules=[{targets!r}]?" if _known(anatomy, targets) else ""
            raise ForgeError(
                f"target_modules={targets!r} is a regular expression that matches no linear layer of this "
                f"{anatomy.model_type}.{hint}"
            )
        return
    if not targets:
        raise ForgeError(f"target_modules={targets!r}: nothing would be adapted. Leave it out for every linear layer.")
    for target in targets:
        if not _known(anatomy, target):
            last = {name.rpartition(".")[2] for name in anatomy.linear_layers}
            raise UnknownNameError.among(f"linear layer of this {anatomy.model_type}", target, last)


def _known(anatomy: ModelAnatomy, target: str) -> bool:
    """Whether PEFT would find the name: it is a module's whole name, or the end of it."""
    plain = ".".join("*" if part.isdigit() else part for part in target.split("."))
    # A layer may be named through another wrapper; embeddings can be adapted although they are not linear layers.
    return target in ("embed_tokens", "wte") or any(
        name == plain or name.endswith(f".{plain}") for name in anatomy.linear_layers
    )
