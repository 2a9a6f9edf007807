"""What there is to tell, as lines in a file that only grows: one process writes, another one reads."""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

logger = logging.getLogger("forge.tracking")

LINES, KEY = "spool.jsonl", "key"


class Spool:
    """The writing end; it never raises, since no training may end for it.

    Args:
        folder: where it is kept; what an earlier process wrote is gone on with.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LINES
        self._lock = threading.Lock()
        self._told: set[tuple[str, str, int]] = set()
        self._lost = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.key = _key(folder / KEY)
            for record in self._before():
                if record["do"] == "metrics":
                    self._told |= {(record["run"], name, record["step"]) for name in record["values"]}
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
                    file.write(line.encode("utf-8", "replace") + b"\n")
            except OSError as error:
                self._lose(error)

    def add_metrics(self, run: str, values: dict[str, float], step: int) -> None:
        """Write figures of a step; those that were written before a kill are not written again."""
        new = {name: value for name, value in values.items() if (run, name, step) not in self._told}
        if new:
            self._told |= {(run, name, step) for name in new}
            self.add(run, "metrics", values=new, step=step)

    def _before(self) -> list[dict[str, Any]]:
        """The lines of an earlier process; one that a kill cut short is ended, so that the next begins afresh."""
        if not self.path.exists():
            return []
        text = self.path.read_bytes()
        if text and not text.endswith(b"\n"):
            with self.path.open("ab") as file:
                file.write(b"\n")
        return list(filter(None, map(parsed, text.split(b"\n"))))

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
    return found if isinstance(found, dict) and {"run", "do", "time"} <= found.keys() else None


def _key(path: Path) -> str:
    """What the runs of this folder are known by, for ever."""
    if path.exists() and (known := path.read_text(encoding="utf-8").strip()):
        return known
    key = uuid4().hex
    path.write_text(key, encoding="utf-8")
    return key
