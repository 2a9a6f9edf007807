"""From the tensors a step allocates to the memory it *reserves*: a model of PyTorch's CUDA caching allocator.

What runs out on a GPU is not what tensors take but what the allocator has taken from the driver for them. It takes
whole segments, cuts blocks out of them, keeps what is freed, and joins free neighbours only inside a segment.

    round      every request to a multiple of 512 bytes
    pool       up to 1 MiB: the small one; above: the large one
    reuse      the smallest free block of the pool that is large enough, at the lowest address among equals
    reserve    else a new segment: 2 MiB for the small pool; 20 MiB for requests under 10 MiB, above that the request
               rounded up to 2 MiB
    split      the rest of the block stays free if it is at least 512 bytes (small pool) or over 1 MiB (large pool);
               else it goes with the block, and counts as allocated
    free       the block joins its free neighbours and waits in its pool
    pressure   when the device has no room for a segment, every segment that is wholly free goes back to it, and the
               request is tried once more; then it is out of memory

With expandable segments each pool is one segment that grows: pages of 2 MiB (small) or 20 MiB (large) are mapped
where free and unmapped space together have room, lowest address first; any rest of 512 bytes is split off; a free
block that ends where unmapped space begins counts as large as it could become; pressure unmaps every page that is
wholly free.

Source: c10/cuda/CUDACachingAllocator.cpp (`malloc`, `get_free_block`, `should_split`, `alloc_block`,
`release_cached_blocks`, `try_allocate_expandable_block`, `unmap_block`); the constants are those of torch 2.13's
c10/core/AllocatorConfig.h.

Left out: streams (all is on one, so a freed block can be used at once), the private pools of CUDA graphs, and what is
off by default: the garbage collection threshold, max_split_size, roundup_power2_divisions. Segments lie at rising
addresses, oldest first, where cudaMalloc may choose otherwise: it decides between free blocks of one size. An
expandable segment has no end, where PyTorch's ends at 9/8 of the device's memory.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import ForgeError

_MIB = 2**20
_ROUND = 512
_SMALL_REQUEST = _MIB
_SMALL_SEGMENT = 2 * _MIB
_LARGE_SEGMENT = 20 * _MIB
_OWN_SEGMENT = 10 * _MIB
_ROUND_SEGMENT = 2 * _MIB
_ENDLESS = 2**60
"""The address space of an expandable segment, and the distance between the two."""


@dataclass(frozen=True)
class Replay:
    """What the allocator did with a stream of allocations, in bytes.

    Args:
        allocated_peak: the most that blocks in use took, as `torch.cuda.max_memory_allocated()` counts it: rounded to
            512 bytes, and with the rests too small to split off.
        requested_peak: the most that was asked for at one time ("requested_bytes.all.peak" in torch's statistics).
        reserved_peak: the most that was taken from the device, `torch.cuda.max_memory_reserved()`.
        reserved_at_end: what was still taken after the last event.
        retries: how often the device had no room and the cache was given back ("num_alloc_retries" in torch's
            statistics, which counts the last, vain attempt too).
        out_of_memory_at: the index of the event that found no room even then, where the replay stopped, or None.
    """

    allocated_peak: int
    requested_peak: int
    reserved_peak: int
    reserved_at_end: int
    retries: int = 0
    out_of_memory_at: int | None = None


def replay(
    events: Iterable[tuple[int, int]], *, capacity: int | None = None, expandable_segments: bool = False
) -> Replay:
    """Run `events` through the allocator.

    >>> result = replay([(0, 1000), (1, 3 * 2**20), (0, -1)])
    >>> result.allocated_peak, result.reserved_peak // 2**20  # a segment of 2 MiB and one of 20
    (3146752, 22)

    Args:
        events: `(n, size)` allocates block n with `size` bytes (0 takes nothing), `(n, -1)` frees it; n may then be
            used again.
        capacity: bytes that this process may take from the device: its memory less the CUDA context and what others
            hold. None for no limit.
        expandable_segments: as PYTORCH_ALLOC_CONF=expandable_segments:True.

    Raises:
        ForgeError: A block is freed that is not there or allocated twice, or a size or the capacity is negative.
    """
    if capacity is not None and (isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 0):
        raise ForgeError(f"capacity={capacity!r}: give a number of bytes, such as 24 * 2**30, or None for no limit.")
    device = _Device(capacity)
    pool = _ExpandablePool if expandable_segments else _Pool
    small, large = pool(device, small=True), pool(device, small=False)
    live: dict[int, tuple[_Block | None, int]] = {}
    allocated = requested = allocated_peak = requested_peak = 0
    failed = None
    for index, (n, size) in enumerate(events):
        if size >= 0:
            if n in live:
                raise ForgeError(f"Event {index} allocates block {n}, which is still allocated: free it first.")
            block = None
            if size:
                rounded = -(-size // _ROUND) * _ROUND
                home = small if rounded <= _SMALL_REQUEST else large
                block = home.allocate(rounded)
                if block is None:
                    device.retries += 1
                    large.release()
                    small.release()
                    block = home.reserve(rounded)
                if block is None:
                    failed = index
                    break
                allocated += block.size
                requested += size
                allocated_peak = max(allocated_peak, allocated)
                requested_peak = max(requested_peak, requested)
            live[n] = block, size
        elif size == -1:
            if n not in live:
                raise ForgeError(f"Event {index} frees block {n}, which is not allocated.")
            freed, asked = live.pop(n)
            if freed:
                allocated -= freed.size
                requested -= asked
                freed.pool.free(freed)
        else:
            raise ForgeError(f"Event {index} is ({n}, {size}): a size is not negative, except for -1, which frees.")
    return Replay(allocated_peak, requested_peak, device.reserved_peak, device.reserved, device.retries, failed)


class _Device:
    """The memory that segments and pages come from."""

    def __init__(self, capacity: int | None) -> None:
        self.capacity = capacity
        self.reserved = self.reserved_peak = self.retries = 0
        self.end = 0

    def take(self, size: int) -> bool:
        if self.capacity is not None and self.reserved + size > self.capacity:
            return False
        self.reserved += size
        self.reserved_peak = max(self.reserved_peak, self.reserved)
        return True

    def give_back(self, size: int) -> None:
        self.reserved -= size

    def addresses(self, size: int) -> int:
        """Where the next segment begins: never the end of the last, for blocks of two segments are no neighbours."""
        begin = self.end
        self.end += size
        return begin


class _Block:
    """A piece of a segment, between its neighbours."""

    __slots__ = ("address", "free", "mapped", "next", "pool", "prev", "size")

    def __init__(self, pool: _Pool, address: int, size: int) -> None:
        self.pool = pool
        self.address = address
        self.size = size
        self.free = True
        self.mapped = True
        self.prev: _Block | None = None
        self.next: _Block | None = None

    def cut(self, size: int) -> _Block:
        """Keep the first `size` bytes, and return the rest as a block of its own."""
        rest = _Block(self.pool, self.address + size, self.size - size)
        rest.mapped = self.mapped
        rest.prev, rest.next = self, self.next
        if self.next:
            self.next.prev = rest
        self.next = rest
        self.size = size
        return rest

    def absorb_next(self) -> None:
        after = self.next
        assert after is not None
        self.size += after.size
        self.next = after.next
        if after.next:
            after.next.prev = self


class _Pool:
    """The free blocks of the small or the large pool, smallest first, then by address."""

    def __init__(self, device: _Device, *, small: bool) -> None:
        self.device = device
        self.small = small
        self.order: list[tuple[int, int]] = []
        self.at: dict[int, _Block] = {}

    def allocate(self, size: int) -> _Block | None:
        """A block for `size` bytes, cached or new; None if the device has no room."""
        block = self.best_fit(size)
        return self.reserve(size) if block is None else self.use(block, size)

    def reserve(self, size: int) -> _Block | None:
        """A block at the start of a new segment."""
        segment = self.segment_size(size)
        if not self.device.take(segment):
            return None
        return self.use(_Block(self, self.device.addresses(segment), segment), size)

    def segment_size(self, size: int) -> int:
        if self.small:
            return _SMALL_SEGMENT
        return _LARGE_SEGMENT if size < _OWN_SEGMENT else -(-size // _ROUND_SEGMENT) * _ROUND_SEGMENT

    def use(self, block: _Block, size: int) -> _Block:
        if self.worth_splitting(block.size - size):
            self.add(block.cut(size))
        block.free = False
        return block

    def worth_splitting(self, rest: int) -> bool:
        return rest >= _ROUND if self.small else rest > _SMALL_REQUEST

    def free(self, block: _Block) -> None:
        block.free = True
        self.add(self.joined(block))

    def joined(self, block: _Block) -> _Block:
        """`block` with its free neighbours, which leave the pool."""
        if (after := block.next) and after.free and after.mapped:
            self.discard(after)
            block.absorb_next()
        if (before := block.prev) and before.free and before.mapped:
            self.discard(before)
            before.absorb_next()
            return before
        return block

    def add(self, block: _Block) -> None:
        insort(self.order, (block.size, block.address))
        self.at[block.address] = block

    def discard(self, block: _Block) -> None:
        del self.order[bisect_left(self.order, (block.size, block.address))]
        del self.at[block.address]

    def best_fit(self, size: int) -> _Block | None:
        index = bisect_left(self.order, (size, 0))
        if index == len(self.order):
            return None
        return self.at.pop(self.order.pop(index)[1])

    def release(self) -> None:
        """Give the segments back that are one free block."""
        for block in list(self.at.values()):
            if block.prev is None and block.next is None:
                self.discard(block)
                self.device.give_back(block.size)


class _ExpandablePool(_Pool):
    """A pool that is one segment, of which pages are mapped and unmapped."""

    def __init__(self, device: _Device, *, small: bool) -> None:
        super().__init__(device, small=small)
        self.page = _SMALL_SEGMENT if small else _LARGE_SEGMENT
        # An address that both pages divide, so that pages begin at multiples of their size.
        everything = _Block(self, device.addresses(_ENDLESS * 10), _ENDLESS * 10)
        everything.mapped = False
        self.unmapped: list[int] = [everything.address]
        self.unmapped_at: dict[int, _Block] = {everything.address: everything}

    def worth_splitting(self, rest: int) -> bool:
        return rest >= _ROUND

    def best_fit(self, size: int) -> _Block | None:
        index = bisect_left(self.order, (size, 0))
        if index == len(self.order):
            return None
        could_be = self._could_be(index)
        while index + 1 < len(self.order) and (following := self._could_be(index + 1)) < could_be:
            index, could_be = index + 1, following
        return self.at.pop(self.order.pop(index)[1])

    def _could_be(self, index: int) -> int:
        """The size of a free block with the unmapped space behind it."""
        size, address = self.order[index]
        after = self.at[address].next
        return size if after is None or after.mapped else size + after.size

    def reserve(self, size: int) -> _Block | None:
        block = self._lowest_room(size)
        if not block.mapped:
            mapped = self._map(block, min(block.size, size))
            if mapped is None:
                return None
            block = mapped
        while block.size < size:
            assert block.next is not None
            mapped = self._map(block.next, min(size - block.size, block.next.size))
            if mapped is None:
                return None
            block = mapped
        self.discard(block)
        return self.use(block, size)

    def _lowest_room(self, size: int) -> _Block:
        """The first of the neighbours, free or unmapped, that have room together."""
        for address in self.unmapped:
            start = self.unmapped_at[address]
            if start.prev and start.prev.free:
                start = start.prev
            room, block = 0, start
            while room < size and block.free:
                room += block.size
                if block.next is None:
                    break
                block = block.next
            if room >= size:
                return start
        raise AssertionError("an expandable segment has no end")

    def _map(self, block: _Block, size: int) -> _Block | None:
        """Back the first `size` bytes of unmapped space by pages; returns the free block that these are part of."""
        size = -(-size // self.page) * self.page
        if not self.device.take(size):
            return None
        self._discard_unmapped(block)
        if size < block.size:
            self._add_unmapped(block.cut(size))
        block.mapped = True
        block = self.joined(block)
        self.add(block)
        return block

    def release(self) -> None:
        """Unmap the pages that lie wholly in a free block."""
        for block in list(self.at.values()):
            begin = -(-block.address // self.page) * self.page
            end = (block.address + block.size) // self.page * self.page
            if begin < end:
                self._unmap(block, begin, end)

    def _unmap(self, block: _Block, begin: int, end: int) -> None:
        self.discard(block)
        if block.address + block.size > end:
            self.add(block.cut(end - block.address))
        pages = block
        if block.address < begin:
            pages = block.cut(begin - block.address)
            self.add(block)
        self.device.give_back(pages.size)
        pages.mapped = False
        if (after := pages.next) and not after.mapped:
            self._discard_unmapped(after)
            pages.absorb_next()
        if (before := pages.prev) and not before.mapped:
            before.absorb_next()
        else:
            self._add_unmapped(pages)

    def _add_unmapped(self, block: _Block) -> None:
        insort(self.unmapped, block.address)
        self.unmapped_at[block.address] = block

    def _discard_unmapped(self, block: _Block) -> None:
        del self.unmapped[bisect_left(self.unmapped, block.address)]
        del self.unmapped_at[block.address]
