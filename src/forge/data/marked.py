"""Which tokens stand between a chat template's markers, and which reach into a stretch of text."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from .skeleton import Spans
from .tokens import Messages, TemplateRefusalError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def marked_places(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    template: str | None,
    tools: list[Any] | None,
    options: dict[str, Any] | None,
) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """A conversation in tokens, for each whether the template's markers are around it, and where in the text it is."""
    from jinja2 import TemplateError

    try:
        found = tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tools=tools or None,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
            **(options or {}),
        )
    except (TemplateError, TypeError, KeyError, ValueError, AttributeError) as error:
        raise TemplateRefusalError(str(error) or type(error).__name__) from error
    marked, offsets = list(found["assistant_masks"]), found["offset_mapping"]
    for index in range(1, len(marked)):
        # transformers marks the first token of an answer's last character; one of several bytes has more.
        (_, end), (start, same) = offsets[index - 1], offsets[index]
        if marked[index - 1] and start < end == same:
            marked[index] = 1
    return list(found["input_ids"]), marked, list(offsets)


def marked_answers(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    template: str | None,
    tools: list[Any] | None,
    options: dict[str, Any] | None,
) -> tuple[list[int], list[int]]:
    """A conversation in tokens, and for each whether the template's markers are around it."""
    return marked_places(tokenizer, messages, template, tools, options)[:2]


def runs(marked: list[int]) -> Spans:
    """Where the marks stand, as half-open stretches.

    >>> runs([0, 1, 1, 0, 1])
    [(1, 3), (4, 5)]
    """
    found, position = [], 0
    for mark, run in groupby(marked):
        length = sum(1 for _ in run)
        if mark:
            found.append((position, position + length))
        position += length
    return found


def covered_by(offsets: list[tuple[int, int]], spans: Spans, headers: set[int]) -> list[bool]:
    """For each token whether it reaches into one of the stretches of text, which are in order.

    A control token that begins before a stretch (some swallow the white space after them) is none of it.
    """
    covered, position = [False] * len(offsets), 0
    for start, end in spans:
        while position < len(offsets) and offsets[position][1] <= start:
            position += 1
        while position < len(offsets) and offsets[position][0] < end:
            covered[position] = not (position in headers and offsets[position][0] < start)
            position += 1
    return covered
