"""Which of the six formats a data set has: its columns say, and their values must agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..errors import ConflictError, UnknownNameError
from .messages import looks_like_messages

FormatName = Literal["messages", "sharegpt", "alpaca", "prompt-completion", "preference", "text"]
FORMATS: tuple[FormatName, ...] = get_args(FormatName)

_CONVERSATION = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns")
_PROMPT = ("prompt", "question", "query", "problem", "input")
_COMPLETION = ("completion", "response", "answer", "solution", "output", "target")
# The names that a field answers to, its own first.
_FIELDS: dict[FormatName, dict[str, tuple[str, ...]]] = {
    "messages": {"messages": _CONVERSATION},
    "sharegpt": {"messages": _CONVERSATION},
    "alpaca": {
        "instruction": ("instruction",),
        "output": ("output", "response", "answer", "completion"),
        "input": ("input", "context"),
        "system": ("system", "system_prompt"),
    },
    "prompt-completion": {"prompt": _PROMPT, "completion": _COMPLETION, "system": ("system", "system_prompt")},
    "preference": {
        "chosen": ("chosen",),
        "rejected": ("rejected",),
        "prompt": ("prompt", "question", "query", "instruction", "input"),
        "system": ("system", "system_prompt"),
    },
    "text": {"text": ("text",)},
}
_OPTIONAL = {"input", "system"}
NEEDS = {
    "messages": "a column messages (or conversations, ...): lists of {role, content}",
    "sharegpt": "a column conversations (or messages, ...): lists of {from, value}",
    "alpaca": "text columns instruction and output, perhaps input and system",
    "prompt-completion": "columns prompt and completion (or question and answer, ...): text or lists of messages",
    "preference": "columns chosen and rejected, perhaps prompt: text or lists of messages",
    "text": "a column text",
}


@dataclass(frozen=True)
class Layout:
    """A format, and the column of the data set that holds each of its fields.

    Args:
        format: one of `FORMATS`.
        columns: field -> column.
        ignored: columns that another format could have been read from.
    """

    format: FormatName
    columns: dict[str, str]
    ignored: tuple[str, ...] = ()


def find_layout(
    columns: Sequence[str], samples: dict[str, list[Any]], format: FormatName | Literal["auto"] = "auto"
) -> Layout:
    """The layout of a data set.

    >>> find_layout(["question", "answer"], {"question": ["2 + 2?"], "answer": ["4"]}).format
    'prompt-completion'

    Args:
        columns: its columns.
        samples: the first values of each column that are not null. One that fits is enough: what is wrong with the
            others is told row by row.
        format: one of `FORMATS`, or "auto".

    Raises:
        UnknownNameError: no such format.
        ConflictError: no format fits the columns and their values, or several do.
    """
    if format != "auto":
        if format not in FORMATS:
            raise UnknownNameError.among("format", format, [*FORMATS, "auto"])
        fields = _fields(format, columns, samples)
        if fields is None:
            raise ConflictError(f"format={format!r} needs {NEEDS[format]}. {_found(columns, samples)} {_REMEDY}")
        return Layout(format, fields)
    fitting = {name: fields for name in FORMATS if (fields := _fields(name, columns, samples)) is not None}
    text = fitting.pop("text", None)
    if "alpaca" in fitting and "prompt-completion" in fitting:
        # Alpaca's optional input, read as a prompt; only columns that Alpaca leaves alone make a second reading.
        left = [column for column in columns if column not in fitting["alpaca"].values()]
        if _fields("prompt-completion", left, samples) is None:
            del fitting["prompt-completion"]
    if text is not None and not fitting:
        return Layout("text", text)
    if len(fitting) == 1:
        ((name, fields),) = fitting.items()
        # Rendered conversations are often kept beside what they were made of.
        return Layout(name, fields, tuple(text.values()) if text else ())
    if fitting:
        could = "; ".join(f"{name} (from {', '.join(fields.values())})" for name, fields in fitting.items())
        raise ConflictError(
            f"The columns can be read in more than one way: {could}. {_found(columns, samples)} "
            f"Say which: format={next(iter(fitting))!r}, or remove the other columns."
        )
    needs = "".join(f"\n  {name}: {what}" for name, what in NEEDS.items())
    raise ConflictError(f"No format fits. {_found(columns, samples)} The formats need:{needs}\n{_REMEDY}")


_REMEDY = "Rename what you have with dataset.rename_column(old, new), or name the format with format=..."


def _fields(name: FormatName, columns: Sequence[str], samples: dict[str, list[Any]]) -> dict[str, str] | None:
    """The column of each field of a format; None where one is missing or holds something else."""
    fields: dict[str, str] = {}
    for field, names in _FIELDS[name].items():
        there = [column for column in names if column in columns and column not in fields.values()]
        fitting = [column for column in there if _fits(name, field, samples.get(column, []))]
        optional = field in _OPTIONAL or (name == "preference" and field == "prompt")
        if not fitting and optional:
            continue
        if not fitting:
            return None
        if len(fitting) > 1 and fitting[0] != names[0]:
            raise ConflictError(
                f"The columns {', '.join(fitting)} could each be the {field}. {_found(columns, samples)} "
                f"Rename the right one to {names[0]!r} (dataset.rename_column), or remove the others."
            )
        fields[field] = fitting[0]
    return fields


def _fits(name: FormatName, field: str, values: list[Any]) -> bool:
    shapes = [shape for value in values if (shape := looks_like_messages(value))]
    if field == "messages":
        return shapes[:1] == [name]
    texts = any(isinstance(value, str) for value in values)
    both = name in ("prompt-completion", "preference") and field != "system"
    return texts or (both and bool(shapes))


def _found(columns: Sequence[str], samples: dict[str, list[Any]]) -> str:
    kinds = [f"{column} ({_kind(samples.get(column, []))})" for column in columns]
    return f"Columns found: {', '.join(kinds) or 'none'}."


def _kind(values: list[Any]) -> str:
    for shape in filter(None, map(looks_like_messages, values)):
        return "lists of {role, content}" if shape == "messages" else "lists of {from, value}"
    if not values:
        return "empty"
    kind = type(values[0]).__name__
    return {"str": "text", "list": "lists", "dict": "objects"}.get(kind, kind)
