"""No question is on both sides, and the sides do not depend on chance, order or repetition."""

import random

import pytest
from chat_families import assistant, system, user

from forge import ConflictError
from forge.data import prepare_dataset
from forge.data.rows import Sample
from forge.data.split import split, wanted_rows
from support.tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def conversation(number, turns=3):
    return [
        message
        for turn in range(turns)
        for message in (user(f"Question {number}.{turn}?"), assistant(f"Answer {number}.{turn}."))
    ]


def first_questions(rows):
    """The first question of each row in a spelling of its own, found without forge's key."""
    found = []
    for row in rows:
        messages = row.get("messages") or row["prompt"]
        asked = next(message["content"] for message in messages if message["role"] == "user")
        found.append("".join(asked.lower().split()).replace("\uff1f", "?"))
    return set(found)


def assert_apart(data):
    assert not first_questions(data.train) & first_questions(data.validation)


def test_exploded_conversations_stay_together():
    """A row for each answer, with all that came before it: prefixes of one another."""
    rows = [{"messages": conversation(number)[: 2 * turn]} for number in range(40) for turn in (1, 2, 3)]
    random.Random(0).shuffle(rows)
    data = prepare_dataset(rows, TOKENIZER, validation=0.2)
    assert_apart(data)
    assert (len(data.train), len(data.validation)) == (96, 24)


def test_spellings_of_one_question_stay_together():
    """Case, white space, full-width signs, the system prompt and the answer make no other question of it."""
    rows = []
    for number in range(30):
        rows += [
            {"messages": [user(f"What is {number} times two?"), assistant("a")]},
            {"messages": [user(f"  what IS\n{number}  times two?"), assistant("b")]},
            {"messages": [user(f"What is {number} times two\uff1f"), assistant("c")]},
            {"messages": [system("Be brief."), user(f"What is {number} times two?"), assistant("d")]},
        ]
    data = prepare_dataset(rows, TOKENIZER, validation=12)
    assert_apart(data)
    assert len(data.validation) == 12


def test_order_and_reruns_change_nothing():
    rows = [{"messages": conversation(number, 1)} for number in range(60)]
    first = prepare_dataset(rows, TOKENIZER, validation=0.25)
    shuffled = rows[:]
    random.Random(1).shuffle(shuffled)
    random.seed(5)
    second = prepare_dataset(shuffled, TOKENIZER, validation=0.25)
    sides = [sorted(map(str, data.validation["messages"])) for data in (first, second)]
    assert sides[0] == sides[1]
    assert len(sides[0]) == 15
    kept = [row["messages"] for row in first.train]
    assert kept == [row["messages"] for row in rows if row["messages"] in kept]  # in their order
    # A row more moves few others: the order of the hashes stays.
    third = prepare_dataset([*rows, {"messages": conversation(99, 1)}], TOKENIZER, validation=0.25)
    assert len(set(map(str, third.validation["messages"])) & set(sides[0])) >= 14


@pytest.mark.parametrize(
    "rows",
    [
        [{"text": f"Text {n % 20}"} for n in range(40)],
        [{"question": f"Q{n % 20}", "answer": f"a{n}"} for n in range(40)],
        [{"prompt": f"Q{n % 20}", "chosen": f"a{n}", "rejected": "b"} for n in range(40)],
    ],
    ids=["text", "pairs", "preferences"],
)
@pytest.mark.parametrize("template", [True, False])
def test_all_formats(rows, template):
    tokenizer = TOKENIZER if template else tiny_tokenizer(chat_template=None)
    data = prepare_dataset(rows, tokenizer, validation=4)
    column = "text" if "text" in rows[0] else "prompt"
    assert not set(map(str, data.train[column])) & set(map(str, data.validation[column]))
    assert len(data.validation) == 4


def test_a_given_validation_set_is_removed_from_training():
    rows = [{"messages": conversation(number, 2)} for number in range(10)]
    other = [{"prompt": "question 3.0?", "completion": "else"}, {"prompt": "QUESTION  7.0?", "completion": "x"}]
    data = prepare_dataset(rows, TOKENIZER, validation=other)
    assert data.report.leakage == (3, 7)
    assert len(data.train) == 8
    assert "removed: asked in validation too" in str(data.report)
    with pytest.raises(ConflictError, match="nothing is left to train on"):
        prepare_dataset(rows, TOKENIZER, validation=rows)
    with pytest.raises(ConflictError, match="format messages, those of validation text"):
        prepare_dataset(rows, TOKENIZER, validation=[{"text": "x"}])


