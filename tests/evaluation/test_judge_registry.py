import inspect
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch

from forge.errors import ConflictError, UnknownNameError
from forge.evaluation.judges import Judge, Rubric, default_judge, get_judge, list_judges, register_judge


def test_the_names():
    assert list_judges() == ["gemini", "gigachat", "local", "openai"]


@pytest.mark.parametrize("name", ["opnai", "gpt", "OpenAI", ""])
def test_an_unknown_name_is_answered_with_all_names(name):
    with pytest.raises(UnknownNameError, match="Known: gemini, gigachat, local, openai"):
        get_judge(name)


def test_the_default_comes_from_the_environment_else_stays_here(monkeypatch):
    assert default_judge() == "local"
    with pytest.raises(ConflictError, match='"local" needs a model: pass model= and tokenizer='):
        get_judge()
    monkeypatch.setenv("FORGE_JUDGE", "nobody")
    with pytest.raises(UnknownNameError, match="'nobody' \\(from FORGE_JUDGE\\)"):
        get_judge()
    monkeypatch.setenv("FORGE_JUDGE", "mine")
    register_judge("mine")(lambda prompt, answer, reference: 1.0)
    assert get_judge().score(["?"], ["!"]).mean == 1


def test_a_function_is_a_judge():
    @register_judge("overlap")
    def overlap(prompt, answer, reference):
        if answer == "bad":
            raise RuntimeError("cannot")
        return 100.0 if answer == reference else float("nan") if answer == "nan" else 5

    judge = get_judge("overlap", progress=False)
    result = judge.score(["a"] * 4, ["x", "y", "bad", "nan"], ["x"] * 4)
    assert [one.score for one in result.judgements] == [100, 5, None, None]
    assert [one.error for one in result.judgements[2:]] == [
        "RuntimeError: cannot",
        "the score is not within 0 and 100",
    ]
    assert (result.judge, result.model, overlap("", "x", "x")) == ("overlap", overlap.__qualname__, 100.0)
    with pytest.raises(UnknownNameError, match=r"'model' of the judge 'overlap'\. Known: progress"):
        get_judge("overlap", model="m")


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda prompt, answer: 1 if (prompt, answer) == ("p", "a") else 0, 1),
        (lambda prompt, answer, strict=True: 1 if strict is True else 0, 1),
        (lambda prompt, answer, reference: 1 if reference == "r" else 0, 1),
        (lambda prompt, answer, *, reference=None: 1 if reference == "r" else 0, 1),
        (lambda prompt, answer, **rest: 1 if rest == {"reference": "r"} else 0, 1),
        (lambda prompt, answer: np.float32(50), 50),
        (lambda prompt, answer: np.int64(50), 50),
        (lambda prompt, answer: torch.tensor(50.0), 50),
        (lambda prompt, answer: Fraction(1, 2), 0.5),
    ],
)
def test_a_function_is_given_what_it_takes_and_may_return_any_number(function, expected):
    register_judge("mine")(function)
    found = get_judge("mine", progress=False).score(["p"], ["a"], ["r"]).judgements[0]
    assert (found.error, found.score, type(found.score)) == (None, expected, float)


@pytest.mark.parametrize("score", [True, np.True_, torch.tensor(True), np.array([50.0]), 1j, "50", None])
def test_what_is_no_number_is_no_score(score):
    register_judge("mine")(lambda prompt, answer: score)
    assert get_judge("mine").score(["p"], ["a"]).judgements[0].error == "the score is not a number"


def _judge(question, answer, reference):
    return 50


@pytest.mark.parametrize(
    "function",
    [_judge, lambda q, a: 1, lambda prompt, answer, reference, weight: 1, lambda prompt, answer, other: 1],
)
def test_a_function_that_could_not_be_called_is_refused_at_once(function):
    with pytest.raises(
        ConflictError, match=r"\(prompt, answer\) or \(prompt, answer, reference\), by these names"
    ) as error:
        register_judge("mine")(function)
    assert f"takes {', '.join(inspect.signature(function).parameters)}." in str(error.value)
    assert "mine" not in list_judges()


def test_a_function_sees_texts_as_texts_and_messages_as_messages():
    seen = []
    register_judge("seen")(lambda prompt, answer, reference: seen.append(prompt) or 0)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    get_judge("seen").score(["text", turns], ["x", "x"])
    assert seen == ["text", turns]


