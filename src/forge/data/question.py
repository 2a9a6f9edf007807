"""What a row asks and what it should be answered with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from .formats import FormatName, find_layout
from .messages import Messages
from .rows import read_row


def question_and_reference(
    row: Mapping[str, Any], *, chat: bool = False, format: FormatName | Literal["auto"] = "auto"
) -> tuple[Messages | str, str] | None:
    """The prompt of a row and its reference answer; of a conversation, all before the last answer and that answer.

    >>> question_and_reference({"question": "2 + 2?", "answer": "4"})
    ('2 + 2?', '4')
    >>> question_and_reference({"question": "2 + 2?", "answer": "4"}, chat=True)
    ([{'role': 'user', 'content': '2 + 2?'}], '4')
    >>> question_and_reference({"text": "Two and two is four."}) is None
    True

    Args:
        row: of a prepared data set, or of one in any format that `prepare_dataset` recognises. Of a preference the
            reference is the chosen answer.
        chat: turn questions that are plain text into messages, as `prepare_dataset` does for tokenizers with a chat
            template. Rows that are prepared have been.
        format: of the row, as for `prepare_dataset`.

    Returns:
        Messages (or plain text, where the row has no messages) and the reference; None where the row has no prompt
        (format "text") or no answer in words.

    Raises:
        ConflictError: the row fits no format, or several.
        BadValueError: a field holds what it cannot hold.
    """
    values = {column: value for column, value in row.items() if column not in _MADE}
    given = {column: [value] for column, value in values.items() if value is not None}
    layout = find_layout(list(values), given, format)
    if layout.format == "text":
        return None
    sample = read_row(values, 0, layout, chat=chat)
    if isinstance(sample, str):
        return None
    if isinstance(sample.prompt, str) or isinstance(sample.answer, str):
        return str(sample.prompt), str(sample.answer)
    messages = sample.prompt + sample.answer
    reference = messages[-1]["content"]
    return (messages[:-1], reference) if reference.strip() and len(messages) > 1 else None


_MADE = frozenset({"input_ids", "labels", "assistant_masks", "attention_mask"})
