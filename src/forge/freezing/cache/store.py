"""Hidden states by key, on the disk: the segments of all processes as one."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from pathlib import Path
from types import TracebackType

import torch

from ...errors import ForgeError
from .room import Room, file_sizes, readable
from .segment import ALIGNMENT, HEADER_BYTES, INDEX, KEY_BYTES, RECORD_BYTES, STATES, Layout, Record, Segment
from .table import Table
from .writer import Writer

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_OWN_FILES = re.compile(r"[0-9a-f]{32}\.(states|index|new)")


class StateStore:
    """Hidden states by key, in memory-mapped files that only grow.

    Any number of processes read and write one folder: each appends to a segment of its own, made when it first adds
    something, and reads those of all; there are no locks. Within a process it is for one thread at a time. After a
    fork, parent and child go on as two processes.

    What `add` has stored survives kill -9; what `flush` came after survives a loss of power. What is damaged is absent.

    >>> import tempfile
    >>> key = b"sixteen bytes ok"
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with StateStore(Path(folder), width=2, dtype=torch.bfloat16, max_bytes=10_000) as store:
    ...         stored = store.add(key, torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=torch.bfloat16))
    ...         print(stored, store.tokens(key), store.get(key)[1:])
    True 3 tensor([[3., 4.],
            [5., 6.]], dtype=torch.bfloat16)

    Args:
        folder: One folder per model, boundary and dtype; made if it is missing.
        width: The hidden size.
        dtype: What the states are stored in.
        max_bytes: What all files in the folder may take together. Processes that write at the same time may pass it
            by a few samples. Whatever it is, the larger of 1 GiB and 1% of the disk is left free.

    Raises:
        ForgeError: The folder cannot be written to, or holds something else.
    """

    full: str | None
    """Why nothing more is stored, with numbers and the remedy; None while there is room. Reading goes on."""

    def __init__(self, folder: Path, *, width: int, dtype: torch.dtype, max_bytes: int) -> None:
        for name, value in (("width", width), ("max_bytes", max_bytes)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ForgeError(f"{name}={value!r}: give a whole number above 0.")
        self.folder = Path(folder)
        self.full = None
        self._layout = Layout(width, dtype)
        self._room = Room(self.folder, max_bytes)
        self._table = Table()
        self._segments: dict[str, Segment] = {}
        self._writer: Writer | None = None
        self._nbytes = 0
        self._closed = False
        try:
            # A folder that cannot be written to is found out now, not after the first hour.
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            self._not_written(error)
        self.refresh()

    def __repr__(self) -> str:
        return (
            f"StateStore({self.num_samples} samples, {self.num_tokens} tokens, {readable(self.nbytes)}, {self.folder})"
        )

    def __contains__(self, key: bytes) -> bool:
        return _checked(key) in self._table

    @property
    def dtype(self) -> torch.dtype:
        """What the states are stored in."""
        return self._layout.dtype

    @property
    def num_samples(self) -> int:
        """How many keys are known."""
        return len(self._table)

    @property
    def num_tokens(self) -> int:
        """How many rows they have together."""
        return self._table.num_tokens

    @property
    def nbytes(self) -> int:
        """What the files of all processes took at the last `refresh`, with what this one wrote since."""
        return self._nbytes

    def tokens(self, key: bytes) -> int:
        """How many rows `get` returns.

        Raises:
            KeyError: The key is not there.
        """
        return self._table[_checked(key)].tokens

    def get(self, key: bytes) -> torch.Tensor | None:
        """The states of a sample, or None.

        None also where `key in store` was true and the states turn out to be damaged or deleted, which only reading
        them shows; from then on the key is absent, and can be added again.

        Args:
            key: 16 bytes.

        Returns:
            (tokens, width) on the CPU, a view of the file. Copy it before you change it: changes never reach the file,
            but the next `get` in this process would see them.

        Raises:
            ForgeError: The key has another length, or the file cannot be read.
        """
        self._check_open()
        while record := self._table.get(_checked(key)):
            try:
                states = record.segment.read(record)
            except OSError as error:
                raise _not_read(record.segment.states, error) from error
            if states is not None:
                return states
            self._table.drop(key)
        return None

    def add(self, key: bytes, states: torch.Tensor) -> bool:
        """Store the states of a sample.

        Args:
            key: 16 bytes.
            states: (tokens, width) on the CPU, of the store's dtype; any strides.

        Returns:
            Whether they are there now, or were already. False where there is no room: `full` says why.

        Raises:
            ForgeError: The states are not such, or cannot be written for another reason than room.
        """
        self._check_open()
        self._check_states(states)
        if _checked(key) in self._table:
            return True
        if self.full is not None:
            return False
        if self._writer is not None and (self._writer.process != os.getpid() or self._writer.deleted):
            self._leave_writer()
        try:
            self.full = self._room.refuse(self._size_at_most(states))
            if self.full is not None:
                return False
            record = self._append(key, states.contiguous())
        except OSError as error:
            self._not_written(error)
            return False
        except BaseException:
            # An interrupt: nobody knows how far the writing came, so nothing may be written behind it.
            self._leave_writer()
            raise
        self._table.take(key, record)
        return True

    def refresh(self) -> int:
        """Learn what other processes appended, and what was deleted.

        Returns:
            How many keys are new.

        Raises:
            ForgeError: A file in the folder is no segment, or holds states of another width or dtype.
        """
        self._check_open()
        sizes = file_sizes(self.folder)
        self._nbytes = sum(sizes.values())
        names = [file.removesuffix(INDEX) for file in sizes if file.endswith(INDEX)]
        for name in self._segments.keys() - {name for name in names if name + STATES in sizes}:
            self._forget(self._segments.pop(name))
        new = 0
        for name in names:
            known = self._segments.get(name)
            if known is not None and known.index_bytes == sizes[name + INDEX]:
                continue
            segment = known or Segment(self.folder, name, self._layout)
            try:
                if known is None:
                    segment.check()
                news = segment.news()
            except FileNotFoundError:
                continue  # deleted just now, or half of a pair that a loss of power left
            except OSError as error:
                raise _not_read(segment.index, error) from error
            self._segments[name] = segment
            new += sum([self._table.take(key, record) for key, record in news])
        return new

    def flush(self) -> None:
        """Bring what this process added to the disk itself, where a loss of power does not reach it."""
        if self._writer is not None and self._writer.process == os.getpid():
            try:
                self._writer.sync()
            except OSError as error:
                self._not_written(error)

    def close(self) -> None:
        """Close the files. Tensors that `get` returned stay valid."""
        self._leave_writer()
        for segment in self._segments.values():
            segment.release()
        self._closed = True

    def clear(self) -> None:
        """Delete the files of all processes; those that still write begin new ones."""
        self._check_open()
        self._leave_writer()
        try:
            # The index first: without it, nobody looks for the states.
            for path in sorted(self.folder.glob("*"), key=lambda path: path.suffix != INDEX):
                if _OWN_FILES.fullmatch(path.name):
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise ForgeError(f"{error.filename} cannot be deleted ({error.strerror}). Delete {self.folder}.") from error
        self.full = None
        self.refresh()

    def __enter__(self) -> StateStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, key: bytes, states: torch.Tensor) -> Record:
        before = self._writer.nbytes if self._writer else 0
        if self._writer is None:
            self.folder.mkdir(parents=True, exist_ok=True)  # somebody may have deleted it
            self._writer = Writer(self.folder, self._layout)
            self._segments[self._writer.index.stem] = self._writer
        record = self._writer.append(key, states)
        self._nbytes += self._writer.nbytes - before
        return record

    def _leave_writer(self) -> None:
        """Append no more to this segment; the next `add` begins another."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _forget(self, segment: Segment) -> None:
        segment.release()
        self._table.forget(segment)
        if segment is self._writer:
            self._leave_writer()

    def _size_at_most(self, states: torch.Tensor) -> int:
        headers = 2 * HEADER_BYTES if self._writer is None else 0
        return headers + ALIGNMENT + len(states) * self._layout.row_bytes + RECORD_BYTES

    def _check_open(self) -> None:
        if self._closed:
            raise ForgeError(f"The store in {self.folder} was closed: open another StateStore on this folder.")

    def _check_states(self, states: torch.Tensor) -> None:
        if not isinstance(states, torch.Tensor):
            raise ForgeError(f"The states are a {type(states).__name__}: give a tensor.")
        if states.ndim != 2 or states.shape[1] != self._layout.width or not len(states):
            raise ForgeError(
                f"The states have the shape {tuple(states.shape)}, but the store in {self.folder} takes "
                f"(tokens, {self._layout.width}) with one token or more: give one sample, without batch and padding."
            )
        if states.dtype != self._layout.dtype or states.device.type != "cpu":
            raise ForgeError(
                f"The states are {states.dtype} on {states.device}, but the store in {self.folder} takes "
                f'{self._layout.dtype} on the CPU: give states.to("cpu", {self._layout.dtype}).'
            )

    def _not_written(self, error: OSError) -> None:
        """Stop storing where the disk is full.

        Raises:
            ForgeError: It is something else.
        """
        if error.errno not in _NO_ROOM:
            raise ForgeError(
                f"{self.folder} cannot be written to ({error.strerror}). Give the cache a folder that this user may "
                "write to, on a disk that is sound."
            ) from error
        self.full = (
            f"Writing to {self.folder} failed ({error.strerror}) with {readable(self._nbytes)} in it. "
            "Free space, or name another folder."
        )


def _checked(key: bytes) -> bytes:
    if not isinstance(key, bytes) or len(key) != KEY_BYTES:
        raise ForgeError(f"{key!r} is no key: give {KEY_BYTES} bytes, such as a digest of the sample.")
    return key


def _not_read(path: Path, error: OSError) -> ForgeError:
    return ForgeError(
        f"{path} cannot be read ({error.strerror}). Make it readable, delete {path.parent}, or give the cache another "
        "folder."
    )
