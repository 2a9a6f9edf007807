import json
import logging
import math

import pytest

from forge import BertScore, ConflictError, EvaluationResult, compare_results, evaluate_model, prepare_dataset
from forge.evaluation.scoring import score_answers
from support.data import dpo_preferences, sft_messages, sft_prompt_completion, sft_text
from support.models import lora, text_model

OFF = {"bert_score": False, "progress": False, "max_new_tokens": 4}


@pytest.fixture
def encoder(minilm):
    return BertScore(str(minilm), num_layers=2)


@pytest.fixture
def model():
    return text_model(layers=2)


@pytest.mark.parametrize("data", [sft_messages, sft_prompt_completion, dpo_preferences])
def test_every_kind_of_data_with_questions(data, model, tokenizer):
    rows = data(6)
    result = evaluate_model(model, tokenizer, rows, **OFF)
    references = [
        (row.get("completion") or row.get("chosen") or row["messages"])[-1]["content"]
        for row in {json.dumps(row): row for row in rows}.values()
    ]
    assert [one.reference for one in result.samples] == references
    assert all(one.answer is not None and one.tokens > 0 for one in result.samples)
    assert math.isfinite(result.loss.perplexity)


def test_prepared_data_and_the_data_they_were_made_of_give_the_same(model, tokenizer):
    raw = sft_messages(8)
    data = prepare_dataset(raw, tokenizer, validation=3)
    of_validation = evaluate_model(model, tokenizer, data, **OFF)
    assert [one.reference for one in of_validation.samples] == [
        row["messages"][-1]["content"] for row in data.validation
    ]
    of_rows = evaluate_model(model, tokenizer, data.validation, **OFF)
    assert of_rows.samples == of_validation.samples
    of_raw = evaluate_model(model, tokenizer, raw, **OFF)
    assert set(map(repr, of_validation.samples)) <= set(map(repr, of_raw.samples))


def test_prepared_data_without_a_validation_part_are_refused(model, tokenizer):
    with pytest.raises(ConflictError, match=r"validation=0.1, or pass data.train"):
        evaluate_model(model, tokenizer, prepare_dataset(sft_messages(4), tokenizer), **OFF)


def test_plain_text_has_a_loss_only(model, tokenizer, encoder):
    result = evaluate_model(model, tokenizer, sft_text(5), **{**OFF, "bert_score": encoder})
    assert result.loss.mean > 0
    assert result.answered == ()
    assert result.bert_score is None
    assert "no questions" in str(result)


def test_scores_are_those_of_the_encoder(model, tokenizer, encoder):
    result = evaluate_model(model, tokenizer, sft_messages(6), **{**OFF, "bert_score": encoder})
    expected = encoder.score([one.answer for one in result.samples], [one.reference for one in result.samples])
    assert result.bert_scores == pytest.approx([float(f1) for f1 in expected.f1])
    assert result.combined == result.bert_score == pytest.approx(sum(result.bert_scores) / len(result.bert_scores))
    interval = result.bert_interval()
    assert interval.low <= result.bert_score <= interval.high


def test_bounds_choose_the_same_samples_for_every_model(tokenizer):
    rows = sft_messages(40)
    first = evaluate_model(text_model(layers=2), tokenizer, rows, max_eval_samples=5, **OFF)
    second = evaluate_model(text_model(layers=2, seed=1), tokenizer, rows, max_eval_samples=5, **OFF)
    assert [one.prompt for one in first.samples] == [one.prompt for one in second.samples]
    assert len(first.samples) == 5
    assert any("On 5 of" in note for note in first.notes)


def test_a_judge_is_asked_about_some_and_its_failures_are_missing(model, tokenizer, encoder, scripted_judge, caplog):
    from forge import get_judge

    def reply(request):
        return "no" if len(judge.requests) % 3 == 0 else '{"reason": "fine", "score": 78.5}'

    with scripted_judge(reply) as judge, caplog.at_level(logging.INFO, "forge"):
        critic = get_judge("openai", base_url=judge.url, model="m", api_key="k", cache=False, concurrency=1)
        options = {**OFF, "bert_score": encoder, "judge": critic}
        result = evaluate_model(model, tokenizer, sft_messages(20), judge_samples=5, **options)
    asked = [one for one in result.samples if one.was_judged]
    assert len(asked) == 5
    assert set(result.judge_scores) == {78.5}
    assert all((one.judge_score is None) == (one.judge_error is not None) for one in asked)
    assert result.combined == pytest.approx(0.4 * result.bert_score + 0.6 * 0.785)
    assert f"LLM judge: mean 78.5 on {len(result.judge_scores)} of 5 samples" in caplog.text
    assert f"BERTScore {result.bert_score:.3f}, judge 78.5, combined {result.combined:.3f}" in caplog.text


