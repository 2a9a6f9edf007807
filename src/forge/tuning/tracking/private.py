"""What nobody is told: tokens, passwords, keys."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "[hidden]"
_SECRET = re.compile(
    r"(?:^|[_\-.\s])(?:token|secret|secret[_-]?key|password|passwd|pwd|api[_-]?key|apikey|access[_-]?key"
    r"|private[_-]?key|credentials?|auth|authorization|cookie)$",
    re.IGNORECASE,
)
_IN_WORDS = re.compile(r"[a-z](?:Token|Secret|Password|ApiKey|AccessKey|PrivateKey|SecretKey|Credentials?)$")
_NOT_SECRET = re.compile(r"(?:^|[_\-.])(?:eos|bos|pad|unk|sep|cls|mask|stop|image|video|audio)_token$", re.IGNORECASE)
_USERINFO = re.compile(r"([a-zA-Z][a-zA-Z0-9+.\-]*://)[^/\s?#'\"]*@")  # to the last @: passwords may hold one
_IN_QUERY = re.compile(r"([?&][^=&\s]*(?:token|secret|password|key|signature|sig)=)[^&\s]+", re.IGNORECASE)
# The shapes of the commonest tokens: Hugging Face, OpenAI and alike, GitHub, AWS, Google.
_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_\-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|AKIA[A-Z0-9]{16}|AIza[A-Za-z0-9_\-]{30,})"
)
# Names and values in the text of a dict, of JSON, or of arguments.
_PAIR = re.compile(r"""(?P<name>[\w.\-]+)(?P<between>['"]?\s*[:=]\s*)(?P<value>'[^']*'|"[^"]*"|[^\s'",;&}\]\)]+)""")
_SHORTEST = 6  # a shorter value of a variable is a word that may stand anywhere


def is_secret(name: str) -> bool:
    """Whether what is called so should not be shown.

    >>> [is_secret(name) for name in ("hub_token", "OPENAI_API_KEY", "eos_token", "max_new_tokens")]
    [True, True, False, False]
    """
    return bool(_SECRET.search(name) or _IN_WORDS.search(name)) and not _NOT_SECRET.search(name)


def told(name: str, value: Any) -> str:
    """A value as text, without what is secret in it.

    >>> told("tracking_uri", "http://ada:hunter2@host:5000")
    'http://host:5000'
    >>> told("hub_token", "x")
    '[hidden]'
    >>> told("judge", {"api_key": "x", "eos_token": "</s>"})
    "{'api_key': '[hidden]', 'eos_token': '</s>'}"
    """
    text = str(_without_secrets(value))
    if is_secret(name) and text not in ("", "None"):
        return HIDDEN
    text = _IN_QUERY.sub(rf"\1{HIDDEN}", _USERINFO.sub(r"\1", text))
    text = _PAIR.sub(_without_value, text)
    for secret in _of_environment():
        text = text.replace(secret, HIDDEN)
    return _SHAPES.sub(HIDDEN, text)


def _without_value(pair: re.Match[str]) -> str:
    known = pair["value"].strip("'\"") in ("", "None", HIDDEN) or pair["value"].startswith("[hidden")
    return pair[0] if known or not is_secret(pair["name"]) else f"{pair['name']}{pair['between']}{HIDDEN}"


def _without_secrets(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            name: HIDDEN if is_secret(str(name)) and one not in ("", None) else _without_secrets(one)
            for name, one in value.items()
        }
    if type(value) in (list, tuple):
        return type(value)(map(_without_secrets, value))
    return value


def _of_environment() -> list[str]:
    found = [value for name, value in os.environ.items() if is_secret(name) and len(value) >= _SHORTEST]
    return sorted(found, key=len, reverse=True)
