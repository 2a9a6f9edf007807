"""Messages as forge keeps them: a role, a content that is text, and what else a chat template may read."""

from __future__ import annotations

import json
from typing import Any

from ..errors import ForgeError

Messages = list[dict[str, Any]]

# The spellings of ShareGPT and its relatives, by the role that chat templates know.
_ROLES = {
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bot", "model", "bard", "bing"),
    "system": ("system",),
    "developer": ("developer",),
    "tool": ("tool", "function", "function_response", "observation", "ipython"),
}
ROLES = {spelling: role for role, spellings in _ROLES.items() for spelling in spellings}


class BadValueError(ForgeError):
    """A value that cannot be what its field must hold: the field's path in the row, and what is wrong."""

    def __init__(self, path: str, said: str) -> None:
        super().__init__(f"{path}: {said}")


def read_messages(value: Any, path: str) -> Messages:
    """A conversation in any of the spellings that are understood, as role and content.

    Args:
        value: a list of `{"role", "content"}` or `{"from", "value"}`, or the JSON of one.
        path: where it stands in the row, for errors.

    Raises:
        BadValueError: it is something else.
    """
    value = from_json(value, path)
    if not isinstance(value, list):
        raise BadValueError(path, f"{describe(value)}, where a list of messages belongs")
    return [_message(message, f"{path}[{index}]") for index, message in enumerate(value)]


def from_json(value: Any, path: str) -> Any:
    """The value, parsed if it is the JSON of a list or an object, as CSV files and many exports hold it."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise BadValueError(path, f"text that begins like JSON and is none ({error})") from None


def looks_like_messages(value: Any) -> str | None:
    """Which of "messages" and "sharegpt" a list is by the keys of its first entry; None for what is neither."""
    try:
        value = from_json(value, "")
    except BadValueError:
        return None
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return None
    keys = {key for key, held in value[0].items() if held is not None}
    if "role" in keys and keys & {"content", "tool_calls"}:
        return "messages"
    return "sharegpt" if {"from", "value"} <= keys else None


def _message(message: Any, path: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise BadValueError(path, f"{describe(message)}, where an object with role and content belongs")
    message = {key: held for key, held in message.items() if held is not None}
    role_key, content_key = ("from", "value") if "from" in message and "role" not in message else ("role", "content")
    if role_key not in message:
        raise BadValueError(f"{path}.role", f"missing; the message has {', '.join(message) or 'nothing'}")
    said = message[role_key]
    role = ROLES.get(said.strip().lower()) if isinstance(said, str) else None
    if role is None:
        raise BadValueError(f"{path}.{role_key}", f"{said!r} is no role; known are {', '.join(sorted(ROLES))}")
    content = _content(message.get(content_key), f"{path}.{content_key}")
    if content is None and not message.get("tool_calls"):
        raise BadValueError(f"{path}.{content_key}", "missing")
    rest = {key: held for key, held in message.items() if key not in (role_key, content_key, *_WEIGHTS)}
    weight = {} if _counts(message, path) else {"weight": 0}
    if calls := rest.get("tool_calls"):
        rest["tool_calls"] = [_with_arguments(call) for call in calls] if isinstance(calls, list) else calls
    return {"role": role, "content": content or "", **rest, **weight}


# OpenAI's format and others say by these keys that an answer is context and not to be learnt.
_WEIGHTS = ("weight", "train", "training")


def _counts(message: dict[str, Any], path: str) -> bool:
    for key in _WEIGHTS:
        if key in message and message[key] not in (0, 1):
            raise BadValueError(f"{path}.{key}", f"{describe(message[key])}, where 0 or 1 (false or true) belongs")
    return all(message[key] for key in _WEIGHTS if key in message)


def _with_arguments(call: Any) -> Any:
    """A call whose arguments are an object: OpenAI's format holds its JSON, which templates would write as a string."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except json.JSONDecodeError:
        return call
    if not isinstance(arguments, dict):
        return call
    parsed = {**function, "arguments": arguments}
    return {**call, "function": parsed} if "function" in call else parsed


def _content(content: Any, path: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        others = sorted({str(part.get("type")) for part in content} - {"text"})
        if others:
            raise BadValueError(path, f"holds parts of the type {', '.join(others)}; forge prepares text only")
        return "".join(str(part.get("text") or "") for part in content)
    raise BadValueError(path, f"{describe(content)}, where text belongs")


def without_nulls(value: Any) -> Any:
    """The value without keys that hold nothing, at any depth: Arrow gives every row the keys of all rows.

    Not for rows from elsewhere: a null in a call's arguments or in the schema of a tool is what somebody said.
    """
    if isinstance(value, dict):
        return {key: without_nulls(held) for key, held in value.items() if held is not None}
    return [without_nulls(held) for held in value] if isinstance(value, list) else value


def describe(value: Any) -> str:
    """A value in an error: its type, and enough of it to be found.

    >>> describe(17), describe(None), describe("x" * 99)
    ('int 17', 'nothing (null)', "str 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx'...")
    """
    if value is None:
        return "nothing (null)"
    text = repr(value)
    return f"{type(value).__name__} " + (text if len(text) <= 42 else text[:41] + f"{text[0]}..."[-4:])


def first_five(lines: list[str]) -> tuple[str, str]:
    """What a message about many rows shows of them: a remark on how many there are, and the first five, indented.

    >>> first_five(["row 3, text: missing"])
    ('', 'row 3, text: missing')
    """
    return f" (the first 5 of {len(lines):,})" if len(lines) > 5 else "", "\n  ".join(lines[:5])
