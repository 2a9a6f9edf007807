"""The model's own chat template, and which of the tokens that it writes are the assistant's.

Where a template says so itself, by `{% generation %}` markers, it is believed; else TRL's rewriting of it is used, if
TRL knows it; else the answers are found: what the template writes of the messages before an answer, with its generation
prompt, must be the beginning of what it writes of the whole, and the answer lasts from there to the first control token
that the template writes after answers. A template that keeps none of the three promises is refused.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any

from ..compat import has_generation_markers
from .skeleton import Skeleton, Spans, skeleton
from .tokens import Messages, TemplateRefusalError, control_tokens, render, shared_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PLAIN = {"role", "content"}
REMEDY = (
    "Put {% generation %} and {% endgeneration %} around what the assistant writes, its end-of-turn token included, in "
    "tokenizer.chat_template; a newer TRL may know the family's template."
)


@dataclass(frozen=True)
class Encoded:
    """A conversation in tokens.

    Args:
        ids: the tokens.
        learnt: for each, whether it is the assistant's.
        unlearnt_turns: how many answers are only context, because what the template writes of them is not what the
            assistant said, or not what it would have to say next time; or because their weight is 0.
        unwritten: how many messages say something that the template does not write.
    """

    ids: list[int]
    learnt: list[bool]
    unlearnt_turns: int = 0
    unwritten: int = 0


@dataclass(frozen=True)
class ChatTemplate:
    """How a tokenizer's conversations are written and masked.

    Args:
        tokenizer: the model's.
        text: the template that renders, None for the tokenizer's own.
        origin: "markers", "TRL" or "prefix": whose knowledge of the template the masks rest on.
        ends: the control tokens that the template writes after an answer.
        marked: whether answers are where the template's markers are, or are found.
        every_turn: whether answers before the last are learnt.
        notes: what a reader of the report should know.
    """

    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    text: str | None = field(repr=False)
    origin: str
    ends: frozenset[int]
    marked: bool = False
    every_turn: bool = True
    notes: tuple[str, ...] = ()

    def encode(
        self,
        messages: Messages,
        first: int = 0,
        tools: list[Any] | None = None,
        options: dict[str, Any] | None = None,
    ) -> Encoded:
        """A conversation in tokens, and which of them are learnt.

        Args:
            messages: all of it, up to the last answer.
            first: the index of the first message whose answers are learnt.
            tools: for the template.
            options: more arguments of the template.

        Raises:
            TemplateRefusalError: the template would not write them, or does not keep its promise for them.
        """
        if self.marked:
            return self._by_markers(messages, first, tools, options)
        if self.origin == "TRL" and self._has_markers and _uncommon(messages, tools):
            # Where tools speak between the answers, TRL knows better where one ends than the first stop token does.
            try:
                return self._by_markers(messages, first, tools, options)
            except TemplateRefusalError:
                pass
        return self._by_prefix(messages, first, tools, options)

    def _by_markers(
        self, messages: Messages, first: int, tools: list[Any] | None, options: dict[str, Any] | None
    ) -> Encoded:
        ids, marked = marked_answers(self.tokenizer, messages, self.text, tools, options)
        spans, kept = runs(marked), None
        if first or self.origin == "TRL" or any(map(_is_context, messages)):
            turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
            if len(turns) != len(spans):
                raise TemplateRefusalError(
                    f"it marks {len(spans)} stretches as the assistant's, and the conversation has {len(turns)} answers"
                )
            kept = [(span, turn) for span, turn in zip(spans, turns, strict=True) if turn >= first]
            asked = len(kept)
            kept = [(span, turn) for span, turn in kept if not _is_context(messages[turn])]
            if self.origin == "TRL":
                kept = [(self._narrowed(ids, span, messages[:turn], tools, options), turn) for span, turn in kept]
            spans = [span for span, _ in kept if span[0] < span[1]]
        learnt = [False] * len(ids)
        for start, end in spans:
            learnt[start:end] = [True] * (end - start)
        unlearnt = asked - len(spans) if kept is not None else 0
        return Encoded(ids, learnt, unlearnt, self._unwritten(messages, tools, options))

    def _narrowed(
        self,
        ids: list[int],
        span: tuple[int, int],
        before: Messages,
        tools: list[Any] | None,
        options: dict[str, Any] | None,
    ) -> tuple[int, int]:
        """An answer without what the generation prompt writes, and without what follows its end: TRL marks both."""
        start, end = span
        if before:
            said: dict[str, Any] = {"chat_template": self.text, "tools": tools, "options": options}
            prompt = render(self.tokenizer, before, add_generation_prompt=True, **said)
            asked = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
            shared = shared_length(ids, asked)
            if (
                shared < start
            ):  # what was asked is written otherwise once more follows: whose words these are is unknown
                return start, start
            start = max(start, shared)
        last = next((index for index in range(end - 1, start - 1, -1) if ids[index] in self.ends), end - 1)
        return start, last + 1

    def _by_prefix(
        self, messages: Messages, first: int, tools: list[Any] | None, options: dict[str, Any] | None
    ) -> Encoded:
        whole = render(self.tokenizer, messages, chat_template=self.text, tools=tools, options=options)
        spans = self._quickly(messages, whole, first) if not tools and not options else None
        if spans is None:
            spans = list(self._find(messages, whole, first, tools, options).values())
            unwritten = _unwritten(messages, whole)
        else:
            unwritten = 0
        asked = sum(message["role"] == "assistant" for message in messages[first:])
        encoding = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        ids = list(encoding["input_ids"])
        headers = {index for index, token in enumerate(ids) if token in self._controls}
        return Encoded(ids, _covered(encoding["offset_mapping"], spans, headers), asked - len(spans), unwritten)

    def _unwritten(self, messages: Messages, tools: list[Any] | None, options: dict[str, Any] | None) -> int:
        if not _uncommon(messages, tools):
            return 0
        return _unwritten(
            messages, render(self.tokenizer, messages, chat_template=self.text, tools=tools, options=options)
        )

    def _quickly(self, messages: Messages, whole: str, first: int) -> Spans | None:
        """The answers' places by the skeleton of these roles, if there is one and it fits."""
        if not self.every_turn or any(message.keys() != _PLAIN for message in messages):
            return None
        roles = tuple(message["role"] for message in messages)
        if (roles, first) not in self._skeletons:

            def find(placeholders: Messages) -> tuple[str, dict[int, tuple[int, int]]]:
                text = render(self.tokenizer, placeholders, chat_template=self.text)
                return text, self._find(placeholders, text, first, None, None)

            self._skeletons[roles, first] = skeleton(roles, find)
        known = self._skeletons[roles, first]
        return known.fit([message["content"] for message in messages], whole) if known else None

    def _find(
        self,
        messages: Messages,
        whole: str,
        first: int,
        tools: list[Any] | None,
        options: dict[str, Any] | None,
    ) -> dict[int, tuple[int, int]]:
        """The places in the text of the answers that can be learnt, by the index of the message."""
        spans: dict[int, tuple[int, int]] = {}
        for index in range(first, len(messages)):
            last = index == len(messages) - 1
            # Before the first message nothing was said that a template could be asked to render.
            if messages[index]["role"] != "assistant" or not index or not (last or self.every_turn):
                continue
            if _is_context(messages[index]):
                continue
            start, end = self._span(whole, messages, index, tools, options)
            before = max((stop for _, stop in spans.values()), default=0)
            if start >= before and _is_its_own(messages, index, whole[start:end]):
                spans[index] = (start, end)
        return spans

    def _span(
        self, whole: str, messages: Messages, index: int, tools: list[Any] | None, options: dict[str, Any] | None
    ) -> tuple[int, int]:
        """Where in the text an answer begins and ends."""
        said: dict[str, Any] = {"chat_template": self.text, "tools": tools, "options": options}
        before = render(self.tokenizer, messages[:index], add_generation_prompt=True, **said)
        if not whole.startswith(before):
            raise TemplateRefusalError(
                f"what it writes before message {index} changes once the answer is there, so the answer's beginning "
                f"cannot be found. {REMEDY}"
            )
        # Control tokens that are part of what was said do not end it.
        skipped = len(self._stop.findall(str(messages[index]["content"])))
        for number, found in enumerate(self._stop.finditer(whole, len(before))):
            if number == skipped:
                return len(before), found.end()
        raise TemplateRefusalError(f"it writes no end-of-turn token after message {index}. {REMEDY}")

    @cached_property
    def marks(self) -> frozenset[str]:
        """The control tokens that the template itself writes, in the tokenizer's spelling."""
        controls = control_tokens(self.tokenizer)
        written = render(self.tokenizer, probe(4), chat_template=self.text)
        special = {index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        special |= set(self.tokenizer.all_special_ids)
        return frozenset(text for index, text in controls.items() if index in special and text in written)

    @cached_property
    def opening(self) -> str:
        """What the template writes after a question to have it answered; empty where it writes nothing."""
        asked, alone = (
            render(self.tokenizer, probe(1), chat_template=self.text, add_generation_prompt=prompt)
            for prompt in (True, False)
        )
        return asked[len(alone) :].strip() if asked.startswith(alone) else ""

    @cached_property
    def _controls(self) -> frozenset[int]:
        return frozenset(control_tokens(self.tokenizer))

    @cached_property
    def _has_markers(self) -> bool:
        return has_generation_markers(self.text or self.tokenizer.get_chat_template())

    @cached_property
    def _stop(self) -> re.Pattern[str]:
        spelling = control_tokens(self.tokenizer)
        return re.compile("|".join(re.escape(spelling[end]) for end in sorted(self.ends)))

    @cached_property
    def _skeletons(self) -> dict[tuple[tuple[str, ...], int], Skeleton | None]:
        return {}


def marked_answers(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    template: str | None,
    tools: list[Any] | None,
    options: dict[str, Any] | None,
) -> tuple[list[int], list[int]]:
    """A conversation in tokens, and for each whether the template's markers are around it."""
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
    return list(found["input_ids"]), marked


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


def _uncommon(messages: Messages, tools: list[Any] | None) -> bool:
    """Whether there is more than questions and answers after at most one system message."""
    roles = [message["role"] for message in messages]
    return bool(tools) or any(
        role in ("tool", "developer") or (role == "system" and index) or messages[index].get("tool_calls")
        for index, role in enumerate(roles)
    )


def _is_context(message: dict[str, Any]) -> bool:
    """Whether an answer is not to be learnt: OpenAI's format says so by a weight of 0."""
    return message.get("weight") == 0


def _is_its_own(messages: Messages, index: int, written: str) -> bool:
    """Whether a stretch of text says all that the answer says, and nothing that another message after it says."""
    message = messages[index]
    said, calls = str(message["content"]).strip(), _called(message)
    if not (said or calls) or said not in written or not all(name in written for name in calls):
        return False
    others = [str(other["content"]).strip() for other in messages[index + 1 :]]
    known = "\n".join(str(other["content"]) for other in messages[: index + 1]) + json.dumps(message.get("tool_calls"))
    return not any(len(other) > 2 and other in written and other not in known for other in others)


def _called(message: dict[str, Any]) -> list[str]:
    calls = [call.get("function", call) for call in message.get("tool_calls") or () if isinstance(call, dict)]
    return [str(call["name"]) for call in calls if isinstance(call, dict) and "name" in call]


def _unwritten(messages: Messages, whole: str) -> int:
    """How many messages say something that is not in the text, as it is or as JSON."""
    lost = 0
    for message in messages:
        said = str(message["content"]).strip()
        there = said in whole or json.dumps(said)[1:-1] in whole or json.dumps(said, ensure_ascii=False)[1:-1] in whole
        with suppress(TypeError, ValueError):  # results of tools are JSON that some templates write anew
            there = there or all(str(value) in whole for value in dict(json.loads(said)).values())
        lost += not (there and all(name in whole for name in _called(message)))
    return lost


def _covered(offsets: list[tuple[int, int]], spans: Spans, headers: set[int]) -> list[bool]:
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


_ASKED = ("What is two and two?", "It is four.", "And three and three?", "That is six.")


def probe(length: int) -> Messages:
    """A plain conversation of so many messages, at most four, to see what a template makes of it."""
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(_ASKED[:length])]
