import json

import pytest

from forge.evaluation.judges import Judgement, JudgeResult, Usage
from forge.evaluation.judges.reply import SCHEMA, Unreadable, check, read


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"reason": "Right.", "score": 90}', (90.0, "Right.")),
        ('\n {"score": 0, "reason": ""}\n', (0.0, "")),
        ('```json\n{"reason": "with ``` in it", "score": 99.5}\n```', (99.5, "with ``` in it")),
        ('```\n{"reason": "x", "score": 1e2}\n```', (100.0, "x")),
    ],
)
def test_an_exact_object_is_read(text, expected):
    assert read(text) == expected


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "empty"),
        ("85", "not an object"),
        ("[85]", "not an object"),
        ("The score is 85.", "not one JSON"),
        ('Sure! {"reason": "x", "score": 85}', "not one JSON"),
        ('{"reason": "x", "score": 85} {"reason": "x", "score": 20}', "not one JSON"),
        ('{"reason": "x", "score": 85}\nI hope this helps.', "not one JSON"),
        ('```json\n{"reason": "x", "score": 85}\n``` as asked', "not one JSON"),
        ('```json\n{"reason": "x", "score": 85}\n```\n```json\n{"reason": "y", "score": 1}\n```', "not one JSON"),
        ('{"reason": "x", "score": 85, "score": 100}', "twice"),
        ('{"reason": "x"}', "just"),
        ('{"reason": "x", "score": 85, "sure": true}', "just"),
        ('{"Reason": "x", "score": 85}', "just"),
        ('{"reason": 1, "score": 85}', "reason is not a text"),
        ('{"reason": "x", "score": "85"}', "not a number"),
        ('{"reason": "x", "score": true}', "not a number"),
        ('{"reason": "x", "score": null}', "not a number"),
        ('{"reason": "x", "score": [85]}', "not a number"),
        ('{"reason": "x", "score": NaN}', "NaN"),
        ('{"reason": "x", "score": Infinity}', "Infinity"),
        ('{"reason": "x", "score": 1e999}', "within"),
        ('{"reason": "x", "score": -1}', "within"),
        ('{"reason": "x", "score": 100.01}', "within"),
        ('{"reason": "x", "score": 8' + "5" * 6000 + "}", "not one JSON"),
        ("[" * 100_000, "not one JSON"),
        ("{'reason': 'x', 'score': 85}", "not one JSON"),
        ('{"reason": "x", "score": 85', "not one JSON"),
    ],
)
def test_anything_else_is_missing_and_no_number_is_picked_out_of_it(text, why):
    with pytest.raises(Unreadable, match=why):
        read(text)


def test_a_nan_from_a_function_is_no_score():
    with pytest.raises(Unreadable, match="within"):
        check(float("nan"))


def test_the_schema_says_what_the_parser_wants():
    assert SCHEMA["required"] == list(SCHEMA["properties"]) == ["reason", "score"]
    assert SCHEMA["additionalProperties"] is False


def result(*judgements, **usage):
    return JudgeResult("openai", "m", "0a", tuple(judgements), Usage(**usage))


def test_a_result_says_on_how_many_samples_it_rests():
    scores = [Judgement(float(score)) for score in (80, 77)]
    assert result(*scores).describe() == "LLM judge: mean 78.5 on 2 of 2 samples"
    late, talk = Judgement(error="no answer within 60 s"), Judgement(error="the reply is not one JSON object")
    assert result(*scores, late).describe() == (
        "LLM judge: mean 78.5 on 2 of 3 samples; 1 missing: no answer within 60 s"
    )
    assert result(*scores, talk, late, late).describe() == (
        "LLM judge: mean 78.5 on 2 of 5 samples; 3 missing: no answer within 60 s (so 2 of them)"
    )
    assert result(late).describe() == "LLM judge: no score on 0 of 1 samples; 1 missing: no answer within 60 s"


def test_what_is_missing_is_not_counted_as_zero():
    found = result(Judgement(50.0), Judgement(error="x"), Judgement(0.0))
    assert (found.mean, found.judged, found.total) == (25.0, 2, 3)
    assert result(Judgement(error="x")).mean is None


def test_a_result_is_json():
    found = json.loads(json.dumps(result(Judgement(50.0, "So so."), Judgement(error="x"), requests=3).to_dict()))
    assert found["judgements"] == [
        {"score": 50.0, "reason": "So so.", "error": None},
        {"score": None, "reason": "", "error": "x"},
    ]
    assert (found["mean"], found["judged"], found["total"], found["usage"]["requests"]) == (50.0, 1, 2, 3)
