"""Scores of a judge that is another one by now, adapters that came back on, a judgement lost for its reason."""

import copy

import pytest
import torch

from forge import ConflictError, UnsupportedError, get_judge, register_judge
from forge.evaluation.judges import Judge, Judgement
from forge.evaluation.judges.base_model import adapters_off, weights_digest
from forge.evaluation.judges.reply import check, read
from support.models import lora, nf4_model, text_model
from support.tokenizer import tiny_tokenizer


@pytest.mark.parametrize("change", ["fused", "data"])
def test_the_digest_follows_weights_that_torch_does_not_count(change):
    model = text_model(layers=1)
    before = weights_digest(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    if change == "data":
        weight.data.add_(1)
    else:
        weight.grad = torch.ones_like(weight)
        torch.optim.AdamW([weight], lr=0.1, fused=True).step()
    assert weights_digest(model) != before


def test_packed_weights_of_another_scale_are_other_weights(tmp_path):
    model = nf4_model(tmp_path, layers=1)
    before = weights_digest(model)
    state = model.model.layers[0].mlp.up_proj.weight.quant_state
    state.absmax = state.absmax.clone() * 2
    assert weights_digest(model) != before


def test_another_chat_template_is_another_judge():
    model, tokenizer = text_model(layers=1), tiny_tokenizer()
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ 'x' }}" + tokenizer.chat_template
    judges = [get_judge("local", model=model, tokenizer=one, cache=False, progress=False) for one in (tokenizer, other)]
    found = [judge.score(["a"], ["b"]).identity for judge in judges]
    assert found[0] != found[1]
    assert found[0] == judges[0].score(["c"], ["d"]).identity


def test_adapters_that_were_off_stay_off():
    model = text_model(layers=1)
    model.add_adapter(lora())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5)
    ids = torch.tensor([[5, 6, 7]])
    on = model(ids).logits
    model.disable_adapters()
    off = model(ids).logits
    assert not torch.equal(on, off)
    with adapters_off(model):
        assert torch.equal(model(ids).logits, off)
    assert torch.equal(model(ids).logits, off)
    model.enable_adapters()
    with adapters_off(model):
        assert torch.equal(model(ids).logits, off)
    assert torch.equal(model(ids).logits, on)


def test_merged_adapters_are_refused():
    import peft

    model = peft.get_peft_model(text_model(layers=1), lora())
    model.merge_adapter()
    with pytest.raises(UnsupportedError, match=r"model.unmerge_adapter\(\) first"):
        get_judge("local", model=model, tokenizer=tiny_tokenizer())


def test_a_class_that_changed_is_asked_again(tmp_path, monkeypatch):
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path))

    def scored(score, version=""):
        asked = []

        @register_judge("mine")
        class Mine(Judge):
            def reply(self, question):
                asked.append(question)
                return f'{{"reason": "", "score": {score}}}'

        Mine.version = version
        return get_judge("mine", progress=False).score(["a"], ["b"]).mean, len(asked)

    assert [scored(10), scored(90)] == [(10, 1), (90, 1)]
    assert [scored(10, "1"), scored(90, "1"), scored(90, "2")] == [(10, 1), (10, 0), (90, 1)]


def test_functions_of_two_arguments_and_of_others():
    @register_judge("two")
    def two(prompt, answer):
        return len(answer)

    assert get_judge("two", progress=False).score(["a"], ["bcd"]).mean == 3
    with pytest.raises(ConflictError, match=r"takes question, answer, reference. .* \(prompt, answer\) or"):

        @register_judge("named otherwise")
        def named(question, answer, reference):
            return 1


def test_scores_of_numpy_and_torch_are_numbers():
    import numpy as np

    assert [check(np.float32(50)), check(np.int64(7)), check(torch.tensor(3.0))] == [50, 7, 3]


def test_a_reason_that_cannot_be_written_costs_no_score():
    judgement = Judgement(*read('{"reason": "half \\ud800 and \\u001b[31m", "score": 70}'))
    assert judgement.score == 70
    assert judgement.reason == "half \ufffd and \ufffd[31m"
    judgement.reason.encode()
