"""The tokenizer, the data sets, the tiny models and trainers, and the fixtures that carry the workshop."""

import pytest
import torch

from support import data
from support.families import FAMILIES
from support.models import VOCAB_SIZE, lora, nf4_model, text_model, trainer

CONVERSATION = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]


@pytest.mark.parametrize("text", ["After a, 2?", " zwei Äpfel\n\t", "日本語 🙂", "<|im_start|>user\n"])
def test_the_tokenizer_loses_nothing(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert max(ids) < len(tokenizer) <= 256


def test_special_tokens_are_distinct_and_single(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer("x<|im_end|>")["input_ids"][1:] == [2]


def test_the_chat_template_marks_what_the_assistant_says(tokenizer):
    encoded = tokenizer.apply_chat_template(CONVERSATION, return_dict=True, return_assistant_tokens_mask=True)
    learnt = [i for i, is_learnt in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if is_learnt]
    assert tokenizer.decode(learnt) == "Yes.<|im_end|>"


def test_the_generation_prompt_is_a_prefix(tokenizer):
    prompt = tokenizer.apply_chat_template(CONVERSATION[:1], tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(CONVERSATION, tokenize=False).startswith(prompt)


@pytest.mark.parametrize("name", ["sft_messages", "sft_prompt_completion", "sft_text", "dpo_preferences", "lm_tokens"])
def test_data_is_seeded_and_its_size_is_as_asked(name):
    make = getattr(data, name)
    assert make(8).to_list() == make(8).to_list() != make(8, seed=1).to_list()
    assert len(make(8)) == 8


def test_a_rejected_answer_is_never_the_chosen_one():
    assert all(row["chosen"] != row["rejected"] for row in data.dpo_preferences(64))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_model_of_every_family_reads_the_tokenizers_ids(family):
    model = text_model(family, layers=3).eval()  # Gemma 3 asks for token types in training
    ids = torch.arange(246).view(2, 123)
    assert model(input_ids=ids, use_cache=False).logits.shape == (2, 123, VOCAB_SIZE)
    assert model.config.get_text_config().num_hidden_layers == 3


def test_a_text_model_is_the_same_at_every_call():
    first, second = text_model().state_dict(), text_model().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", ["plain", "sft", "dpo"])
@pytest.mark.parametrize("method", ["full", "lora", "nf4"])
def test_a_tiny_trainer_learns_without_foreign_warnings(tmp_path, kind, method, no_foreign_warnings):
    model = nf4_model(tmp_path / "base", layers=2) if method == "nf4" else text_model(layers=2)
    if method != "full" and kind == "plain":
        import peft

        model = peft.get_peft_model(model, lora())
    options = {"peft_config": lora()} if method != "full" and kind != "plain" else {}
    subject = trainer(kind, tmp_path, model, max_steps=8, learning_rate=1e-2, trainer_options=options)
    subject.train()
    losses = [entry["loss"] for entry in subject.state.log_history if "loss" in entry]
    assert sum(losses[-2:]) < sum(losses[:2])


def test_the_fixtures_are_there(
    warning_recorder, inject_nan, backward_probe, kill_and_resume, device_reads, scripted_judge, text_model, tiny_model,
    tiny_config, make_trainer,
):  # fmt: skip
    assert callable(make_trainer)
    assert tiny_model("llama").config.model_type == tiny_config("llama").model_type
    warning_recorder.assert_clean()


@pytest.mark.real
def test_the_real_assets_are_there(smollm2, minilm, conversations):
    assert smollm2.is_dir()
    assert minilm.is_dir()
    assert conversations
