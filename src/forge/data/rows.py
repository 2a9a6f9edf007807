"""Rows of any format as one kind of sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .formats import Layout
from .messages import BadValueError, Messages, describe, from_json, looks_like_messages, read_messages
from .sample import SYSTEM
from .sample import Sample as Sample  # noqa: PLC0414 (for those who read rows)

# Why a row is left out; also the words of the report.
EMPTY_ROW = "empty row"
EMPTY_PROMPT = "empty prompt"
NO_ANSWER = "no assistant message"
EMPTY_ANSWER = "empty answer"
NO_PREFERENCE = "chosen and rejected are the same"
DUPLICATE = "exact duplicate of an earlier row"
UNPROVEN = "no answer that can be learnt"
CUT_AWAY = "nothing of the answer left after max_length"


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
    for column in (*layout.columns.values(), *_PARSED):
        value = row.get(column)
        if isinstance(value, str) and "\\ud" in value.lower():  # the JSON of one
            value = from_json(value, column) if column in _PARSED or looks_like_messages(value) else value
        _check_text(value, column)
    sample = _READERS[layout.format](values, layout.columns, chat)
    if isinstance(sample, str):
        return sample
    sample.row = number
    if sample.conversational:
        sample.tools = _tools(row.get("tools"))
        options = from_json(row.get("chat_template_kwargs"), "chat_template_kwargs")
        if options is not None and not isinstance(options, dict):
            raise BadValueError("chat_template_kwargs", f"{describe(options)}, where an object belongs")
        sample.options = options or None
    return sample


_PARSED = ("tools", "chat_template_kwargs")


def _check_text(value: Any, path: str) -> None:
    """Refuse text that is no Unicode: JSON can spell half a character, and neither Arrow nor a tokenizer takes it."""
    if isinstance(value, str):
        try:
            value.isascii() or value.encode()
        except UnicodeEncodeError as error:
            raise BadValueError(
                path, f"holds half a character (U+{ord(value[error.start]):04X}, character {error.start})"
            ) from None
    elif isinstance(value, dict):
        for key, held in value.items():
            _check_text(key, path)
            _check_text(held, f"{path}.{key}")
    elif isinstance(value, list):
        for index, held in enumerate(value):
            _check_text(held, f"{path}[{index}]")


def _tools(tools: Any) -> list[Any] | None:
    tools = from_json(tools, "tools")
    if tools is not None and not isinstance(tools, list):
        raise BadValueError("tools", f"{describe(tools)}, where a list of functions belongs")
    return tools or None


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
    before = [message for message in shared if message["role"] in SYSTEM]
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
        before = f"{system}\n\n" if system.strip() else ""
        return Sample(0, before + prompt, answer, before=before)
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