def test_the_local_judge_is_the_base_and_is_named(model, tokenizer):
    import peft

    tuned = peft.get_peft_model(model, lora())
    result = evaluate_model(tuned, tokenizer, sft_messages(3), judge="local", judge_samples=2, **OFF)
    assert result.judge_score is None  # it cannot say anything sensible, and that is no 0
    assert sum(one.judge_error is not None for one in result.samples) == 2
    assert result.settings["judge"]["name"] == "local"
    assert result.settings["judge"]["model"]
    assert "LLM judge: no score on 0 of 2 samples" in " ".join(result.describe())


def test_answers_are_kept_when_scoring_fails(model, tokenizer, encoder, monkeypatch, caplog, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(encoder.__class__, "score", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate_model(model, tokenizer, sft_messages(3), **{**OFF, "bert_score": encoder})
    [folder] = tmp_path.glob("forge-answers-*")
    assert str(folder) in caplog.text
    monkeypatch.undo()
    scored = score_answers(EvaluationResult.load(folder), bert_score=encoder)
    assert len(scored.bert_scores) == 3


def test_saved_and_loaded(model, tokenizer, encoder, tmp_path):
    result = evaluate_model(model, tokenizer, sft_messages(4), **{**OFF, "bert_score": encoder})
    report = result.save(tmp_path / "out")
    assert EvaluationResult.load(tmp_path / "out").to_dict() == result.to_dict()
    html = report.read_text()
    assert all(f"F1 {one.bert_f1:.3f}" in html for one in result.samples)
    with pytest.raises(ConflictError, match="no saved evaluation"):
        EvaluationResult.load(tmp_path)


def test_the_model_is_left_as_it_was(model, tokenizer):
    model.train()
    evaluate_model(model, tokenizer, sft_messages(3), **OFF)
    assert model.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_eval_samples": 0}, "max_eval_samples=0"),
        ({"judge_samples": True}, "judge_samples=True"),
        ({"bert_score": "minilm"}, "give a BertScore"),
        ({"judge": 3}, "judge=3"),
        ({"max_new_tokens": 500}, "leave no room"),
        ({"dataset": []}, "no rows"),
    ],
)
def test_bad_input_is_refused_before_the_first_forward_pass(model, tokenizer, change, message):
    model.register_forward_hook(lambda *_: pytest.fail("a forward pass"))
    options = {"dataset": sft_messages(3), **OFF, **change}
    with pytest.raises(ValueError, match=message):
        evaluate_model(model, tokenizer, options.pop("dataset"), **options)


def test_a_missing_key_is_said_before_the_first_forward_pass(model, tokenizer, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    model.register_forward_hook(lambda *_: pytest.fail("a forward pass"))
    with pytest.raises(ValueError, match="OPENAI_API_KEY"):
        evaluate_model(model, tokenizer, sft_messages(3), judge="openai", **OFF)


def trained(model, tokenizer, tmp_path, make_trainer):
    trainer = make_trainer("sft", model, max_steps=60, learning_rate=1e-2, per_device_train_batch_size=8)
    trainer.train()
    return trainer.model


def test_a_trained_model_is_better_and_that_can_be_shown(tokenizer, encoder, tmp_path, make_trainer):
    rows, options = sft_messages(24, seed=5), {**OFF, "bert_score": encoder, "max_new_tokens": 8}
    before = evaluate_model(text_model(layers=2), tokenizer, rows, name="base", **options)
    model = trained(text_model(layers=2), tokenizer, tmp_path, make_trainer)
    after = evaluate_model(model, tokenizer, rows, name="tuned", **options)
    found = compare_results(before, after)
    assert found.losses["tuned"].high < 0
    assert any("that of tuned is lower than that of base" in line for line in found.conclusions())
    assert found.ranking is not None
    html = found.save(tmp_path / "report").read_text()
    assert "base against tuned" in html
    assert "Answers, side by side" in html
    assert json.loads((tmp_path / "report/comparison.json").read_text())["results"][1]["model"] == "tuned"
    assert "tuned" in str(found)


def test_a_model_against_itself_is_a_tie(model, tokenizer, encoder):
    options = {**OFF, "bert_score": encoder}
    first, second = (evaluate_model(model, tokenizer, sft_messages(8), name=name, **options) for name in "ab")
    found = compare_results(first, second)
    assert found.losses["b"].mean == 0
    assert "no difference can be shown between b and a" in found.conclusions()[0]


def test_what_cannot_be_compared_is_refused(model, tokenizer):
    first = evaluate_model(model, tokenizer, sft_messages(4), name="a", **OFF)
    other = evaluate_model(model, tokenizer, sft_messages(4, seed=9), name="b", **OFF)
    with pytest.raises(ConflictError, match="0 agree"):
        compare_results(first, other)
    with pytest.raises(ConflictError, match="two or more"):
        compare_results(first)
    with pytest.raises(ConflictError, match="Two results are called 'a'"):
        compare_results(first, first)
