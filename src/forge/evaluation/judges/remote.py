"""Judges behind a server: what their options, keys and packages have in common."""

from __future__ import annotations

import math
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from ...errors import ConflictError, UnsupportedError
from .fence import Sample
from .insistence import Ask, in_threads, insist
from .judge import Judge, Outcome
from .judgement import Usage
from .reply import Reply


@dataclass(frozen=True)
class Limits:
    """How a server is asked.

    Args:
        concurrency: Questions at a time.
        timeout_s: Seconds that one answer may take.
        retries: How often a question is repeated after a rate limit, an error of the server or a time-out.
        max_tokens: Longest reply, in tokens, hidden thoughts included.
        price_per_million_tokens: Of prompt and completion, in any currency; without it no cost is given.
    """

    concurrency: int
    timeout_s: float
    retries: int
    max_tokens: int
    price_per_million_tokens: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name, least in {"concurrency": 1, "retries": 0, "max_tokens": 1}.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConflictError(f"{name}={value!r}: give a whole number of at least {least}.")
        if not _is_number(self.timeout_s) or self.timeout_s <= 0:
            raise ConflictError(f"timeout_s={self.timeout_s!r}: give a number of seconds above 0.")
        prices = self.price_per_million_tokens
        if prices is not None and not (
            isinstance(prices, Sequence) and len(prices) == 2 and all(_is_number(p) and p >= 0 for p in prices)
        ):
            raise ConflictError(
                f"price_per_million_tokens={prices!r}: give the two prices of a million prompt tokens and a million "
                "completion tokens, for example (0.4, 1.6)."
            )


class RemoteJudge(Judge, ABC):
    """A judge that asks a server: `connect` is what a subclass adds.

    Args:
        model: The model's name there.
        concurrency: As in `Limits`; the other limits too.
        timeout_s: Seconds that one answer may take.
        retries: How often a question is repeated.
        max_tokens: Longest reply.
        price_per_million_tokens: Of prompt and completion.
        options: Those of `Judge`.
    """

    def __init__(
        self,
        model: str,
        *,
        concurrency: int = 4,
        timeout_s: float = 60.0,
        retries: int = 4,
        max_tokens: int = 1024,
        price_per_million_tokens: tuple[float, float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not isinstance(model, str) or not model:
            raise ConflictError(f"model={model!r}: give the name of a model that the server has.")
        self.model = model
        self.longest = f"max_tokens={max_tokens}"
        self.limits = Limits(concurrency, timeout_s, retries, max_tokens, price_per_million_tokens)

    @abstractmethod
    def connect(self) -> AbstractContextManager[Ask]:
        """A context with a function that asks one question; several threads call it. It raises a `Trouble`."""

    def outcomes(self, todo: dict[str, Sample]) -> Generator[tuple[str, Outcome], None, None]:
        """Judge samples, several at a time."""
        if not todo:
            return
        stop = threading.Event()
        with self.connect() as ask_once:

            def judge(key: str, sample: Sample) -> Outcome:
                return self._judged(
                    key, sample, lambda question: insist(ask_once, question, retries=self.limits.retries, stop=stop)
                )

            # The first goes alone: a wrong key costs one request, and what the server refuses is learnt once.
            waiting = iter(todo.items())
            first = next(waiting)
            yield first[0], judge(*first)
            yield from in_threads(judge, waiting, threads=min(self.limits.concurrency, len(todo) - 1), stop=stop)

    def _usage(self, replies: Sequence[Reply], *, cached: int) -> Usage:
        usage = super()._usage(replies, cached=cached)
        if self.limits.price_per_million_tokens is None or usage.uncounted:
            return usage
        read_price, written_price = self.limits.price_per_million_tokens
        cost = (usage.prompt_tokens * read_price + usage.completion_tokens * written_price) / 1e6
        return replace(usage, cost=cost)


def package(name: str, extra: str, judge: str) -> Any:
    """The module of a judge's package.

    Raises:
        UnsupportedError: It is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise UnsupportedError(
            f"The judge {judge!r} needs a package that is not installed ({error}): "
            f"pip install 'transformers-forge[{extra}]'"
        ) from error


def check_address(address: str, *, option: str, key: str) -> None:
    """Refuse an address that could hold a key: addresses stand in results, errors and the cache.

    Raises:
        ConflictError: It has a user, a query or a fragment; the message does not repeat it.
    """
    if set(address) & set("@?#"):
        raise ConflictError(
            f"{option} contains a user, a password or a query, which files and errors would show. Give the "
            f"address alone, such as https://host/v1, and the key as {key}=."
        )


def key_from(given: str | None, *variables: str, judge: str, option: str) -> str:
    """A key: the one that was given, else that of the first variable that is set.

    Raises:
        ConflictError: There is none; the message names the variable.
    """
    found = given or next((value for name in variables if (value := os.environ.get(name, "").strip())), None)
    if not found:
        raise ConflictError(
            f"The judge {judge!r} needs a key: neither {option}= was given nor {' or '.join(variables)} set in the "
            f"environment. Set {variables[0]}."
        )
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
