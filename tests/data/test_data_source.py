"""Where data sets come from, and what is said when they do not."""

import csv
import json

import datasets
import pytest
from chat_families import assistant, user

from forge import ConflictError, ForgeError
from forge.data import prepare_dataset
from forge.data.messages import read_messages
from forge.errors import UnsupportedError
from support.tokenizer import tiny_tokenizer

ROWS = [{"messages": [user(f"{n}?"), assistant(f"{n}!")]} for n in range(6)]
PAIRS = [{"question": f"{n}?", "answer": f"00{n}"} for n in range(6)]


def ids(data):
    return [row["input_ids"] for row in data.train]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_all_sources_are_the_same(tmp_path):
    tokenizer = tiny_tokenizer()
    expected = ids(prepare_dataset(ROWS, tokenizer))
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "rows.parquet")
    write_lines(tmp_path / "rows.jsonl", ROWS)
    write_lines(tmp_path / "lines.json", ROWS)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS), encoding="utf-8")
    (tmp_path / "inside.json").write_text("\ufeff" + json.dumps({"version": 1, "data": ROWS}), encoding="utf-8")
    sources = [table, table.with_format("numpy"), datasets.DatasetDict(train=table), tmp_path / "saved"]
    sources += [
        str(tmp_path / name) for name in ("rows.parquet", "rows.jsonl", "lines.json", "rows.json", "inside.json")
    ]
    for source in sources:
        assert ids(prepare_dataset(source, tokenizer)) == expected


@pytest.mark.parametrize(("name", "separator"), [("rows.csv", ","), ("rows.tsv", "\t")])
def test_tables_of_text_stay_text(tmp_path, name, separator):
    """Numbers keep their zeros, "NA" is an answer, empty is empty."""
    path = tmp_path / name
    rows = [*PAIRS, {"question": "missing?", "answer": "NA"}, {"question": "empty?", "answer": ""}]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["question", "answer"], delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
    data = prepare_dataset(path, tiny_tokenizer())
    assert [row["completion"][0]["content"] for row in data.train] == [f"00{n}" for n in range(6)] + ["NA"]
    assert data.report.train.dropped == {"empty answer": [7]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"text": "a"}\n{"text": "b"\n', "line 2: no JSON: Expecting ',' delimiter at column"),
        ('{"text": "a"}\n\n[1]\n', "line 3: list [1], where an object"),
        ('{"text": "a"}\nplain\n', "line 2: no JSON: Expecting value at column 1: 'plain'"),
    ],
)
def test_bad_lines_are_named(tmp_path, text, said):
    path = tmp_path / "bad.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ForgeError) as caught:
        prepare_dataset(path, tiny_tokenizer())
    assert f"{path}, {said}" in str(caught.value)


