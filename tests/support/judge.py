"""A scripted judge: a server on loopback that answers what a test tells it to, as OpenAI, Gemini and GigaChat would.

    with ScriptedJudge(['{"score": 80}', Reply.rate_limited(retry_after_s=0.1), '{"score": 70}']) as judge:
        client = OpenAI(base_url=judge.url, api_key="any")
    judge.requests[0].messages

The script is a list, served in the order of arrival, or a function from the request to a reply. A text is a reply with
that content. A request beyond the list's end is answered 400 and fails the test on exit.

OpenAI's protocol is at `url`, and so is GigaChat's, which differs by its authorisation at `oauth_url`; Gemini's is at
`origin`. The requests of all three are recorded alike: `messages` are role and content, whatever the protocol.
"""

import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any


@dataclass(frozen=True)
class Reply:
    """What to answer: a chat completion with this text, or with `raw` exactly these bytes as the body."""

    text: str = ""
    status: int = 200
    delay_s: float = 0.0
    headers: Mapping[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    finish: str = "stop"

    @classmethod
    def rate_limited(cls, *, retry_after_s: float) -> "Reply":
        return cls("rate limit reached", status=429, headers={"Retry-After": f"{retry_after_s:g}"})

    @classmethod
    def malformed(cls) -> "Reply":
        """Return a status 200 whose body ends in the middle of its JSON."""
        return cls(raw=b'{"id": "chatcmpl-1", "choices": [{"message": {"role": "assist')


@dataclass(frozen=True)
class Request:
    """One request as it arrived, in order."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: Any
    arrived_s: float

    @property
    def messages(self) -> list[dict[str, Any]]:
        if "messages" in self.body:
            return self.body["messages"]
        system = self.body.get("systemInstruction")
        turns = [{**system, "role": "system"}] if system else []
        return [
            {"role": turn.get("role") or "user", "content": "".join(part["text"] for part in turn["parts"])}
            for turn in [*turns, *self.body["contents"]]
        ]


Script = Iterable[Reply | str] | Callable[[Request], Reply | str]


class ScriptedJudge:
    """Context manager; `url` is the base URL, `requests` the chat requests, `max_in_flight` how many came at once."""

    def __init__(self, script: Script, *, models: tuple[str, ...] = ("scripted-judge",)) -> None:
        self.requests: list[Request] = []
        self.authorisations: list[Request] = []
        self.max_in_flight = 0
        self.models = models
        self._answer = script if callable(script) else None
        self._script = [] if callable(script) else list(script)
        self._beyond = 0
        self._in_flight = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"judge": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def url(self) -> str:
        return f"{self.origin}/v1"

    @property
    def oauth_url(self) -> str:
        return f"{self.origin}/oauth"

    def __enter__(self) -> "ScriptedJudge":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        if self._beyond and kind is None:
            raise AssertionError(f"{self._beyond} requests came after the script of {len(self._script)} replies ended")

    def reply_to(self, request: Request) -> Reply:
        """Record a chat request and return its reply, after the reply's delay."""
        with self._lock:
            number = len(self.requests)
            self.requests.append(request)
            self._in_flight += 1
            self.max_in_flight = max(self.max_in_flight, self._in_flight)
        try:
            if self._answer is not None:
                reply = self._answer(request)
            elif number < len(self._script):
                reply = self._script[number]
            else:
                self._beyond += 1
                reply = Reply(f"the script has no reply for request {number}", status=400)
            reply = Reply(reply) if isinstance(reply, str) else reply
            self._closing.wait(reply.delay_s)
            return reply
        finally:
            with self._lock:
                self._in_flight -= 1


class _Handler(BaseHTTPRequestHandler):
    judge: ScriptedJudge
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            models = [{"id": name, "object": "model", "owned_by": "tests"} for name in self.judge.models]
            self._send(200, json.dumps({"object": "list", "data": models}).encode())
        else:
            self._refuse(404, f"no such path: {self.path}")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/oauth":
            self.judge.authorisations.append(
                Request("POST", self.path, dict(self.headers), body.decode(), time.monotonic())
            )
            token = {"access_token": "scripted-token", "expires_at": int(time.time() * 1000) + 1_800_000}
            return self._send(200, json.dumps(token).encode())
        gemini = self.path.startswith(("/v1/models/", "/v1beta/models/")) and self.path.endswith(":generateContent")
        if self.path != "/v1/chat/completions" and not gemini:
            return self._refuse(404, f"no such path: {self.path}")
        try:
            content = json.loads(body)
        except ValueError as error:
            return self._refuse(400, f"the request is not JSON: {error}")
        if not (content.get("contents") if gemini else content.get("messages")) or content.get("stream"):
            return self._refuse(400, "a request needs messages, and the scripted judge does not stream")
        request = Request("POST", self.path, dict(self.headers), content, time.monotonic())
        reply = self.judge.reply_to(request)
        if reply.raw is not None:
            return self._send(reply.status, reply.raw, reply.headers)
        if reply.status != 200:
            return self._refuse(reply.status, reply.text, reply.headers)
        answer = (_generated if gemini else _completion)(request, reply)
        return self._send(200, json.dumps(answer).encode(), reply.headers)

    def _refuse(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        self._send(status, json.dumps({"error": {"message": message, "code": status}}).encode(), headers)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        try:
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client gave up waiting, which some tests are about

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent; the requests are recorded."""


def _completion(request: Request, reply: Reply) -> dict[str, Any]:
    prompt, answer = _counts(request, reply)
    message = {"role": "assistant", "content": reply.text}
    return {
        "id": "chatcmpl-scripted",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": request.body.get("model", "scripted-judge"),
        "choices": [{"index": 0, "message": message, "finish_reason": reply.finish}],
        "usage": {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer},
    }


def _generated(request: Request, reply: Reply) -> dict[str, Any]:
    prompt, answer = _counts(request, reply)
    content = {"role": "model", "parts": [{"text": reply.text}]}
    return {
        "candidates": [{"index": 0, "content": content, "finishReason": reply.finish.upper()}],
        "usageMetadata": {
            "promptTokenCount": prompt,
            "candidatesTokenCount": answer,
            "thoughtsTokenCount": 7,
            "totalTokenCount": prompt + answer + 7,
        },
    }


def _counts(request: Request, reply: Reply) -> tuple[int, int]:
    prompt = sum(len(str(message.get("content", "")).split()) for message in request.messages)
    return prompt, len(reply.text.split())
