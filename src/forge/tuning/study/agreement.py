"""Whether two workers mean the same study."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ...errors import ConflictError
from ...reporting.private import without_credentials

_MISSING = "nothing"


def check_same(name: str, stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse to go on with a study whose settings are others.

    Args:
        name: of the study.
        stored: its settings.
        given: this worker's.

    Raises:
        ConflictError: they differ; the message says in what.

    >>> check_same("first", {"model": {"name": "a"}}, {"model": {"name": "b"}})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    forge.errors.ConflictError: The study 'first' was begun with other settings: model.name was "a" and is now "b". ...
    """
    differences = [
        f"{key} was {_short(was)} and is now {_short(now)}"
        for key, (was, now) in sorted(_pairs(as_json(stored), as_json(given)).items())
        if was != now
    ]
    if differences:
        more = f"; and {len(differences) - 6} more" if len(differences) > 6 else ""
        raise ConflictError(
            f"The study {name!r} was begun with other settings: {'; '.join(differences[:6])}{more}. "
            "Give the same again to go on with it, or choose another study_name or output_dir for a new study."
        )


def as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as the database gives them back.

    Args:
        settings: of values that JSON knows.

    >>> as_json({"betas": (0.9, 0.95)})
    {'betas': [0.9, 0.95]}
    """
    return dict(json.loads(json.dumps(settings)))


def _pairs(stored: Any, given: Any, path: str = "") -> dict[str, tuple[str, str]]:
    """Every place in either, with what stands there as text."""
    if isinstance(stored, dict) and isinstance(given, dict):
        found: dict[str, tuple[str, str]] = {}
        for key in {*stored, *given}:
            place = f"{path}.{key}" if path else str(key)
            found |= _pairs(stored.get(key, _Nothing), given.get(key, _Nothing), place)
        return found
    return {path: (_text(stored), _text(given))}


class _Nothing:
    """Where one of the two has no such key."""


def _text(value: Any) -> str:
    if value is _Nothing:
        return _MISSING
    return json.dumps(value, sort_keys=True)


def _short(said: str) -> str:
    said = without_credentials(said)
    return said if len(said) <= 120 else f"{said[:117]}..."
