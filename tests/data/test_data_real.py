"""Real conversations and a real tokenizer."""

import time

import pytest
from chat_families import learnt_text

from forge.data import encode_prompt, prepare_dataset, question_and_reference, stop_token_ids
from forge.data.choose import by_prefix


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


def test_smollm2_learns_what_was_said(tokenizer, conversations):
    rows = [{"messages": messages} for messages in conversations[:60]]
    data = prepare_dataset(rows, tokenizer, validation=0.1)
    assert data.report.template == "prefix"
    assert stop_token_ids(tokenizer) == [tokenizer.eos_token_id]
    for row in [*data.train, *data.validation]:
        said = learnt_text(tokenizer, row["input_ids"], row["labels"])
        assert said == [m["content"] + "<|im_end|>" for m in row["messages"] if m["role"] == "assistant"]
        prompt, reference = question_and_reference(row)
        ids = encode_prompt(tokenizer, prompt)
        assert row["input_ids"][: len(ids)] == ids
        assert said[-1] == reference + "<|im_end|>"


def test_the_skeleton_is_exact_on_real_text(tokenizer, conversations):
    quick, slow = by_prefix(tokenizer), by_prefix(tokenizer)
    slow.__dict__["_quickly"] = lambda *_: None
    for messages in conversations[100:120]:
        assert quick.encode(messages) == slow.encode(messages)


@pytest.mark.long
def test_all_conversations_in_a_minute(tokenizer, conversations):
    began = time.perf_counter()
    data = prepare_dataset([{"messages": messages} for messages in conversations], tokenizer, validation=0.05)
    assert time.perf_counter() - began < 60
    total = len(data.train) + len(data.validation) + sum(map(len, data.report.train.dropped.values()))
    assert total == len(conversations)
    first = [next(m["content"] for m in row["messages"] if m["role"] == "user") for row in data.train]
    held = [next(m["content"] for m in row["messages"] if m["role"] == "user") for row in data.validation]
    assert not {" ".join(text.casefold().split()) for text in first} & {" ".join(t.casefold().split()) for t in held}
