import json
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from support.judge import Reply, ScriptedJudge


def ask(judge, text="Rate this.", *, timeout=10, **more):
    body = {"model": "m", "messages": [{"role": "user", "content": text}], **more}
    request = urllib.request.Request(
        f"{judge.url}/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": "Bearer secret"},
    )
    with urllib.request.urlopen(request, timeout=timeout) as response:
        return json.loads(response.read())


def content(answer):
    return answer["choices"][0]["message"]["content"]


def test_the_script_is_answered_in_order_and_the_requests_are_recorded():
    with ScriptedJudge(["first", Reply("second")]) as judge:
        assert [content(ask(judge, "a")), content(ask(judge, "b", temperature=0))] == ["first", "second"]
    assert [request.messages[0]["content"] for request in judge.requests] == ["a", "b"]
    assert judge.requests[1].body["temperature"] == 0
    assert judge.requests[0].headers["Authorization"] == "Bearer secret"


def test_a_function_answers_by_the_request():
    with ScriptedJudge(lambda request: request.messages[0]["content"].upper()) as judge:
        answer = ask(judge, "shout two")
    assert content(answer) == "SHOUT TWO"
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}


def test_a_rate_limit_carries_the_time_to_wait():
    with ScriptedJudge([Reply.rate_limited(retry_after_s=1.5), Reply(status=503)]) as judge:
        with pytest.raises(urllib.error.HTTPError) as error:
            ask(judge)
        assert (error.value.code, error.value.headers["Retry-After"]) == (429, "1.5")
        error.value.close()
        with pytest.raises(urllib.error.HTTPError) as error:
            ask(judge)
        assert error.value.code == 503
        error.value.close()


def test_malformed_json():
    with ScriptedJudge([Reply.malformed()]) as judge, pytest.raises(json.JSONDecodeError):
        ask(judge)


def test_a_delay_outlasts_an_impatient_client_and_does_not_hold_up_the_end():
    began = time.monotonic()
    with ScriptedJudge([Reply("late", delay_s=30)]) as judge, pytest.raises(TimeoutError):
        ask(judge, timeout=0.1)
    assert time.monotonic() - began < 5


def test_a_request_beyond_the_script_fails():
    def ask_twice():
        with ScriptedJudge(["one"]) as judge:
            ask(judge)
            with pytest.raises(urllib.error.HTTPError, match="400") as error:
                ask(judge)
            error.value.close()

    with pytest.raises(AssertionError, match="1 requests came after the script of 1"):
        ask_twice()


def test_requests_in_flight_are_counted():
    with ScriptedJudge(lambda _: Reply("yes", delay_s=0.2)) as judge, ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda _: content(ask(judge)) == "yes", range(4)))
    assert judge.max_in_flight == 4
    with ScriptedJudge(lambda _: "yes") as judge:
        for _ in range(3):
            ask(judge)
    assert judge.max_in_flight == 1


def test_models_are_listed_and_other_paths_refused():
    with ScriptedJudge([]) as judge:
        with urllib.request.urlopen(f"{judge.url}/models") as response:
            assert json.loads(response.read())["data"][0]["id"] == "scripted-judge"
        with pytest.raises(urllib.error.HTTPError, match="404") as error:
            urllib.request.urlopen(f"{judge.url}/embeddings")
        error.value.close()


def test_what_is_no_chat_request_is_refused_and_not_counted():
    with ScriptedJudge(["unused"]) as judge:
        for bad in ({"messages": []}, {"stream": True}):
            with pytest.raises(urllib.error.HTTPError, match="400") as error:
                ask(judge, **bad)
            error.value.close()
    assert judge.requests == []


def test_geminis_protocol_is_answered_and_its_requests_read_alike():
    body = {
        "contents": [{"role": "user", "parts": [{"text": "Rate"}, {"text": " this."}]}],
        "systemInstruction": {"parts": [{"text": "Judge."}], "role": "user"},
    }
    with ScriptedJudge([Reply("ten", finish="max_tokens")]) as judge:
        request = urllib.request.Request(
            f"{judge.origin}/v1beta/models/m:generateContent", json.dumps(body).encode(), {"x-goog-api-key": "k"}
        )
        with urllib.request.urlopen(request) as response:
            answer = json.loads(response.read())
    assert answer["candidates"][0]["content"]["parts"] == [{"text": "ten"}]
    assert answer["candidates"][0]["finishReason"] == "MAX_TOKENS"
    assert answer["usageMetadata"]["promptTokenCount"] == 3
    assert judge.requests[0].messages == [
        {"role": "system", "content": "Judge."},
        {"role": "user", "content": "Rate this."},
    ]


def test_gigachats_authorisation_is_recorded_apart():
    with ScriptedJudge([]) as judge, urllib.request.urlopen(judge.oauth_url, b"scope=X") as response:
        assert json.loads(response.read())["access_token"] == "scripted-token"
    assert (judge.requests, judge.authorisations[0].body) == ([], "scope=X")