def test_types_that_differ_from_line_to_line(tmp_path):
    """`datasets` gives up on such a file; what does not fit is named, what does is used."""
    rows = [{"question": "a", "answer": "b", "meta": 1}, {"question": "c", "answer": 7, "meta": {"x": []}}]
    path = write_lines(tmp_path / "mixed.jsonl", rows)
    with pytest.raises(ForgeError, match="row 1, answer: int 7, where text belongs"):
        prepare_dataset(path, tiny_tokenizer())
    write_lines(path, [rows[0], {**rows[1], "answer": "7"}])
    assert len(prepare_dataset(path, tiny_tokenizer()).train) == 2


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", b'{"a": [', "line 1: no JSON"),
        ("a.json", b'"text"', "where a list of objects belongs"),
        ("a.json", b'[{"a": 1}, 3]', "entry 1 is int 3"),
        ("a.json", b'{"a": [{"x": 1}], "b": [{"x": 1}]}', "several lists of objects: a, b"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "line 2: byte 0xff is not UTF-8"),
        ("a.csv", b"text\n\xff", "line 2: byte 0xff is not UTF-8"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", "line 3: 3 fields under a header of 2"),
        ("a.csv", b"", "has no rows"),
        ("a.parquet", b"PAR2", "not a Parquet file"),
        ("a.txt", b"hello", "known are .jsonl"),
        ("a.jsonl", b"\n", "has no rows"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ForgeError) as caught:
        prepare_dataset(path, tiny_tokenizer())
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_files_and_ids(tmp_path):
    with pytest.raises(ForgeError, match=r"no file .*looked for .*nowhere\.jsonl"):
        prepare_dataset(tmp_path / "nowhere.jsonl", tiny_tokenizer())
    with pytest.raises(ForgeError, match=r"no file 'train\.csv'"):
        prepare_dataset("train.csv", tiny_tokenizer())
    with pytest.raises(ForgeError, match=r"neither a file \(looked for .*owner/name\) nor .* hub id: "):
        prepare_dataset("owner/name", tiny_tokenizer())
    (tmp_path / "notes.md").write_text("x", encoding="utf-8")
    with pytest.raises(ForgeError, match=r"not written by save_to_disk; it holds notes\.md"):
        prepare_dataset(tmp_path, tiny_tokenizer())


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ([], "dataset has no rows"),
        (datasets.Dataset.from_list([]), "dataset has no rows"),
        ([{"text": "a"}, "b"], "row 1 is str 'b'"),
        ({"text": ["a"]}, "dataset is a dict"),
        (3, "dataset is a int"),
        (
            datasets.DatasetDict(dev=datasets.Dataset.from_list(ROWS)),
            r"splits dev and no split 'train'.*dataset\['dev'\]",
        ),
    ],
    ids=["empty list", "empty", "no dict", "dict", "number", "no train"],
)
def test_what_is_no_data_set(source, said):
    with pytest.raises(ForgeError, match=said):
        prepare_dataset(source, tiny_tokenizer())


def test_streams_are_refused():
    stream = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
    for source in (stream, datasets.IterableDatasetDict(train=stream)):
        with pytest.raises(UnsupportedError, match=r"is a stream .*from_list"):
            prepare_dataset(source, tiny_tokenizer())


def test_splits_of_a_dict():
    tokenizer = tiny_tokenizer()
    table = datasets.Dataset.from_list(ROWS)
    splits = datasets.DatasetDict(train=table, test=table.select(range(2)), extra=table.select(range(3)))
    data = prepare_dataset(splits, tokenizer)
    assert (len(data.train), len(data.validation)) == (4, 2)
    assert data.report.validation_from == "split 'test', 2 rows"
    data = prepare_dataset(splits, tokenizer, validation="extra")
    assert (len(data.train), len(data.validation)) == (3, 3)
    with pytest.raises(ConflictError, match=r"'extras' is neither a split .*\(it has test, extra\) nor a file"):
        prepare_dataset(splits, tokenizer, validation="extras")


def test_validation_from_a_file(tmp_path):
    path = write_lines(tmp_path / "dev.jsonl", ROWS[:1])
    data = prepare_dataset(ROWS, tiny_tokenizer(), validation=path)
    assert (len(data.train), len(data.validation), data.report.leakage) == (5, 1, (0,))


def test_rows_with_columns_that_arrow_filled():
    """What one row has, Arrow gives to all as nulls; templates would see keys that nobody wrote."""
    rows = [
        {"messages": [user("a"), assistant("b")]},
        {"messages": [user("c"), {**assistant("d"), "name": "bot", "tool_calls": None}]},
    ]
    tokenizer = tiny_tokenizer(
        chat_template="{% for m in messages %}{{ m | tojson }}"
        "{% if m.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    )
    data = prepare_dataset(datasets.Dataset.from_list(rows), tokenizer)
    assert "null" not in tokenizer.decode(data.train[0]["input_ids"])
    assert '"name": "bot"' in tokenizer.decode(data.train[1]["input_ids"])


def test_keys_that_hold_nothing_are_no_part_of_a_message():
    """Templates of older transformers see them, newer ones take them out. Inside a call they say something."""
    call = {"function": {"name": "f", "arguments": {"x": 1, "y": None}}}
    written = {"role": "assistant", "content": None, "name": None, "tool_calls": [call]}
    assert read_messages([written], "messages") == [{"role": "assistant", "content": "", "tool_calls": [call]}]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("\n", "is empty"),
        ('question,answer\nq,"never closed\nr,b\n', "row that begins in line 2: unexpected end of data"),
        ('question,answer\nq,a\n"Yes" he said,b\n', "row that begins in line 3: ',' expected after '\"'"),
        ("question,answer,answer\nq,a,b\n", "header names answer more than once"),
        ('question,answer\n"two\nlines",a\nq\n', "line 4: 1 field under"),
    ],
)
def test_tables_that_would_be_misread(tmp_path, text, said):
    path = tmp_path / "rows.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ForgeError) as caught:
        prepare_dataset(path, tiny_tokenizer())
    assert said in str(caught.value)


