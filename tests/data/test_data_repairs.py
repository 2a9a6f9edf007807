"""What went wrong silently once: other people's words learnt, words lost, questions on both sides, columns shifted."""

import json

import pytest
from chat_families import assistant, bundled, family_of, learnt_text, own, system, user, with_template

from forge import ConflictError, ForgeError
from forge.data import encode_prompt, prepare_dataset, preview, question_and_reference
from support.tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
BUNDLED = bundled()
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOLS = [
    user("Will it rain?"),
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": "TOOLRESULT"},
    assistant("It will."),
    user("Thanks"),
    assistant("Welcome."),
]


def learnt(tokenizer, messages, **columns):
    data = prepare_dataset([{"messages": messages, **columns}], tokenizer)
    row = data.train[0]
    return learnt_text(tokenizer, row["input_ids"], row["labels"]), data.report


@pytest.mark.parametrize("name", sorted(BUNDLED))
def test_nobody_elses_words_are_learnt(name):
    """Results of tools, questions and system messages are not, whatever the template makes of them."""
    tokenizer = with_template(BUNDLED[name], family_of(name))
    for messages in (TOOLS, [user("QUESTION1"), assistant("b"), system("MIDDLE"), user("QUESTION2"), assistant("d")]):
        try:
            said, report = learnt(tokenizer, messages)
        except ForgeError:
            continue  # refused, with a reason: another test's matter
        text = "".join(said)
        assert not any(word in text for word in ("TOOLRESULT", "QUESTION", "MIDDLE", "rain?", "Thanks")), said
        assert len(said) + sum("only context" in note for note in report.notes) >= 1
        assert not any("assistant" in part.lower() for part in said), said


@pytest.mark.skipif("qwen2_5" not in BUNDLED, reason="this TRL ships no templates")
def test_calls_of_tools_are_learnt_where_the_template_writes_them():
    said, report = learnt(with_template(BUNDLED["qwen2_5"], "qwen"), TOOLS)
    assert ["weather" in part for part in said] == [True, False, False]
    assert report.warnings == ()


def test_what_the_template_does_not_write_is_not_learnt_and_said():
    said, report = learnt(own("smollm2"), TOOLS[:2] + TOOLS[3:])
    assert said == ["It will.<|im_end|>", "Welcome.<|im_end|>"]
    assert any("does not write all that is said in 1 row" in warning for warning in report.warnings)


@pytest.mark.skipif("qwen2_5" not in BUNDLED, reason="this TRL ships no templates")
def test_arguments_that_are_json_text_are_not_written_as_a_string():
    tokenizer = with_template(BUNDLED["qwen2_5"], "qwen")
    text = {"type": "function", "function": {"name": "weather", "arguments": json.dumps({"city": "Oslo"})}}
    messages = [TOOLS[0], {"role": "assistant", "content": "", "tool_calls": [text]}]
    assert learnt(tokenizer, messages)[0] == learnt(tokenizer, TOOLS[:2])[0]
    assert '{"city": "Oslo"}' in learnt(tokenizer, messages)[0][0]


@pytest.mark.parametrize("off", [{"weight": 0}, {"train": False}, {"training": False}])
@pytest.mark.parametrize("marked", [True, False])
def test_answers_without_weight_are_context(off, marked):
    tokenizer = TOKENIZER if marked else own("smollm2")
    messages = [user("q"), {**assistant("BAD"), **off}, user("r"), {**assistant("good"), **dict.fromkeys(off, 1)}]
    said, report = learnt(tokenizer, messages)
    assert said == ["good<|im_end|>"]
    assert any("1 answers are only context" in note for note in report.notes)
    with pytest.raises(ForgeError, match=r"messages\[1\]\.weight: str 'no', where 0 or 1"):
        prepare_dataset([{"messages": [user("q"), {**assistant("a"), "weight": "no"}]}], tokenizer)


def test_a_prompt_that_mentions_a_control_token_is_no_rendered_prompt():
    rows = [{"prompt": f"What does <|im_end|> mean, {i}?", "completion": "It ends a turn."} for i in range(3)]
    tokenizer = own("smollm2")
    data = prepare_dataset([*rows, {"prompt": "Plain?", "completion": "Yes."}], tokenizer)
    assert all("<|im_start|>user" in tokenizer.decode(row["input_ids"]) for row in data.train)
    assert "<|im_start|>user" in str(preview(rows[0], tokenizer))


def test_rendered_training_rows_and_plain_validation_rows_are_refused():
    rendered = [
        {"prompt": f"<|im_start|>user\nQ{i}<|im_end|>\n<|im_start|>assistant\n", "completion": "a"} for i in "ab"
    ]
    plain = [{"prompt": "Q9", "completion": "c"}]
    for train, validation in ((rendered, plain), (plain, rendered)):
        with pytest.raises(ConflictError, match="the other way round"):
            prepare_dataset(train, own("smollm2"), validation=validation)


