"""What every row becomes: what is asked, what is answered, and what was preferred less."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from dataclasses import dataclass
from typing import Any

from .messages import Messages


@dataclass(slots=True)
class Sample:
    """A row in one of two shapes: messages, which a chat template writes, or plain text.

    Args:
        row: its number in the data set that was handed in, from 0.
        prompt: what is never learnt (empty for format "text").
        answer: what is learnt; of messages only the assistant's. For preferences the chosen answer.
        rejected: the other answer of a preference, else None.
        tools: for the chat template.
        options: more arguments of the chat template (the column `chat_template_kwargs`).
        unanswered: how many messages after the last answer were left out.
        before: the system prompt that a prompt of text begins with.
    """

    row: int
    prompt: Messages | str
    answer: Messages | str
    rejected: Messages | str | None = None
    tools: list[Any] | None = None
    options: dict[str, Any] | None = None
    unanswered: int = 0
    before: str = ""

    @property
    def conversational(self) -> bool:
        """Whether a chat template writes it."""
        return not isinstance(self.answer, str)

    @property
    def key(self) -> str:
        """What rows that must not be on both sides of a split share: the hash of the prompt, normalised.

        That is the first question: everything before the first answer to a user, without the system prompt and a
        greeting; case, runs of white space and Unicode's compatibility forms make no difference. Where nothing is
        asked, it is the whole.
        """
        if isinstance(self.prompt, str) or isinstance(self.answer, str):
            said = [_first_turn(str(self.prompt)[len(self.before) :] or str(self.answer))]
        else:
            whole = self.prompt + self.answer
            roles = [message["role"] for message in whole]
            user = roles.index("user") if "user" in roles else 0
            first = next((i for i in range(user, len(whole)) if roles[i] == "assistant"), len(whole))
            asked = [_first_turn(whole[i]["content"]) for i in range(user, first) if roles[i] not in SYSTEM]
            said = asked if any(text.strip() for text in asked) else [message["content"] for message in whole]
        return _digest("\x1f".join(_normalised(text) for text in said))

    @property
    def system(self) -> str:
        """The hash of the system prompt, normalised; that of nothing without one."""
        if isinstance(self.prompt, str):
            return _digest(_normalised(self.before))
        said = [message["content"] for message in self.prompt if message["role"] in SYSTEM]
        return _digest("\x1f".join(_normalised(text) for text in said))

    @property
    def content(self) -> str:
        """The hash of all that is in it."""
        parts: tuple[Any, ...] = (self.prompt, self.answer, self.rejected, self.tools, self.options)
        if not isinstance(self.prompt, str) and not isinstance(self.answer, str) and self.rejected is None:
            parts = (self.prompt + self.answer, None, None, self.tools, self.options)
        return _digest(json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str))


SYSTEM = ("system", "developer")
_TEXT_QUESTION, _TEXT_ANSWER = "\n\nHuman:", "\n\nAssistant:"


def _first_turn(text: str) -> str:
    r"""The first question of a dialogue that is one text (HH's are), up to the answer; all of what is none.

    >>> _first_turn("\n\nAssistant: Hello!\n\nHuman: 2 + 2?\n\nAssistant: 4")
    '\n\nHuman: 2 + 2?'
    """
    dialogue = "\n\n" + text.lstrip()
    begin = max(dialogue.find(_TEXT_QUESTION), 0)
    end = dialogue.find(_TEXT_ANSWER, begin)
    return dialogue[begin:end] if end > 0 else text


def _normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _digest(text: str) -> str:
    # A lone surrogate is legal in JSON and not in UTF-8.
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
