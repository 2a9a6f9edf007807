"""Which process this is, and whether another one of this machine still lives."""

from __future__ import annotations

import functools
import os
import socket
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A process, as others can find it again.

    Args:
        machine: and the boot of it, and the container: where process numbers mean the same.
        pid: its number.
        started: when it began, in the system's own unit; numbers are given again to others.
    """

    machine: str
    pid: int
    started: float

    @classmethod
    def this(cls) -> Process:
        """The one that asks."""
        pid = os.getpid()
        return cls(_machine(), pid, _started(pid) or 0.0)

    @property
    def is_gone(self) -> bool:
        """Whether it surely lives no more; False for one elsewhere, of which nothing is known.

        >>> Process.this().is_gone
        False
        """
        if self.machine != _machine():
            return False
        started = _started(self.pid)
        return started is None or abs(started - self.started) > 2


@functools.cache
def _machine() -> str:
    """The host, its boot and the namespace of process numbers: containers may share all but the last."""
    parts = [socket.gethostname()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    except OSError:  # another system: its network card's number
        parts.append(f"{uuid.getnode():x}")
    with suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _started(pid: int) -> float | None:
    """When a process began; None where there is none, or only what its parent has not yet collected."""
    import psutil  # type: ignore[import-untyped]

    stat = Path(f"/proc/{pid}/stat")
    try:
        # In ticks since the boot: psutil's seconds since 1970 move when the machine's clock is set.
        text = stat.read_text()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    else:
        fields = text[text.rindex(")") + 2 :].split()
        return None if fields[0] in "ZXx" else float(fields[19])
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None
    except psutil.AccessDenied:  # it is there, and it is not ours: another one of the same number
        return 0.0
