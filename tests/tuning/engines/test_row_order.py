import random
from collections import Counter

import pytest

from forge.tuning.engines.course import Course, next_rung
from forge.tuning.engines.order import row_order


@pytest.mark.parametrize("rows", [1, 2, 7, 64, 101])
@pytest.mark.parametrize("micro_batch", [1, 4, 8])
@pytest.mark.parametrize("epochs", [0.3, 1, 2, 2.5])
def test_every_row_comes_once_an_epoch(rows, micro_batch, epochs):
    lengths = [random.Random(row).randint(1, 90) for row in range(rows)]
    order = row_order(lengths, micro_batch=micro_batch, epochs=epochs, seed=3)
    assert len(order) == -(-rows * int(epochs * 10) // 10)
    for epoch in range(int(epochs)):
        assert sorted(order[epoch * rows : (epoch + 1) * rows]) == list(range(rows))
    assert max(Counter(order).values()) <= -(-int(epochs * 10) // 10)


def test_a_shorter_training_sees_the_first_rows_of_a_longer_one():
    lengths = [7 * row % 31 + 1 for row in range(50)]
    long = row_order(lengths, micro_batch=4, epochs=3, seed=0)
    assert row_order(lengths, micro_batch=4, epochs=1.5, seed=0) == long[:75]
    assert row_order(lengths, micro_batch=4, epochs=3, seed=1) != long
    assert long[:50] != long[50:100]


def test_micro_batches_hold_rows_of_like_length_and_steps_of_many():
    drawn = random.Random(0)
    lengths = [drawn.randint(1, 200) for _ in range(256)]
    order = row_order(lengths, micro_batch=4, epochs=1, seed=0)
    micro = [[lengths[row] for row in order[start : start + 4]] for start in range(0, 256, 4)]
    spread = sum(max(batch) - min(batch) for batch in micro) / len(micro)
    assert spread < 10  # of 200
    mean = sum(lengths) / len(lengths)
    rounds = [order[start : start + 32] for start in range(0, 256, 32)]
    for each in rounds:  # a round has all lengths in it
        assert abs(sum(lengths[row] for row in each) / 32 - mean) < 0.1 * mean


def test_what_stands_at_the_same_place_of_a_round_is_of_like_length():
    drawn = random.Random(0)
    lengths = [drawn.randint(1, 200) for _ in range(256)]
    order = row_order(lengths, micro_batch=4, epochs=2, seed=0)
    longest = [max(lengths[row] for row in order[start : start + 4]) for start in range(0, 512, 4)]
    together = [max(longest[place], longest[place + 32]) for place in range(96)]  # one trial is 4 rounds behind
    assert sum(together) < 1.1 * sum(longest[:96])
    apart = [max(longest[place], longest[place + 33]) for place in range(95)]
    assert sum(apart) > 1.25 * sum(longest[:95])


@pytest.mark.parametrize(("rows", "batch", "micro_batch"), [(64, 16, 4), (61, 16, 4), (10, 4, 2), (3, 8, 8), (5, 4, 1)])
def test_a_course_cuts_rows_into_steps(rows, batch, micro_batch):
    course = Course(tuple(range(rows)), batch, micro_batch)
    seen, step = [], []
    steps = 0
    for micro in range(course.micro_batches):
        assert course.steps_done(micro) == steps
        assert course.first_of_step(micro) == steps * batch // micro_batch
        seen += course.rows(micro)
        step += course.rows(micro)
        assert set(course.rows(micro)) <= set(course.step_rows(micro))
        if course.ends_step(micro):
            assert tuple(step) == course.step_rows(micro)
            step, steps = [], steps + 1
    assert (seen, step, steps) == (list(range(rows)), [], course.steps)
    assert course.steps_done(course.micro_batches) == course.steps


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10, 99])
def test_the_rungs_are_shares_of_the_steps(steps):
    course = Course(tuple(range(steps)), 1, 1)
    for percent in (25, 50, 100):
        assert course.steps_at(percent) - 1 < steps * percent / 100 <= course.steps_at(percent)
    came = [next_rung(done, course) for done in range(steps)]
    assert came == sorted(came)
    assert came[-1] == 100
