"""The one process that appends to a segment."""

from __future__ import annotations

import io
import os
import weakref
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import torch

from .segment import (
    ALIGNMENT,
    HEADER_BYTES,
    INDEX,
    RECORD_BYTES,
    STATES,
    Layout,
    Record,
    Segment,
    bytes_of,
    checksum_of,
)

UNNAMED = ".new"
"""The suffix of an index that is not a segment yet."""


class Writer(Segment):
    """A new segment of this process's own.

    Args:
        folder: Where it is made; it is there.
        layout: What it will hold.

    Raises:
        OSError: It cannot be made; nothing is left of it.
    """

    def __init__(self, folder: Path, layout: Layout) -> None:
        super().__init__(folder, uuid4().hex, layout)
        self.process = os.getpid()
        unnamed = self.index.with_suffix(UNNAMED)
        self._states_file = self.states.open("xb", buffering=0)
        try:
            self._index_file = unnamed.open("xb", buffering=0)
            try:
                for file, suffix in ((self._states_file, STATES), (self._index_file, INDEX)):
                    _write_at(file.fileno(), memoryview(layout.header(suffix)), 0)
                self.sync()
                unnamed.rename(self.index)
            except BaseException:
                self._index_file.close()
                unnamed.unlink(missing_ok=True)
                raise
        except BaseException:
            self._states_file.close()
            self.states.unlink(missing_ok=True)
            raise
        # Whoever forgets to close the store shall not be told so when its files are collected.
        self._closing = weakref.finalize(self, _close, self._states_file, self._index_file)
        self._states_end = self.index_bytes = HEADER_BYTES

    @property
    def nbytes(self) -> int:
        """The bytes of both files."""
        return self._states_end + self.index_bytes

    @property
    def deleted(self) -> bool:
        """Whether somebody deleted one of the files, so that nobody would find what is written."""
        return any(os.fstat(file.fileno()).st_nlink == 0 for file in (self._states_file, self._index_file))

    def append(self, key: bytes, states: torch.Tensor) -> Record:
        """Write the states, then their index record.

        Args:
            key: 16 bytes.
            states: Contiguous, on the CPU, of the segment's layout.

        Raises:
            OSError: They could not be written. The segment is as before.
        """
        data = bytes_of(states)
        offset = -(-self._states_end // ALIGNMENT) * ALIGNMENT
        record = Record(self, offset, len(states), checksum_of(states))
        try:
            _write_at(self._states_file.fileno(), data, offset)
            _write_at(self._index_file.fileno(), memoryview(record.pack(key)), self.index_bytes)
        except OSError:
            # The record is not whole, so no process looks at what is cut off.
            with suppress(OSError):
                self._index_file.truncate(self.index_bytes)
                self._states_file.truncate(self._states_end)
            raise
        self._states_end = offset + len(data)
        self.index_bytes += RECORD_BYTES
        self._good_until = self.index_bytes
        return record

    def sync(self) -> None:
        """Bring what was written to the disk, the states before the index that speaks of them."""
        for file in (self._states_file, self._index_file):
            os.fsync(file.fileno())

    def close(self) -> None:
        """Append no more; reading goes on."""
        self._closing()


def _close(*files: io.FileIO) -> None:
    for file in files:
        file.close()


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
