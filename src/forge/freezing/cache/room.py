"""What the files of a folder take, and whether there is room for more: in the user's limit and on the disk."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from .segment import INDEX, STATES

RESERVE_BYTES, RESERVE_SHARE = 2**30, 0.01
"""What is left free on the disk, the larger of the two: checkpoints go there too."""

_LOOKS = 256
"""Room is measured again when this part of it was used, because other processes use it too."""


class Room:
    """How much more may be written.

    Args:
        folder: Where; it need not be there.
        max_bytes: What all segments in it may take together.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._granted = 0

    def refuse(self, size: int) -> str | None:
        """Why `size` more bytes may not be written, or None, and then they count as written.

        Raises:
            OSError: The folder cannot be made or looked at.
        """
        if size > self._granted:
            self.folder.mkdir(parents=True, exist_ok=True)
            used, disk = sum(file_sizes(self.folder).values()), shutil.disk_usage(self.folder)
            reserve = reserve_of(disk.total)
            allowed, free = self.max_bytes - used, disk.free - reserve
            if size > allowed:
                return (
                    f"{self.folder} takes {readable(used)} of the {readable(self.max_bytes)} that it may, and the next "
                    f"sample {readable(size)} more. Raise the limit."
                )
            if size > free:
                return (
                    f"The disk of {self.folder} has {readable(disk.free)} free, of which {readable(reserve)} are kept "
                    f"for checkpoints, and the next sample takes {readable(size)}. Free space, or name another folder."
                )
            self._granted = max(size, min(allowed, free) // _LOOKS)
        self._granted -= size
        return None


def reserve_of(disk_bytes: int) -> int:
    """How many bytes of a disk of this size are left free."""
    return max(RESERVE_BYTES, int(disk_bytes * RESERVE_SHARE))


def file_sizes(folder: Path) -> dict[str, int]:
    """The bytes of every file that is part of a segment, by name; nothing for a folder that is not there."""
    sizes = {}
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith((STATES, INDEX)):
                with suppress(FileNotFoundError):
                    sizes[entry.name] = entry.stat().st_size
    return sizes


def readable(size: int) -> str:
    """A number of bytes in its unit.

    >>> readable(300), readable(5 * 2**29)
    ('300 bytes', '2.5 GiB')
    """
    if abs(size) < 2**10:
        return f"{size} bytes"
    power = next(power for power in (4, 3, 2, 1) if abs(size) >= 2 ** (10 * power))
    return f"{size / 2 ** (10 * power):.1f} {' KMGT'[power]}iB"
