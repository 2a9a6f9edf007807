"""A model as a list of pieces: each parameter, buffer and quantisation constant once, with its place in the model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...models.anatomy import unpacked_numel
from ...models.experts import find_experts, is_linear
from ...models.layers import named_base_modules, unwrap, without_adapters

if TYPE_CHECKING:
    import torch
    from torch import nn

LAYERS, ADAPTERS, EMBEDDINGS, HEAD, OTHER = "decoder layers", "adapters", "embeddings", "head", "other"

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_?forward|expert|\b(?:fc|w)_?(?:\d|in|out)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Piece:
    """Something that a model stores.

    Args:
        kind: "parameter", "buffer", or the name of a quantisation constant.
        module: the name of the module that holds it, without PEFT's additions to it.
        key: its name there.
        part: where it belongs.
        inside: where in that part; "" where it has no parts.
        count: how many parameters it stands for.
        trainable: whether it requires a gradient.
        dtype: as people write it; the method for packed weights.
        packed: whether bitsandbytes packed it.
        bytes: what it stores that no piece before it does.
        device: where.
    """

    kind: str
    module: str
    key: str
    part: str
    inside: str
    count: int
    trainable: bool
    dtype: str
    packed: bool
    bytes: int
    device: str


class Pieces:
    """All pieces of a model, and the names that share a parameter.

    Args:
        model: any module; plain, quantised, on meta, or wrapped by PEFT.
        layers_path: where the decoder layers are, None where there are none.
    """

    def __init__(self, model: nn.Module, layers_path: str | None) -> None:
        self.modules = named_base_modules(model)
        self._places = _Places(model, self.modules, layers_path)
        self._stored: set[tuple[int, int, int]] = set()
        self._names: dict[int, list[str]] = {}
        self._adapters = adapter_configs(model)
        self.all = [piece for name, module, added in self._owners(model) for piece in self._of(name, module, added)]

    @property
    def tied(self) -> tuple[tuple[str, ...], ...]:
        """Groups of names that are one parameter."""
        return tuple(tuple(names) for names in self._names.values() if len(names) > 1)

    @property
    def fused_experts(self) -> tuple[str, ...]:
        """Parameters that hold all experts of a layer."""
        return self._places.fused

    @property
    def has_own_head(self) -> bool:
        """Whether the output head has a weight that is not the embeddings'."""
        return any(piece.part == HEAD and piece.kind == "parameter" and piece.key == "weight" for piece in self.all)

    @property
    def head_is_tied(self) -> bool:
        """Whether there is an output head, and its weight is the embeddings'."""
        return self._places.head is not None and not self.has_own_head

    def _owners(self, model: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
        """The model's own modules, then what PEFT added (True)."""
        own = {id(module) for module in self.modules.values()}
        yield from ((name, module, False) for name, module in self.modules.items())
        for name, module in model.named_modules(remove_duplicate=False):
            if id(module) not in own:
                yield name, module, True

    def _of(self, name: str, module: nn.Module, added: bool) -> Iterator[Piece]:
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            full_name = f"{name}.{key}" if name else key
            names = self._names.setdefault(id(parameter), [])
            names.append(full_name)
            if len(names) > 1:
                continue
            part, inside = (ADAPTERS, self._adapter_of(full_name)) if added else self._places.of(name)
            method = packing(parameter)
            piece = Piece(
                kind="parameter",
                module=name,
                key=key,
                part=part,
                inside=inside,
                count=unpacked_numel(parameter),
                trainable=parameter.requires_grad,
                dtype=method or dtype_name(parameter.dtype),
                packed=method is not None,
                bytes=self._new_bytes(parameter),
                device=str(parameter.device),
            )
            yield piece
            for kind, constant in _constants(parameter, module) if method else ():
                yield replace(piece, kind=kind, count=0, trainable=False, bytes=self._new_bytes(constant))
        for key, buffer in module.named_buffers(recurse=False):
            part, inside = (ADAPTERS, self._adapter_of(name)) if added else self._places.of(name)
            device, dtype = str(buffer.device), dtype_name(buffer.dtype)
            yield Piece("buffer", name, key, part, inside, 0, False, dtype, False, self._new_bytes(buffer), device)

    def _adapter_of(self, name: str) -> str:
        """The adapter that a name belongs to; what all of them share is "shared"."""
        path = name.split(".")
        found = next((part for part in reversed(path) if part in self._adapters), "shared")
        return f"{found} (modules_to_save)" if "modules_to_save" in path else found

    def _new_bytes(self, tensor: torch.Tensor) -> int:
        """The bytes of a tensor, 0 for one that shares its storage with another before it."""
        if hasattr(tensor, "__tensor_flatten__"):  # a wrapper around tensors: torchao, DTensor
            return sum(self._new_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
        size = tensor.numel() * tensor.element_size()
        key = (tensor.untyped_storage()._cdata, int(tensor.storage_offset()), size)  # an address would be 0 on meta
        if key in self._stored:
            return 0
        self._stored.add(key)
        return size


class _Places:
    """Where in the model a module belongs, by its path and its structure."""

    def __init__(self, model: nn.Module, modules: dict[str, nn.Module], layers_path: str | None) -> None:
        base: Any = unwrap(model)
        self._modules = modules
        self._layers = layers_path
        self._prefix = str(getattr(base, "base_model_prefix", ""))
        self._embeddings = _path_of(base, "get_input_embeddings", modules)
        self.head = _path_of(base, "get_output_embeddings", modules)
        experts = find_experts(modules, layers_path) if layers_path else None
        self._routers = experts.routers if experts else frozenset()
        self.fused = experts.parameters if experts else ()
        self._experts = {name.rpartition(".")[0] for name in self.fused} | set(self._lists_of_experts())

    def of(self, name: str) -> tuple[str, str]:
        """The part of the module `name`, and where in that part."""
        if self.head is not None and _within(name, {self.head}):
            return HEAD, ""
        if name == self._embeddings:
            return EMBEDDINGS, ""
        if self._layers and name.startswith(f"{self._layers}."):
            return LAYERS, self._in_layer(name)
        if not name or not any(True for _ in self._modules[name].parameters(recurse=False)):
            return OTHER, ""
        return self._beside_the_layers(name), ""

    def _in_layer(self, name: str) -> str:
        if _within(name, self._routers):
            return "router"
        if _within(name, self._experts):
            return "experts"
        if self._is_norm(name):
            return "norms"
        inner = name[len(self._layers or "") + 1 :].split(".")
        around = [self._modules[".".join([self._layers or "", *inner[:depth]])] for depth in range(2, len(inner) + 1)]
        described = " ".join([".".join(inner[1:]), *(type(module).__name__ for module in around)])
        if _ATTENTION.search(described):
            return "attention"
        if any(hasattr(module, "A_log") for module in around):
            return "state space"
        return "mlp" if _MLP.search(described) else OTHER

    def _beside_the_layers(self, name: str) -> str:
        """What stands beside the layers is embeddings or the last norm; what stands elsewhere keeps its own name."""
        from torch import nn

        path = name.split(".")
        decoder = (self._layers or f"{self._prefix}.layers").split(".")[:-1]
        common = next((i for i, (a, b) in enumerate(zip(path, decoder, strict=False)) if a != b), None)
        depth = min(len(path), len(decoder)) if common is None else common
        if self._layers and depth == len(decoder) == len(path) - 1:
            if isinstance(self._modules[name], nn.Embedding):
                return EMBEDDINGS
            if self._is_norm(name):
                return "final norm"
        return ".".join(path[: depth + 1])

    def _is_norm(self, name: str) -> bool:
        module = self._modules[name]
        leaf = next(module.children(), None) is None and not is_linear(module)
        return leaf and all(parameter.ndim <= 1 for parameter in module.parameters(recurse=False))

    def _lists_of_experts(self) -> Iterator[str]:
        from torch import nn

        blocks = {router.rpartition(".")[0] for router in self._routers}
        for name, module in self._modules.items():
            if isinstance(module, nn.ModuleList) and len(module) > 1 and name.rpartition(".")[0] in blocks:
                yield name


def packing(parameter: nn.Parameter) -> str | None:
    """The method that packed a parameter ("nf4", "fp4", "int8"), None where bitsandbytes did not."""
    if unpacked_numel(parameter) != parameter.numel():
        return str(getattr(parameter, "quant_type", "4-bit"))
    is_int8 = type(parameter).__name__ == "Int8Params" and not parameter.dtype.is_floating_point
    return "int8" if is_int8 else None


def dtype_name(dtype: torch.dtype) -> str:
    """As people write it.

    >>> import torch
    >>> dtype_name(torch.bfloat16), dtype_name(torch.uint8)
    ('bf16', 'uint8')
    """
    name = str(dtype).removeprefix("torch.")
    return {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}.get(name, name)


def adapter_configs(model: nn.Module) -> dict[str, Any]:
    """PEFT's configs by the adapter's name; none for a model without adapters."""
    configs: Any = getattr(model, "peft_config", None)
    return configs if isinstance(configs, dict) else {}


def _constants(parameter: nn.Parameter, module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What bitsandbytes keeps beside a packed weight, by name."""
    state: Any = getattr(parameter, "quant_state", None)
    nested: Any = getattr(state, "state2", None)
    int8: Any = getattr(module, "state", None)  # the first forward pass moves SCB and CB there
    found = [
        ("absmax", getattr(state, "absmax", None)),
        ("nested absmax", getattr(nested, "absmax", None)),
        ("codebooks", getattr(state, "code", None)),
        ("codebooks", getattr(nested, "code", None)),
        ("offset", getattr(state, "offset", None)),
        *((key, getattr(holder, key, None)) for holder in (parameter, int8) for key in ("SCB", "CB")),
    ]
    yield from ((name, tensor) for name, tensor in found if tensor is not None)


def _path_of(base: Any, getter: str, modules: dict[str, nn.Module]) -> str | None:
    try:
        found = getattr(base, getter)()
    except (AttributeError, NotImplementedError):  # no transformers model, or one that cannot name them
        return None
    wanted = None if found is None else without_adapters(found)
    return next((name for name, module in modules.items() if module is wanted and name), None)


def _within(name: str, roots: set[str] | frozenset[str]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)
