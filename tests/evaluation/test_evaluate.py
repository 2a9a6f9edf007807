import json
import logging
import math

import pytest

from forge import BertScore, ConflictError, EvaluationResult, compare_results, evaluate_model, prepare_dataset
from forge.evaluation.loss import held_out_loss
from forge.evaluation.result import EvaluatedSample
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


@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # PEFT, of what generate() hands it
def test_prompt_tuning_is_read_behind_its_virtual_tokens(tokenizer):
    import peft
    import torch

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = peft.get_peft_model(text_model(layers=2), config).eval()
    ids = torch.randint(3, 240, (1, 20))
    expected = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.item()
    # The model's own loss also counts the first token, which comes after the virtual ones.
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -21:-1]
    own = torch.nn.functional.cross_entropy(logits[0], ids[0], reduction="none")
    assert expected == pytest.approx(own.mean().item(), rel=1e-4)
    assert held_out_loss(model, ids.tolist(), ids.tolist()).mean == pytest.approx(own[1:].mean().item(), rel=1e-4)
    assert evaluate_model(model, tokenizer, sft_messages(2), **OFF).model.endswith("with adapter")


def test_the_precision_that_a_trainer_left_behind_changes_nothing(tokenizer, make_trainer):
    rows, options = sft_messages(6), {**OFF, "max_new_tokens": 8}
    model = text_model(layers=2)
    before = evaluate_model(model, tokenizer, rows, name="before", **options)
    trainer = make_trainer("sft", model, bf16=True, learning_rate=0.0, max_steps=1)
    trainer.train()
    assert "_original_forward" in model.__dict__, "accelerate no longer leaves its autocast: the unwrapping can go"
    wrapped = model.forward
    after = evaluate_model(model, tokenizer, rows, name="after", **options)
    assert after.samples == before.samples
    assert model.forward is wrapped


def test_rows_that_are_padded_count_without_their_padding(model, tokenizer):
    rows = list(prepare_dataset(sft_messages(4), tokenizer).train)
    wide = max(len(row["input_ids"]) for row in rows)
    padded = []
    for row in rows:
        missing = wide - len(row["input_ids"])
        padded.append(
            {
                "input_ids": [0] * missing + row["input_ids"],
                "labels": [-100] * missing + row["labels"],
                "attention_mask": [0] * missing + [1] * len(row["input_ids"]),
            }
        )
    from datasets import Dataset

    plain = evaluate_model(model, tokenizer, Dataset.from_list(rows), **OFF)
    left = evaluate_model(model, tokenizer, Dataset.from_list(padded), **OFF)  # nothing but tokens: a loss only
    assert left.answered == ()
    assert left.loss == plain.loss
    assert [one.digest for one in left.samples] == [one.digest for one in plain.samples]


def test_texts_that_differ_are_not_compared(model, tokenizer):
    first, second = [{"text": f"abcdefg {i}"} for i in range(8)], [{"text": f"gfedcba {i}"} for i in range(8)]
    results = [
        evaluate_model(model, tokenizer, rows, name=name, **OFF)
        for name, rows in zip("ab", (first, second), strict=True)
    ]
    with pytest.raises(ConflictError, match="0 agree"):
        compare_results(results)


def result(name, *samples, **settings):
    return EvaluationResult(name, samples, settings)


def test_what_could_not_be_compared_is_said():
    one = {"prompt": "q", "reference": "r", "answer": "a", "tokens": 2, "digest": "d"}
    plain = EvaluatedSample(**one, nll=2.0)
    scored = EvaluatedSample(**one, nll=1.0, bert_f1=0.5)
    found = compare_results(result("a", plain, max_new_tokens=16), result("b", scored, max_new_tokens=256))
    assert found.ranking is None
    assert "a has no BERTScore" in str(found)
    assert "max_new_tokens (a 16, b 256)" in " ".join(found.conclusions())
    other = EvaluatedSample(**{**one, "digest": "e"}, nll=1.0)
    assert "of different tokens" in " ".join(compare_results(result("a", plain), result("b", other)).conclusions())
    broken = EvaluatedSample(**one, nll=math.nan)
    assert "that of b is not finite" in " ".join(compare_results(result("a", plain), result("b", broken)).conclusions())


def test_the_combined_score_of_a_comparison_is_that_of_its_ranking():
    def samples(scores):
        one = {"prompt": "q", "reference": "r", "answer": "a", "bert_f1": 0.5}
        return [EvaluatedSample(**one, judge_score=score, judge_error=None if score else "no") for score in scores]

    judge = {"name": "j", "identity": "1"}
    a, b = (
        result(name, *samples(scores), judge=judge)
        for name, scores in {"a": [90.0, 90.0, None, None], "b": [90.0, 90.0, 10.0, 10.0]}.items()
    )
    found = compare_results(a, b)
    assert a.combined > b.combined
    assert [figures["combined"] for figures in found.figures()] == ["0.7400", "0.7400"]
    c = result("c", *[EvaluatedSample(prompt="q", reference="r", answer="a", bert_f1=0.5)] * 4)
    assert all("combined" not in figures for figures in compare_results(a, c).figures())
    with pytest.raises(ConflictError, match="different judges"):
        compare_results(a, result("d", *samples([90.0] * 4), judge={"name": "j", "identity": "2"}))


