"""Google's Gemini as a judge, through the package google-genai."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .concessions import Concessions
from .fence import Question
from .insistence import Ask
from .remote import RemoteJudge, check_address, key_from, package
from .reply import SCHEMA, Reply
from .trouble import Passing, Permanent, Trouble, from_status, from_transport

DEFAULT_URL = "https://generativelanguage.googleapis.com/"
DEFAULT_MODEL = "gemini-3.8-flash"
"""The model of the examples in google-genai 3.4's own documentation: of the quick and cheap kind."""

_WORDS = {
    "no system": ("developer instruction", "system instruction", "system_instruction"),
    "no schema": ("json mode", "response_mime_type", "response_schema", "response mime", "response schema"),
}


class GeminiJudge(RemoteJudge):
    """Asks Gemini's developer API, never Vertex AI, whatever the environment says of it.

    The conversation, the reference, the answer and the rubric are sent to Google, which may use what is sent without
    payment to improve its products: read its terms before judging private data.

    Args:
        model: The model's name.
        api_key: Instead of GEMINI_API_KEY or GOOGLE_API_KEY.
        base_url: Another address of the same protocol.
        options: Those of `Limits`, and `rubric`, `cache`, `progress`. `max_tokens` is 8192 unless it is given, since
            hidden thoughts count.

    Raises:
        ConflictError: No key, a key in the address, or an option with an impossible value.
        UnsupportedError: The package google-genai is not installed.
    """

    name = "gemini"

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        api_key: str | None = None,
        base_url: str = DEFAULT_URL,
        **options: Any,
    ) -> None:
        self._package = package("google.genai", "gemini", self.name)
        check_address(base_url, option="base_url", key="api_key")
        super().__init__(model, **{"max_tokens": 8192, **options})
        self.base_url = base_url
        key = key_from(api_key, "GEMINI_API_KEY", "GOOGLE_API_KEY", judge=self.name, option="api_key")
        self.secrets = (key,)
        self._concessions = Concessions(_WORDS)

    @property
    def identity(self) -> tuple[str, ...]:
        """The judge's name, model and address."""
        return (*super().identity, self.base_url)

    @contextmanager
    def connect(self) -> Iterator[Ask]:
        """A client for as long as samples are judged."""
        options = self._package.types.HttpOptions(base_url=self.base_url, timeout=round(self.limits.timeout_s * 1000))
        client = self._package.Client(api_key=self.secrets[0], vertexai=False, http_options=options)
        try:
            yield lambda question: self._ask(client, question)
        finally:
            client.close()

    def _ask(self, client: Any, question: Question) -> Reply:
        errors = self._package.errors
        try:
            return self._concessions.send(
                lambda made: self._read(client.models.generate_content(**self._request(question, made))), self._refusal
            )
        except Trouble:
            raise
        except errors.APIError as error:
            raise self._trouble(error) from error
        except (errors.UnknownApiResponseError, json.JSONDecodeError) as error:
            raise Passing("the server's response is not one of its protocol") from error
        except Exception as error:
            trouble = from_transport(error, timeout_s=self.limits.timeout_s, where=self.base_url)
            if trouble is None:
                raise
            raise trouble from error

    def _request(self, question: Question, made: frozenset[str]) -> dict[str, Any]:
        config: dict[str, Any] = {"temperature": 0, "max_output_tokens": self.limits.max_tokens}
        contents = question.data
        if "no system" in made:
            contents = question.merged[0]["content"]
        else:
            config["system_instruction"] = question.task
        if "no schema" not in made:
            # Gemini's dialect has no additionalProperties, and keeps an order only if it is told one.
            schema = {name: value for name, value in SCHEMA.items() if name != "additionalProperties"}
            config["response_mime_type"] = "application/json"
            config["response_schema"] = {**schema, "property_ordering": SCHEMA["required"]}
        return {
            "model": self.model,
            "contents": contents,
            "config": self._package.types.GenerateContentConfig(**config),
        }

    def _read(self, response: Any) -> Reply:
        usage = response.usage_metadata
        read = getattr(usage, "prompt_token_count", None)
        written = (getattr(usage, "candidates_token_count", None) or 0) + (
            getattr(usage, "thoughts_token_count", None) or 0
        )
        if not response.candidates:
            blocked = getattr(response.prompt_feedback, "block_reason", None)
            raise Trouble(f"the server's filter blocked it ({_name(blocked)})" if blocked else "the response is empty")
        candidate = response.candidates[0]
        end = _name(candidate.finish_reason)
        parts = (candidate.content.parts or []) if candidate.content else []
        text = "".join(part.text for part in parts if part.text and not part.thought)
        if not text and end not in ("STOP", "MAX_TOKENS", ""):
            raise Trouble(f"the server's filter blocked it ({end})")
        return Reply(text, read, written, cut=end == "MAX_TOKENS")

    def _refusal(self, error: Exception) -> str | None:
        return str(error.message) if isinstance(error, self._package.errors.APIError) and error.code == 400 else None

    def _trouble(self, error: Any) -> Trouble:
        said = str(error.message or error.status or "")
        if error.code == 400 and ("API key" in said or "API_KEY_INVALID" in str(error.details)):
            return Permanent("the server does not know the key: check GEMINI_API_KEY or GOOGLE_API_KEY")
        return from_status(
            error.code,
            said,
            headers=getattr(error.response, "headers", None),
            key="GEMINI_API_KEY or GOOGLE_API_KEY",
            model=f"model={self.model!r}",
            secrets=self.secrets,
        )


def _name(value: Any) -> str:
    return str(getattr(value, "name", value) or "")
