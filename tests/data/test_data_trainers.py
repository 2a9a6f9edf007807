"""The labels that reach the model are the ones that were prepared, whoever trains."""

import json
from itertools import pairwise

import pytest
import torch
from chat_families import assistant, learnt_text, own, system, user, with_template
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq

from forge.data import encode_prompt, prepare_dataset, question_and_reference
from forge.errors import UnsupportedError
from support.models import text_model

CHATS = [
    {"messages": [user(f"What is {n}?"), assistant(f"It is {n * n}."), user("Sure?"), assistant("Yes" * n)]}
    for n in range(1, 9)
]
PAIRS = [{"question": f"What is {n}?", "answer": f"It is {n * n}."} for n in range(1, 9)]
TEXTS = [{"text": f"The square of {n} is {n * n}."} for n in range(1, 9)]


def rows_of(trainer):
    """ids -> labels of every row that the trainer's batches hold, padding taken off and packs taken apart."""
    found = {}
    for batch in trainer.get_train_dataloader():
        ids, labels = batch["input_ids"], batch["labels"]
        if "attention_mask" in batch:
            for row, said, mask in zip(ids, labels, batch["attention_mask"], strict=True):
                assert torch.all(said[mask == 0] == -100)
                found[tuple(row[mask == 1].tolist())] = said[mask == 1].tolist()
            continue
        starts = [*torch.nonzero(batch["position_ids"][0] == 0).flatten().tolist(), ids.shape[1]]
        for start, end in pairwise(starts):
            found[tuple(ids[0, start:end].tolist())] = labels[0, start:end].tolist()
    return found


def prepared(data, max_length=None):
    return {tuple(row["input_ids"][:max_length]): row["labels"][:max_length] for row in data.train}


@pytest.mark.parametrize("rows", [CHATS, PAIRS, TEXTS], ids=["chats", "pairs", "texts"])
@pytest.mark.parametrize("options", [{}, {"max_length": 100}, {"max_length": 256, "packing": True}])
def test_sft_trainer(make_trainer, tokenizer, rows, options):
    data = prepare_dataset(rows, tokenizer, validation=2)
    trainer = make_trainer(
        "sft",
        trainer_options={"train_dataset": data.train, "eval_dataset": data.validation},
        max_steps=1,
        **{"max_length": 1024, **options},
    )
    limit = options.get("max_length") if "packing" not in options else None
    assert rows_of(trainer) == prepared(data, limit)
    assert trainer.train().training_loss > 0
    assert trainer.evaluate()["eval_loss"] > 0


def test_sft_trainer_without_a_length(make_trainer, tokenizer):
    data = prepare_dataset(CHATS, tokenizer, max_length=90)
    trainer = make_trainer("sft", trainer_options={"train_dataset": data.train}, max_length=None)
    assert rows_of(trainer) == prepared(data)
    assert max(map(len, prepared(data))) == 90


@pytest.mark.parametrize("rows", [CHATS, PAIRS, TEXTS], ids=["chats", "pairs", "texts"])
def test_plain_trainer(make_trainer, tokenizer, rows):
    data = prepare_dataset(rows, tokenizer)
    for collator in (data.collator(), DataCollatorForSeq2Seq(tokenizer)):
        trainer = make_trainer(
            "plain", trainer_options={"train_dataset": data.train, "data_collator": collator}, max_steps=1
        )
        assert rows_of(trainer) == prepared(data)
        assert trainer.train().training_loss > 0


def test_trl_learns_the_same_where_it_can(make_trainer, tokenizer):
    """`assistant_only_loss` on the raw rows, with a template that has markers."""
    data = prepare_dataset(CHATS, tokenizer)
    raw = Dataset.from_list(CHATS)
    trainer = make_trainer("sft", trainer_options={"train_dataset": raw}, assistant_only_loss=True, max_length=512)
    assert rows_of(trainer) == prepared(data)


@pytest.mark.parametrize(
    "rows",
    [
        [
            {"prompt": [user(f"{n}?")], "chosen": [assistant("a" * n)], "rejected": [assistant("b")]}
            for n in range(1, 5)
        ],
        [{"question": f"{n}?", "chosen": "a" * n, "rejected": "b"} for n in range(1, 5)],
        [
            {"chosen": [user(f"{n}?"), assistant("a" * n)], "rejected": [user(f"{n}?"), assistant("b")]}
            for n in range(1, 5)
        ],
        [{"chosen": f"Q: {n}? A: right", "rejected": f"Q: {n}? A: rong"} for n in range(1, 5)],
    ],
    ids=["messages", "texts", "implicit messages", "implicit texts"],
)
def test_dpo_trainer(make_trainer, tokenizer, rows):
    """It takes the rows, and its lengths are those that were reported."""
    data = prepare_dataset(rows, tokenizer)
    assert data.train.column_names == ["prompt", "chosen", "rejected"]
    trainer = make_trainer("dpo", trainer_options={"train_dataset": data.train}, max_steps=1, max_length=512)
    longest = [
        len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in trainer.train_dataset
    ]
    assert (max(longest), sum(longest)) == (data.report.train.lengths.max, data.report.train.lengths.total)
    chosen = sum(len(row["chosen_ids"]) for row in trainer.train_dataset)
    assert data.report.train.supervised_tokens == chosen
    assert trainer.train().training_loss > 0
    assert question_and_reference(data.train[0])[1].strip() in ("a", "right")
    with pytest.raises(UnsupportedError, match="DPOTrainer"):
        data.collator()


