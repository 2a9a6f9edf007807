from typing import Any

import pytest
from datasets import Dataset

from forge.tuning.fingerprint import fingerprint_of

ROWS: dict[str, Any] = {
    "input_ids": [[1, 2, 3], [4], []],
    "labels": [[-100, 2, 3], [4], []],
    "messages": ["a", "b", "c"],
}


def of(**changes: Any) -> str:
    return fingerprint_of(Dataset.from_dict({**ROWS, **changes}))


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("input_ids", [[1, 2, 9], [4], []]),
        ("input_ids", [[1, 2], [3, 4], []]),  # the same tokens, in other rows
        ("labels", [[1, 2, 3], [4], []]),
    ],
)
def test_every_token_label_and_border_counts(column: str, value: Any) -> None:
    assert of(**{column: value}) != of()


def test_what_is_not_learnt_does_not_count() -> None:
    assert of(messages=["x", "y", "z"]) == of()


def test_order_and_number_of_rows_count() -> None:
    rows = Dataset.from_dict(ROWS)
    assert len({fingerprint_of(rows), fingerprint_of(rows.select([1, 0, 2])), fingerprint_of(rows.select([0, 1]))}) == 3


def test_it_is_that_of_the_rows_and_not_of_their_storage() -> None:
    twice = Dataset.from_dict({name: value * 2 for name, value in ROWS.items()})
    assert fingerprint_of(twice.select([0, 1, 2])) == of()
    assert fingerprint_of(twice.shuffle(seed=1)) != fingerprint_of(twice)


def test_preferences_by_their_texts() -> None:
    def pairs(rejected: str) -> str:
        turn = [{"role": "assistant", "content": rejected}]
        return fingerprint_of(Dataset.from_dict({"prompt": ["p"], "chosen": ["c"], "rejected": [turn]}))

    assert pairs("bad") == pairs("bad") != pairs("worse")


def test_many_rows_are_read_in_batches() -> None:
    ids = [[number % 7] * (number % 5) for number in range(2500)]
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    other = [*ids[:-1], [3]]
    assert fingerprint_of(rows) != fingerprint_of(Dataset.from_dict({"input_ids": other, "labels": ids}))