def test_a_subclass_and_a_factory_are_judges():
    @register_judge("kind")
    class Kind(Judge):
        def __init__(self, generosity=100, **options):
            super().__init__(**options)
            self.generosity = generosity

        def reply(self, question):
            return f'{{"reason": "", "score": {self.generosity}}}'

    @register_judge("half")
    def half(**options):
        return Kind(50, **options)

    assert get_judge("kind", cache=False).score(["?"], ["!"]).judge == "kind"
    assert get_judge("half", cache=False, rubric="Short?").score(["?"], ["!"]).mean == 50
    with pytest.raises(UnknownNameError, match="Known: cache, generosity, progress, rubric"):
        get_judge("kind", model="m")
    assert "kind" in list_judges()


def test_what_is_no_judge_is_refused():
    with pytest.raises(ConflictError, match="no subclass"):
        register_judge("x")(dict)
    with pytest.raises(ConflictError, match="neither"):
        register_judge("x")("text")
    with pytest.raises(ConflictError, match="give a name"):
        register_judge("")
    register_judge("x")(lambda: 3)
    with pytest.raises(ConflictError, match="made a int"):
        get_judge("x")


def test_a_judge_of_ones_own_may_fail_as_it_likes():
    class Moody(Judge):
        def reply(self, question):
            raise KeyError("mood")

    class Unfinished(Judge):
        pass

    result = Moody(cache=False).score(["?", "??"], ["!", "!"])
    assert (result.judged, result.judgements[0].error) == (0, "KeyError: 'mood'")
    assert "overrides neither" in Unfinished(cache=False).score(["?"], ["!"]).judgements[0].error


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((["a", "b"], ["x"]), "2 prompts, 1 answers"),
        ((["a"], ["x"], ["r", "s"]), "2 references"),
        (([], []), "nothing to judge"),
        (("a", ["x"]), "prompts is one text"),
        ((["a"], "x"), "answers is one text"),
        ((["a"], [None]), r"answers\[0\] is a NoneType"),
        ((["a"], ["x"], [1]), r"references\[0\] is a int"),
        ((["a", []], ["x", "x"]), r"prompts\[1\]=\[\]"),
        ((["a", None], ["x", "x"]), r"prompts\[1\]=None"),
        (([[{"role": "user"}]], ["x"]), r"prompts\[0\] has a message"),
        (([[{"role": "user", "content": [{"type": "image"}]}]], ["x"]), "read text only"),
        (([["a"]], ["x"]), r"prompts\[0\] has a message"),
    ],
)
def test_what_cannot_be_judged_is_named(arguments, word):
    register_judge("one")(lambda prompt, answer, reference: 1)
    with pytest.raises(ConflictError, match=word):
        get_judge("one").score(*arguments)


def test_rubrics():
    assert Rubric("Polite?").text.startswith("Polite?\n\nScores:\n90 to 100: ")
    assert Rubric("Polite?").text.endswith(
        "0 to 24: Wrong, empty, unintelligible, harmful, or no answer to the question."
    )
    assert Rubric.of("Polite?") == Rubric("Polite?")
    assert Rubric.of(None) == Rubric.of(Rubric()) == Rubric()
    assert Rubric().digest != Rubric("Polite?").digest
    assert Rubric(bands=((60, "yes"), (0, "no"))).text.endswith("60 to 100: yes\n0 to 59: no")
    for bands in ((), ((50, "a"),), ((0, "a"), (50, "b")), ((101, "a"), (0, "b"))):
        with pytest.raises(ConflictError, match="must fall"):
            Rubric(bands=bands)


def test_a_rubric_with_braces_is_told_as_it_is():
    told = []

    class Told(Judge):
        def reply(self, question):
            told.append(question.task)
            return "{}"

    Told(rubric='Is it {"json"} or {0}?', cache=False).score(["?"], ["!"])
    assert 'Is it {"json"} or {0}?' in told[0]


def test_importing_the_judges_is_light():
    code = (
        "import sys, forge.evaluation.judges\n"
        "print(sorted({'torch', 'transformers', 'openai', 'google.genai', 'gigachat', 'tqdm'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
