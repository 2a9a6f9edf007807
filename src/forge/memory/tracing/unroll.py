"""From the tape of a few layers to the tape of them all.

Layers of one kind that follow each other form a run; where kinds take turns, as local and global attention do, a whole
turn counts as one layer. Five of a run are traced: its first two, its last two, and one in
the middle whose neighbours are its like. For a longer run the middle one's events are repeated, its own storages as new
ones, its neighbours' as its neighbours'. The result is the tape of the whole depth, storage by storage, which both the
peak and the caching allocator's share are then read from (tests/memory/tracing/test_unroll.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from torch import nn

from ...errors import ForgeError
from .tape import ALLOCATED, FREED, PHASE, Event, Recording

SHORT = 5
LONGEST_TURN = 8  # layers of a turn, as far as one is looked for
WORTH_A_TRY = 0.6  # share of the layers: turns may turn out irregular, and then all are traced after all
MIDDLE = 2  # of the five, the one that is repeated


class IrregularError(ForgeError):
    """The middle layers of a run do not behave alike; the model has to be traced at full depth."""


def kind_of(layer: nn.Module, *extra: Any) -> int:
    """Equal for two layers that cost the same memory: modules, shapes, dtypes, what trains."""
    parameters = tuple((n, tuple(p.shape), str(p.dtype), p.requires_grad) for n, p in layer.named_parameters())
    modules = tuple((n, type(m).__name__, getattr(m, "sliding_window", None)) for n, m in layer.named_modules())
    return hash((parameters, modules, extra))


def runs_of(kinds: Sequence[Any]) -> list[list[int]]:
    """Indices of the layers, those of one kind that follow each other together.

    >>> runs_of(["dense", "moe", "moe", "moe"])
    [[0], [1, 2, 3]]
    """
    return [[index for index, _ in group] for _, group in groupby(enumerate(kinds), key=lambda pair: pair[1])]


def units_of(kinds: Sequence[Any]) -> list[list[int]]:
    """The layers in units that follow each other, such that the fewest layers have to be traced.

    >>> units_of(["local", "local", "global"] * 12 + ["local"])[-3:]
    [[30, 31, 32], [33, 34, 35], [36]]
    >>> units_of(["dense"] * 3)
    [[0], [1], [2]]
    """
    layers = range(len(kinds))
    found = []
    for period in range(1, LONGEST_TURN + 1):
        whole = len(kinds) // period * period
        units = [list(layers[start : start + period]) for start in range(0, whole, period)]
        units += [[index] for index in layers[whole:]]
        runs = runs_of([tuple(kinds[index] for index in unit) for unit in units])
        cost = sum(len(units[number]) for number in shortened(runs))
        if period == 1 or cost <= WORTH_A_TRY * len(kinds):
            found.append((cost, period, units))
    return min(found)[2]


def relabelled(recording: Recording, units: Sequence[int]) -> Recording:
    """The recording with units in the place of layers.

    Args:
        recording: with the indices of layers.
        units: the number of each layer's unit.
    """

    def of(layer: int | None) -> int | None:
        return None if layer is None else units[layer]

    return Recording(
        [(*event[:-1], of(event[-1])) if event[0] in (ALLOCATED, PHASE) else event for event in recording.events]
    )


def shortened(runs: Sequence[Sequence[int]]) -> list[int]:
    """The layers to trace: all of a short run, five of a long one.

    >>> shortened([[0], list(range(1, 32))])
    [0, 1, 2, 3, 30, 31]
    """
    return [i for run in runs for i in (run if len(run) <= SHORT else [*run[: MIDDLE + 1], *run[MIDDLE - SHORT + 1 :]])]


def unroll(recording: Recording, runs: Sequence[Sequence[int]]) -> Recording:
    """The recording of all layers.

    Args:
        recording: of the layers that `shortened` names.
        runs: of the whole model.

    Raises:
        IrregularError: see there.
    """
    start = 0
    for run in runs:
        if len(run) > SHORT:
            recording = _Run(recording, start + MIDDLE, len(run) - SHORT).repeated()
        start += len(run)
    _check(recording)
    return recording


def _check(recording: Recording) -> None:
    alive: set[int] = set()
    for event in recording.events:
        if event[0] == ALLOCATED:
            alive.add(event[1])
        elif event[0] != PHASE and event[1] not in alive:
            raise IrregularError("a storage is freed twice: the layers do not take turns")
        elif event[0] == FREED:
            alive.remove(event[1])


class _Run:
    """One run to lengthen: the layer `middle` is followed by `count` copies of itself."""

    def __init__(self, recording: Recording, middle: int, count: int) -> None:
        self._events, self._middle, self._count = recording.events, middle, count
        self._from_above = False  # whether the layer above the middle is speaking
        self._next = 1 + max((event[1] for event in self._events if event[0] == ALLOCATED), default=0)
        self._owner: dict[int, int] = {}
        self._place: dict[int, tuple[str, int]] = {}  # of a layer's storage: the phase it was made in, and its number
        self._by_place: dict[tuple[int, str, int], tuple[int, int]] = {}  # layer, place -> storage and size
        self._copies: dict[tuple[int, str, int], int] = {}  # copy, place -> storage
        self._adopt()
        self._index()

    def repeated(self) -> Recording:
        """The longer recording; layers above the middle are renumbered."""
        out: list[Event] = []
        for layer, events in self._segments():
            if layer is None:
                self._beside_layers(events, out)
            elif layer == self._middle:
                name = events[0][1]
                order = range(self._count + 1)
                for copy in reversed(order) if ".backward" in name else order:
                    self._emit(events, copy, out)
            else:
                self._from_above = layer == self._middle + 1
                self._emit(events, None, out)
                self._from_above = False
        return Recording(out)

    def _adopt(self) -> None:
        """A storage made beside the layers that a layer frees is that layer's: the gradient of a router's logits."""
        made: dict[int, tuple[str, int]] = {}
        freed: dict[int, list[int]] = {}
        phase, layer = "", None
        for event in self._events:
            if event[0] == PHASE:
                phase, layer = event[1:]
            elif event[0] == ALLOCATED and event[4] is None:
                made[event[1]] = phase, event[2]
            elif event[0] == FREED and layer is not None and event[1] in made:
                freed.setdefault(layer, []).append(event[1])
        trio = [sorted(freed.get(self._middle + step, ())) for step in (-1, 0, 1)]
        below, middle, above = ([made[number] for number in numbers] for numbers in trio)
        if middle and below == middle == above:
            adopted = {
                number: self._middle + step
                for step, numbers in zip((-1, 0, 1), trio, strict=True)
                for number in numbers
            }
            self._events = [
                (*event[:4], adopted[event[1]]) if event[0] == ALLOCATED and event[1] in adopted else event
                for event in self._events
            ]

    def _index(self) -> None:
        phase, counts = "", dict[tuple[int, str], int]()
        for event in self._events:
            if event[0] == PHASE:
                phase = event[1]
            elif event[0] == ALLOCATED and event[4] is not None:
                _, number, size, _, layer = event
                place = counts.get((layer, phase), 0)
                counts[layer, phase] = place + 1
                self._owner[number] = layer
                self._place[number] = phase, place
                self._by_place[layer, phase, place] = number, size
        middle = {key[1:]: found[1] for key, found in self._by_place.items() if key[0] == self._middle}
        for neighbour in (self._middle - 1, self._middle + 1):
            theirs = {key[1:]: found[1] for key, found in self._by_place.items() if key[0] == neighbour}
            if theirs != middle:
                raise IrregularError(f"layers {self._middle} and {neighbour} differ in what they allocate")

    def _segments(self) -> Iterator[tuple[int | None, list[Event]]]:
        """Events from one phase to the next, with the layer whose forward or backward that is; of a turn, all of it."""
        segment: list[Event] = []
        layer: int | None = None
        for event in self._events:
            if event[0] == PHASE and (event[2] is None or event[2] != layer):
                if segment:
                    yield layer, segment
                segment, layer = [], event[2]
            segment.append(event)
        if segment:
            yield layer, segment

    def _beside_layers(self, events: list[Event], out: list[Event]) -> None:
        """The optimizer, the state before the first step: each layer's events, where they come."""
        for actor, group in groupby(self._acting(events), key=lambda pair: pair[0]):
            of_one = [event for _, event in group]
            if actor == self._middle:
                for copy in range(self._count + 1):
                    self._emit(of_one, copy, out)
            else:
                self._from_above = actor == self._middle + 1
                self._emit(of_one, None, out)
                self._from_above = False

    def _acting(self, events: list[Event]) -> Iterator[tuple[int | None, Event]]:
        """Each event with the layer whose turn it is: a loop's variable keeps a tensor into the next one's turn."""
        turn: int | None = None
        for event in events:
            owner = None if event[0] == PHASE else self._owner.get(event[1])
            if event[0] == ALLOCATED and owner is not None:
                turn = owner
            elif event[0] == FREED and turn is not None and owner == turn - 1:
                owner = turn
            yield owner, event

    def _emit(self, events: Any, copy: int | None, out: list[Event]) -> None:
        for event in events:
            if event[0] == PHASE:
                out.append((PHASE, event[1], self._renumbered(event[2], copy)))
            elif event[0] == ALLOCATED:
                number, layer = self._storage(event[1], copy), self._renumbered(event[4], copy)
                out.append((ALLOCATED, number, event[2], event[3], layer))
            else:
                out.append((event[0], self._storage(event[1], copy), *event[2:]))

    def _renumbered(self, layer: int | None, copy: int | None) -> int | None:
        if layer is None or layer < self._middle:
            return layer
        return layer + (copy or 0) if layer == self._middle else layer + self._count

    def _storage(self, number: int, copy: int | None) -> int:
        """The storage that stands where `number` does, seen from a copy of the middle layer (None: from elsewhere)."""
        owner = self._owner.get(number)
        if copy is None:
            # The layer above the middle has the last copy below it now; everyone else means what they say.
            above = owner == self._middle and self._from_above
            return self._copy_of(number, self._count) if above else number
        if owner == self._middle:
            return self._copy_of(number, copy)
        if owner == self._middle - 1:
            return number if copy == 0 else self._copy_of(self._alike(number), copy - 1)
        if owner == self._middle + 1:
            return number if copy == self._count else self._copy_of(self._alike(number), copy + 1)
        if copy == 0:
            return number
        raise IrregularError(f"layer {self._middle} touches what belongs to {owner}")

    def _alike(self, number: int) -> int:
        return self._by_place[(self._middle, *self._place[number])][0]

    def _copy_of(self, number: int, copy: int) -> int:
        if copy == 0:
            return number
        key = (copy, *self._place[number])
        if key not in self._copies:
            self._copies[key] = self._next
            self._next += 1
        return self._copies[key]
