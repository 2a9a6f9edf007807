"""A segment: the hidden states that one process wrote, in a pair of files that only grow.

    <id>.states   a header, then the states of one sample after the other, each at a multiple of 64 bytes
    <id>.index    a header, then 48 bytes per sample: key, offset, tokens, checksum of the states, checksum of these

The states are written before their index record. A record counts if its own checksum is right and its states lie
inside the file; the states count if their checksum is right, which the first read looks at. So wherever a process is
killed or a machine loses power, a sample is there whole or not at all. What kill -9 leaves is in the page cache, where
every process sees it: only a loss of power needs fsync.

The headers are on the disk before the index gets its name, so nobody meets half of one; a file with another header is
not a segment.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from xxhash import xxh3_64_intdigest

from ...errors import ForgeError

FORMAT = 1
STATES, INDEX = ".states", ".index"
KEY_BYTES = 16
ALIGNMENT = 64
HEADER_BYTES = 64
RECORD_BYTES = 48

_MAGIC = {STATES: b"forgeHS\n", INDEX: b"forgeIX\n"}
_HEADER = struct.Struct("<8sII16s24xQ")
_RECORD = struct.Struct("<16sQQQQ")
_CHECKSUM_BYTES = 8

# Python knows its name from 3.13 on. Linux refuses a private writable mapping larger than RAM and swap without it.
_MAP_NORESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


@dataclass(frozen=True)
class Layout:
    """What all segments of a folder have in common: `width` numbers of `dtype` per token."""

    width: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"width {self.width} in {self._dtype_name}"

    @property
    def row_bytes(self) -> int:
        """The bytes of one token."""
        return self.width * self.dtype.itemsize

    @property
    def _dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def header(self, suffix: str) -> bytes:
        """The first 64 bytes of a file of this kind."""
        fields = (_MAGIC[suffix], FORMAT, self.width, self._dtype_name.encode())
        start = _HEADER.pack(*fields, 0)[:-_CHECKSUM_BYTES]
        return _HEADER.pack(*fields, xxh3_64_intdigest(start))

    def check(self, path: Path) -> None:
        """Refuse a file whose header is another.

        Raises:
            ForgeError: It is no segment, one of another format, or holds states of another width or dtype.
            OSError: It cannot be read.
        """
        with path.open("rb", buffering=0) as file:
            found = file.read(HEADER_BYTES)
        if found == self.header(path.suffix):
            return
        magic = _MAGIC[path.suffix]
        version = int.from_bytes(found[8:12], "little")
        remedy = f"Delete the folder {path.parent}, or give the cache another one."
        if not found.startswith(magic):
            begin = bytes(found[: len(magic)])
            raise ForgeError(f"{path} is no file of cached states: it begins with {begin!r}, not {magic!r}. {remedy}")
        if version != FORMAT:
            raise ForgeError(f"{path} has format {version}; this version of forge reads format {FORMAT}. {remedy}")
        if len(found) < HEADER_BYTES or _HEADER.unpack(found)[-1] != xxh3_64_intdigest(found[:-_CHECKSUM_BYTES]):
            raise ForgeError(f"{path} has a damaged header: its checksum does not fit. {remedy}")
        _, _, width, dtype, _ = _HEADER.unpack(found)
        name = dtype.rstrip(b"\0").decode(errors="replace")
        raise ForgeError(f"{path} holds states of width {width} in {name}, but {self} is asked for. {remedy}")


@dataclass(slots=True, eq=False)
class Record:
    """Where the states of one sample are.

    Args:
        segment: The files.
        offset: Where in the `.states` file they begin.
        tokens: How many rows they have.
        checksum: The xxh3_64 of their bytes.
        verified: Whether this process has seen that it is right.
    """

    segment: Segment
    offset: int
    tokens: int
    checksum: int
    verified: bool = False

    def pack(self, key: bytes) -> bytes:
        """The 48 bytes of the index."""
        fields = (key, self.offset, self.tokens, self.checksum)
        return _RECORD.pack(*fields, xxh3_64_intdigest(_RECORD.pack(*fields, 0)[:-_CHECKSUM_BYTES]))


class Segment:
    """A segment as every process reads it, while its writer may still be at work.

    Args:
        folder: Where the two files are.
        name: Their name without suffix.
        layout: What they must hold.
    """

    def __init__(self, folder: Path, name: str, layout: Layout) -> None:
        self.states = folder / (name + STATES)
        self.index = folder / (name + INDEX)
        self.layout = layout
        self.index_bytes = 0
        """The size of the index when it was last read."""
        self._good_until = HEADER_BYTES
        self._mapping: mmap.mmap | None = None

    def check(self) -> None:
        """Refuse files that are no segment of this layout, as `Layout.check` does."""
        self.layout.check(self.index)
        self.layout.check(self.states)

    def news(self) -> list[tuple[bytes, Record]]:
        """The samples that came since the last call.

        Raises:
            OSError: A file cannot be read, or was deleted.
        """
        start = self._good_until
        with self.index.open("rb", buffering=0) as file:
            file.seek(start)
            tail = file.read()
        # After the index: states that a record speaks of were written before it.
        end = self.states.stat().st_size
        self.index_bytes = start + len(tail)
        found = []
        whole = memoryview(tail)[: len(tail) // RECORD_BYTES * RECORD_BYTES]
        for number, (key, offset, tokens, checksum, own) in enumerate(_RECORD.iter_unpack(whole)):
            entry = whole[number * RECORD_BYTES : (number + 1) * RECORD_BYTES]
            if own != xxh3_64_intdigest(entry[:-_CHECKSUM_BYTES]) or offset + tokens * self.layout.row_bytes > end:
                continue
            # What follows the last good record may be half written: it is read again when the index has grown.
            self._good_until = start + (number + 1) * RECORD_BYTES
            found.append((key, Record(self, offset, tokens, checksum)))
        return found

    def read(self, record: Record) -> torch.Tensor | None:
        """The states of a record of this segment, (tokens, width); None if they are gone or not what was written.

        The tensor is a view of a private, copy-on-write mapping: what is written into it does not reach the file, and
        it outlives the segment and even the file.
        """
        size = record.tokens * self.layout.row_bytes
        try:
            buffer, offset = self._buffer(record.offset, size)
        except FileNotFoundError:
            return None
        if buffer is None:
            return None
        count = record.tokens * self.layout.width
        states = torch.frombuffer(buffer, dtype=self.layout.dtype, count=count, offset=offset)
        if not record.verified:
            if checksum_of(states) != record.checksum:
                return None
            record.verified = True
        return states.view(record.tokens, self.layout.width)

    def release(self) -> None:
        """Let go of the mapping, which ends with the last tensor that looks into it."""
        # Never mmap.close(): a tensor from torch.frombuffer does not keep a mapping from being unmapped below it.
        self._mapping = None

    def _buffer(self, offset: int, size: int) -> tuple[mmap.mmap | bytearray | None, int]:
        """Something that holds these bytes of the file, and where they begin in it; None if the file ends earlier."""
        if self._mapping is None or len(self._mapping) < offset + size:
            with self.states.open("rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size < offset + size:
                    return None, 0
                self.release()
                try:
                    self._mapping = mmap.mmap(
                        file.fileno(),
                        0,
                        flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
                        prot=mmap.PROT_READ | mmap.PROT_WRITE,
                    )
                except OSError:
                    # A limit on address space, strict overcommit, a file system without mmap: a copy is as good.
                    return _read_at(file.fileno(), size, offset), 0
        # One request to the disk for the whole sample, where page faults would ask for 128 KiB at a time.
        page = offset - offset % mmap.PAGESIZE
        self._mapping.madvise(mmap.MADV_WILLNEED, page, offset + size - page)
        return self._mapping, offset


def bytes_of(states: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, not copied."""
    return states.detach().view(-1).view(torch.uint8).numpy().data


def checksum_of(states: torch.Tensor) -> int:
    """The xxh3_64 of a contiguous tensor's bytes."""
    return xxh3_64_intdigest(bytes_of(states))


def _read_at(descriptor: int, size: int, offset: int) -> bytearray | None:
    data = bytearray(size)
    done = 0
    while done < size:
        read = os.preadv(descriptor, [memoryview(data)[done:]], offset + done)
        if not read:
            return None
        done += read
    return data
