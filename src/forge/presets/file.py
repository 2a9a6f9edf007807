"""A preset as a JSON file: every value as it was, with its reason, so that a later forge gives the same."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import ForgeError
from ..hardware import PROFILES
from ..models import ModelAnatomy
from .choice import Choice
from .method import OBJECTIVES
from .preset import Preset

_FORMAT = 1


def write_preset(preset: Preset, path: Path) -> None:
    """Write the preset; see `Preset.save`."""
    if PROFILES.get(preset.hardware.name) != preset.hardware:
        raise ForgeError(
            f"hardware {preset.hardware.name!r} is a profile of your own, and a file keeps only the name of one of "
            f"{', '.join(PROFILES)}. Save one of these, and set what differs as overrides."
        )
    record = {
        "forge_preset": _FORMAT,
        "name": preset.name,
        "hardware": preset.hardware.name,
        "anatomy": preset.anatomy.to_dict() if preset.anatomy else None,
        "overrides": dict(preset.overrides),
        "tables": {o: {n: asdict(c) for n, c in table.items()} for o, table in preset.tables.items()},
    }
    lost = [name for name, value in preset.overrides.items() if not _survives(value)]
    if lost:
        raise ForgeError(
            f"The preset cannot be written as JSON: {', '.join(lost)} would not come back as it is. Leave it out, "
            "and set it on the object that the preset gives you."
        )
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_preset(path: Path) -> Preset:
    """The preset that `write_preset` wrote; see `Preset.load`."""
    text = path.read_bytes()
    try:
        record = json.loads(text)
        found = record["forge_preset"]
        if found == _FORMAT:
            return Preset(
                name=record["name"],
                hardware=PROFILES[record["hardware"]],
                anatomy=ModelAnatomy.from_dict(record["anatomy"]) if record["anatomy"] else None,
                overrides=record["overrides"],
                tables={o: {n: Choice(**c) for n, c in record["tables"][o].items()} for o in OBJECTIVES},
            )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ForgeError(f"{path} is not a preset: Preset.load reads what Preset.save wrote.") from error
    raise ForgeError(f"{path} has preset format {found!r}; this forge reads {_FORMAT}. Upgrade forge.")


def _survives(value: Any) -> bool:
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except TypeError:
        return False