def test_a_loss_that_is_not_finite_is_valid_json_and_comes_back(tmp_path):
    broken = result("a", EvaluatedSample(prompt="q", nll=math.nan, tokens=3))
    broken.save(tmp_path)
    text = (tmp_path / "result.json").read_text()
    assert "NaN" not in text
    assert math.isnan(EvaluationResult.load(tmp_path / "report.html").loss.mean)


def test_why_a_judge_failed_stands_in_the_table(model, tokenizer, scripted_judge):
    from forge import ForgeWarning, get_judge
    from support.judge import Reply

    with scripted_judge(lambda _: Reply("wrong key", status=401)) as judge:
        critic = get_judge("openai", base_url=judge.url, model="m", api_key="k", cache=False)
        with pytest.warns(ForgeWarning, match="given up"):
            found = evaluate_model(model, tokenizer, sft_messages(3), judge=critic, **OFF)
    assert "LLM judge: no score on 0 of" in str(found)
    assert "401" in str(found)


def test_a_tokenizer_with_more_tokens_than_the_model(model, tokenizer):
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens([f"<new{i}>" for i in range(20)])
    assert tokenizer.pad_token_id < 256 < len(tokenizer)
    tokenizer.pad_token = "<new19>"
    assert tokenizer.pad_token_id >= 256
    assert len(evaluate_model(model, tokenizer, sft_messages(3), **OFF).answered) > 0
    with pytest.raises(ConflictError, match="not resized"):
        evaluate_model(model, tokenizer, [{"prompt": "<new18>", "completion": "b"}], **OFF)


def test_samples_beyond_the_context_are_refused(model, tokenizer):
    rows = [{"prompt": "a", "completion": "b" * 300}]
    with pytest.raises(ConflictError, match=r"1 of 1 samples are longer .* max_length=128"):
        evaluate_model(model, tokenizer, rows, **OFF)


@pytest.mark.parametrize("change", [{"model": "an-id"}, {"name": 5}])
def test_what_people_type(model, tokenizer, change):
    options = {"model": model, **OFF, **change}
    with pytest.raises(ConflictError, match="a model that is loaded"):
        evaluate_model(options.pop("model"), tokenizer, sft_messages(2), **options)


def test_encoders_of_one_name_are_told_apart_by_their_weights(minilm, tmp_path, model, tokenizer):
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    other = tmp_path / minilm.name
    shutil.copytree(minilm, other)
    weights = load_file(other / "model.safetensors")
    name = next(key for key in weights if "layer.0.attention.self.query.weight" in key)
    save_file({**weights, name: weights[name] + torch.randn_like(weights[name])}, other / "model.safetensors")
    results = [
        evaluate_model(
            model, tokenizer, sft_messages(3), name=str(folder), **{**OFF, "bert_score": BertScore(folder, 2)}
        )
        for folder in (minilm, other)
    ]
    with pytest.raises(ConflictError, match="different encoders"):
        compare_results(*results)


@pytest.mark.parametrize("adapted", [True, False])
def test_a_model_that_judges_itself_is_named_as_such(model, tokenizer, adapted):
    import peft

    judged = peft.get_peft_model(model, lora()) if adapted else model
    found = evaluate_model(judged, tokenizer, sft_messages(2), judge="local", judge_samples=1, **OFF)
    assert any("the evaluated model itself" in note for note in found.notes) == (not adapted)


def test_what_a_row_says_to_its_chat_template_reaches_the_prompt(model, tokenizer):
    tokenizer.chat_template = (
        "{{ mood }}{% for tool in tools or [] %}{{ tool.name }}{% endfor %}" + tokenizer.chat_template
    )
    rows = [
        {
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "tools": [{"name": "TOOL"}],
            "chat_template_kwargs": {"mood": "MOOD"},
        }
    ]
    seen = []
    generate = model.generate
    model.generate = lambda input_ids, **more: seen.append(input_ids) or generate(input_ids=input_ids, **more)
    data = prepare_dataset(rows, tokenizer)
    evaluate_model(model, tokenizer, data.train, **OFF)
    prompt = tokenizer.decode(seen[0][0])
    assert prompt.startswith("MOODTOOL")
    assert tokenizer.decode(data.train[0]["input_ids"]).startswith(prompt)
