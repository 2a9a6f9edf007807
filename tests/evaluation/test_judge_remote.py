"""The three judges behind a server, through their own packages, against scripted servers on loopback."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from itertools import pairwise

import pytest

from forge.errors import ConflictError, ForgeWarning, UnknownNameError, UnsupportedError
from forge.evaluation.judges import get_judge, insistence
from support.judge import Reply, ScriptedJudge

KEY = "sk-very-secret-0123456789"
NAMES = ("openai", "gemini", "gigachat")
VARIABLES = {
    "openai": ["OPENAI_API_KEY"],
    "gemini": ["GEMINI_API_KEY", "GOOGLE_API_KEY"],
    "gigachat": ["GIGACHAT_CREDENTIALS"],
}


def verdict(score, reason="Fine."):
    return json.dumps({"reason": reason, "score": score})


def make(name, server, **options):
    """The judge of this name at a scripted server."""
    address = {
        "openai": lambda: {"base_url": server.url, "model": "m", "api_key": KEY},
        "gemini": lambda: {"base_url": server.origin, "model": "m", "api_key": KEY},
        "gigachat": lambda: {"base_url": server.url, "auth_url": server.oauth_url, "model": "m", "credentials": KEY},
    }[name]()
    return get_judge(name, **{"cache": False, "progress": False, **address, **options})


def prompts(count):
    return [f"Question {number}?" for number in range(count)], [f"Answer {number}." for number in range(count)]


def number_in(request):
    return int(request.messages[-1]["content"].split('"answer": "Answer ')[1].split(".")[0])


@pytest.fixture(autouse=True)
def _no_keys_and_short_waits(monkeypatch):
    keys = [key for keys in VARIABLES.values() for key in keys]
    for variable in [*keys, "OPENAI_BASE_URL", "FORGE_JUDGE", "GIGACHAT_BASE_URL"]:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(insistence, "_FIRST_WAIT_S", 0.02)


@pytest.mark.parametrize("name", NAMES)
def test_judgements_come_in_the_order_of_the_samples(name):
    def answer(request):
        number = number_in(request)
        return Reply(verdict(number), delay_s=0.05 if number % 2 else 0.0)

    with ScriptedJudge(answer) as server:
        result = make(name, server, concurrency=4).score(*prompts(9))
    assert [one.score for one in result.judgements] == [float(number) for number in range(9)]
    assert (result.judge, result.model, result.mean) == (name, "m", 4.0)
    assert result.describe() == "LLM judge: mean 4.0 on 9 of 9 samples"
    thoughts = 7 if name == "gemini" else 0
    assert result.usage.requests == len(server.requests) == 9
    assert result.usage.completion_tokens == 9 * (len(verdict(1).split()) + thoughts)
    assert result.usage.prompt_tokens == sum(
        len(message["content"].split()) for request in server.requests for message in request.messages
    )


def test_each_protocol_asks_for_temperature_0_the_schema_and_the_same_fence():
    asked = {}
    for name in NAMES:
        with ScriptedJudge([verdict(50)]) as server:
            make(name, server).score(["Why?"], ["Because <|im_end|>."], ["So."])
        asked[name] = server.requests[0]
    assert asked["openai"].messages == asked["gemini"].messages == asked["gigachat"].messages
    assert [message["role"] for message in asked["gemini"].messages] == ["system", "user"]
    for name in ("openai", "gigachat"):
        assert asked[name].body["temperature"] == 0
        schema = asked[name].body["response_format"]
        schema = schema["json_schema"] if name == "openai" else schema
        assert schema["schema"]["required"] == ["reason", "score"]
    config = asked["gemini"].body["generationConfig"]
    assert (config["temperature"], config["responseMimeType"]) == (0, "application/json")
    assert config["responseSchema"]["required"] == ["reason", "score"]
    headers = {name: {key.lower(): value for key, value in asked[name].headers.items()} for name in NAMES}
    assert headers["openai"]["authorization"] == f"Bearer {KEY}"
    assert headers["gemini"]["x-goog-api-key"] == KEY
    assert headers["gigachat"]["authorization"] == "Bearer scripted-token"


def test_gigachat_sends_its_key_to_the_authorisation_only():
    with ScriptedJudge(lambda _: verdict(50)) as server:
        make("gigachat", server).score(*prompts(3))
    assert len(server.authorisations) == 1
    assert server.authorisations[0].headers["Authorization"] == f"Basic {KEY}"
    assert all(KEY not in str(request) for request in server.requests)


@pytest.mark.parametrize("name", NAMES)
def test_a_rate_limit_is_waited_out(name):
    with ScriptedJudge([Reply.rate_limited(retry_after_s=0.4), verdict(70)]) as server:
        result = make(name, server).score(["?"], ["!"])
    assert result.mean == 70
    assert 0.4 <= server.requests[1].arrived_s - server.requests[0].arrived_s < 1.5


@pytest.mark.parametrize("name", NAMES)
def test_waits_grow_and_end(name):
    with ScriptedJudge([Reply(status=503)] * 5) as server:
        result = make(name, server, retries=4).score(["?"], ["!"])
    assert result.judgements[0].error == "the server answered 503 5 times"
    arrived = [request.arrived_s for request in server.requests]
    waits = [later - earlier for earlier, later in pairwise(arrived)]
    for attempt, wait in enumerate(waits):
        assert 0.5 * 0.02 * 2**attempt <= wait < 0.02 * 2**attempt + 0.3
    assert len(waits) == 4


@pytest.mark.parametrize("name", NAMES)
def test_an_hour_is_not_waited_for(name):
    began = time.monotonic()
    with ScriptedJudge([Reply.rate_limited(retry_after_s=3600)]) as server:
        error = make(name, server).score(["?"], ["!"]).judgements[0].error
    assert "longer than 120 s" in error
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_that_takes_too_long_is_asked_for_again(name):
    with ScriptedJudge([Reply(verdict(1), delay_s=30), verdict(60)]) as server:
        judge = make(name, server, timeout_s=0.5)
        assert judge.score(["?"], ["!"]).mean == 60
    with ScriptedJudge([Reply(verdict(1), delay_s=30)]) as server:
        judge = make(name, server, timeout_s=0.3, retries=0)
        assert judge.score(["?"], ["!"]).judgements[0].error == "no answer within 0.3 s"


@pytest.mark.parametrize("name", NAMES)
def test_a_broken_response_is_asked_for_again_and_then_missing(name):
    with ScriptedJudge([Reply.malformed(), verdict(60)]) as server:
        assert make(name, server).score(["?"], ["!"]).mean == 60
    with ScriptedJudge([Reply.malformed()] * 2) as server:
        error = make(name, server, retries=1).score(["?"], ["!"]).judgements[0].error
    assert error == "the server's response is not one of its protocol 2 times"


@pytest.mark.parametrize("name", NAMES)
def test_an_unreadable_reply_is_asked_for_once_more(name):
    with ScriptedJudge(["I would say 80.", verdict(80)]) as server:
        result = make(name, server).score(["?"], ["!"])
    assert (result.mean, result.usage.requests) == (80, 2)
    with ScriptedJudge(["I would say 80."] * 2) as server:
        result = make(name, server).score(["?"], ["!"])
    assert (result.mean, result.usage.requests) == (None, 2)
    assert result.judgements[0].error == "the reply is not one JSON object"


@pytest.mark.parametrize("name", NAMES)
def test_a_reply_that_was_cut_says_so(name):
    end = "max_tokens" if name == "gemini" else "length"
    with ScriptedJudge([Reply('{"reason": "It is', finish=end)] * 2) as server:
        error = make(name, server, max_tokens=5).score(["?"], ["!"]).judgements[0].error
    assert error == "the reply is not one JSON object: it was cut off at max_tokens=5"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_model_costs_one_request_and_not_the_evaluation(name, status, caplog):
    with (
        ScriptedJudge(lambda _: Reply(f"Incorrect API key provided: {KEY}", status=status)) as server,
        pytest.warns(ForgeWarning, match=f"{name}.*given up on, 9 of 9 samples") as caught,
    ):
        result = make(name, server, concurrency=4).score(*prompts(9))
    # GigaChat's package asks once more with a new token after a 401.
    assert len(server.requests) <= (2 if name == "gigachat" and status == 401 else 1)
    assert (result.judged, result.total, len(caught)) == (0, 9, 1)
    expected = "model='m'" if status == 404 else "api_key" if name == "openai" else VARIABLES[name][0]
    assert expected in result.judgements[0].error
    assert len({one.error for one in result.judgements}) == 1
    assert KEY not in f"{result}{caught[0].message}{caplog.text}"


def test_a_key_that_is_revoked_in_the_middle_stops_the_rest():
    def answer(request):
        return verdict(50) if number_in(request) < 3 else Reply("revoked", status=401)

    with ScriptedJudge(answer) as server, pytest.warns(ForgeWarning, match="given up on"):
        result = make("openai", server, concurrency=2).score(*prompts(40))
    assert 1 <= result.judged <= 3
    assert len(server.requests) <= 3 + 2
    assert result.describe().startswith(f"LLM judge: mean 50.0 on {result.judged} of 40 samples; ")


def test_a_used_up_account_is_not_asked_for_again():
    body = json.dumps({"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}).encode()
    with ScriptedJudge([Reply(raw=body, status=429)]) as server, pytest.warns(ForgeWarning, match="used up"):
        make("openai", server).score(*prompts(3))


def test_geminis_word_for_a_wrong_key_is_understood():
    body = {"error": {"code": 400, "message": "API key not valid.", "status": "INVALID_ARGUMENT"}}
    reply = Reply(raw=json.dumps(body).encode(), status=400)
    with ScriptedJudge([reply]) as server, pytest.warns(ForgeWarning, match="check GEMINI_API_KEY"):
        make("gemini", server).score(*prompts(3))


@pytest.mark.parametrize("name", NAMES)
def test_a_server_that_is_not_there_is_given_up_on(name):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        origin = f"http://127.0.0.1:{unused.getsockname()[1]}"

    class Nobody:
        url = oauth_url = f"{origin}/v1"

    Nobody.origin = origin
    with pytest.warns(ForgeWarning, match="cannot be reached 3 times"):
        result = make(name, Nobody, retries=2).score(*prompts(4))
    assert result.judged == 0


@pytest.mark.parametrize("name", ["openai", "gigachat"])
def test_a_server_without_response_format_is_asked_without_it_from_then_on(name):
    def answer(request):
        if "response_format" in request.body:
            return Reply("Unexpected fields in the request", status=422)
        return verdict(50)

    with ScriptedJudge(answer) as server:
        judge = make(name, server)
        assert judge.score(*prompts(6)).judged == 6
        assert judge.score(["again"], ["!"]).judged == 1
    assert len(server.requests) == 8


def test_what_openais_later_models_refuse_is_left_out(caplog):
    def answer(request):
        if "max_tokens" in request.body:
            return Reply("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", status=400)
        if "temperature" in request.body:
            return Reply("Unsupported value: 'temperature' does not support 0 with this model.", status=400)
        return verdict(50)

    with ScriptedJudge(answer) as server:
        judge = make("openai", server)
        assert judge.score(*prompts(3)).judged == 3
    assert len(server.requests) == 3 + 2
    last = server.requests[-1].body
    assert last["max_completion_tokens"] == 1024
    assert "response_format" in last
    assert caplog.text.count("does not take temperature 0") == 1


@pytest.mark.parametrize(
    ("name", "words"), [("openai", "System role not supported"), ("gemini", "Developer instruction")]
)
def test_models_without_a_system_role_get_one_message(name, words):
    def answer(request):
        return Reply(f"{words} is not enabled", status=400) if len(request.messages) > 1 else verdict(50)

    with ScriptedJudge(answer) as server:
        assert make(name, server).score(*prompts(2)).judged == 2
    assert len(server.requests) == 3
    assert server.requests[1].messages[0]["content"].startswith("You are a strict, impartial judge")
    assert "\nBEGIN DATA " in server.requests[1].messages[0]["content"]


@pytest.mark.parametrize("name", NAMES)
def test_one_bad_sample_is_missing_and_the_others_are_not(name):
    def answer(request):
        return Reply("too many tokens", status=400) if number_in(request) == 1 else verdict(50)

    with ScriptedJudge(answer) as server:
        result = make(name, server).score(*prompts(4))
    assert [one.score for one in result.judgements] == [50, None, 50, 50]
    assert "the server answered 400" in result.describe()
    assert "too many tokens" in result.describe()
    if name != "gemini":  # one sample's refusal says nothing of the others
        assert all("response_format" in request.body for request in server.requests if number_in(request) != 1)


@pytest.mark.parametrize("name", NAMES)
def test_so_many_at_a_time_and_no_more(name):
    with ScriptedJudge(lambda _: Reply(verdict(50), delay_s=0.1)) as server:
        make(name, server, concurrency=3).score(*prompts(10))
    assert server.max_in_flight == 3


def test_filters_and_refusals_are_missing():
    with ScriptedJudge([Reply("", finish="content_filter")]) as server:
        assert "filter" in make("openai", server).score(["?"], ["!"]).judgements[0].error
    with ScriptedJudge([Reply("I cannot say.", finish="blacklist")]) as server:
        assert "filter" in make("gigachat", server).score(["?"], ["!"]).judgements[0].error
    with ScriptedJudge([Reply("", finish="safety")]) as server:
        assert "SAFETY" in make("gemini", server).score(["?"], ["!"]).judgements[0].error
    blocked = json.dumps({"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}}).encode()
    with ScriptedJudge([Reply(raw=blocked)]) as server:
        assert "PROHIBITED" in make("gemini", server).score(["?"], ["!"]).judgements[0].error


def test_costs_are_counted_from_given_prices_and_never_guessed():
    with ScriptedJudge(lambda _: verdict(50)) as server:
        free = make("openai", server).score(*prompts(2)).usage
        paid = make("openai", server, price_per_million_tokens=(2.0, 8.0)).score(*prompts(2)).usage
    assert free.cost is None
    assert paid.cost == pytest.approx((paid.prompt_tokens * 2 + paid.completion_tokens * 8) / 1e6)
    assert paid.cost > 0
    uncounted = json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": verdict(50)}}]})
    with ScriptedJudge([Reply(raw=uncounted.encode())]) as server:
        usage = make("openai", server, price_per_million_tokens=(2.0, 8.0)).score(["?"], ["!"]).usage
    assert (usage.uncounted, usage.prompt_tokens, usage.cost) == (1, 0, None)


def test_the_result_is_logged_in_one_line(caplog):
    caplog.set_level(logging.INFO, logger="forge")
    with ScriptedJudge([verdict(78.5)]) as server:
        make("openai", server).score(["?"], ["!"])
    assert caplog.messages == ["LLM judge: mean 78.5 on 1 of 1 samples"]


@pytest.mark.parametrize("name", NAMES)
def test_keys_are_shown_nowhere(name, caplog, tmp_path):
    caplog.set_level(logging.DEBUG)
    with ScriptedJudge([Reply(f"bad key {KEY}", status=500), Reply(f"no {KEY}", status=400), verdict(1)]) as server:
        judge = make(name, server, retries=1, cache=tmp_path)
        error = judge.score(["?"], [f"what is {name}?"]).judgements[0].error or ""
    assert KEY not in f"{judge!r}{judge}{error}{judge.identity}"
    assert KEY not in "".join(record.getMessage() for record in caplog.records if record.name.startswith("forge"))
    assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_key_is_named_at_once(name):
    with pytest.raises(ConflictError) as error:
        get_judge(name)
    assert all(variable in str(error.value) for variable in VARIABLES[name])


@pytest.mark.parametrize(("name", "variable"), [(n, v) for n in NAMES for v in VARIABLES[n]])
def test_a_key_comes_from_the_environment(name, variable, monkeypatch):
    monkeypatch.setenv(variable, KEY)
    judge = get_judge(name, cache=False)
    assert judge.model
    assert KEY not in repr(judge)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_package_is_named_with_the_way_to_get_it(name, monkeypatch):
    module = {"openai": "openai", "gemini": "google.genai", "gigachat": "gigachat"}[name]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UnsupportedError, match=rf"pip install 'transformers-forge\[{name}\]'"):
        get_judge(name)


def test_a_server_on_this_machine_needs_no_key_and_is_not_sent_openais(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # a proxy that nothing listens at
    with ScriptedJudge([verdict(5)]) as server:
        assert get_judge("openai", base_url=server.url, model="m", cache=False).score(["?"], ["!"]).mean == 5
    assert KEY not in str(server.requests[0].headers)


@pytest.mark.parametrize(
    "address",
    [
        "http://me:secret@127.0.0.1/v1",
        "http://secret@127.0.0.1/v1",
        "secret@127.0.0.1/v1",
        "http://127.0.0.1/v1?api_key=secret",
        "http://127.0.0.1/v1#secret",
        "http://[secret@127.0.0.1/v1",
    ],
)
@pytest.mark.parametrize(
    ("name", "option", "key"),
    [
        ("openai", "base_url", "api_key"),
        ("openai", "OPENAI_BASE_URL", "api_key"),
        ("gemini", "base_url", "api_key"),
        ("gigachat", "base_url", "credentials"),
        ("gigachat", "auth_url", "credentials"),
        ("gigachat", "GIGACHAT_BASE_URL", "credentials"),
        ("gigachat", "GIGACHAT_AUTH_URL", "credentials"),
    ],
)
def test_a_key_in_the_address_is_refused_and_not_repeated(name, option, key, address, monkeypatch):
    given = {option: address} if option.islower() else {}
    if not given:
        monkeypatch.setenv(option, address)
    with pytest.raises(ConflictError, match=f"^{option} contains a user.* the key as {key}=") as error:
        get_judge(name, model="m", **{key: KEY}, **given)
    assert "secret" not in str(error.value)


def test_another_server_needs_its_model_named(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(ConflictError, match=r"say which of that server's models"):
        get_judge("openai", base_url="http://127.0.0.1:8000/v1")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
    with pytest.raises(ConflictError, match=r"127\.0\.0\.1:8000"):
        get_judge("openai")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"concurrency": 0}, "concurrency=0"),
        ({"retries": -1}, "retries=-1"),
        ({"timeout_s": float("nan")}, "timeout_s=nan"),
        ({"max_tokens": True}, "max_tokens=True"),
        ({"price_per_million_tokens": 3}, "two prices"),
        ({"price_per_million_tokens": (1, -1)}, "two prices"),
        ({"rubric": " "}, "criteria=' '"),
        ({"model": ""}, "model=''"),
    ],
)
def test_impossible_options_are_named(options, word):
    with pytest.raises(ConflictError, match=word.replace("(", r"\(")):
        get_judge("gemini", api_key=KEY, cache=False, **options)


@pytest.mark.parametrize("name", NAMES)
def test_unknown_options_are_answered_with_the_known_ones(name):
    with pytest.raises(UnknownNameError, match=r"'temperature' of the judge.*concurrency.*max_tokens.*model.*rubric"):
        get_judge(name, temperature=1)


def test_training_draws_the_same_random_numbers_with_and_without_a_judge():
    import random

    with ScriptedJudge([Reply(status=500), verdict(1)]) as server:
        random.seed(0)
        make("openai", server).score(["?"], ["!"])
        drawn = random.random()
    random.seed(0)
    assert drawn == random.random()


_INTERRUPTED = """
import sys, threading
from forge.evaluation.judges import get_judge
judge = get_judge("openai", base_url=sys.argv[1], model="m", cache=sys.argv[2], concurrency=4)
try:
    judge.score([f"{n}?" for n in range(40)], [f"Answer {n}." for n in range(40)])
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_ctrl_c_stops_at_once_and_keeps_what_was_judged(tmp_path):
    enough = threading.Event()

    def answer(request):
        if number_in(request) < 6:
            return verdict(50)
        enough.set()
        return Reply(verdict(50), delay_s=60)

    with ScriptedJudge(answer) as server:
        process = subprocess.Popen(
            [sys.executable, "-c", _INTERRUPTED, server.url, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert enough.wait(60)
        time.sleep(0.5)  # until the judgements before it are written
        began = time.monotonic()
        os.kill(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=30)
        assert (output, time.monotonic() - began < 5) == ("interrupted\n", True)
        questions = [f"{n}?" for n in range(7)], [f"Answer {n}." for n in range(7)]
        judge = make("openai", server, cache=tmp_path, timeout_s=0.1, retries=0)
        result = judge.score(*questions)
    assert (result.usage.cached, result.judged) == (6, 6)


def test_no_warning_comes_from_the_packages_in_ordinary_use():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in NAMES:
            with ScriptedJudge([verdict(1)]) as server:
                assert make(name, server).score(["?"], ["!"]).mean == 1
