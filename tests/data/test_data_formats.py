"""Which format is recognised, which is not, and what bad and useless rows lead to."""

import pytest
from chat_families import assistant, system, user

from forge import ConflictError, ForgeError, UnknownNameError
from forge.data import prepare_dataset, question_and_reference
from forge.data.formats import FORMATS, find_layout
from forge.errors import UnsupportedError
from support.tokenizer import tiny_tokenizer

CHAT = [user("a"), assistant("b")]
SHARE = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
TABLE = [
    ({"messages": CHAT}, "messages"),
    ({"conversations": CHAT, "id": 7}, "messages"),
    ({"chat": CHAT}, "messages"),
    ({"messages": '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'}, "messages"),
    ({"messages": CHAT, "text": "rendered", "source": "x"}, "messages"),
    ({"messages": CHAT, "prompt": "a"}, "messages"),
    ({"conversations": SHARE}, "sharegpt"),
    ({"messages": SHARE}, "sharegpt"),
    ({"instruction": "a", "output": "b"}, "alpaca"),
    ({"instruction": "a", "input": "c", "output": "b"}, "alpaca"),
    ({"instruction": "a", "input": "", "output": "b", "text": "rendered"}, "alpaca"),
    ({"instruction": "a", "context": "c", "response": "b", "category": "x"}, "alpaca"),
    ({"system": "s", "instruction": "a", "output": "b"}, "alpaca"),
    ({"prompt": "a", "completion": "b"}, "prompt-completion"),
    ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "prompt-completion"),
    ({"prompt": CHAT[:1], "completion": "b"}, "prompt-completion"),
    ({"question": "a", "answer": "b"}, "prompt-completion"),
    ({"prompt": "a", "response": "b"}, "prompt-completion"),
    ({"input": "a", "output": "b"}, "prompt-completion"),
    ({"prompt": "a", "completion": "b", "answer": "c"}, "prompt-completion"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
    ({"question": "a", "chosen": "b", "rejected": "c"}, "preference"),
    ({"chosen": CHAT, "rejected": [user("a"), assistant("c")]}, "preference"),
    ({"prompt": "a", "chosen": CHAT, "rejected": [user("a"), assistant("c")]}, "preference"),
    ({"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": [assistant("c")]}, "preference"),
    ({"text": "a b"}, "text"),
    ({"text": "a b", "id": 3, "answer": 4}, "text"),
]
FITTING_NONE = [
    {"foo": "a"},
    {"question": "a", "answer": 42},
    {"prompt": "a"},
    {"text": 3},
    {"text": ["a"]},
    {"messages": "hello"},
    {"messages": [{"speaker": "x", "line": "y"}]},
    {"chosen": "a"},
]
AMBIGUOUS = [
    {"messages": CHAT, "prompt": "a", "completion": "b"},
    {"messages": CHAT, "chosen": CHAT, "rejected": SHARE},
    {"messages": CHAT, "conversations": SHARE},
    {"instruction": "a", "output": "b", "prompt": "a", "completion": "b"},
]


@pytest.mark.parametrize(("row", "expected"), TABLE, ids=[f"{'+'.join(row)}->{name}" for row, name in TABLE])
def test_recognised(row, expected):
    data = prepare_dataset([row, {**row, "unused": 1}], tiny_tokenizer())
    assert data.report.format == expected
    assert len(data.train) == 1  # the second says the same
    again = prepare_dataset([row], tiny_tokenizer(), format=expected)
    assert again.train[0] == data.train[0]
    assert (question_and_reference(row) is None) == (expected == "text")


@pytest.mark.parametrize("row", FITTING_NONE, ids="+".join)
def test_unknown_columns_say_what_each_format_needs(row):
    with pytest.raises(ConflictError) as caught:
        prepare_dataset([row], tiny_tokenizer())
    said = str(caught.value)
    assert all(column in said for column in row)
    assert all(f"\n  {name}: " in said for name in FORMATS)
    assert "rename_column" in said
    assert "format=" in said


@pytest.mark.parametrize("row", AMBIGUOUS, ids="+".join)
def test_ambiguous_columns_are_not_guessed(row):
    with pytest.raises(ConflictError, match=r"more than one way: .*Columns found: .*format="):
        prepare_dataset([row], tiny_tokenizer())


def test_two_columns_for_one_field():
    with pytest.raises(ConflictError, match=r"question, query could each be the prompt.*rename_column"):
        prepare_dataset([{"question": "a", "query": "b", "answer": "c"}], tiny_tokenizer())


