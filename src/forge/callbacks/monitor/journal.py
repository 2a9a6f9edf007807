"""metrics.jsonl: one line for each entry of the log and each event, on disk as soon as it is known."""

from __future__ import annotations

import json
import math
from numbers import Real
from pathlib import Path
from typing import Any

from ...errors import ForgeError
from .events import Event, logger

FILE = "metrics.jsonl"


class Journal:
    """The lines of one run, which a killed and resumed run goes on with.

    Numbers that JSON has no word for are written as strings ("nan", "inf"), and read back as numbers.

    Args:
        folder: Where it is kept; made when it is missing.
        step: The step that training begins at: after a kill, lines of later steps are of work that is lost. At 0 an
            earlier run's file is kept beside, as metrics.1.jsonl and so on.
    """

    def __init__(self, folder: Path, *, step: int = 0) -> None:
        self._lost = False
        self.path = folder / FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._keep_earlier(step)
            self.path.touch()
        except OSError as error:
            raise ForgeError(f"report_dir={str(folder)!r} cannot be written ({error}): name another folder.") from error

    def add(self, step: int, values: dict[str, Any]) -> None:
        """Write an entry of the log."""
        self._write({"step": step, **values})

    def add_event(self, event: Event) -> None:
        """Write an event."""
        self._write({"step": event.step, "event": event.kind, "message": event.message})

    def _write(self, entry: dict[str, Any]) -> None:
        if self._lost:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({name: _plain(value) for name, value in entry.items()}) + "\n")
        except OSError as error:  # a full disk must not end the training
            self._lost = True
            logger.warning("%s is no longer written: %s. Training goes on.", self.path, error)

    def _keep_earlier(self, step: int) -> None:
        if not self.path.exists():
            return
        if step == 0:
            number = 1
            while (kept := self.path.with_name(f"metrics.{number}.jsonl")).exists():
                number += 1
            self.path.rename(kept)
            return
        lines = [
            json.dumps({k: _plain(v) for k, v in entry.items()}) for entry in read(self.path) if entry["step"] <= step
        ]
        self.path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def read(path: Path) -> list[dict[str, Any]]:
    """The entries of a journal; a last line that a kill cut short is left out."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        entries.append({name: _number(value) for name, value in entry.items()})
    return entries


def _plain(value: Any) -> Any:
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, Real):  # numpy's numbers too
        return float(value) if math.isfinite(value) else str(float(value))
    return str(value)


def _number(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value
