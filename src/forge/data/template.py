"""The model's own chat template, and which of the tokens that it writes are the assistant's.

Where a template says so itself, by `{% generation %}` markers, it is believed; else TRL's rewriting of it is used, if
TRL knows it; else the answers are found: what the template writes of the messages before an answer, with its generation
prompt, must be the beginning of what it writes of the whole, and the answer lasts from there to the first control token
that the template writes after answers. A template that keeps none of the three promises is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

from ..compat import has_generation_markers
from .marked import covered_by, marked_places, runs
from .said import says_only, shared, unwritten
from .skeleton import Skeleton, Spans, skeleton
from .structure import OTHER, Structure
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
        otherwise: how rows are masked in which markers do not mark every answer; None refuses them.
    """

    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    text: str | None = field(repr=False)
    origin: str
    ends: frozenset[int]
    marked: bool = False
    every_turn: bool = True
    notes: tuple[str, ...] = ()
    otherwise: ChatTemplate | None = field(default=None, repr=False)

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
            try:
                return self._by_markers(messages, first, tools, options)
            except TemplateRefusalError:
                if self.otherwise is None or _uncommon(messages, tools):
                    raise
                # Tokenizers that place white space nowhere lose the mark of an answer that begins with it.
                return self.otherwise.encode(messages, first, tools, options)
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
        ids, marked, places = marked_places(self.tokenizer, messages, self.text, tools, options)
        whole = render(self.tokenizer, messages, chat_template=self.text, tools=tools, options=options)
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        spans, learnt = runs(marked), [False] * len(ids)
        if len(turns) != len(spans):
            raise TemplateRefusalError(
                f"it marks {len(spans)} stretches as the assistant's, and the conversation has {len(turns)} answers"
            )
        kept = [(span, turn) for span, turn in zip(spans, turns, strict=True) if turn >= first]
        unlearnt = 0
        for span, turn in kept:
            start, end = self._narrowed(ids, span, messages[:turn], tools, options)
            proven = start < end and not _is_context(messages[turn])
            if proven:
                proven = says_only(messages, turn, whole[places[start][0] : places[end - 1][1]], self._control)
            if proven and _uncommon(messages, tools):
                proven = places[end - 1][1] <= self._bound(whole, messages, turn, tools, options)
            if proven:
                learnt[start:end] = [True] * (end - start)
            unlearnt += not proven
        return Encoded(ids, learnt, unlearnt, unwritten(messages, whole))

    def _narrowed(
        self,
        ids: list[int],
        span: tuple[int, int],
        before: Messages,
        tools: list[Any] | None,
        options: dict[str, Any] | None,
    ) -> tuple[int, int]:
        """An answer without what the generation prompt writes, and without what follows its end: TRL marks both.

        The model's own markers are believed, but for a header that swallows the white space with which they begin.
        """
        start, end = span
        if before and (self.origin == "TRL" or ids[start] in self._spelling):
            said: dict[str, Any] = {"chat_template": self.text, "tools": tools, "options": options}
            prompt = render(self.tokenizer, before, add_generation_prompt=True, **said)
            asked = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
            common = shared_length(ids, asked)
            if common < start and self.origin == "TRL":
                # What was asked is written otherwise once more follows: whose words these are is unknown.
                return start, start
            start = max(start, common)
        if self.origin != "TRL":
            return start, end
        last = next((index for index in range(end - 1, start - 1, -1) if ids[index] in self.ends), end - 1)
        return start, last + 1

    def _by_prefix(
        self, messages: Messages, first: int, tools: list[Any] | None, options: dict[str, Any] | None
    ) -> Encoded:
        whole = render(self.tokenizer, messages, chat_template=self.text, tools=tools, options=options)
        spans = self._quickly(messages, whole, first) if not tools and not options else None
        if spans is None:
            spans = list(self._find(messages, whole, first, tools, options).values())
            lost = unwritten(messages, whole)
        else:
            lost = 0
        asked = sum(message["role"] == "assistant" for message in messages[first:])
        encoding = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        ids = list(encoding["input_ids"])
        headers = {index for index, token in enumerate(ids) if token in self._spelling}
        return Encoded(ids, covered_by(encoding["offset_mapping"], spans, headers), asked - len(spans), lost)

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
            span = self._span(whole, messages, index, tools, options)
            before = max((stop for _, stop in spans.values()), default=0)
            if (
                span is not None
                and span[0] >= before
                and says_only(messages, index, whole[slice(*span)], self._control)
            ):
                spans[index] = span
        return spans

    def _span(
        self, whole: str, messages: Messages, index: int, tools: list[Any] | None, options: dict[str, Any] | None
    ) -> tuple[int, int] | None:
        """Where in the text an answer begins and ends; None if it does not end before the next message begins."""
        said: dict[str, Any] = {"chat_template": self.text, "tools": tools, "options": options}
        before = render(self.tokenizer, messages[:index], add_generation_prompt=True, **said)
        if not whole.startswith(before):
            raise TemplateRefusalError(
                f"what it writes before message {index} changes once the answer is there, so the answer's beginning "
                f"cannot be found. {REMEDY}"
            )
        # Control tokens that are part of what was said do not end it.
        skipped = len(self._stop.findall(str(messages[index]["content"])))
        found = next(islice(self._stop.finditer(whole, len(before)), skipped, None), None)
        if found is None or found.end() > self._bound(whole, messages, index, tools, options):
            return None
        return len(before), found.end()

    def _bound(
        self, whole: str, messages: Messages, index: int, tools: list[Any] | None, options: dict[str, Any] | None
    ) -> int:
        """Where in the text what the next message says begins: there the text changes if it says something else."""
        for later in range(index + 1, len(messages)):
            kept = {key: held for key, held in messages[later].items() if key not in ("content", "tool_calls")}
            other = [*messages[:later], {**kept, "content": OTHER}, *messages[later + 1 :]]
            try:
                text = render(self.tokenizer, other, chat_template=self.text, tools=tools, options=options)
            except TemplateRefusalError:
                # Then the text up to the answer's end, which the template may have to write without what follows.
                text = render(
                    self.tokenizer, messages[: index + 1], chat_template=self.text, tools=tools, options=options
                )
            if text != whole:  # else it does not write that message
                return shared(text, whole)
        return len(whole)

    @cached_property
    def structure(self) -> Structure:
        """What the template writes around what is said."""
        return Structure(self.tokenizer, self.text, tuple(self._spelling[end] for end in sorted(self.ends)))

    @cached_property
    def _spelling(self) -> dict[int, str]:
        return control_tokens(self.tokenizer)

    @cached_property
    def _has_markers(self) -> bool:
        return has_generation_markers(self.text or self.tokenizer.get_chat_template())

    @cached_property
    def _stop(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(self._spelling[end]) for end in sorted(self.ends)))

    @cached_property
    def _control(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(text) for text in sorted(self._spelling.values(), key=len, reverse=True)))

    @cached_property
    def _skeletons(self) -> dict[tuple[tuple[str, ...], int], Skeleton | None]:
        return {}


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