def test_naming_the_format_settles_it():
    row = {"messages": CHAT, "prompt": "x", "completion": "y"}
    assert "messages" in prepare_dataset([row], tiny_tokenizer(), format="messages").train.column_names
    assert prepare_dataset([row], tiny_tokenizer(), format="prompt-completion").train[0]["completion"] == [
        assistant("y")
    ]
    with pytest.raises(ConflictError, match=r"format='alpaca' needs text columns instruction and output"):
        prepare_dataset([row], tiny_tokenizer(), format="alpaca")
    with pytest.raises(UnknownNameError, match="Did you mean 'alpaca'"):
        prepare_dataset([row], tiny_tokenizer(), format="alpacca")


def test_the_first_value_that_fits_decides():
    """A broken or empty first row does not hide the format; the row itself is told by number."""
    assert find_layout(["messages"], {"messages": [3, CHAT]}).format == "messages"
    with pytest.raises(ForgeError, match="row 0, messages: int 3"):
        prepare_dataset([{"messages": 3}, {"messages": CHAT}], tiny_tokenizer())


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [user("a"), "b"]}, "messages[1]: str 'b', where an object with role and content belongs"),
        ({"messages": [user("a"), {"content": "b"}]}, "messages[1].role: missing; the message has content"),
        ({"messages": [user("a"), {"role": "alien", "content": "b"}]}, "messages[1].role: 'alien' is no role"),
        ({"messages": [user("a"), {"role": "assistant", "content": 5}]}, "messages[1].content: int 5"),
        ({"messages": [user("a"), {"role": "assistant", "content": None}]}, "messages[1].content: missing"),
        (
            {"messages": [user("a"), {"role": "assistant", "content": [{"type": "image", "url": "x"}]}]},
            "messages[1].content: holds parts of the type image",
        ),
        ({"messages": {"role": "user"}}, "messages: dict"),
        ({"messages": "[broken"}, "messages: text that begins like JSON and is none"),
        ({"messages": [*CHAT, assistant("c")], "tools": 3}, "tools: int 3"),
        ({"messages": [*CHAT, assistant("c")], "chat_template_kwargs": ["x"]}, "chat_template_kwargs: list"),
    ],
)
def test_broken_rows_are_named_with_their_field(row, said):
    rows = [{"messages": CHAT}, {"messages": [*CHAT, user("x"), assistant("y")]}, row]
    with pytest.raises(ForgeError) as caught:
        prepare_dataset(rows, tiny_tokenizer())
    assert f"row 2, {said}" in str(caught.value)
    assert "1 of the 3 rows" in str(caught.value)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": [assistant("c")]}, "rejected: list"),
        ({"prompt": "a", "chosen": 5, "rejected": "c"}, "chosen: int 5"),
        ({"prompt": [user("a")], "chosen": [user("b")], "rejected": [assistant("c")]}, "chosen[0].role: 'user'"),
        ({"prompt": None, "chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]}, "no prompt"),
    ],
)
def test_broken_preferences(row, said):
    with pytest.raises(ForgeError) as caught:
        prepare_dataset([{"prompt": "a", "chosen": "b", "rejected": "c"}, row], tiny_tokenizer())
    assert "row 1, " in str(caught.value)
    assert said in str(caught.value)


def test_five_broken_rows_are_shown_with_the_total():
    with pytest.raises(ForgeError) as caught:
        prepare_dataset([{"messages": CHAT}] + [{"messages": number} for number in range(12)], tiny_tokenizer())
    said = str(caught.value)
    assert "12 of the 13 rows" in said
    assert "the first 5 of 12" in said
    assert said.count("\n  row ") == 5


def test_useless_rows_are_dropped_with_their_reason():
    rows = [
        {"messages": CHAT},
        {"messages": []},
        {"messages": None},
        {"messages": [user("a")]},
        {"messages": [user("a"), assistant(" \n")]},
        {"messages": CHAT},
        {"messages": [user("A"), assistant("b")]},
        {"messages": [user("a"), assistant("c"), user("thanks")]},
    ]
    data = prepare_dataset(rows, tiny_tokenizer())
    assert data.report.train.dropped == {
        "empty row": [1, 2],
        "no assistant message": [3],
        "empty answer": [4],
        "exact duplicate of an earlier row": [5],
    }
    assert (data.report.train.rows_in, data.report.train.rows_out, len(data.train)) == (8, 3, 3)
    assert data.train[2]["messages"] == [user("a"), assistant("c")]
    assert "1 conversations end with messages that nobody answers" in " ".join(data.report.notes)


def test_useless_preferences_and_pairs():
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        {"prompt": "a", "chosen": "", "rejected": "b"},
        {"prompt": " ", "chosen": "x", "rejected": "b"},
        {"prompt": None, "chosen": None, "rejected": None},
    ]
    dropped = prepare_dataset(rows, tiny_tokenizer()).report.train.dropped
    assert dropped == {
        "chosen and rejected are the same": [1],
        "empty answer": [2],
        "empty prompt": [3],
        "empty row": [4],
    }
    pairs = [{"question": "a", "answer": "b"}, {"question": "a", "answer": None}, {"question": None, "answer": "b"}]
    assert prepare_dataset(pairs, tiny_tokenizer()).report.train.dropped == {"empty answer": [1], "empty prompt": [2]}
    with pytest.raises(ForgeError, match=r"Nothing of train is left .*empty answer: 1"):
        prepare_dataset([{"question": "a", "answer": " "}], tiny_tokenizer())


