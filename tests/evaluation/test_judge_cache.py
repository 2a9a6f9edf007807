import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading

import pytest

from forge.errors import ConflictError
from forge.evaluation.judges import Judge, Judgement, Rubric, get_judge
from forge.evaluation.judges.cache import Cache, key_of
from forge.evaluation.judges.fence import Sample
from forge.evaluation.judges.openai_judge import OpenAIJudge
from support.judge import Reply, ScriptedJudge

VERDICT = '{"reason": "Fine.", "score": 64}'


def judge_at(server, folder, **options):
    return get_judge("openai", **{"base_url": server.url, "model": "m", "cache": folder, "progress": False, **options})


def test_what_was_judged_is_not_asked_again(tmp_path):
    with ScriptedJudge([VERDICT] * 3) as server:
        first = judge_at(server, tmp_path).score(["a", "b"], ["x", "y"])
        second = judge_at(server, tmp_path).score(["b", "a", "c"], ["y", "x", "z"])
    assert (first.usage.requests, first.usage.cached) == (2, 0)
    assert (second.usage.requests, second.usage.cached, second.usage.prompt_tokens > 0) == (1, 2, True)
    assert second.judgements[0] == first.judgements[1] == Judgement(64.0, "Fine.")


def test_the_same_sample_twice_in_a_list_is_asked_once(tmp_path):
    with ScriptedJudge([VERDICT]) as server:
        result = judge_at(server, False).score(["a", "a"], ["x", "x"])
    assert (result.judged, result.usage.requests, result.usage.cached) == (2, 1, 1)


def test_a_failure_is_asked_again(tmp_path):
    with ScriptedJudge(["no", "no", VERDICT]) as server:
        judge = judge_at(server, tmp_path)
        assert judge.score(["a"], ["x"]).mean is None
        assert judge.score(["a"], ["x"]).mean == 64


@pytest.mark.parametrize(
    "changed",
    [
        {"model": "other"},
        {"rubric": "Polite?"},
        {"rubric": Rubric(bands=((50, "good"), (0, "bad")))},
        {"prompts": ["A"]},
        {"prompts": [[{"role": "system", "content": "a"}]]},
        {"answers": ["X"]},
        {"references": ["r"]},
        {"references": [""]},
    ],
    ids=str,
)
def test_everything_that_a_judgement_depends_on_is_in_its_key(tmp_path, changed):
    sample = {"prompts": ["a"], "answers": ["x"], "references": [None]}
    with ScriptedJudge([VERDICT] * 2) as server:
        judge_at(server, tmp_path).score(**sample)
        options = {name: value for name, value in changed.items() if name not in sample}
        judge = judge_at(server, tmp_path, **options)
        assert judge.score(**{**sample, **{n: v for n, v in changed.items() if n in sample}}).usage.cached == 0


def test_another_server_is_another_judge(tmp_path):
    with ScriptedJudge([VERDICT]) as one, ScriptedJudge([VERDICT]) as two:
        judge_at(one, tmp_path).score(["a"], ["x"])
        assert judge_at(two, tmp_path).score(["a"], ["x"]).usage.cached == 0


def test_the_default_place_is_forges_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path))
    with ScriptedJudge([VERDICT]) as server:
        judge_at(server, True).score(["a"], ["x"])
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["judgements.sqlite"]
    assert (tmp_path / "judgements" / "judgements.sqlite").is_file()


_WRITER = """
import sys
from forge.evaluation.judges import Judgement
from forge.evaluation.judges.cache import Cache
cache, name, count = Cache(sys.argv[1]), sys.argv[2], int(sys.argv[3])
for number in range(count):
    cache.write(f"{name}-{number}", Judgement(float(number % 100), "x" * 500))
    print(number, flush=True)
"""


