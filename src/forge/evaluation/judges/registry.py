"""Judges by name."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, TypeVar

from ...errors import ConflictError, UnknownNameError
from .function import FunctionJudge, scores
from .judge import Judge

Registered = TypeVar("Registered", bound=Callable[..., Any])

_OWN = {
    "openai": (".openai_judge", "OpenAIJudge"),
    "gemini": (".gemini", "GeminiJudge"),
    "gigachat": (".gigachat_judge", "GigaChatJudge"),
    "local": (".local", "LocalJudge"),
}
_registered: dict[str, Callable[..., Any]] = {}


def list_judges() -> list[str]:
    """The names that `get_judge` knows.

    >>> list_judges()[:4]
    ['gemini', 'gigachat', 'local', 'openai']
    """
    return sorted({*_OWN, *_registered})


def default_judge() -> str:
    """The judge that is meant where none is named: `FORGE_JUDGE`, else "local", which sends nothing anywhere."""
    return os.environ.get("FORGE_JUDGE", "").strip() or "local"


def get_judge(name: str | None = None, **options: Any) -> Judge:
    """A judge that is ready to be asked: key and package are looked for now, before any training.

    >>> get_judge("opnai")
    Traceback (most recent call last):
    forge.errors.UnknownNameError: Unknown judge 'opnai'. Known: gemini, gigachat, local, openai.

    Args:
        name: "openai" (any server that speaks OpenAI's protocol, by `base_url`), "gemini", "gigachat", "local" (a model
            on this machine, by `model` and `tokenizer`), or what `register_judge` added. Without one: `FORGE_JUDGE`,
            else "local".
        options: Of that judge. All have `rubric`, `cache` and `progress`; those behind a server `model`, `base_url`,
            `concurrency`, `timeout_s`, `retries`, `max_tokens` and `price_per_million_tokens`.

    Raises:
        UnknownNameError: No such judge, or no such option of it; the message lists those that there are.
        ConflictError: A missing key, a missing model, or an option with an impossible value.
        UnsupportedError: Its package is not installed.
    """
    source = "" if name is not None or not os.environ.get("FORGE_JUDGE", "").strip() else " (from FORGE_JUDGE)"
    name = default_judge() if name is None else name
    if name not in list_judges():
        raise UnknownNameError(f"Unknown judge {name!r}{source}. Known: {', '.join(list_judges())}.")
    make = _registered.get(name) or _own(name)
    _check_options(name, make, options)
    judge = make(**options)
    if not isinstance(judge, Judge):
        raise ConflictError(
            f"What is registered as {name!r} made a {type(judge).__name__}: it must return a Judge, or be a function "
            "of prompt, answer and reference that returns a score."
        )
    judge.name = judge.name or name
    return judge


def register_judge(name: str) -> Callable[[Registered], Registered]:
    """Add a judge of your own, as a decorator.

    >>> @register_judge("length")
    ... def length(prompt, answer, reference):
    ...     return min(100.0, len(answer))
    >>> get_judge("length", progress=False).score(["Hello?"], ["Hello!"]).mean
    6.0

    Args:
        name: For `get_judge`. A name that is known is replaced.

    Returns:
        A decorator for a subclass of `Judge`, for a function of `prompt` and `answer`, or of `prompt`, `answer` and
        `reference` (by these names), that returns a score from 0 to 100, or for any other function that takes options
        and returns a `Judge`.

    Raises:
        ConflictError: An empty name, what is none of these, or a function with other parameters.
    """
    if not isinstance(name, str) or not name.strip():
        raise ConflictError(f"register_judge({name!r}): give a name, as in @register_judge('mine').")

    def register(what: Registered) -> Registered:
        if isinstance(what, type) and not issubclass(what, Judge):
            raise ConflictError(f"{what.__name__} is no subclass of forge.evaluation.judges.Judge.")
        if not callable(what):
            raise ConflictError(f"{what!r} is neither a Judge nor a function.")
        make: Callable[..., Any] = what
        scoring = _scores(make)
        if not isinstance(what, type) and not (scores(make) if scoring else not _needed(make)):
            takes = ", ".join(map(str, inspect.signature(make).parameters.values()))
            raise ConflictError(
                f"{getattr(what, '__name__', what)} takes {takes}. A function that scores takes (prompt, answer) or "
                "(prompt, answer, reference), by these names; one that makes a judge has a default for every option."
            )
        _registered[name] = partial(FunctionJudge, make, name) if scoring else make
        return what

    return register


def _own(name: str) -> Callable[..., Judge]:
    module, kind = _OWN[name]
    found: Callable[..., Judge] = getattr(import_module(module, __package__), kind)
    return found


def _scores(what: Callable[..., Any]) -> bool:
    """Whether it is a function that returns the score itself."""
    if isinstance(what, type):
        return False
    return list(inspect.signature(what).parameters)[:2] == ["prompt", "answer"]


def _needed(what: Callable[..., Any]) -> list[str]:
    """The arguments that it cannot be called without."""
    found = inspect.signature(what).parameters.values()
    named = (p for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    return [p.name for p in named if p.default is p.empty]


def _check_options(name: str, make: Callable[..., Any], options: dict[str, Any]) -> None:
    known = _options_of(make)
    unknown = [] if known is None else sorted(set(options) - set(known))
    if unknown:
        raise UnknownNameError(
            f"Unknown option {unknown[0]!r} of the judge {name!r}. Known: {', '.join(sorted(known or ()))}."
        )


def _options_of(make: Callable[..., Any]) -> set[str] | None:
    """The options that it takes, and those that a class hands on to the class above; None where only it knows."""
    kinds = make.__mro__ if isinstance(make, type) else ()
    initializers = [vars(kind)["__init__"] for kind in kinds if "__init__" in vars(kind)] or [make]
    found: set[str] = set()
    for one in initializers:
        parameters = inspect.signature(one).parameters.values()
        found |= {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)} - {"self"}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return found
    return None
