"""From whatever a caller has to rows that a trainer takes, and a report of what happened on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ConflictError, ForgeError
from .encode import Encoder, Tokens, encode_all
from .formats import FormatName, Layout, find_layout
from .lengths import Lengths, counted, lost, shortest_that_keeps
from .output import dataset as output
from .prepared import PreparedData
from .read import read
from .remarks import (
    notes,
    notes_on_rows,
    warnings_on_length,
    warnings_on_tools,
    warnings_on_unwritten,
    warnings_on_words,
)
from .report import DataReport, SplitReport
from .rows import CUT_AWAY, UNPROVEN, Sample
from .source import Rows, load
from .split import split, wanted_rows, without_leakage
from .tokens import pad_token_id
from .way import Way, find_way, rendered_before

if TYPE_CHECKING:
    from typing import TypeAlias

    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase

    Source: TypeAlias = Dataset | DatasetDict | Sequence[Mapping[str, Any]] | str | Path


def prepare_dataset(
    dataset: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    format: FormatName | Literal["auto"] = "auto",
    max_length: int | None = None,
    validation: float | Source | None = None,
) -> PreparedData:
    """Recognise, check, render, mask, split and report a data set.

    Conversations go through the model's own chat template, and only what the assistant says is learnt, in every turn
    and with the token that ends it. Rows in which there is nothing to learn and exact duplicates are left out and
    reported; rows that are broken raise before anything is computed. Rows that ask the same (but for case, white space
    and Unicode's compatibility forms) stay on one side of a split.

    Args:
        dataset: a `datasets.Dataset`; a `DatasetDict`, of which "train" is taken; a list of dicts; the path of a
            .jsonl, .json, .csv, .tsv or .parquet file or of a folder that `save_to_disk` wrote; or a hub id.
        tokenizer: the model's.
        format: "messages", "sharegpt", "alpaca", "prompt-completion", "preference" or "text"; "auto" looks at the
            columns and their values.
        max_length: rows are cut to so many tokens, from the end. None cuts nothing; mind the trainer's own limit.
        validation: the share of the rows to hold out (a float), their number (an int), the name of another split of
            `dataset`, or a data set of its own, whose questions are then removed from training. None takes the split
            "validation" or "test" if `dataset` has one.

    Returns:
        The data sets, a report (`.report.print()`), and `.preview(0)`.

    Raises:
        ForgeError: there is nothing to read, rows are broken, or the chat template refuses rows; the message names file
            and line, or row and field.
        ConflictError: no format fits or several do, or the validation set would be empty.
        UnsupportedError: no chat template, or one of which nobody can say what it would teach.
    """
    if isinstance(tokenizer, str):
        raise ConflictError(f"tokenizer={tokenizer!r}: load it first, AutoTokenizer.from_pretrained({tokenizer!r}).")
    max_length = _max_length(max_length)
    rows = load(dataset)
    held_out = _validation(rows, validation)
    layout = find_layout(rows.columns, rows.first_values(), format)
    way = find_way(rows, layout, tokenizer)
    sides, leaking = _sides(rows, layout, held_out, format, way)
    encoder = Encoder(tokenizer, way.template, way.end)
    done = {name: _finish(side, encoder, layout.format, max_length) for name, side in sides.items()}
    report = DataReport(
        format=layout.format,
        columns=layout.columns,
        splits=tuple(side.report for side in done.values()),
        template=way.origin,
        stop_tokens=way.stop_tokens(tokenizer),
        pad_token=str(tokenizer.convert_ids_to_tokens(pad_token_id(tokenizer))),
        max_length=max_length,
        max_length_keeping_99_percent=shortest_that_keeps(done["train"].lengths),
        leakage=tuple(sample.row for sample in leaking),
        validation_from=_said_of(held_out),
        notes=(
            *notes(layout, way, tokenizer, (*rows.columns, *rows.media)),
            *notes_on_rows([s for side in sides.values() for s in side.samples], [d.unlearnt for d in done.values()]),
        ),
        warnings=(
            *warnings_on_length(layout, max_length, done["train"].lengths),
            *warnings_on_unwritten([row for side in done.values() for row in side.unwritten]),
            *warnings_on_tools(way, [sample for side in sides.values() for sample in side.samples]),
            *warnings_on_words(way, [sample for side in sides.values() for sample in side.samples]),
        ),
    )
    validation_rows = done["validation"].dataset if "validation" in done else None
    return PreparedData(done["train"].dataset, validation_rows, report, tokenizer)


@dataclass
class _Side:
    """The rows of one side on their way."""

    name: str
    rows_in: int
    samples: list[Sample]
    dropped: dict[str, list[int]]

    def drop(self, reason: str, row: int) -> None:
        self.dropped.setdefault(reason, []).append(row)

    def check(self) -> None:
        """Refuse to go on with nothing."""
        if not self.samples:
            reasons = "; ".join(f"{reason}: {len(rows):,}" for reason, rows in self.dropped.items())
            raise ForgeError(
                f"Nothing of {self.name} is left to learn from ({reasons}). Look at its columns and first rows, and at "
                "max_length."
            )


def _sides(
    rows: Rows, layout: Layout, held_out: Rows | float | int | None, format: FormatName | Literal["auto"], way: Way
) -> tuple[dict[str, _Side], list[Sample]]:
    """The samples of each side, and the training rows that were removed because validation asks the same."""
    train = _Side("train", len(rows), *read(rows, layout, chat=way.chat))
    way.check(train.samples)
    train.check()
    if held_out is None:
        return {"train": train}, []
    if not isinstance(held_out, Rows):
        train.samples, held = split(train.samples, wanted_rows(held_out, len(train.samples)))
        train.rows_in -= len(held)
        return {"train": train, "validation": _Side("validation", len(held), held, {})}, []
    other = find_layout(held_out.columns, held_out.first_values(), format)
    if _kind(other) != _kind(layout):
        raise ConflictError(
            f"The training rows have the format {layout.format}, those of {held_out.name} {other.format}. Validation "
            "must measure what training teaches; pass rows of the same kind."
        )
    validation = _Side("validation", len(held_out), *read(held_out, other, chat=way.chat))
    if way.template is not None and rendered_before(held_out, other, way.template) != way.rendered:
        raise ConflictError(
            f"The prompts of {rows.name} {'have' if way.rendered else 'have not'} been through the chat template "
            f"already, and those of {held_out.name} the other way round. Prepare both alike."
        )
    way.check(validation.samples)
    validation.check()
    train.samples, leaking = without_leakage(train.samples, validation.samples)
    if not train.samples:
        raise ConflictError(
            f"Every row of {rows.name} asks what {held_out.name} asks, so nothing is left to train on. "
            "Pass another validation set, or let one be split off: validation=0.05."
        )
    return {"train": train, "validation": validation}, leaking


def _max_length(asked: Any) -> int | None:
    if asked is None:
        return None
    if isinstance(asked, bool) or not isinstance(asked, Integral):
        raise ConflictError(
            f"max_length={asked!r} is no whole number. Pass a number of tokens, or None to cut nothing."
        )
    if asked < 2:
        raise ConflictError(f"max_length={asked!r}: a row needs two tokens at least for one to be learnt.")
    return int(asked)


def _validation(rows: Rows, validation: Any) -> Rows | float | int | None:
    """The validation set's rows, or its size."""
    if validation is None:
        return rows.held_out[1] if rows.held_out else None
    if isinstance(validation, bool):
        return validation  # refused with the other sizes that are none
    if isinstance(validation, Real):  # NumPy's numbers too
        return int(validation) if isinstance(validation, Integral) else float(validation)
    if isinstance(validation, str):
        if validation in rows.splits:
            return rows.splits[validation]
        is_path = Path(validation).expanduser().exists() or "/" in validation or "." in validation
        if not validation or not is_path:
            splits = ", ".join(rows.splits) or "none besides the training rows"
            raise ConflictError(
                f"validation={validation!r} is neither a split of {rows.name} (it has {splits}) nor a file. Pass a "
                "share such as 0.05, a number of rows, a split's name, a path or a data set."
            )
    return load(validation, name="validation")


def _kind(layout: Layout) -> str:
    return layout.format if layout.format in ("preference", "text") else "answers"


@dataclass(frozen=True)
class _Done:
    dataset: Dataset
    lengths: list[int]
    unlearnt: int
    unwritten: list[int]
    report: SplitReport


def _finish(side: _Side, encoder: Encoder, format: FormatName, max_length: int | None) -> _Done:
    """One side in tokens, cut and counted."""
    tokens = encode_all(encoder, side.samples, side.name)
    unwritten = [sample.row for sample, row in zip(side.samples, tokens, strict=True) if row.unwritten]
    kept: list[tuple[Sample, Tokens]] = []
    for sample, row in zip(side.samples, tokens, strict=True):
        if not any(row.learnt):
            side.drop(UNPROVEN, sample.row)
        elif not any(row.learnt[:max_length]):
            side.drop(CUT_AWAY, sample.row)
        else:
            kept.append((sample, row))
    side.samples = [sample for sample, _ in kept]
    side.check()
    rows = [row for _, row in kept]
    # Also of the rows of which nothing is left: they lose the most.
    lengths = [row.length for row in tokens if any(row.learnt)]
    cut_rows, cut_tokens = (0, 0) if max_length is None else lost(lengths, max_length)
    report = SplitReport(
        name=side.name,
        rows_in=side.rows_in,
        rows_out=len(kept),
        lengths=Lengths.of(lengths),
        supervised_tokens=sum(sum(row.learnt[:max_length]) for row in rows),
        tokens=sum(len(row.ids[:max_length]) for row in rows),
        truncated_rows=cut_rows,
        truncated_tokens=cut_tokens,
        dropped={reason: sorted(numbers) for reason, numbers in side.dropped.items()},
    )
    return _Done(
        output(side.samples, rows, format, max_length),
        lengths,
        sum(r.unlearnt_turns for r in rows),
        unwritten,
        report,
    )


def _said_of(held_out: Rows | float | int | None) -> str | None:
    if held_out is None:
        return None
    if isinstance(held_out, Rows):
        return f"{held_out.name}, {counted(len(held_out), 'row')}"
    asked = f"{held_out:.1%} of the rows" if isinstance(held_out, float) else counted(held_out, "row")
    return f"{asked}, split off by the hash of what they ask"