def writer(folder, name, count):
    command = [sys.executable, "-c", _WRITER, str(folder), name, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_threads_and_processes_write_at_once_and_lose_nothing(tmp_path):
    cache = Cache(tmp_path)
    processes = [writer(tmp_path, name, 40) for name in "ab"]
    threads = [
        threading.Thread(target=lambda t=t: [cache.write(f"{t}-{n}", Judgement(1.0)) for n in range(40)]) for t in "cd"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.communicate(timeout=120) and process.returncode for process in processes] == [0, 0]
    assert len(cache.read([f"{name}-{number}" for name in "abcd" for number in range(40)])) == 160


def test_what_was_written_survives_kill_9(tmp_path):
    process = writer(tmp_path, "k", 100_000)
    written = 0
    for line in process.stdout:
        written = int(line) + 1
        if written == 25:
            os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    cache = Cache(tmp_path)
    found = cache.read([f"k-{number}" for number in range(written)])
    assert len(found) == written >= 25
    assert all(judgement.reason == "x" * 500 for judgement in found.values())
    cache.write("after", Judgement(1.0))
    with sqlite3.connect(cache.path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


def test_a_file_that_is_no_cache_is_named_before_any_training(tmp_path):
    (tmp_path / "judgements.sqlite").write_text("something else entirely, and long enough to be looked at" * 10)
    with pytest.raises(ConflictError, match=r"judgements\.sqlite cannot be used.*cache=False"):
        get_judge("openai", base_url="http://127.0.0.1:1/v1", model="m", cache=tmp_path)


def test_a_cache_that_breaks_on_the_way_costs_no_judgement(tmp_path, caplog):
    with ScriptedJudge(lambda _: Reply(VERDICT)) as server:
        judge = judge_at(server, tmp_path)
        judge.cache.path.write_bytes(b"broken" * 1000)
        result = judge.score(["a", "b"], ["x", "y"])
    assert result.judged == 2
    assert "could not be read" in caplog.text
    assert caplog.text.count("cannot be kept") == 1


def test_whatever_fails_at_keeping_it_costs_no_judgement(tmp_path, monkeypatch, caplog):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with ScriptedJudge(lambda _: Reply(VERDICT)) as server:
        judge = judge_at(server, tmp_path)
        monkeypatch.setattr(judge.cache, "_open", full)
        monkeypatch.setattr(judge.cache, "read", lambda keys: {})
        result = judge.score(["a", "b"], ["x", "y"])
    assert result.judged == 2
    assert caplog.text.count("No space left") == 1


def test_a_reason_that_no_file_can_hold_is_kept_without_what_spoils_it(tmp_path):
    spoilt = '{"reason": "a\\ud800b\\u001b[31mc\\nd\\te \\ud83d\\ude00", "score": 64}'
    with ScriptedJudge([spoilt]) as server:
        first = judge_at(server, tmp_path).score(["a"], ["x"])
        second = judge_at(server, tmp_path).score(["a"], ["x"])
    assert first.judgements == (Judgement(64.0, "a\ufffdb\ufffd[31mc\nd\te \U0001f600"),) == second.judgements
    assert second.usage.cached == 1


def test_a_path_to_a_file_is_that_file(tmp_path):
    assert Cache(tmp_path / "mine.db").path == tmp_path / "mine.db"
    assert Cache(str(tmp_path / "folder")).path == tmp_path / "folder" / "judgements.sqlite"


def test_keys_tell_lists_from_joined_texts():
    samples = [
        Sample((("user", "a"), ("user", "b")), "c"),
        Sample((("user", "ab"),), "c"),
        Sample((("user", "a"),), "bc"),
        Sample((("user", "a"),), "b", "c"),
        Sample((("user", "a"),), "\ud800"),
    ]
    assert len({key_of(("judge", "m"), "0", sample) for sample in samples}) == 5
    assert key_of(("a", "bc"), "0", samples[0]) != key_of(("ab", "c"), "0", samples[0])


def test_judges_of_ones_own_do_not_share_judgements(tmp_path):
    class One(Judge):
        version = "1"

        def reply(self, question):
            return VERDICT

    class Two(One):
        pass

    assert One(cache=tmp_path).score(["a"], ["x"]).usage.cached == 0
    assert Two(cache=tmp_path).score(["a"], ["x"]).usage.cached == 0
    assert One(cache=tmp_path).score(["a"], ["x"]).usage.cached == 1


def test_a_judge_of_ones_own_is_asked_again_unless_it_has_a_version(tmp_path, monkeypatch):
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path))

    def define(score, **attributes):
        reply = lambda self, question: f'{{"reason": "", "score": {score}}}'  # noqa: E731
        return type("Mine", (Judge,), {"reply": reply, **attributes})

    def scored(kind):
        result = kind().score(["a"], ["x"])
        return result.mean, result.usage.cached

    assert [scored(define(score)) for score in (10, 90)] == [(10, 0), (90, 0)]
    assert not list(tmp_path.rglob("*.sqlite"))
    assert [scored(define(score, version="1")) for score in (10, 90)] == [(10, 0), (10, 1)]
    assert scored(define(90, version="2")) == (90, 0)
    with pytest.raises(ConflictError, match=r"Mine has no version.*version = \"1\""):
        define(10)(cache=tmp_path)


def test_a_subclass_of_forges_own_needs_a_version_too(tmp_path, monkeypatch):
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path))

    class Mine(OpenAIJudge):
        pass

    class Versioned(OpenAIJudge):
        version = "1"

    options = {"model": "m", "progress": False}
    with ScriptedJudge(lambda _: Reply(VERDICT)) as server:
        results = [
            kind(base_url=server.url, **options).score(["a"], ["x"])
            for kind in (OpenAIJudge, Mine, Mine, Versioned, Versioned)
        ]
    assert [result.usage.cached for result in results] == [0, 0, 0, 0, 1]
    assert results[3].identity != results[0].identity


def test_a_result_tells_judges_of_one_name_and_model_apart():
    with ScriptedJudge(lambda _: Reply(VERDICT)) as one, ScriptedJudge(lambda _: Reply(VERDICT)) as two:
        first, again, other = (judge_at(server, False).score(["a"], ["x"]) for server in (one, one, two))
    assert (first.judge, first.model) == (other.judge, other.model)
    assert first.identity == again.identity == first.to_dict()["identity"]
    assert first.identity != other.identity
    assert re.fullmatch("[0-9a-f]{16}", first.identity)
