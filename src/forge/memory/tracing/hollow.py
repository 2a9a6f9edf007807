"""Tensors with a storage of the right size and no memory, and operations on them that compute nothing but shapes.

torch's FakeTensorMode does this too. It works out every operation anew in Python, which would be most of the time of a
trace; and its tensors are known as fakes, so that libraries take their paths for compilers. A hollow tensor is an
ordinary CPU tensor over address space that no page stands behind. Operations are looked up by what they are given; what
is not known yet is run on the meta device once.

All hollow tensors share one mapping: it holds nothing that anyone reads.
"""

from __future__ import annotations

import mmap
import sys
import threading
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

_MAPPED = 1 << 40  # bytes of address space, no memory
_LEAST = 1 << 28
_lock = threading.Lock()
_mapping: Any = None


def hollow(shape: tuple[int, ...], dtype: torch.dtype, _name: str = "") -> torch.Tensor:
    """A contiguous hollow tensor; what it is called, as real ones are told apart by, is of no matter.

    >>> tensor = hollow((2048, 4096, 4096), torch.float32)  # 128 GiB
    >>> tensor.shape, tensor.untyped_storage().nbytes() // 2**30
    (torch.Size([2048, 4096, 4096]), 128)
    """
    count = 1
    for size in shape:
        count *= size
    return _flat(count, dtype).view(shape)


def _flat(count: int, dtype: torch.dtype) -> torch.Tensor:
    global _mapping  # noqa: PLW0603  (made at the first need, kept: it costs nothing)
    if count == 0:
        return torch.empty(0, dtype=dtype)
    if _mapping is None:
        with _lock:
            _mapping = _mapping or _map()
    return torch.frombuffer(_mapping, dtype=dtype, count=count)


def _map() -> Any:
    # Python names MAP_NORESERVE from 3.13 on; without it Linux refuses more address space than there is memory.
    unreserved = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform.startswith("linux") else 0)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | unreserved
    size = _MAPPED
    while True:
        try:
            return mmap.mmap(-1, size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except (OSError, ValueError):  # noqa: PERF203  (a limit on address space, ulimit -v: take what there is)
            if size <= _LEAST:
                raise
            size //= 2


class Shapes:
    """Runs operations on hollow tensors: what comes out has the right shapes, strides, types and aliases."""

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}
        self._kinds: dict[Any, str] = {}

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The operation's results."""
        kind = self._kinds.get(func)
        if kind is None:
            kind = self._kinds[func] = _kind(func)
        if kind == "view":  # moves no data
            return func(*args, **kwargs)
        if kind == "in_place":
            return _written(func, args, kwargs)
        key = (func, _described(args), _described(tuple(kwargs.items())) if kwargs else None)
        recipe = self._known.get(key)
        if recipe is None:
            own = _RECIPES.get(func)
            recipe = self._known[key] = own(*args, **kwargs) if own else _on_meta(func, args, kwargs)
        return _made(recipe)


_VIEWS = ("_unsafe_view", "_reshape_alias", "alias", "detach", "lift_fresh", "set_", "resize_")


def _kind(func: Any) -> str:
    schema = func._schema
    if func.namespace == "profiler" or func._opname in _VIEWS:
        return "view"
    written = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if written and all(r.alias_info is not None and r.alias_info.is_write for r in schema.returns):
        return "in_place"
    aliased = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    return "view" if aliased else "functional"


def _written(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation that writes into its arguments returns: those arguments."""
    schema = func._schema
    if not schema.returns:
        return None
    written = []
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(args[index] if index < len(args) else kwargs[argument.name])
    return written[0] if len(schema.returns) == 1 else tuple(written[: len(schema.returns)])


def _described(value: Any) -> Any:
    """A hashable description of all that shapes can depend on."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.stride(), value.storage_offset()
    if isinstance(value, (list, tuple)):
        return tuple(_described(each) for each in value)
    return (type(value), value) if isinstance(value, (bool, int, float)) else value


def _on_meta(func: Any, args: Any, kwargs: Any) -> Any:
    """Run on meta; for each result what to make."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        count = tensor.storage_offset() + last + 1 if tensor.numel() else 0
        flat = torch.empty(count, dtype=tensor.dtype, device="meta")
        return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    args, kwargs = tree_map_only(torch.Tensor, moved, (args, kwargs))
    if "device" in kwargs or any(a.name == "device" for a in func._schema.arguments):
        kwargs = {**kwargs, "device": torch.device("meta")}
    return _recipe(func(*args, **kwargs))


def _grouped_product(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor | None = None, *_: Any, **__: Any) -> Any:
    """Of experts' matrices (aten._grouped_mm): the meta device takes bfloat16 alone. Rows are 16-byte aligned."""
    shape: tuple[int, ...]
    if a.dim() == 2 and b.dim() == 2 and offsets is not None:  # rows are summed within their group
        shape = (offsets.shape[0], a.shape[0], b.shape[1])
    elif a.dim() == 2 or b.dim() == 2:
        shape = (a.shape[-2], b.shape[-1])
    else:
        shape = (a.shape[0], a.shape[1], b.shape[2])
    width = -(-shape[-1] // (unit := 16 // a.dtype.itemsize)) * unit
    return shape, (shape[-2] * width, width, 1)[-len(shape) :], a.dtype


def _all_places(tensor: torch.Tensor) -> Any:
    """`nonzero`, as if nothing were zero: how much is, nobody can tell."""
    return (tensor.numel(), tensor.dim()), (1, tensor.numel()), torch.long


def _everything(tensor: torch.Tensor, _mask: torch.Tensor) -> Any:
    return (tensor.numel(),), (1,), tensor.dtype


def _counts(tensor: torch.Tensor, bins: int = 100, *_: Any, **__: Any) -> Any:
    """`histc`, which the meta device refuses where algorithms have to be deterministic."""
    return (bins,), (1,), tensor.dtype


_RECIPES: dict[Any, Any] = {
    torch.ops.aten.histc.default: _counts,
    torch.ops.aten._grouped_mm.default: _grouped_product,
    torch.ops.aten.nonzero.default: _all_places,
    torch.ops.aten.masked_select.default: _everything,
}


def _recipe(out: Any) -> Any:
    if isinstance(out, torch.Tensor):
        return out.shape, out.stride(), out.dtype
    if isinstance(out, (list, tuple)):
        return [_recipe(each) for each in out]
    return out


def _made(recipe: Any) -> Any:
    if isinstance(recipe, list):
        return tuple(_made(each) for each in recipe)
    if not isinstance(recipe, tuple):
        return recipe
    shape, stride, dtype = recipe
    count = 1
    for size, step in zip(shape, stride, strict=True):
        count += (size - 1) * step
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    return _flat(count, dtype).as_strided(shape, stride)
