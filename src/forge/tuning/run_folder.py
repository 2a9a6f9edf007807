"""The folder of a run: what it is, how far it came, what it made.

run.json        what the run is: config, recipe, model, data, seeds, versions
preset.json     the recipe with every reason
checkpoints/    of the Trainer
training/       MonitorCallback's log and report
adapter/        the result, with its model card
evaluation/     base/ and tuned/, and their comparison
report.html     all of it on a page
result.json     what `TuningResult.load` reads; a run that has it is over
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..errors import ConflictError, ForgeError
from ..presets import Preset
from ..reporting.charts import write_whole

logger = logging.getLogger("forge.tuning")

FORMAT = 1
LOCK = "lock"
# What must be the same for a run to go on; versions and dates may differ, and are said when they do.
IDENTITY = ("config", "preset", "params", "model", "data", "encoder", "seed")
_OF_CHECKPOINT = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth")


class RunFolder:
    """Paths and records of one run.

    Args:
        path: its folder, made when the run begins.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().absolute()  # the caller may change folders before reading the result
        self.checkpoints = self.path / "checkpoints"
        self.training = self.path / "training"
        self.adapter = self.path / "adapter"
        self.evaluation = self.path / "evaluation"
        self.report = self.path / "report.html"
        self.recipe = self.path / "preset.json"
        self.record = self.path / "run.json"
        self.result = self.path / "result.json"

    @property
    def finished(self) -> bool:
        """Whether the run is over and its result there."""
        return self.result.is_file() and (self.adapter / "adapter_config.json").is_file()

    @property
    def has_progress(self) -> bool:
        """Whether anything in it would have to be done again: a run that failed at once may be mended and run anew."""
        made = (self.checkpoints, self.evaluation, self.adapter, self.result)
        return any(path.is_file() or (path.is_dir() and any(path.iterdir())) for path in made)

    def begin(self, record: Mapping[str, Any], *, resume: bool) -> None:
        """Make the folder for this run, or find it there and go on.

        Args:
            record: what the run is, as JSON knows it.
            resume: whether a run that is there goes on. If not it is moved aside, never deleted.

        Raises:
            ConflictError: the folder holds another run; the message says in what it differs.
            ForgeError: the folder holds other things, or a file has its name.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ForgeError(f"output_dir={str(self.path)!r} is a file: name a folder, which may be new.")
        if self.record.is_file():
            before = self.read()
            if self.has_progress and resume:
                self._refuse_another(before, record)
                _say_what_changed(before.get("versions", {}), record.get("versions", {}))
                return
            if self.has_progress:
                self._set_aside()
        elif self.path.exists() and (
            there := sorted(child.name for child in self.path.iterdir() if not _is_ours(child))
        ):
            raise ForgeError(
                f"output_dir={str(self.path)!r} is not empty and holds no run ({', '.join(there[:5])}): name a new "
                "folder, so that nothing in it is overwritten."
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ForgeError(f"output_dir={str(self.path)!r} cannot be made ({error}): name another folder.") from error
        write_json(self.record, {"forge_run": FORMAT, "begun": now(), **record})

    def read(self) -> dict[str, Any]:
        """The record of the run that is there.

        Raises:
            ForgeError: there is none, or it is not one.
        """
        try:
            found = json.loads(self.record.read_text(encoding="utf-8"))
            known = found["forge_run"] == FORMAT
        except FileNotFoundError:
            raise ForgeError(f"{self.path} holds no run: there is no {self.record.name} in it.") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ForgeError(f"{self.record} is not the record of a run ({error}).") from error
        if not known:
            raise ForgeError(f"{self.record} has format {found['forge_run']!r}; this forge reads {FORMAT}.")
        return dict(found)

    @contextmanager
    def mine(self) -> Iterator[None]:
        """Keep other processes out of the folder while this one works in it.

        Raises:
            ForgeError: another one is at work.
        """
        from filelock import FileLock, Timeout

        lock = FileLock(self.path / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ForgeError(
                f"Another process is at work in {self.path}. Wait until it is over, or name another output_dir."
            ) from None
        try:
            yield
        finally:
            lock.release()

    def preset(self) -> Preset | None:
        """The recipe, value for value; None where it could not be written."""
        return Preset.load(self.recipe) if self.recipe.is_file() else None

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written to its end; the Trainer writes trainer_state.json last."""
        found = [path for path in self.checkpoints.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
        for path in sorted(found, key=lambda path: -int(path.name.rpartition("-")[2])):
            if _is_whole(path):
                return path
            logger.warning("%s was not written to its end and is passed over.", path.name)
        return None

    def _refuse_another(self, before: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        differences = [line for name in IDENTITY for line in _differences(name, before.get(name), record.get(name))]
        if differences:
            raise ConflictError(
                f"{self.path} holds another run. What differs (there, here):\n  "
                + "\n  ".join(differences[:12])
                + "\nName another output_dir, or pass resume=False: the run that is there is then moved aside."
            )

    def _set_aside(self) -> None:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        target = self.path.with_name(f"{self.path.name}.before-{stamp}")
        number = 1
        while target.exists():
            number += 1
            target = self.path.with_name(f"{self.path.name}.before-{stamp}-{number}")
        self.path.rename(target)
        logger.warning("The run that was in %s is now in %s.", self.path, target)


def _is_ours(path: Path) -> bool:
    """What a process leaves that is killed before the record is there."""
    return path.name == LOCK or path.suffix == ".tmp"


def write_json(path: Path, value: Any) -> None:
    """Write a value whole or not at all."""
    write_whole(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "replace"))


def now() -> str:
    """The time, as records have it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / _OF_CHECKPOINT[0]).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return all((checkpoint / name).is_file() for name in _OF_CHECKPOINT[1:])


def _differences(name: str, before: Any, after: Any) -> list[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        keys = dict.fromkeys([*before, *after])
        return [line for key in keys for line in _differences(f"{name}.{key}", before.get(key), after.get(key))]
    return [] if before == after else [f"{name}: {before!r:.80}, {after!r:.80}"]


def _say_what_changed(before: Mapping[str, str], after: Mapping[str, str]) -> None:
    changed = [f"{name} {before[name]} -> {after.get(name)}" for name in before if before[name] != after.get(name)]
    if changed:
        logger.warning("The run goes on with other versions than it began with: %s.", ", ".join(changed))