def test_a_tokenizer_without_padding(make_trainer):
    """Padding with the end token: the end token that is part of an answer is learnt all the same."""
    tokenizer = own("mistral")
    data = prepare_dataset(PAIRS, tokenizer)
    assert tokenizer.pad_token is None
    model = text_model()
    model.resize_token_embeddings(len(tokenizer))
    trainer = make_trainer(
        "sft", model, trainer_options={"train_dataset": data.train, "processing_class": tokenizer}, max_length=512
    )
    assert rows_of(trainer) == prepared(data)
    for ids, labels in rows_of(trainer).items():
        assert learnt_text(tokenizer, ids, labels)[0].endswith("</s>")


def test_tools_and_template_options_reach_the_template():
    template = (
        "{% if tools %}{{ '<|im_start|>tools\\n' + tools | tojson + '<|im_end|>\\n' }}{% endif %}"
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}"
        "{{ message['content'] + (mood if mood is defined and message['role'] == 'user' else '') + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    tokenizer = with_template(template)
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    rows = [
        {
            "messages": [
                system("s"),
                user("1+1?"),
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "2", "name": "add"},
                assistant("two"),
            ],
            "tools": [tool],
            "chat_template_kwargs": {"mood": " (angry)"},
        },
        {"messages": [user("hi"), assistant("ho")], "tools": None, "chat_template_kwargs": None},
    ]
    data = prepare_dataset(rows, tokenizer)
    first = data.train[0]
    text = tokenizer.decode(first["input_ids"])
    assert '"name": "add"' in text
    assert "1+1? (angry)" in text
    said = learnt_text(tokenizer, first["input_ids"], first["labels"])
    assert said[0].endswith('"arguments": {"a": 1}}}]<|im_end|>')
    assert said[1] == "two<|im_end|>"
    assert "tools" not in tokenizer.decode(data.train[1]["input_ids"])
    prompt, reference = question_and_reference(first)
    assert (len(prompt), reference) == (4, "two")
    assert prompt[2]["tool_calls"] == [call]


def test_dpo_trainer_writes_no_second_end_after_rendered_texts(make_trainer, tokenizer):
    asked = "<|im_start|>user\n{}?<|im_end|>\n<|im_start|>assistant\n"
    rows = [
        {"prompt": asked.format(n), "chosen": f"good {n}<|im_end|>\n", "rejected": "bad<|im_end|> \n"} for n in range(4)
    ]
    data = prepare_dataset(rows, tokenizer)
    trainer = make_trainer("dpo", trainer_options={"train_dataset": data.train}, max_steps=1, max_length=512)
    for number, row in enumerate(trainer.train_dataset):
        assert tokenizer.decode(row["chosen_ids"]) == f"good {number}<|im_end|>"
        assert tokenizer.decode(row["rejected_ids"]) == "bad<|im_end|>"
        ids = [token.id for token in data.preview(number).parts["chosen"]]
        assert ids == row["prompt_ids"] + row["chosen_ids"]
    assert data.report.train.supervised_tokens == sum(len(row["chosen_ids"]) for row in trainer.train_dataset)


CALLING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
    "{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def calling(**arguments):
    return [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]


@pytest.mark.parametrize("others", [{"x": 1.5}, {"x": 2**70}, {"x": "one"}, {"y": 1}])
def test_arguments_of_every_type_are_what_was_said(others):
    """A column of objects would make 1.0 of 1, and cannot hold the rest."""
    tokenizer = with_template(CALLING)
    rows = [
        {"messages": [user("a"), *calling(x=1), {"role": "tool", "content": "r"}, assistant("done")]},
        {"messages": [user("b"), *calling(**others), {"role": "tool", "content": "r"}, assistant("done")]},
    ]
    for row in prepare_dataset(rows, tokenizer).train:
        prompt, reference = question_and_reference(row)
        ids = encode_prompt(tokenizer, prompt)
        assert (row["input_ids"][: len(ids)], reference) == (ids, "done")


@pytest.mark.parametrize("others", [{"x": 1.5}, {"x": 2**70}, {"x": "one"}, {"y": 1}])
def test_preferences_whose_calls_arrow_would_change_are_refused(others):
    tokenizer = with_template(CALLING)
    rows = [
        {"prompt": [user("a")], "chosen": calling(x=1), "rejected": [assistant("no")]},
        {"prompt": [user("b")], "chosen": calling(**others), "rejected": [assistant("no")]},
    ]
    assert len(prepare_dataset(rows[:1], tokenizer).train) == 1
    with pytest.raises(UnsupportedError, match=r"no type in common.*render both sides to text"):
        prepare_dataset(rows, tokenizer)


def test_options_of_templates_of_every_type():
    rows = [
        {**row, "chat_template_kwargs": {"mood": mood}}
        for row, mood in zip(PAIRS, (1, 1.5, "sad", 2**70), strict=False)
    ]
    assert len(prepare_dataset(rows, with_template(CALLING)).train) == 4
    rows = [{"prompt": row["question"], "chosen": "a", "rejected": "b", **row} for row in rows]
    for row in rows:
        del row["question"], row["answer"]
    with pytest.raises(UnsupportedError, match="chat_template_kwargs"):
        prepare_dataset(rows, with_template(CALLING))


@pytest.mark.parametrize(
    ("others", "listed"), [((1, 2), True), ((1, 2**70), False), ((1, 1.5), False), ((1, [2]), False)]
)
def test_other_keys_of_messages_come_back_as_they_were(others, listed):
    rows = [{"messages": [{**user(f"q{n}"), "turn": turn}, assistant("a")]} for n, turn in enumerate(others)]
    found = prepare_dataset(rows, with_template(CALLING)).train["messages"]
    assert all(isinstance(messages, list) == listed for messages in found)
    read = [messages if listed else json.loads(messages) for messages in found]
    assert [messages[0]["turn"] for messages in read] == list(others)
    assert [type(messages[0]["turn"]) for messages in read] == [type(turn) for turn in others]