@pytest.mark.parametrize("size", [0, -1, 10, 11, 0.0, 1.0, 1.5, -0.1, 0.01, True, float("nan")])
def test_nonsense_sizes(size):
    with pytest.raises(ConflictError, match="validation="):
        wanted_rows(size, 10)


def test_one_question_cannot_be_split():
    samples = [Sample(n, [user("same")], [assistant(str(n))]) for n in range(10)]
    with pytest.raises(ConflictError, match=r"only 1 different question \(the most frequent 10 times\)"):
        split(samples, 3)


def test_the_size_is_met_as_nearly_as_the_questions_allow():
    """A question asked too often is passed over, not taken for want of a smaller one."""
    for name in range(20):  # wherever its hash stands among the others
        asked = [f"often {name}"] * 50 + [f"once {n}" for n in range(50)]
        samples = [Sample(n, [user(question)], [assistant(str(n))]) for n, question in enumerate(asked)]
        train, held = split(samples, 10)
        assert (len(train), len(held)) == (90, 10)
        assert all(sample.row >= 50 for sample in held)


def test_rows_without_a_question_are_told_apart_by_all_of_it():
    samples = [Sample(n, [], [assistant(f"opening {n}")]) for n in range(10)]
    assert len({sample.key for sample in samples}) == 10


def dialogue(*turns, greeting=""):
    speakers = ("Human", "Assistant")
    return greeting + "".join(f"\n\n{speakers[n % 2]}: {said}" for n, said in enumerate(turns))


@pytest.mark.parametrize("greeting", ["", "\n\nAssistant: Hello!"], ids=["asked", "greeted"])
@pytest.mark.parametrize("form", ["implicit", "explicit", "pairs", "text"])
@pytest.mark.parametrize("template", [True, False])
def test_growing_dialogues_in_text_stay_together(form, greeting, template):
    """HH's: each answer is a row with all that was said before it, a greeting perhaps first."""
    rows = []
    for number in range(40):
        asked = f"What is {number}?"
        for turns in ((asked,), (asked, f"It is {number}.", f"Why {number}?")):
            said = dialogue(*turns, greeting=greeting)
            good, bad = f" good {number}{len(turns)}", f" bad {number}{len(turns)}"
            if form == "implicit":
                rows.append({"chosen": f"{said}\n\nAssistant:{good}", "rejected": f"{said}\n\nAssistant:{bad}"})
            elif form == "explicit":
                rows.append({"prompt": f"{said}\n\nAssistant:", "chosen": good, "rejected": bad})
            elif form == "pairs":
                rows.append({"prompt": f"{said}\n\nAssistant:", "completion": good})
            else:
                rows.append({"text": f"{said}\n\nAssistant:{good}"})
    tokenizer = TOKENIZER if template else tiny_tokenizer(chat_template=None)
    data = prepare_dataset(rows, tokenizer, validation=0.25)
    column = "text" if form == "text" else "prompt"
    sides = [
        {str(said).split("What is ")[1].split("?")[0] for said in side[column]}
        for side in (data.train, data.validation)
    ]
    assert not sides[0] & sides[1]
    assert [len(side) for side in sides] == [30, 10]


def test_greeted_conversations_that_grow_stay_together():
    rows = [
        {"messages": [assistant(f"Hello {turn}!"), *conversation(number)[: 2 * turn]]}
        for number in range(40)
        for turn in (1, 2, 3)
    ]
    data = prepare_dataset(rows, TOKENIZER, validation=0.25)
    assert_apart(data)
    assert len(data.validation) == 30


def test_the_sides_do_not_depend_on_the_chat_template():
    """Without one the system prompt is part of the text; it is no more part of the question for that."""
    rows = [
        {"system": f"You are {who}.", "prompt": f"Question {number}?", "completion": f"{who} says {number}"}
        for number in range(40)
        for who in ("a pirate", "a poet")
    ]
    answers = []
    for tokenizer in (TOKENIZER, tiny_tokenizer(chat_template=None)):
        held = prepare_dataset(rows, tokenizer, validation=0.25).validation["completion"]
        said = [answer if isinstance(answer, str) else answer[0]["content"] for answer in held]
        assert len({answer.split()[-1] for answer in said}) == 10
        answers.append(said)
    assert answers[0] == answers[1]


def test_sizes_may_be_numpys():
    import numpy as np

    rows = [{"prompt": f"{number}", "completion": "a"} for number in range(20)]
    for size in (np.int64(5), np.float32(0.25), np.float64(0.25)):
        assert len(prepare_dataset(rows, TOKENIZER, validation=size).validation) == 5
    with pytest.raises(ConflictError, match="validation='' is neither a split"):
        prepare_dataset(rows, TOKENIZER, validation="")