def test_texts_become_messages_where_there_is_a_template():
    row = {"instruction": "Add", "input": "1, 2", "output": "3", "system": "Be brief."}
    data = prepare_dataset([row], tiny_tokenizer())
    assert data.train[0]["prompt"] == [system("Be brief."), user("Add\n\n1, 2")]
    assert data.train[0]["completion"] == [assistant("3")]
    assert question_and_reference(data.train[0]) == ([system("Be brief."), user("Add\n\n1, 2")], "3")
    plain = tiny_tokenizer(chat_template=None)
    data = prepare_dataset([row], plain)
    assert (data.train[0]["prompt"], data.train[0]["completion"]) == ("Be brief.\n\nAdd\n\n1, 2", "3")
    assert plain.decode(data.train[0]["input_ids"]) == "Be brief.\n\nAdd\n\n1, 23<|im_end|>"
    learnt = [label for label in data.train[0]["labels"] if label != -100]
    assert plain.decode(learnt) == "3<|im_end|>"
    assert "no chat template" in " ".join(data.report.notes)
    with pytest.raises(UnsupportedError, match=r"Row 0 holds messages.*tokenizer\.chat_template"):
        prepare_dataset([{"messages": CHAT}], plain)


def test_rendered_prompts_are_taken_as_they_are():
    tokenizer = tiny_tokenizer()
    rendered = {"prompt": "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", "completion": "b"}
    data = prepare_dataset([rendered], tokenizer)
    assert data.train[0]["input_ids"] == prepare_dataset([{"messages": CHAT}], tokenizer).train[0]["input_ids"][:-1]
    assert tokenizer.decode([x for x in data.train[0]["labels"] if x != -100]) == "b<|im_end|>"
    assert "taken as they are" in " ".join(data.report.notes)
    with pytest.raises(ConflictError, match=r"1 of the 2 prompts .*\(rows 1\)"):
        prepare_dataset([{"prompt": "plain", "completion": "x"}, rendered], tokenizer)


def test_text_ends_once_and_begins_once(tokenizer):
    rows = [{"text": "abc"}, {"text": "abd<|im_end|>"}, {"text": "<|im_start|>abe<|im_end|>\n"}]
    data = prepare_dataset(rows, tokenizer)
    texts = [tokenizer.decode(row["input_ids"]) for row in data.train]
    assert texts == ["abc<|im_end|>", "abd<|im_end|>", "<|im_start|>abe<|im_end|>\n"]
    for row in data.train:
        assert row["labels"] == [-100, *row["input_ids"][1:]]  # nothing comes before the first


def test_a_tokenizer_that_writes_its_own_beginning():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer(chat_template=None)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    data = prepare_dataset([{"text": "abc"}, {"text": "<|im_start|>abd"}], tokenizer)
    assert [tokenizer.decode(row["input_ids"]) for row in data.train] == [
        "<|im_start|>abc<|im_end|>",
        "<|im_start|>abd<|im_end|>",
    ]
    pair = prepare_dataset([{"prompt": "ab", "completion": "c"}], tokenizer).train[0]
    assert tokenizer.decode(pair["input_ids"]) == "<|im_start|>abc<|im_end|>"
    assert [label != -100 for label in pair["labels"]] == [False] * 3 + [True] * 2


def test_lists_of_parts_are_text():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    data = prepare_dataset([{"messages": [{"role": "user", "content": parts}, assistant("c")]}], tiny_tokenizer())
    assert data.train[0]["messages"][0] == user("ab")


def test_implicit_prompts_of_text_end_with_a_word():
    rows = [{"chosen": "Q: two? A: thirty", "rejected": "Q: two? A: three"}]
    row = prepare_dataset(rows, tiny_tokenizer()).train[0]
    assert (row["prompt"], row["chosen"], row["rejected"]) == ("Q: two? A:", " thirty", " three")


def test_arguments_of_all_kinds_survive():
    """Arrow has no type for a column whose values differ; the conversation is then kept as JSON."""
    calls = [{"function": {"name": "f", "arguments": {"x": value}}} for value in (1, "one", [1])]
    rows = [
        {"messages": [user(str(i)), {"role": "assistant", "content": "", "tool_calls": [call]}, assistant("done")]}
        for i, call in enumerate(calls)
    ]
    data = prepare_dataset(rows, tiny_tokenizer())
    for row, call in zip(data.train, calls, strict=True):
        prompt, reference = question_and_reference(row)
        assert (prompt[1]["tool_calls"], reference) == ([call], "done")
