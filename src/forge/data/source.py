"""Where rows come from: objects, files, folders, the hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ForgeError, UnsupportedError
from .files import READERS, read_file
from .messages import describe

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

_VALIDATION = ("validation", "valid", "val", "dev", "test", "eval")


@dataclass(frozen=True)
class Rows:
    """Rows that can be read more than once.

    Args:
        name: what errors call them.
        rows: a list, or a `datasets.Dataset`.
        columns: of all rows.
        splits: the other splits that came with them, by name.
        media: columns of pictures and sound, which are not read.
    """

    name: str
    rows: Sequence[Mapping[str, Any]]
    columns: tuple[str, ...]
    splits: dict[str, Rows]
    media: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self.rows)

    def first_values(self, most: int = 50) -> dict[str, list[Any]]:
        """The values that are not null among the first rows, or, of columns that hold none there, the first one."""
        found: dict[str, list[Any]] = {column: [] for column in self.columns}
        for number, row in enumerate(self):
            if number >= most and all(found.values()):
                break
            for column, value in row.items():
                if value is not None and (number < most or not found[column]):
                    found[column].append(value)
        return found

    @property
    def held_out(self) -> tuple[str, Rows] | None:
        """The split that is called what validation splits are called, if one came with the rows."""
        return next(((name, self.splits[name]) for name in _VALIDATION if name in self.splits), None)


def load(source: Any, *, name: str = "dataset") -> Rows:
    """Rows from whatever a caller may have.

    Args:
        source: a `datasets.Dataset` or `DatasetDict`, a list of dicts, a path, or the id of a data set on the hub.
        name: the argument's, for errors.

    Raises:
        ForgeError: nothing is there, it cannot be read, or it has no rows.
        UnsupportedError: it streams, or is something else.
    """
    import datasets

    if isinstance(source, (str, Path)):
        return _from_path(source, name)
    if isinstance(source, datasets.DatasetDict):
        return _from_splits(source, name)
    if isinstance(source, (datasets.IterableDataset, datasets.IterableDatasetDict)):
        raise UnsupportedError(
            f"{name} is a stream ({type(source).__name__}), and lengths, duplicates and a split need all rows. "
            "Take what you need of it: datasets.Dataset.from_list(list(stream.take(10_000)))."
        )
    if isinstance(source, datasets.Dataset):
        # Torch or NumPy formats would hand out arrays where text and lists are expected.
        if source.format["type"] == "custom":  # a transform makes the rows, so they are what it makes
            return _listed(name, [source[number] for number in range(len(source))])
        return _table(name, source.with_format(None))
    if isinstance(source, Mapping) or not isinstance(source, Sequence):
        raise UnsupportedError(
            f"{name} is a {type(source).__name__}; pass a datasets.Dataset or DatasetDict, a list of dicts, a path or "
            "a hub id."
        )
    for number, row in enumerate(source):
        if not isinstance(row, Mapping):
            raise UnsupportedError(f"{name}: row {number} is {describe(row)}; a list must hold dicts, column -> value.")
    return _listed(name, list(source))


def _listed(name: str, rows: list[Mapping[str, Any]]) -> Rows:
    return _rows(name, rows, tuple(dict.fromkeys(column for row in rows for column in row)))


def _table(name: str, table: Dataset) -> Rows:
    # Pictures and sound would be decoded with every row that is looked at, and nothing is learnt from them here.
    media = [column for column, feature in table.features.items() if _is_decoded(feature)]
    rest = table.remove_columns(media) if len(media) < len(table.column_names) else table
    return replace(_rows(name, rest, tuple(rest.column_names)), media=tuple(media))


def _is_decoded(feature: Any) -> bool:
    while hasattr(feature, "feature"):  # lists
        feature = feature.feature
    return hasattr(feature, "decode_example") and bool(getattr(feature, "decode", False))


def _rows(name: str, rows: Any, columns: tuple[str, ...]) -> Rows:
    if not len(rows):
        raise ForgeError(f"{name} has no rows. There is nothing to prepare; check what it was filtered or read from.")
    return Rows(name, rows, columns, {})


def _from_splits(splits: DatasetDict, name: str) -> Rows:
    if "train" not in splits:
        raise ForgeError(
            f"{name} has the splits {', '.join(splits) or 'none'} and no split 'train'. "
            f"Pass the one to train on: dataset[{next(iter(splits), 'name')!r}]."
        )
    others = {other: load(rows, name=f"split {other!r}") for other, rows in splits.items() if other != "train" and rows}
    train = load(splits["train"], name=f"{name} (split 'train')")
    return replace(train, splits=others)


def _from_path(source: str | Path, name: str) -> Rows:
    path = Path(source).expanduser()
    if source != "" and path.is_dir():
        return _from_folder(path, name)
    if path.is_file():
        return _listed_or_table(path, read_file(path))
    if isinstance(source, Path) or path.suffix.lower() in READERS or str(source).count("/") > 1 or not str(source):
        raise ForgeError(
            f"{name}: no file {str(source)!r} (looked for {path.absolute()}). Pass the path of a "
            f"{', '.join(READERS)} file, of a folder that save_to_disk wrote, or a hub id such as 'owner/name'."
        )
    return _from_hub(str(source), path, name)


def _listed_or_table(path: Path, found: list[Mapping[str, Any]] | Dataset) -> Rows:
    if isinstance(found, list):
        return _listed(str(path), found)
    return _table(str(path), found)


def _from_folder(path: Path, name: str) -> Rows:
    import datasets

    try:
        return load(datasets.load_from_disk(str(path)), name=str(path))
    except FileNotFoundError:
        files = sorted(file.name for file in path.iterdir())[:8]
        raise ForgeError(
            f"{name}: the folder {path} was not written by save_to_disk; it holds {', '.join(files) or 'nothing'}. "
            "Pass one file of it, or datasets.load_dataset(folder)."
        ) from None


def _from_hub(source: str, path: Path, name: str) -> Rows:
    import datasets

    try:
        return load(datasets.load_dataset(source), name=source)
    except ForgeError:
        raise
    except Exception as error:
        raise ForgeError(
            f"{name}={source!r} is neither a file (looked for {path.absolute()}) nor could it be loaded as a hub id: "
            f"{type(error).__name__}: {error}. Correct the path; or, for a data set that needs more arguments, pass "
            "datasets.load_dataset(...) itself."
        ) from error
