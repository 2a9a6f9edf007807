"""The data of a project: a folder that the caller names, and the files in it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ...data.files import READERS
from ...errors import ConflictError, ForgeError

_VALIDATION = ("validation", "valid", "val", "dev", "test", "eval")
"""In this order: where there are several, the first is taken."""
_SAVED_TO_DISK = ({"dataset_dict.json"}, {"dataset_info.json", "state.json"})
_LISTED = 8


def dataset_of(
    project: int | str, projects: Mapping[Any, str | os.PathLike[str]] | Callable[[int | str], Any]
) -> tuple[str, str | None]:
    """The training data of a project, and its validation data if there are some.

    The id is only ever looked up: it never becomes part of a path.

    Args:
        project: Its id.
        projects: The folder of each, or a function that says it.

    Raises:
        ForgeError: There is no such project, folder or file; the message lists what there is.
    """
    folder = Path(_folder_of(project, projects)).expanduser()
    if folder.is_file() and folder.suffix.lower() in READERS:
        return str(folder), None
    if not folder.is_dir():
        raise ForgeError(f"its folder {str(folder)!r} is not there. Make it, or correct the mapping.")
    return find_data(folder)


def find_data(folder: Path) -> tuple[str, str | None]:
    """The training file of a folder, and its validation file if there is one.

    A folder that `datasets` saved is itself the training data, with its own splits.

    Raises:
        ForgeError: There is none, or several could be meant.
    """
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if any(marks <= set(names) for marks in _SAVED_TO_DISK):
        return str(folder), None
    files = [folder / name for name in names if Path(name).suffix.lower() in READERS and (folder / name).is_file()]
    held_out = next(filter(None, (_called(name, files) for name in _VALIDATION)), [])
    others = [file for file in files if file.stem.lower() not in _VALIDATION]
    train = _called("train", files) or (others if len(others) == 1 else [])
    for what, found in (("training", train), ("validation", held_out)):
        if len(found) > 1:
            raise ForgeError(
                f"{_listing(file.name for file in found)} in {str(folder)!r} could all be its {what} data. Keep one."
            )
    if not train:
        raise ForgeError(
            f"its folder {str(folder)!r} holds {_listing(names)}, and no training data: one file train.jsonl, .json, "
            ".csv or .parquet, a single data file, or what save_to_disk wrote. Add one of these."
        )
    return str(train[0]), str(held_out[0]) if held_out else None


def _called(stem: str, files: list[Path]) -> list[Path]:
    return [file for file in files if file.stem.lower() == stem]


def _folder_of(project: int | str, projects: Any) -> str | os.PathLike[str]:
    folder = None
    if isinstance(projects, Mapping):
        key = next((key for key in _keys(project) if key in projects), None)
        if key is None:
            raise ForgeError(f"no such project. Known are {_listing(str(key) for key in projects)}.")
        folder = projects[key]
    else:
        try:
            folder = projects(project)
        except LookupError:
            folder = None
        if folder is None:
            raise ForgeError("no such project: the function projects has no folder for it.")
    if not isinstance(folder, (str, os.PathLike)) or not os.fspath(folder):
        raise ConflictError(f"projects says {folder!r}, where the path of a folder belongs. Correct the mapping.")
    return folder


def _keys(project: int | str) -> list[int | str]:
    """123 and "123" are one project: JSON has no other keys than text, and databases like numbers."""
    if isinstance(project, int):
        return [project, str(project)]
    as_number = int(project) if project.isascii() and project.isdigit() and len(project) < 19 else None
    return [project] if as_number is None or str(as_number) != project else [project, as_number]


def _listing(names: Iterable[str]) -> str:
    found = list(names)
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return (", ".join(found[:_LISTED]) or "nothing") + more
