"""What a chat template writes around what is said."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from .tokens import Messages, TemplateRefusalError, control_tokens, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OTHER = "forge: something else"
_ASKED = ("What is two and two?", "It is four.", "And three and three?", "That is six.")


def probe(length: int) -> Messages:
    """A plain conversation of so many messages, at most four, to see what a template makes of it."""
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(_ASKED[:length])]


@dataclass(frozen=True)
class Structure:
    """By what rendered text, and the control tokens in it, are known.

    Args:
        tokenizer: the model's.
        template: what renders, None for the tokenizer's own.
        ends: how the tokens that end answers are spelled.
    """

    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    template: str | None = field(repr=False)
    ends: tuple[str, ...]

    @cached_property
    def marks(self) -> frozenset[str]:
        """The control tokens that the template itself writes, in the tokenizer's spelling."""
        written = self._rendered(probe(4))
        return frozenset(text for text in self._special if text in written)

    @cached_property
    def opening(self) -> str:
        """What the template writes after a question to have it answered; empty where it writes nothing."""
        asked, alone = self._rendered(probe(1), add_generation_prompt=True), self._rendered(probe(1))
        return asked[len(alone) :].strip() if asked.startswith(alone) else ""

    @cached_property
    def heads(self) -> tuple[str, ...]:
        """What the template writes before what a user or a system message says: a rendered prompt begins so.

        Only the first line of each, since what follows may be a date or a system prompt of its own.
        """
        begun = [self._rendered(probe(1)).partition(_ASKED[0])[0]]
        with suppress(TemplateRefusalError):
            begun.append(self._rendered([{"role": "system", "content": OTHER}, *probe(1)]).partition(OTHER)[0])
        between = self._rendered(probe(3)).partition(_ASKED[1])[2].partition(_ASKED[2])[0]
        for end in self.ends:
            between = between.rpartition(end)[2]
        beginning = str(self.tokenizer.bos_token or "")
        begun += [between, *(text.removeprefix(beginning) for text in (*begun, between))]
        lines = {text.lstrip().partition("\n")[0] for text in begun}
        return tuple(sorted(found for line in lines if (found := self._header(line)) not in ("", beginning)))

    def _header(self, line: str) -> str:
        """The control tokens that a line begins with, and the role after them; not the words of a system prompt."""
        end = max((line.rfind(mark) + len(mark) for mark in self._special if mark in line), default=0)
        return line[:end] if not end or " " in line[end:].strip() else line

    @cached_property
    def _special(self) -> frozenset[str]:
        special = {index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        special |= set(self.tokenizer.all_special_ids)
        return frozenset(text for index, text in control_tokens(self.tokenizer).items() if index in special)

    def _rendered(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        return render(
            self.tokenizer, messages, chat_template=self.template, add_generation_prompt=add_generation_prompt
        )
