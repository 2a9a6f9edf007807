"""Rows of any format as one kind of sample: what is asked, what is answered, and what was preferred less."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .formats import Layout
from .messages import BadValueError, Messages, describe, from_json, looks_like_messages, read_messages, without_nulls

# Why a row is left out; also the words of the report.
EMPTY_ROW = "empty row"
EMPTY_PROMPT = "empty prompt"
NO_ANSWER = "no assistant message"
EMPTY_ANSWER = "empty answer"
NO_PREFERENCE = "chosen and rejected are the same"
DUPLICATE = "exact duplicate of an earlier row"
UNPROVEN = "no answer that can be learnt"
CUT_AWAY = "nothing of the answer left after max_length"


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
    """

    row: int
    prompt: Messages | str
    answer: Messages | str
    rejected: Messages | str | None = None
    tools: list[Any] | None = None
    options: dict[str, Any] | None = None
    unanswered: int = 0

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
            # Dialogues in text (HH's) have their first question before the first answer.
            said = [str(self.prompt).split(_TEXT_ANSWER)[0]] if self.prompt else [str(self.answer)]
        else:
            whole = self.prompt + self.answer
            roles = [message["role"] for message in whole]
            user = roles.index("user") if "user" in roles else 0
            first = next((i for i in range(user, len(whole)) if roles[i] == "assistant"), len(whole))
            asked = [whole[i]["content"] for i in range(user, first) if roles[i] not in _SYSTEM]
            said = asked if any(text.strip() for text in asked) else [message["content"] for message in whole]
        return _digest("\x1f".join(_normalised(text) for text in said))

    @property
    def system(self) -> str:
        """The hash of the system prompt, normalised; that of nothing without one."""
        if isinstance(self.prompt, str):
            return _digest("")
        said = [message["content"] for message in self.prompt if message["role"] in _SYSTEM]
        return _digest("\x1f".join(_normalised(text) for text in said))

    @property
    def content(self) -> str:
        """The hash of all that is in it."""
        parts: tuple[Any, ...] = (self.prompt, self.answer, self.rejected, self.tools, self.options)
        if not isinstance(self.prompt, str) and not isinstance(self.answer, str) and self.rejected is None:
            parts = (self.prompt + self.answer, None, None, self.tools, self.options)
        return _digest(json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str))


_SYSTEM = ("system", "developer")
_TEXT_ANSWER = "\n\nAssistant:"


def _normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _digest(text: str) -> str:
    # A lone surrogate is legal in JSON and not in UTF-8.
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def read_row(row: Mapping[str, Any], number: int, layout: Layout, *, chat: bool) -> Sample | str:
    """A row as a sample, or the reason why it is left out.

    Args:
        row: column -> value.
        number: of the row.
        layout: of its data set.
        chat: whether texts become messages: there is a chat template to write them with.

    Raises:
        BadValueError: a field holds what it cannot hold.
    """
    values = {field: row.get(column) for field, column in layout.columns.items()}
    if all(_blank(value) for field, value in values.items() if field != "system"):
        return EMPTY_ROW
    sample = _READERS[layout.format](values, layout.columns, chat)
    if isinstance(sample, str):
        return sample
    sample.row = number
    if sample.conversational:
        sample.tools = _tools(row.get("tools"))
        options = from_json(row.get("chat_template_kwargs"), "chat_template_kwargs")
        if options is not None and not isinstance(options, dict):
            raise BadValueError("chat_template_kwargs", f"{describe(options)}, where an object belongs")
        sample.options = without_nulls(options) if options else None
    return sample


def _tools(tools: Any) -> list[Any] | None:
    tools = from_json(tools, "tools")
    if tools is not None and not isinstance(tools, list):
        raise BadValueError("tools", f"{describe(tools)}, where a list of functions belongs")
    return without_nulls(tools) or None


def _conversation(values: dict[str, Any], columns: dict[str, str], _: bool) -> Sample | str:
    messages = read_messages(values["messages"], columns["messages"])
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        return NO_ANSWER
    if any(_unsaid(messages[index]) for index in answers):
        return EMPTY_ANSWER
    end = answers[-1] + 1
    return Sample(0, messages[: answers[0]], messages[answers[0] : end], unanswered=len(messages) - end)