def test_a_header_that_swallows_white_space_is_not_learnt():
    from tokenizers import AddedToken

    tokenizer = tiny_tokenizer(
        chat_template="{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    )
    tokens = [AddedToken(text, rstrip=True, special=True) for text in ("<|user|>", "<|assistant|>", "<|end|>")]
    tokenizer.add_tokens(tokens, special_tokens=True)
    data = prepare_dataset([{"messages": [user("q"), assistant("\nHello")]}], tokenizer)
    row = data.train[0]
    assert tokenizer.convert_tokens_to_ids("<|assistant|>") not in row["labels"]
    assert "Hello" in tokenizer.decode([label for label in row["labels"] if label != -100])


def test_a_question_of_text_beside_conversations_that_go_on_is_kept():
    shared = [assistant("A"), user("more")]
    row = {"prompt": "Hi", "chosen": [*shared, assistant("B")], "rejected": [*shared, assistant("C")]}
    assert prepare_dataset([row], TOKENIZER).train[0]["prompt"] == [user("Hi"), *shared]
    whole = [user("Hi"), assistant("A"), user("more")]
    again = {"prompt": "Hi", "chosen": [*whole, assistant("B")], "rejected": [*whole, assistant("C")]}
    assert prepare_dataset([again], TOKENIZER).train[0]["prompt"] == whole
    with pytest.raises(ForgeError, match="row 0, prompt: str 'Ho', while the conversations begin with str 'Hi'"):
        prepare_dataset([{**again, "prompt": "Ho"}], TOKENIZER)


def questions_apart(data, read):
    return not {read(row) for row in data.train} & {read(row) for row in data.validation}


def test_a_greeting_before_the_question_leaks_nothing():
    greeting = assistant("Hello! How can I help?")
    rows = [{"messages": [greeting, user(f"q{i}"), assistant(f"a{i}{j}")]} for i in range(60) for j in range(3)]
    data = prepare_dataset(rows, own("phi4"), validation=0.2)
    assert questions_apart(data, lambda row: row["messages"][1]["content"])


def test_dialogues_in_text_leak_nothing():
    rows = [
        {"chosen": f"\n\nHuman: q{i}?\n\nAssistant: {good}", "rejected": f"\n\nHuman: q{i}?\n\nAssistant: {bad}"}
        for i in range(40)
        for good, bad in (("It is good", "It is bad"), ("Yes", "No"))
    ]
    data = prepare_dataset(rows, TOKENIZER, validation=0.2)
    assert questions_apart(data, lambda row: row["prompt"].split("\n\nAssistant:")[0])


@pytest.mark.parametrize("tokenizer", [TOKENIZER, tiny_tokenizer(chat_template=None)], ids=["chat", "text"])
def test_documents_in_the_system_prompt_are_what_is_asked_about(tokenizer):
    rows = [
        {"system": f"Document {i}", "prompt": f"Summarise.{i % 2}", "completion": f"Summary {i}"} for i in range(40)
    ]
    data = prepare_dataset(rows, tokenizer, validation=8)
    assert len(data.validation) == 8
    given = prepare_dataset(rows[:30], tokenizer, validation=rows[30:])
    assert given.report.leakage == ()


def test_advice_on_length_knows_the_rows_of_which_nothing_is_left():
    rows = [{"prompt": "q" * (10 * i), "completion": "a"} for i in range(1, 30)]
    report = prepare_dataset(rows, TOKENIZER, max_length=120).report
    assert report.train.rows_out < 29
    assert report.max_length_keeping_99_percent > 250
    assert report.train.truncated_rows >= 29 - report.train.rows_out
    assert report.train.lengths.max > 290


@pytest.mark.skipif("qwen2_5" not in BUNDLED, reason="this TRL ships no templates")
def test_arguments_of_calls_come_back_as_they_were():
    tokenizer = with_template(BUNDLED["qwen2_5"], "qwen")
    rows = [
        {
            "messages": [
                user("a"),
                {**TOOLS[1], "tool_calls": [{"function": {"name": "f", "arguments": {"x": x}}}]},
                *rest,
            ]
        }
        for x in (1, 1.5)
        for rest in [[{"role": "tool", "content": "r"}, assistant("done")]]
    ]
    for row in prepare_dataset(rows, tokenizer).train:
        prompt, reference = question_and_reference(row)
        ids = encode_prompt(tokenizer, prompt)
        assert row["input_ids"][: len(ids)] == ids
        assert reference == "done"


@pytest.mark.parametrize(
    ("text", "line"),
    [("prompt,completion\nq,a,more\n", "line 2: 3 fields"), ("prompt,completion\nq,a\n\nq\n", "line 4: 1 field under")],
)
def test_csv_columns_do_not_shift(tmp_path, text, line):
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(ForgeError, match=line):
        prepare_dataset(path, TOKENIZER)


def test_csv_with_line_ends_and_separators_in_quotes(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbfprompt,completion\r\n"one, two\nthree","007"\r\n')
    row = prepare_dataset(path, tiny_tokenizer(chat_template=None)).train[0]
    assert (row["prompt"], row["completion"]) == ("one, two\nthree", "007")


def test_a_transform_makes_the_rows():
    from datasets import Dataset

    plain = Dataset.from_list([{"prompt": "q", "completion": "a"}])
    made = plain.with_transform(lambda batch: {**batch, "prompt": [f"SYS {text}" for text in batch["prompt"]]})
    assert prepare_dataset(made, TOKENIZER).train[0]["prompt"][0]["content"] == "SYS q"


@pytest.mark.parametrize("change", [{"max_length": 3.0}, {"max_length": "10"}, {"tokenizer": "an-id"}])
def test_what_people_type(change):
    options = {"tokenizer": TOKENIZER, **change}
    with pytest.raises(ConflictError):
        prepare_dataset([{"prompt": "q", "completion": "a"}], options.pop("tokenizer"), **options)
