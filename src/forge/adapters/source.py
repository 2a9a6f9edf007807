"""Where a base's own values can be read again: a state dict, a model, a checkpoint in a folder or on the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ForgeError
from ..models.layers import named_base_modules

if TYPE_CHECKING:
    from torch import Tensor, nn


class Source:
    """Finds tensors by name; a file is opened when the first is asked for, and only what is asked for is read.

    Args:
        restore_from: what the caller passed.
        base: the model that the names are of.

    Raises:
        ForgeError: it is none of what can be read.
    """

    def __init__(self, restore_from: Any, base: nn.Module) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from torch import nn

        self._base = base
        self._named: Mapping[str, Any] | None = None
        self._files: dict[str, Path] | None = None
        self._where = restore_from
        if isinstance(restore_from, nn.Module):
            if any(isinstance(module, BaseTunerLayer) for module in restore_from.modules()):
                raise ForgeError(
                    f"restore_from is a {type(restore_from).__name__} that carries adapters, and PiSSA and its kin "
                    "change the weights below them: pass a copy of the base that never had any, or its checkpoint."
                )
            self._named = _named_tensors(restore_from)
        elif isinstance(restore_from, Mapping):
            self._named = restore_from
        elif not isinstance(restore_from, (str, Path)):
            raise ForgeError(
                f"restore_from={type(restore_from).__name__}: it must be a state dict, a model, or the folder or hub "
                "id of a checkpoint."
            )
        else:
            self._refuse_other_checkpoints(Path(restore_from))

    def _refuse_other_checkpoints(self, folder: Path) -> None:
        """An adapter's folder, or that of another architecture, which would be built and filled at random."""
        if (folder / "adapter_config.json").is_file():
            raise ForgeError(
                f"restore_from={str(folder)!r} holds an adapter, not the base's weights: pass the folder or hub id "
                "that the base was loaded from."
            )
        wanted = getattr(getattr(self._base, "config", None), "model_type", None)
        try:
            found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        except (OSError, ValueError, AttributeError):
            return  # a hub id, or a folder whose config transformers will complain of
        if wanted and found and wanted != found:
            raise ForgeError(
                f"restore_from={str(folder)!r} is a checkpoint of {found!r}, and the base is a {wanted!r}: pass the "
                "one that the base was loaded from."
            )

    def find(self, names: Sequence[str]) -> Tensor | None:
        """The tensor under the first of its names that is there."""
        if self._named is None:
            found = self._read(names)
            if found is not None:
                return found
            self._named = self._load()  # the checkpoint has other names: transformers knows how to translate them
        return next((self._named[name] for name in names if name in self._named), None)

    def _read(self, names: Sequence[str]) -> Tensor | None:
        from safetensors import safe_open

        if self._files is None:
            self._files = _safetensors(str(self._where))
        for name in names:
            if name in self._files:
                with safe_open(self._files[name], framework="pt", device="cpu") as file:
                    tensor: Tensor = file.get_tensor(name)
                    return tensor
        return None

    def _load(self) -> Mapping[str, Any]:
        base: Any = self._base
        if not hasattr(base, "config") or getattr(base, "is_quantized", False):
            return {}
        try:
            loaded, report = type(base).from_pretrained(
                str(self._where), dtype="auto", device_map="cpu", output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ForgeError(
                f"restore_from={str(self._where)!r}: no checkpoint of a {type(base).__name__} can be loaded from there "
                f"({error}). Pass the folder or hub id that the base was loaded from, or a state dict."
            ) from error
        # What the checkpoint lacks was initialised at random, and is nobody's value.
        invented = {name for key in ("missing_keys", "mismatched_keys") for name in map(_name_of, report.get(key, ()))}
        return {name: tensor for name, tensor in _named_tensors(loaded).items() if name not in invented}


def _name_of(key: Any) -> str:
    """Of a key that did not match, transformers tells the shapes too."""
    return str(key) if isinstance(key, str) else str(key[0])


def _named_tensors(model: nn.Module) -> dict[str, Any]:
    """All parameters and buffers by the names that they have without adapters, tied ones under each."""
    return {
        f"{prefix}.{name}" if prefix else name: tensor
        for prefix, module in named_base_modules(model).items()
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]
        if tensor is not None
    }


def _safetensors(where: str) -> dict[str, Path]:
    """The file of each tensor in a checkpoint; none where it has no safetensors."""
    from transformers.utils import cached_file

    options: dict[str, Any] = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
        "_raise_exceptions_for_gated_repo": False,
    }
    index = cached_file(where, "model.safetensors.index.json", **options)
    if index is not None:
        placed = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        files = {name: cached_file(where, name, **options) for name in set(placed.values())}
        return {name: Path(files[file]) for name, file in placed.items() if files[file] is not None}
    single = cached_file(where, "model.safetensors", **options)
    if single is None:
        return {}
    from safetensors import safe_open

    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), Path(single))
