import random
import warnings

import pytest

from forge import ConflictError, UnsupportedError
from forge.evaluation.generation import generate
from support.families import FAMILIES
from support.models import lora, text_model

QUESTIONS = ["a", "bcd efg", "hi there, who are you?", "z" * 40, "é ü 漢", "1 + 1"]


def chats(questions=QUESTIONS):
    return [[{"role": "user", "content": question}] for question in questions]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_batching_changes_no_answer(family, tokenizer):
    rng = random.Random(1)
    prompts = chats(["".join(rng.choice("abcdefgh ") for _ in range(rng.randint(1, 40))) for _ in range(9)])
    model = text_model(family, layers=2)
    one, four = (generate(model, tokenizer, prompts, max_new_tokens=12, batch_size=size) for size in (1, 4))
    assert one == four


def test_a_penalty_of_the_models_own_does_not_fall_on_the_padding(tokenizer):
    """Left to itself, `generate` penalises the padding of a short prompt, and the answer depends on the neighbours."""
    model = text_model()
    model.generation_config.repetition_penalty = 1.8
    model.generation_config.do_sample, model.generation_config.temperature = True, 0.6
    tokenizer.pad_token = tokenizer.eos_token
    plain = generate(text_model(), tokenizer, chats(), max_new_tokens=16, batch_size=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generate(model, tokenizer, chats(), max_new_tokens=16, batch_size=6) == plain
    assert model.generation_config.repetition_penalty == 1.8
    assert model.generation_config.temperature == 0.6


def test_answers_are_those_of_a_search_by_hand(tokenizer):
    import torch

    model = text_model().eval()
    prompt = tokenizer.apply_chat_template(chats()[1], add_generation_prompt=True, return_dict=False)
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(8):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
    [found] = generate(model, tokenizer, chats()[1:2], max_new_tokens=8)
    assert found.text == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()
    assert found.cut == (ids[-1] != tokenizer.eos_token_id)


def test_the_end_of_turn_stops_an_answer_whatever_the_tokenizer_calls_its_end(tokenizer):
    import torch

    model = text_model()
    with torch.no_grad():  # a model that says "a" and then ends its turn, for ever
        head = torch.zeros_like(model.lm_head.weight)
        model.lm_head.weight = torch.nn.Parameter(head)
        model.lm_head.bias = None
    end, tokenizer.eos_token = tokenizer.eos_token_id, "<|pad|>"
    model.generation_config.eos_token_id = None
    calls = []

    def say(module, args, output):
        calls.append(1)
        output = torch.zeros_like(output)
        output[..., end if len(calls) % 3 == 0 else tokenizer.convert_tokens_to_ids("a")] = 1.0
        return output

    model.lm_head.register_forward_hook(say)
    [found] = generate(model, tokenizer, chats()[:1], max_new_tokens=8)
    assert (found.text, found.tokens, found.cut) == ("aa", 3, False)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_and_the_tokenizer_are_left_as_they_were(tokenizer, training):
    import peft

    model = peft.get_peft_model(text_model(), lora(lora_dropout=0.5))
    model.train(training)
    model.base_model.model.lm_head.eval()
    model.config.use_cache = False
    modes = [module.training for module in model.modules()]
    configs = (model.generation_config, model.get_base_model().generation_config)
    side, pad = tokenizer.padding_side, tokenizer.pad_token
    answers = generate(model, tokenizer, chats(), max_new_tokens=4, batch_size=2)
    assert answers == generate(model, tokenizer, chats(), max_new_tokens=4, batch_size=6)
    assert [module.training for module in model.modules()] == modes
    assert (model.generation_config, model.get_base_model().generation_config) == configs
    assert "generation_config" in model.__dict__ or model.generation_config is configs[0]
    assert (tokenizer.padding_side, tokenizer.pad_token, model.config.use_cache) == (side, pad, False)


def test_the_model_is_left_as_it_was_when_generation_fails(tokenizer):
    model = text_model().train()
    config = model.generation_config
    model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(model, tokenizer, chats(), max_new_tokens=4)
    assert model.training
    assert model.generation_config is config


def test_a_frozen_prefix_changes_no_answer(tokenizer):
    from forge import setup_lp_lora_style

    model = text_model()
    before = generate(model, tokenizer, chats(), max_new_tokens=8)
    setup_lp_lora_style(model, freeze_ratio=0.5)
    assert generate(model.train(), tokenizer, chats(), max_new_tokens=8) == before


def test_plain_text_is_continued(tokenizer):
    tokenizer.chat_template = None
    assert len(generate(text_model(), tokenizer, ["abc", "d"], max_new_tokens=4)) == 2


def test_no_prompts_no_answers(tokenizer):
    assert generate(text_model(), tokenizer, [], max_new_tokens=4) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"batch_size": 2.5}, "batch_size=2.5"),
        ({"max_new_tokens": 120}, "6 of 6 prompts leave no room for 120 new tokens in a context of 128"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_forward_pass(tokenizer, change, message):
    model = text_model()
    model.register_forward_hook(lambda *_: pytest.fail("a forward pass"))
    with pytest.raises(ConflictError, match=message):
        generate(model, tokenizer, chats(), **change)


def test_encoder_decoders_are_refused(tokenizer):
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(vocab_size=256, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(UnsupportedError, match="encoder-decoder"):
        generate(model, tokenizer, chats())
