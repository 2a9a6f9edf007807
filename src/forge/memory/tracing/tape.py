"""What a step allocates and frees, in order: every storage by its size, its category and the phase it happened in.

The tape is a TorchDispatchMode: it sees each operation below autograd, looks at the storages of what comes out, and
follows each by a weak reference until it dies. It does so alike for real tensors and for hollow ones, which have
storages of the right size and no memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..part import PARTS, Part
from .hollow import Shapes

PARAMETERS = "parameters"
PAGED = "paged"
"""The category of what is in managed memory, which PyTorch's allocator does not see."""

ALLOCATOR_BLOCK = 512
"""Bytes that the CUDA caching allocator rounds to, and counts in `max_memory_allocated`."""

# Kinds of events. An allocation is (ALLOCATED, n, bytes, category, layer), a death (FREED, n), a storage that turns out
# to be something else (RECATEGORISED, n, category), a new phase (PHASE, name, layer). The layer is a decoder layer's
# index where the storage belongs to one, or the phase is one's forward or backward; else None.
ALLOCATED, FREED, RECATEGORISED, PHASE = range(4)
Event = tuple[Any, ...]

_UNPACKED = ("dequantize_4bit", "dequantize_blockwise")


@dataclass
class Recording:
    """The events of a tape, and what can be read off them."""

    events: list[Event] = field(default_factory=list)

    def peak(self, block: int = 1) -> Peak:
        """The instant when most is alive.

        Args:
            block: round each size up to a multiple of this.
        """
        alive: dict[int, tuple[int, str]] = {}
        totals: dict[str, int] = dict.fromkeys(PARTS, 0)
        total, highest = 0, -1
        name, layer = "", None
        found = Peak("", None, dict(totals))
        for event in self.events:
            kind = event[0]
            if kind == ALLOCATED:
                size, category = -(-event[2] // block) * block, event[3]
                if category == PAGED:
                    continue
                alive[event[1]] = size, category
                totals[category] += size
                total += size
                if total > highest:
                    highest, found = total, Peak(name, layer, dict(totals))
            elif kind == FREED:
                size, category = alive.pop(event[1], (0, PARAMETERS))
                totals[category] -= size
                total -= size
            elif kind == RECATEGORISED:
                size, category = alive[event[1]]
                alive[event[1]] = size, event[2]
                totals[category] -= size
                totals[event[2]] += size
                if total == highest:  # the same instant, better known
                    found = Peak(found.phase, found.layer, dict(totals))
            else:
                name, layer = event[1], event[2]
        return found

    def when(self, phase: str) -> dict[str, int]:
        """Bytes by category when a phase begins for the last time."""
        alive: dict[int, tuple[int, str]] = {}
        totals: dict[str, int] = dict.fromkeys((*PARTS, PAGED), 0)
        found = dict(totals)
        for event in self.events:
            if event[0] == PHASE and event[1] == phase:
                found = dict(totals)
            _apply(event, alive, totals)
        return found

    def timeline(self, since: str, *, points: int) -> list[dict[str, int]]:
        """Bytes by category since a phase last began: of each of `points` equal spans the instant of most."""
        begin = max(index for index, event in enumerate(self.events) if event[0] == PHASE and event[1] == since)
        span = max(1, (len(self.events) - begin) // points)
        alive: dict[int, tuple[int, str]] = {}
        totals: dict[str, int] = dict.fromkeys((*PARTS, PAGED), 0)
        found: list[dict[str, int]] = []
        for index, event in enumerate(self.events):
            _apply(event, alive, totals)
            if index < begin:
                continue
            if (index - begin) % span == 0:
                found.append(dict(totals))
            elif sum(totals.values()) > sum(found[-1].values()):
                found[-1] = dict(totals)
        return found

    def blocks(self) -> Iterator[tuple[int, int]]:
        """The events as `replay` takes them: (n, bytes) for an allocation, (n, -1) for its end."""
        paged = set()
        for event in self.events:
            if event[0] == ALLOCATED:
                if event[3] == PAGED:
                    paged.add(event[1])
                else:
                    yield event[1], event[2]
            elif event[0] == FREED and event[1] not in paged:
                yield event[1], -1

    @property
    def paged(self) -> int:
        """Bytes in managed memory."""
        return sum(event[2] for event in self.events if event[0] == ALLOCATED and event[3] == PAGED)


def _apply(event: Event, alive: dict[int, tuple[int, str]], totals: dict[str, int]) -> None:
    """Bring the totals up to date with an event."""
    if event[0] == ALLOCATED:
        alive[event[1]] = event[2], event[3]
        totals[event[3]] += event[2]
    elif event[0] == FREED:
        size, category = alive.pop(event[1])
        totals[category] -= size
    elif event[0] == RECATEGORISED:
        size, category = alive[event[1]]
        alive[event[1]] = size, event[2]
        totals[category] -= size
        totals[event[2]] += size


@dataclass(frozen=True)
class Peak:
    """An instant.

    Args:
        phase: its name, "2.backward.layer" for instance.
        layer: the decoder layer whose forward or backward that is, None elsewhere.
        parts: bytes by category.
    """

    phase: str
    layer: int | None
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes alive."""
        return sum(self.parts.values())


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records what the operations run under it allocate and free.

    Args:
        shapes: runs the operations on hollow tensors; None lets them run for real.
        all_true: what a truth value read from a hollow tensor is: "are all tokens real?" without padding.
        counters: whether numbers that an optimizer makes from Python's count; those of a GPU's are on the host.
    """

    def __init__(self, *, shapes: Shapes | None = None, all_true: bool = True, counters: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._shapes = shapes
        self.recording = Recording()
        self.category: Part = "activations"
        self._layer: int | None = None  # whose forward or backward this is
        self._owners: dict[int, int | None] = {}  # of a living storage, the layer that it belongs to
        self._last_owner: int | None = None
        self._all_true, self._counters = all_true, counters
        self._numbers: dict[int, int] = {}  # of a living storage, by its address
        self._watched: dict[int, weakref.ref[Any]] = {}
        self._count = 0

    def register(self, tensors: Iterable[torch.Tensor], category: Part, layer: int | None = None) -> None:
        """Count what is there before the step: parameters, buffers, inputs."""
        for tensor in tensors:
            self._watch(tensor, category, layer)

    def recategorise(self, tensor: torch.Tensor, category: Part) -> None:
        """A storage turns out to be something else: an activation's gradient that became a parameter's."""
        number = self._numbers.get(tensor.untyped_storage()._cdata)
        if number is not None:
            self.recording.events.append((RECATEGORISED, number, category))

    def phase(self, name: str, category: Part = "activations", layer: int | None = None) -> None:
        """What follows belongs to this phase, is of this category, and belongs to this layer if one is named."""
        self.category, self._layer = category, layer
        self.recording.events.append((PHASE, name, layer))

    def turn_of(self, tensor: torch.Tensor) -> None:
        """What an optimizer makes from no tensor, from now on, belongs to this one's layer: counters, zeros."""
        self._last_owner = self._owners.get(self._numbers.get(tensor.untyped_storage()._cdata, -1))

    @contextmanager
    def allocating(self, category: Part) -> Iterator[None]:
        """What is allocated inside is of this category."""
        before, self.category = self.category, category
        try:
            yield
        finally:
            self.category = before

    def transient(self, size: int, category: Part = "workspace") -> None:
        """Count bytes that a kernel takes from the allocator and returns before it ends."""
        number = self._next()
        self.recording.events += [(ALLOCATED, number, size, category, self._layer), (FREED, number)]

    def paged(self, size: int, like: torch.Tensor) -> None:
        """Count managed memory, of the same layer as a tensor."""
        owner = self._owners.get(self._numbers.get(like.untyped_storage()._cdata, -1))
        self.recording.events.append((ALLOCATED, self._next(), size, PAGED, owner))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation; watch what it returns."""
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and self._shapes:
            return _some_value(args[0], self._all_true)
        if func is torch.ops.aten.index.Tensor and self._shapes:
            args = (args[0], self._without_masks(args[1]))
        out = self._shapes.run(func, args, kwargs) if self._shapes else func(*args, **kwargs)
        if func is torch.ops.aten.lift_fresh.default and self.category == "optimizer":  # torch.tensor(0.0): a counter
            if self._counters:
                self._watch(out, self.category, self._last_owner)
            return out
        category: Part = "quantization" if func._opname in _UNPACKED else self.category
        if isinstance(out, torch.Tensor):
            self._watch(out, category, self._owner(args))
        elif isinstance(out, (list, tuple)):
            for index, leaf in enumerate(out):
                if isinstance(leaf, torch.Tensor):
                    self._watch(leaf, category, self._owner(args, index))
                elif isinstance(leaf, (list, tuple)):
                    for place, each in enumerate(leaf):
                        self._watch(each, category, self._owner(args, place))
        return out

    def _owner(self, args: Any, index: int | None = None) -> int | None:
        """The layer that a result belongs to: the one that runs, else that of the argument it was made from."""
        if self._layer is not None:
            return self._layer
        source = args[0] if args else None
        if isinstance(source, (list, tuple)):
            source = source[index] if index is not None and index < len(source) else None
        if not isinstance(source, torch.Tensor):
            return self._last_owner if self.category == "optimizer" else None
        number = self._numbers.get(source.untyped_storage()._cdata)
        self._last_owner = None if number is None else self._owners[number]
        return self._last_owner

    def _watch(self, tensor: torch.Tensor, category: Part, layer: int | None) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._numbers:
            return
        number = self._next()
        self._numbers[address] = number
        self._owners[number] = layer
        self.recording.events.append((ALLOCATED, number, storage.nbytes(), category, layer))
        self._watched[address] = weakref.ref(storage, partial(self._died, address, number))

    def _died(self, address: int, number: int, _: Any) -> None:
        if self._numbers.pop(address, None) is not None:
            del self._watched[address]
            self.recording.events.append((FREED, number))

    def _next(self) -> int:
        self._count += 1
        return self._count

    def _without_masks(self, indices: Any) -> list[Any]:
        """Indices that select everything in the place of a mask, whose count of ones nothing can tell."""
        replaced: list[Any] = []
        for index in indices:
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                replaced.append(index)
                continue
            places = index.new_zeros((index.dim(), index.numel()), dtype=torch.long)
            self._watch(places, self.category, self._layer)
            replaced.extend(places.unbind(0))
        return replaced


def _some_value(tensor: torch.Tensor, truth: bool) -> bool | int | float:
    if tensor.dtype == torch.bool:
        return truth
    return 1.0 if tensor.is_floating_point() else 1
