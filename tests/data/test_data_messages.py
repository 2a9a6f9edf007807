"""What a message may hold beside its role and its text: weights, calls, and nulls that are somebody's own."""

import json

import pytest
from chat_families import assistant, bundled, learnt_text, own, user, with_template

from forge import ForgeError
from forge.data import prepare_dataset
from forge.data.messages import BadValueError, read_messages

BUNDLED = bundled()
needs_templates = pytest.mark.skipif("qwen2_5" not in BUNDLED, reason="this TRL ships no templates")


def called(arguments, name="weather"):
    call = {"id": "call_0001", "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


@pytest.mark.parametrize(
    ("given", "weight"),
    [
        ({"weight": 1}, None),
        ({"weight": 1.0, "train": True}, None),
        ({"training": None}, None),
        ({"weight": 0}, 0),
        ({"weight": 1, "train": False}, 0),
    ],
)
def test_weights_become_one(given, weight):
    (message,) = read_messages([{**assistant("a"), **given}], "messages")
    assert message == ({**assistant("a"), "weight": weight} if weight is not None else assistant("a"))


@pytest.mark.parametrize("key", ["weight", "train", "training"])
@pytest.mark.parametrize("value", [0.5, -1, "yes", [1]])
def test_other_weights_are_refused(key, value):
    with pytest.raises(BadValueError, match=rf"messages\[0\]\.{key}: .* where 0 or 1"):
        read_messages([{**assistant("a"), key: value}], "messages")
    rows = [{"messages": [user("q"), assistant("a")]}, {"messages": [user("q"), {**assistant("a"), key: value}]}]
    with pytest.raises(ForgeError, match=rf"row 1, messages\[1\]\.{key}"):
        prepare_dataset(rows, own("smollm2"))


def test_a_row_of_which_every_answer_has_no_weight_is_left_out():
    rows = [{"messages": [user("q"), {**assistant("a"), "weight": 0}]}, {"messages": [user("r"), assistant("b")]}]
    assert prepare_dataset(rows, own("smollm2")).report.train.dropped == {"no answer that can be learnt": [0]}


def test_nulls_of_a_message_go_and_those_of_its_calls_stay():
    arguments = {"city": None, "days": [None, {"x": None}]}
    (message,) = read_messages([{**called(arguments), "refusal": None, "name": None}], "messages")
    assert message == {**called(arguments), "content": ""}


@needs_templates
@pytest.mark.parametrize("spelled", [lambda arguments: arguments, json.dumps], ids=["object", "text"])
def test_a_null_argument_is_learnt_as_it_was_said(spelled):
    tokenizer = with_template(BUNDLED["qwen2_5"], "qwen")
    schema = {"type": "object", "properties": {"city": {"type": "string", "default": None}}}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": schema}}]
    row = {"messages": [user("q"), called(spelled({"city": None}))], "tools": tools}
    found = prepare_dataset([row], tokenizer).train[0]
    assert learnt_text(tokenizer, found["input_ids"], found["labels"]) == [
        '<tool_call>\n{"name": "weather", "arguments": {"city": null}}\n</tool_call><|im_end|>'
    ]
    assert '"default": null' in tokenizer.decode(found["input_ids"])


@needs_templates
def test_nulls_that_arrow_adds_are_not_learnt():
    """A table gives every call the arguments of all calls."""
    from datasets import Dataset

    tokenizer = with_template(BUNDLED["qwen2_5"], "qwen")
    rows = [{"messages": [user(name), called({name: "x"})]} for name in ("city", "day")]
    data = prepare_dataset(Dataset.from_list(rows), tokenizer)
    for row, name in zip(data.train, ("city", "day"), strict=True):
        (said,) = learnt_text(tokenizer, row["input_ids"], row["labels"])
        assert json.dumps({name: "x"}) in said


@pytest.mark.parametrize("text", ["no JSON", "[1]", '"x"', ""])
def test_arguments_that_are_no_object_stay_text(text):
    assert read_messages([called(text)], "messages")[0]["tool_calls"] == called(text)["tool_calls"]
