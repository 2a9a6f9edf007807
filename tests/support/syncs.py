"""A counter of what makes the CPU wait for a device: reads of a value, copies to the host, shapes that depend on data.

    with DeviceReads() as reads:
        trainer.train()
    reads.assert_none(inside="forge")

It works on a CPU-only machine, where nothing is really waited for: `.item()`, `bool(tensor)` and the like are seen
below Python as `aten._local_scalar_dense` (kind "scalar"), also when a library causes them; `.cpu()`, `.to("cpu")`,
`.tolist()` and `.numpy()` as calls (kind "host"); `nonzero`, boolean indexing and `equal` as operators (kind "shape").
"""

import sys
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_SHAPE = {_aten.nonzero, _aten.masked_select, _aten._unique2, _aten.unique_consecutive, _aten.equal, _aten.bincount}
_INDEXED = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}
_HOST_METHODS = {"cpu", "tolist", "numpy", "__array__"}


@dataclass(frozen=True)
class Frame:
    module: str
    where: str


@dataclass(frozen=True)
class Read:
    """One read: its kind, the operator or method, and the Python stack, innermost frame first."""

    kind: str
    name: str
    stack: tuple[Frame, ...]

    def passes(self, package: str, *, below: str | None = None) -> bool:
        """Say whether the stack passes through `package`, counting only frames called from the module `below`."""
        for frame in self.stack:
            if below is not None and _is_in(frame.module, below):
                return False
            if _is_in(frame.module, package):
                return True
        return False

    def __str__(self) -> str:
        near = [frame.where for frame in self.stack if not _is_in(frame.module, "torch")]
        return f"{self.kind} {self.name}: " + " < ".join(near[:4])


class DeviceReads:
    """Context manager; `reads` holds every read in order."""

    def __init__(self) -> None:
        self.reads: list[Read] = []
        self._modes = (_Calls(self.reads), _Operators(self.reads))

    def matching(self, inside: str | None = None, *, kind: str | None = None, below: str | None = None) -> list[Read]:
        """Return the reads of one kind whose stack passes through a package (see `Read.passes`)."""
        return [
            read
            for read in self.reads
            if kind in (None, read.kind) and (inside is None or read.passes(inside, below=below))
        ]

    def assert_none(self, inside: str | None = None, *, kind: str | None = None, below: str | None = None) -> None:
        """Fail with the places of every matching read."""
        if found := self.matching(inside, kind=kind, below=below):
            places = "\n".join(sorted({str(read) for read in found}))
            raise AssertionError(f"{len(found)} device reads inside {inside or 'the block'}:\n{places}")

    def __enter__(self) -> "DeviceReads":
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(kind, error, trace)


class _Operators(TorchDispatchMode):
    def __init__(self, reads: list[Read]) -> None:
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if packet is _aten._local_scalar_dense:
            self.reads.append(Read("scalar", str(func), _stack()))
        elif packet in _SHAPE or (packet in _INDEXED and _has_mask(args[1])):
            self.reads.append(Read("shape", str(func), _stack()))
        result = func(*args, **(kwargs or {}))
        if packet in (_aten._to_copy, _aten.copy_) and _leaves_device(packet, args, result):
            self.reads.append(Read("host", str(func), _stack()))
        return result


class _Calls(TorchFunctionMode):
    def __init__(self, reads: list[Read]) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        on_cpu = bool(args) and isinstance(args[0], Tensor) and args[0].device.type == "cpu"
        # From a real device the copy shows as an operator; tolist and numpy refuse or copy there.
        if on_cpu and (name in _HOST_METHODS or (name == "to" and _names_cpu((*args[1:], *(kwargs or {}).values())))):
            self.reads.append(Read("host", f"Tensor.{name}", _stack()))
        return func(*args, **(kwargs or {}))


def _names_cpu(values: tuple[Any, ...]) -> bool:
    # Only the word counts: a torch.device may be another tensor's, and the CPU's only because these tests run there.
    return any(isinstance(value, str) and value == "cpu" for value in values)


def _has_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _leaves_device(packet: Any, args: Any, result: Tensor) -> bool:
    source = args[1] if packet is _aten.copy_ else args[0]
    return result.device.type == "cpu" and source.device.type not in ("cpu", "meta")


def _is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _stack() -> tuple[Frame, ...]:
    frame, result = sys._getframe(2), []
    while frame is not None:
        where = f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
        result.append(Frame(frame.f_globals.get("__name__", ""), where))
        frame = frame.f_back
    return tuple(result)