def _alpaca(values: dict[str, Any], columns: dict[str, str], chat: bool) -> Sample | str:
    instruction, more = _text(values, "instruction", columns), _text(values, "input", columns)
    asked = "\n\n".join(part for part in (instruction, more) if part.strip())
    return _asked(asked, _text(values, "output", columns), _text(values, "system", columns), chat)


def _prompt_completion(values: dict[str, Any], columns: dict[str, str], chat: bool) -> Sample | str:
    system = _text(values, "system", columns)
    prompt, completion = (_list_or_text(values[field]) for field in ("prompt", "completion"))
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return _asked(_text(values, "prompt", columns), _text(values, "completion", columns), system, chat)
    asked = _side(prompt, "user", columns["prompt"])
    answer = _side(completion, "assistant", columns["completion"])
    if not asked:
        return EMPTY_PROMPT
    return _answered(_with_system(system, asked), answer, columns["completion"])


def _preference(values: dict[str, Any], columns: dict[str, str], chat: bool) -> Sample | str:
    chosen, rejected = (_list_or_text(values[field]) for field in ("chosen", "rejected"))
    system, prompt = _text(values, "system", columns), _list_or_text(values.get("prompt"))
    if isinstance(chosen, list) != isinstance(rejected, list) and not (_blank(chosen) or _blank(rejected)):
        raise BadValueError(
            columns["rejected"], f"{describe(rejected)}, while {columns['chosen']} is {describe(chosen)}"
        )
    if chosen == rejected:
        return EMPTY_ANSWER if _blank(chosen) else NO_PREFERENCE
    if _blank(chosen) or _blank(rejected):
        return EMPTY_ANSWER
    if isinstance(chosen, list):
        return _preferred_messages(prompt, chosen, rejected, system, columns)
    return _preferred_texts(values, columns, system, chat)


def _preferred_messages(
    prompt: Any, chosen: list[Any], rejected: list[Any], system: str, columns: dict[str, str]
) -> Sample | str:
    left, right = read_messages(chosen, columns["chosen"]), read_messages(rejected, columns["rejected"])
    if isinstance(prompt, list) and prompt:
        asked = read_messages(prompt, columns["prompt"])
        if left[: len(asked)] == asked == right[: len(asked)]:
            left, right = left[len(asked) :], right[len(asked) :]
    else:
        from trl.data_utils import extract_prompt

        # A prompt of text beside whole conversations is their first question, said again.
        found = extract_prompt({"chosen": left, "rejected": right})
        asked, left, right = found["prompt"], found["chosen"], found["rejected"]
        if isinstance(prompt, str) and prompt.strip():
            asked = _with_question(prompt, asked, columns)
    if not asked:
        raise BadValueError(columns["chosen"], "begins differently from rejected, and there is no prompt")
    asked = _with_system(system, asked)
    best, other = _answered(asked, left, columns["chosen"]), _answered(asked, right, columns["rejected"])
    if isinstance(best, str) or isinstance(other, str):
        return best if isinstance(best, str) else str(other)
    if best.answer == other.answer:
        return NO_PREFERENCE
    best.rejected, best.unanswered = other.answer, best.unanswered + other.unanswered
    return best


def _with_question(prompt: str, shared: Messages, columns: dict[str, str]) -> Messages:
    """What both sides begin with, and the question beside them, which it begins with or answers."""
    before = [message for message in shared if message["role"] in _SYSTEM]
    rest = shared[len(before) :]
    if not rest or rest[0]["role"] != "user":
        return [*before, {"role": "user", "content": prompt}, *rest]
    if rest[0]["content"].strip() != prompt.strip():
        raise BadValueError(
            columns["prompt"], f"{describe(prompt)}, while the conversations begin with {describe(rest[0]['content'])}"
        )
    return shared


