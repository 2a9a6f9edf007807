"""Sber's GigaChat as a judge, through the package gigachat."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .concessions import Concessions
from .fence import Question
from .insistence import Ask
from .remote import RemoteJudge, check_address, key_from, package
from .reply import SCHEMA, Reply
from .trouble import Passing, Permanent, Trouble, from_status, from_transport

DEFAULT_MODEL = "GigaChat-2"
"""The model of the examples in gigachat 0.2's own documentation: the smallest of its generation."""

_WORDS = {"temperature": ("temperature",), "no schema": ("response_format", "json_schema", "schema")}


class GigaChatJudge(RemoteJudge):
    """Asks GigaChat's API.

    The conversation, the reference, the answer and the rubric are sent to Sber, the key only to its authorisation.
    What else the package reads from the environment (GIGACHAT_SCOPE, GIGACHAT_CA_BUNDLE_FILE, ...) holds here too. The
    servers' certificates come from an authority that most systems do not know: give `ca_bundle_file`, and do not switch
    their verification off.

    Args:
        model: The model's name.
        credentials: The authorisation key, instead of GIGACHAT_CREDENTIALS.
        scope: GIGACHAT_API_PERS, GIGACHAT_API_B2B or GIGACHAT_API_CORP.
        base_url: Another address of the API.
        auth_url: Another address of the authorisation server.
        ca_bundle_file: Certificates to verify the servers with.
        options: Those of `Limits`, and `rubric`, `cache`, `progress`.

    Raises:
        ConflictError: No key, a key in an address, or an option with an impossible value.
        UnsupportedError: The package gigachat is not installed.
    """

    name = "gigachat"

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        credentials: str | None = None,
        scope: str | None = None,
        base_url: str | None = None,
        auth_url: str | None = None,
        ca_bundle_file: str | None = None,
        **options: Any,
    ) -> None:
        self._package = package("gigachat", "gigachat", self.name)
        self._errors = package("gigachat.exceptions", "gigachat", self.name)
        for option, address in {"base_url": base_url, "auth_url": auth_url}.items():
            variable = f"GIGACHAT_{option.upper()}"
            found = address or os.environ.get(variable) or ""
            check_address(found, option=option if address else variable, key="credentials")
        super().__init__(model, **options)
        key = key_from(credentials, "GIGACHAT_CREDENTIALS", judge=self.name, option="credentials")
        self.secrets = (key,)
        self.base_url = base_url or os.environ.get("GIGACHAT_BASE_URL") or ""
        given = {"scope": scope, "base_url": base_url, "auth_url": auth_url, "ca_bundle_file": ca_bundle_file}
        self._given = {name: value for name, value in given.items() if value is not None}
        self._concessions = Concessions(_WORDS, unnamed=("no schema",))

    @property
    def identity(self) -> tuple[str, ...]:
        """The judge's name, model and address."""
        return (*super().identity, self.base_url)

    @contextmanager
    def connect(self) -> Iterator[Ask]:
        """A client for as long as samples are judged."""
        client = self._package.GigaChat(
            credentials=self.secrets[0],
            model=self.model,
            timeout=self.limits.timeout_s,
            max_retries=0,
            **self._given,
        )
        with client:
            yield lambda question: self._ask(client, question)

    def _ask(self, client: Any, question: Question) -> Reply:
        try:
            return self._concessions.send(
                lambda made: self._read(client.chat(self._body(question, made))), self._refusal
            )
        except Trouble:
            raise
        except self._errors.ResponseError as error:
            raise self._trouble(error) from error
        except ValueError as error:  # no JSON, or not the fields of a completion
            raise Passing("the server's response is not one of its protocol") from error
        except Exception as error:
            trouble = from_transport(error, timeout_s=self.limits.timeout_s, where=self.base_url or "GigaChat")
            if trouble is None:
                raise
            raise trouble from error

    def _body(self, question: Question, made: frozenset[str]) -> dict[str, Any]:
        # Where temperature 0 is refused, the smallest nucleus leaves the likeliest token alone too.
        greedy = {"top_p": 0} if "temperature" in made else {"temperature": 0}
        body = {"messages": question.messages, "max_tokens": self.limits.max_tokens, **greedy}
        if "no schema" not in made:
            body["response_format"] = {"type": "json_schema", "schema": SCHEMA, "strict": True}
        return body

    def _read(self, completion: Any) -> Reply:
        if not completion.choices:
            raise Passing("the server's response is not one of its protocol")
        choice, usage = completion.choices[0], completion.usage
        if choice.finish_reason == "blacklist":
            raise Trouble("the server's filter blocked it")
        return Reply(
            choice.message.content, usage.prompt_tokens, usage.completion_tokens, cut=choice.finish_reason == "length"
        )

    def _refusal(self, error: Exception) -> str | None:
        refused = isinstance(error, self._errors.ResponseError) and error.status_code in (400, 422)
        return _said(error) if refused and not _is_authorisation(error) else None

    def _trouble(self, error: Any) -> Trouble:
        if _is_authorisation(error) and error.status_code < 500 and error.status_code not in (408, 429):
            said = f"the authorisation server answered {error.status_code}"
            return Permanent(f"{said}: check GIGACHAT_CREDENTIALS and scope")
        return from_status(
            error.status_code,
            _said(error),
            headers=error.headers,
            key="GIGACHAT_CREDENTIALS",
            model=f"model={self.model!r}",
            secrets=self.secrets,
        )


def _said(error: Any) -> str:
    return bytes(error.content or b"").decode("utf-8", "replace")


def _is_authorisation(error: Any) -> bool:
    return not str(error.url).rstrip("/").endswith("/chat/completions")
