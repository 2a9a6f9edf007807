"""What there is to tell, as lines in a file that only grows: one process writes, another one reads."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

logger = logging.getLogger("forge.tracking")

LINES, KEY, COPIES = "spool.jsonl", "key", "copies"


class Spool:
    """The writing end; it never raises, since no training may end for it.

    Args:
        folder: where it is kept; what an earlier process wrote is gone on with.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LINES
        self._lock = threading.Lock()
        self._told_before: dict[tuple[str, str, int], float] = {}
        self._lost = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.key = _key(folder / KEY)
            for record in self._before():
                if record["do"] == "metrics":
                    told = {(record["run"], name, record["step"]): value for name, value in record["values"].items()}
                    self._told_before |= told
        except OSError as error:
            self.key = uuid4().hex
            self._lose(error)

    def add(self, run: str, do: str, **what: Any) -> None:
        """Write a line.

        Args:
            run: the key of the run that it is about.
            do: "begin", "params", "metrics", "tags", "artifact" or "end".
            **what: the rest of it.
        """
        line = json.dumps({"run": run, "do": do, "time": round(time.time() * 1000), **what}, ensure_ascii=False)
        with self._lock:
            if self._lost:
                return
            try:
                with self.path.open("ab") as file:
                    # Paths may hold bytes that are no text; json reads them back.
                    file.write(line.encode("utf-8", "surrogatepass") + b"\n")
            except OSError as error:
                self._lose(error)

    def add_metrics(self, run: str, values: dict[str, float], step: int) -> None:
        """Write figures, but for those that a process wrote which was killed later and comes to the step again.

        Figures without a step, which are results, are written again where they have changed.
        """
        new = {name: value for name, value in values.items() if not self._was_told((run, name, step), value)}
        if new:
            self.add(run, "metrics", values=new, step=step)

    def keep(self, run: str, path: Path, changed: Callable[[str], str]) -> Path | None:
        """A changed copy of a text file, kept beside the lines; None, and a warning, where there can be none.

        Args:
            run: the key of the run that it is for.
            path: the file's.
            changed: its text -> the copy's.
        """
        copy = self.path.parent / COPIES / run.replace("/", "-") / path.name
        try:
            text = path.read_text(encoding="utf-8")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(changed(text), encoding="utf-8")
        except (OSError, ValueError) as error:
            logger.warning("%s is not logged (%s): it must be a text file.", path, error)
            return None
        return copy

    def _was_told(self, what: tuple[str, str, int], value: float) -> bool:
        before = self._told_before.get(what)
        return before is not None and (what[-1] != 0 or repr(before) == repr(value))

    def _before(self) -> Iterator[dict[str, Any]]:
        """The lines of an earlier process; one that a kill cut short is ended, so that the next begins afresh."""
        if not self.path.exists():
            return
        line = b"\n"
        with self.path.open("rb") as file:
            for line in file:
                if record := parsed(line):
                    yield record
        if not line.endswith(b"\n"):
            with self.path.open("ab") as file:
                file.write(b"\n")

    def _lose(self, error: OSError) -> None:
        self._lost = True
        logger.warning(
            "%s is no longer written (%s); MLflow will not hear of the rest. The run goes on.", self.path, error
        )


def parsed(line: bytes) -> dict[str, Any] | None:
    """A line, or None where a kill cut it short."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    whole = (
        isinstance(found, dict)
        and {"run", "do", "time"} <= found.keys()
        and _NEEDED.get(found["do"], set()) <= found.keys()
    )
    return found if whole else None


_NEEDED = {
    "begin": {"name", "parent"},
    "params": {"values"},
    "tags": {"values"},
    "metrics": {"values", "step"},
    "artifact": {"path", "to"},
    "end": {"status"},
}


def _key(path: Path) -> str:
    """What the runs of this folder are known by, for ever."""
    if path.exists() and (known := path.read_text(encoding="utf-8").strip()):
        return known
    key = uuid4().hex
    path.write_text(key, encoding="utf-8")
    return key
