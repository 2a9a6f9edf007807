"""What became of a data set, for people and for JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .formats import FormatName
from .lengths import Lengths, counted

_ORIGINS = {
    "markers": "the chat template's own {% generation %} markers",
    "TRL": "TRL's training template for this chat template",
    "prefix": "what the chat template writes before each answer, up to its end-of-turn token",
    "none": "no chat template: the text itself",
}


@dataclass(frozen=True)
class SplitReport:
    """The rows of one side.

    Args:
        name: "train" or "validation".
        rows_in: how many were handed in, or for a split-off validation set how many it was made of.
        rows_out: how many are left.
        lengths: tokens in a row before anything is cut; of preferences the longer side.
        supervised_tokens: how many of the tokens left are learnt; of preferences the chosen answers'.
        tokens: how many tokens are left.
        truncated_rows: how many rows were longer than `max_length`.
        truncated_tokens: what they lost.
        dropped: reason -> numbers of the rows left out, counted from 0 as in `dataset[number]`.
    """

    name: str
    rows_in: int
    rows_out: int
    lengths: Lengths
    supervised_tokens: int
    tokens: int
    truncated_rows: int = 0
    truncated_tokens: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)

    @property
    def supervised_share(self) -> float:
        """The share of the tokens that is learnt."""
        return self.supervised_tokens / self.tokens if self.tokens else 0.0


@dataclass(frozen=True)
class DataReport:
    """What `prepare_dataset` found and did.

    Args:
        format: which of the six.
        columns: field -> the column that it was read from.
        splits: train, and validation if there is one.
        template: where the masks come from: "markers", "TRL", "prefix", or "none" without a chat template.
        stop_tokens: what ends an answer, in the tokenizer's spelling.
        pad_token: what fills up batches.
        max_length: as passed.
        max_length_keeping_99_percent: the smallest that loses at most 1% of the training tokens.
        leakage: numbers of the training rows that were removed, as they ask what the given validation set asks.
        validation_from: where the validation set comes from, None without one.
        notes: what is good to know.
        warnings: what is probably not meant.
    """

    format: FormatName
    columns: dict[str, str]
    splits: tuple[SplitReport, ...]
    template: str
    stop_tokens: tuple[str, ...]
    pad_token: str
    max_length: int | None
    max_length_keeping_99_percent: int
    leakage: tuple[int, ...] = ()
    validation_from: str | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def train(self) -> SplitReport:
        """The training rows."""
        return self.splits[0]

    @property
    def validation(self) -> SplitReport | None:
        """The validation rows, None without any."""
        return self.splits[1] if len(self.splits) > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists, dicts, numbers and strings."""
        found = asdict(self)
        splits = zip(self.splits, found.pop("splits"), strict=True)
        found["splits"] = {split.name: said | {"supervised_share": split.supervised_share} for split, said in splits}
        found |= {name: list(found[name]) for name in ("stop_tokens", "leakage", "notes", "warnings")}
        return found

    def __str__(self) -> str:
        return str(self._table())

    def print(self) -> None:
        """Show it as a table."""
        self._table().print()

    def _table(self) -> Any:
        from ..reporting import Table

        read = ", ".join(f"{name} from {column}" if name != column else name for name, column in self.columns.items())
        table = Table(("data", *(split.name for split in self.splits)), title=f"Format: {self.format} ({read})")
        each = self.splits
        table.add("rows", *(_of(split.rows_out, split.rows_in) for split in each))
        table.add("tokens", *(f"{split.tokens:,}" for split in each))
        table.add("of them learnt", *(f"{split.supervised_share:.1%}" for split in each))
        table.add("tokens in a row", *(_range(split.lengths) for split in each))
        if self.max_length is not None:
            table.add(f"cut to {self.max_length:,} tokens", *(_cut(split) for split in each))
        for reason in dict.fromkeys(reason for split in each for reason in split.dropped):
            table.add(f"dropped: {reason}", *(_numbers(split.dropped.get(reason, [])) for split in each))
        if self.leakage:
            table.add("removed: asked in validation too", _numbers(list(self.leakage)), *("" for _ in each[1:]))
        table.footer = "\n".join(self._lines())
        return table

    def _lines(self) -> list[str]:
        stops = " or ".join(self.stop_tokens) or "nothing"
        same = self.pad_token in self.stop_tokens
        lines = [
            f"What is learnt was found by {_ORIGINS[self.template]}; an answer ends with {stops}.",
            f"Batches are padded with {self.pad_token}"
            + (", which ends answers too: harmless, since labels and masks go by length." if same else "."),
            f"max_length={self.max_length_keeping_99_percent:,} loses at most 1% of the training tokens.",
        ]
        if self.validation_from:
            lines.append(f"Validation: {self.validation_from}.")
        lines += [f"Note: {note}." for note in self.notes]
        return lines + [f"Warning: {warning}." for warning in self.warnings]


def _of(out: int, before: int) -> str:
    return f"{out:,}" if out == before else f"{out:,} of {before:,}"


def _range(lengths: Lengths) -> str:
    return f"{lengths.min:,} to {lengths.max:,}, median {lengths.median:,}, 95% up to {lengths.p95:,}"


def _cut(split: SplitReport) -> str:
    if not split.truncated_rows:
        return "none"
    return f"{counted(split.truncated_rows, 'row')}, which lost {counted(split.truncated_tokens, 'token')}"


def _numbers(rows: list[int]) -> str:
    """Row numbers, not more than fit.

    >>> _numbers([3, 7]), _numbers(list(range(10)))
    ('2 (rows 3, 7)', '10 (rows 0, 1, 2, 3, 4, ...)')
    """
    if not rows:
        return ""
    listed = ", ".join(str(row) for row in rows[:5])
    return f"{len(rows):,} ({'row' if len(rows) == 1 else 'rows'} {listed}{', ...' if len(rows) > 5 else ''})"