def test_a_field_as_long_as_a_book(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text("question\tanswer\nq\t" + "a" * 200_000 + "\n", encoding="utf-8")
    assert len(prepare_dataset(path, tiny_tokenizer()).train[0]["completion"][0]["content"]) == 200_000


def test_a_transform_makes_the_rows_of_a_split_too():
    table = datasets.Dataset.from_list(PAIRS).with_transform(
        lambda batch: {**batch, "question": [f"SYS {text}" for text in batch["question"]]}
    )
    data = prepare_dataset(datasets.DatasetDict(train=table, test=table.select([0])), tiny_tokenizer())
    assert all(row["prompt"][0]["content"].startswith("SYS ") for side in (data.train, data.validation) for row in side)
    assert len(data.validation) == 1


@pytest.mark.parametrize("listed", [False, True])
def test_pictures_are_not_decoded(listed):
    """These would fail if they were."""
    broken = {"bytes": b"no picture", "path": None}
    feature = datasets.Image()
    features = datasets.Features(
        question=datasets.Value("string"),
        answer=datasets.Value("string"),
        image=datasets.List(feature) if listed else feature,
    )
    rows = [{**row, "image": [broken] if listed else broken} for row in PAIRS]
    data = prepare_dataset(datasets.Dataset.from_list(rows, features=features), tiny_tokenizer())
    assert len(data.train) == 6
    assert "columns not used: image" in data.report.notes


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize(
    "row",
    [
        {"tools": [TOOL], "messages": ROWS[0]["messages"]},
        {"messages": ROWS[0]["messages"], "tools": [TOOL]},
        {"prompt": "q", "completion": "a", "tools": [TOOL]},
        {"tools": [TOOL], "prompt": ROWS[0]["messages"][:1], "completion": ROWS[0]["messages"][1:]},
        {"prompt": "q", "completion": "a", "facts": [{"x": 1}]},
    ],
)
def test_an_object_that_is_one_row(tmp_path, row):
    path = tmp_path / "row.json"
    path.write_text(json.dumps(row), encoding="utf-8")
    assert len(prepare_dataset(path, tiny_tokenizer()).train) == 1
    path.write_text(json.dumps({"text": "What this is", "rows": PAIRS}), encoding="utf-8")
    assert len(prepare_dataset(path, tiny_tokenizer()).train) == 6


HALF = "half \ud83d"


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"question": HALF, "answer": "a"}, "question"),
        ({"messages": [user("q"), assistant(HALF)]}, r"messages\[1\]\.content"),
        ({"messages": json.dumps([user("q"), assistant(HALF)])}, r"messages\[1\]\.content"),
        ({"prompt": "q", "chosen": "a", "rejected": HALF}, "rejected"),
        ({"text": HALF}, "text"),
        ({"question": "q", "answer": "a", "tools": [{**TOOL, "name": HALF}]}, r"tools\[0\]\.name"),
    ],
)
def test_half_characters_are_named(tmp_path, row, field):
    path = write_lines(tmp_path / "half.jsonl", [row])
    with pytest.raises(ForgeError, match=rf"row 0, {field}: holds half a character \(U\+D83D, character 5\)"):
        prepare_dataset(path, tiny_tokenizer())