def _preferred_texts(values: dict[str, Any], columns: dict[str, str], system: str, chat: bool) -> Sample | str:
    chosen, rejected = _text(values, "chosen", columns), _text(values, "rejected", columns)
    if "prompt" in columns:
        sample = _asked(_text(values, "prompt", columns), chosen, system, chat)
        if isinstance(sample, Sample):
            sample.rejected = [{"role": "assistant", "content": rejected}] if sample.conversational else rejected
        return sample
    from trl.data_utils import extract_prompt

    found = extract_prompt({"chosen": chosen, "rejected": rejected})
    # Answers that begin with the same letters are no longer prompt: back to where the last word began.
    shared = found["prompt"] if chosen[len(found["prompt"]) :][:1].isspace() else _whole_words(found["prompt"])
    if not shared.strip():
        raise BadValueError(columns["chosen"], "begins differently from rejected, and there is no prompt")
    if not chosen[len(shared) :].strip() or not rejected[len(shared) :].strip():
        return EMPTY_ANSWER
    return Sample(0, shared, chosen[len(shared) :], rejected[len(shared) :])


def _whole_words(text: str) -> str:
    end = len(text)
    while end and not text[end - 1].isspace():
        end -= 1
    return text[:end].rstrip(" ")


def _plain(values: dict[str, Any], columns: dict[str, str], _: bool) -> Sample | str:
    return Sample(0, "", _text(values, "text", columns))


_READERS: dict[str, Callable[[dict[str, Any], dict[str, str], bool], Sample | str]] = {
    "messages": _conversation,
    "sharegpt": _conversation,
    "alpaca": _alpaca,
    "prompt-completion": _prompt_completion,
    "preference": _preference,
    "text": _plain,
}


def _asked(prompt: str, answer: str, system: str, chat: bool) -> Sample | str:
    """A question and its answer, both text."""
    if not prompt.strip():
        return EMPTY_PROMPT
    if not answer.strip():
        return EMPTY_ANSWER
    if not chat:
        return Sample(0, f"{system}\n\n{prompt}" if system.strip() else prompt, answer)
    asked = _with_system(system, [{"role": "user", "content": prompt}])
    return Sample(0, asked, [{"role": "assistant", "content": answer}])


def _answered(prompt: Messages, answer: Messages, path: str) -> Sample | str:
    """A conversation and the messages that answer it."""
    if answer and answer[0]["role"] not in ("assistant", "tool"):
        raise BadValueError(f"{path}[0].role", f"{answer[0]['role']!r}, where an answer begins (assistant)")
    answers = [index for index, message in enumerate(answer) if message["role"] == "assistant"]
    if not answers:
        return NO_ANSWER
    if any(_unsaid(answer[index]) for index in answers):
        return EMPTY_ANSWER
    end = answers[-1] + 1
    return Sample(0, prompt, answer[:end], unanswered=len(answer) - end)


def _side(value: Any, role: str, path: str) -> Messages:
    """One side of a pair whose other side is a list of messages."""
    if isinstance(value, list):
        return read_messages(value, path)
    if value is not None and not isinstance(value, str):
        raise BadValueError(path, f"{describe(value)}, where text or a list of messages belongs")
    return [{"role": role, "content": value}] if value and value.strip() else []


def _with_system(system: str, messages: Messages) -> Messages:
    return [{"role": "system", "content": system}, *messages] if system.strip() else messages


def _text(values: dict[str, Any], field: str, columns: dict[str, str]) -> str:
    value = values.get(field)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadValueError(columns[field], f"{describe(value)}, where text belongs")
    return value


def _unsaid(message: dict[str, Any]) -> bool:
    return not message["content"].strip() and not message.get("tool_calls")


def _list_or_text(value: Any) -> Any:
    """Messages that were written as JSON, parsed; other text stays text, since prompts and answers may be JSON too."""
    return from_json(value, "") if isinstance(value, str) and looks_like_messages(value) else value


def _blank(value: Any) -> bool:
    return value is None or (
        isinstance(value, (str, list)) and not (value.strip() if isinstance(value, str) else value)
    )
