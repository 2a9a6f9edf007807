"""A judge behind any OpenAI-compatible server: OpenAI's own, vLLM, Ollama, llama.cpp, `transformers serve`."""

from __future__ import annotations

import ipaddress
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from ...errors import ConflictError
from .concessions import Concessions
from .fence import Question
from .insistence import Ask
from .remote import RemoteJudge, check_address, key_from, package
from .reply import SCHEMA, Reply
from .trouble import Passing, Trouble, from_status

_log = logging.getLogger(__name__)
DEFAULT_URL = "https://api.openai.com/v1"
DEFAULT_MODEL = "gpt-4.1-mini"
"""The youngest small model of OpenAI's that takes temperature 0: their later ones reason first and refuse it."""

_WORDS = {
    "temperature": ("temperature",),
    "max_completion_tokens": ("max_completion_tokens",),
    "no system": ("system role", "system message", "role 'system'", "role: system"),
    "no schema": ("response_format", "json_schema", "guided", "grammar"),
}


class OpenAIJudge(RemoteJudge):
    """Asks a server by `chat/completions`.

    The conversation, the reference, the answer and the rubric are sent to `base_url` and nowhere else: to OpenAI unless
    it is given or OPENAI_BASE_URL is set. A server on this machine is asked directly, past any proxy, and is not sent
    OPENAI_API_KEY.

    Args:
        model: The model's name there; `gpt-4.1-mini` at OpenAI's own, to be named elsewhere.
        base_url: The address, with its `/v1`.
        api_key: Instead of OPENAI_API_KEY. A server on this machine needs none.
        options: Those of `Limits`, and `rubric`, `cache`, `progress`.

    Raises:
        ConflictError: No key, no model, a key in the address, or an option with an impossible value.
        UnsupportedError: The package openai is not installed.
    """

    name = "openai"

    def __init__(
        self, model: str | None = None, *, base_url: str | None = None, api_key: str | None = None, **options: Any
    ) -> None:
        self._package = package("openai", "openai", self.name)
        self.base_url = (base_url or os.environ.get("OPENAI_BASE_URL") or DEFAULT_URL).rstrip("/")
        check_address(self.base_url, option="base_url" if base_url else "OPENAI_BASE_URL", key="api_key")
        if model is None and self.base_url != DEFAULT_URL:
            raise ConflictError(
                f"base_url={self.base_url!r} without model: say which of that server's models is the judge, "
                'for example model="qwen3:8b".'
            )
        super().__init__(model or DEFAULT_MODEL, **options)
        self.here = is_loopback(self.base_url)
        if self.here:
            self._key = api_key or "none"
        else:
            self._key = key_from(api_key, "OPENAI_API_KEY", judge=self.name, option="api_key")
        self.secrets = (self._key,) if api_key or not self.here else ()
        self._concessions = Concessions(_WORDS, unnamed=("no schema",))
        self._warned = False

    @property
    def identity(self) -> tuple[str, ...]:
        """The judge's name, model and address."""
        return (*super().identity, self.base_url)

    @contextmanager
    def connect(self) -> Iterator[Ask]:
        """A client for as long as samples are judged."""
        openai = self._package
        # A proxy of the environment would carry off what is meant to stay on this machine.
        direct = {"http_client": openai.DefaultHttpxClient(trust_env=False)} if self.here else {}
        client = openai.OpenAI(
            api_key=self._key, base_url=self.base_url, timeout=self.limits.timeout_s, max_retries=0, **direct
        )
        with client:
            yield lambda question: self._ask(client, question)

    def _ask(self, client: Any, question: Question) -> Reply:
        openai = self._package
        try:
            reply = self._concessions.send(
                lambda made: self._read(client.chat.completions.create(**self._body(question, made))), self._refusal
            )
        except openai.APITimeoutError as error:
            raise Passing(f"no answer within {self.limits.timeout_s:g} s") from error
        except openai.APIConnectionError as error:
            raise Passing(f"{self.base_url} cannot be reached", fatal=True) from error
        except openai.APIStatusError as error:
            raise self._trouble(error) from error
        except (openai.APIError, ValueError) as error:
            raise Passing("the server's response is not one of its protocol") from error
        if "temperature" in self._concessions.made and not self._warned:
            self._warned = True
            _log.warning("%s does not take temperature 0: its scores vary from one time to the next", self.model)
        return reply

    def _body(self, question: Question, made: frozenset[str]) -> dict[str, Any]:
        limit = "max_completion_tokens" if "max_completion_tokens" in made else "max_tokens"
        body: dict[str, Any] = {
            "model": self.model,
            "messages": question.merged if "no system" in made else question.messages,
            limit: self.limits.max_tokens,
        }
        if "temperature" not in made:
            body["temperature"] = 0
        if "no schema" not in made:
            schema = {"name": "judgement", "strict": True, "schema": SCHEMA}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body

    def _read(self, completion: Any) -> Reply:
        choices = getattr(completion, "choices", None)
        if not choices:
            raise Passing("the server's response is not one of its protocol")
        message, usage = choices[0].message, getattr(completion, "usage", None)
        if refusal := getattr(message, "refusal", None):
            raise Trouble(f"the model refuses to judge it ({refusal:.80})")
        if choices[0].finish_reason == "content_filter":
            raise Trouble("the server's filter blocked it")
        return Reply(
            message.content or "",
            getattr(usage, "prompt_tokens", None),
            getattr(usage, "completion_tokens", None),
            cut=choices[0].finish_reason == "length",
        )

    def _refusal(self, error: Exception) -> str | None:
        refused = (self._package.BadRequestError, self._package.UnprocessableEntityError)
        return str(error) if isinstance(error, refused) else None

    def _trouble(self, error: Any) -> Trouble:
        code = error.body.get("code") if isinstance(error.body, dict) else None
        return from_status(
            error.status_code,
            f"{code}: {error.message}" if code == "insufficient_quota" else error.message,
            headers=error.response.headers,
            key="api_key" if self.here else "OPENAI_API_KEY",
            model=f"model={self.model!r} and base_url={self.base_url!r}",
            secrets=self.secrets,
        )


def is_loopback(url: str) -> bool:
    """Whether an address is this machine's own.

    >>> is_loopback("http://127.0.0.1:8000/v1"), is_loopback("http://localhost.example/v1")
    (True, False)
    """
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
