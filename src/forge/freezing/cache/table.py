"""Which record holds the states of a key, where several may."""

from __future__ import annotations

from collections.abc import Iterator

from .segment import Record, Segment


class Table:
    """Records by key.

    Two processes may have written the same sample: the first record counts, and the others wait in case that it turns
    out to be damaged.
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        self._first: dict[bytes, Record] = {}
        self._others: dict[bytes, list[Record]] = {}

    def __len__(self) -> int:
        return len(self._first)

    def __contains__(self, key: bytes) -> bool:
        return key in self._first

    def __getitem__(self, key: bytes) -> Record:
        return self._first[key]

    def get(self, key: bytes) -> Record | None:
        """The record that counts, or None."""
        return self._first.get(key)

    def take(self, key: bytes, record: Record) -> bool:
        """Note a record; whether its key is new."""
        if key in self._first:
            self._others.setdefault(key, []).append(record)
            return False
        self._first[key] = record
        self.num_tokens += record.tokens
        return True

    def drop(self, key: bytes) -> None:
        """Forget the record that counts; another takes its place if there is one."""
        self.num_tokens -= self._first.pop(key).tokens
        for record in self._others.pop(key, []):
            self.take(key, record)

    def forget(self, segment: Segment) -> None:
        """Forget all records of a segment."""
        kept = [(key, record) for key, record in self._all() if record.segment is not segment]
        self._first, self._others, self.num_tokens = {}, {}, 0
        for key, record in kept:
            self.take(key, record)

    def _all(self) -> Iterator[tuple[bytes, Record]]:
        yield from self._first.items()
        for key, records in self._others.items():
            yield from ((key, record) for record in records)
