import math
import random

import pytest

from forge.tuning.search.halving import diverged, survivors


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8, 32])
def test_the_first_group_is_halved_exactly(count):
    drawn = random.Random(count)
    losses = {number: drawn.random() for number in range(count)}
    kept = survivors(losses)
    assert len(kept) == -(-count // 2)
    assert max(losses[number] for number in kept) <= min(
        (loss for number, loss in losses.items() if number not in kept), default=math.inf
    )


def test_of_equals_the_earlier_go_on():
    assert survivors(dict.fromkeys(range(6), 1.0)) == {0, 1, 2}
    assert survivors({5: 1.0}, [1.0]) == set()  # the one that stood there before was as good


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_never_goes_on(bad):
    assert survivors({0: bad}) == set()
    assert survivors({0: bad, 1: 9.0, 2: bad}) == {1}
    assert survivors({0: 1.0}, [bad, bad, bad]) == {0}


def test_a_late_strong_group_goes_on_whole_and_a_weak_one_ends_whole():
    before = [2.0, 2.1, 2.2, 2.3]
    assert survivors({8: 1.0, 9: 1.1, 10: 1.2, 11: 1.3}, before) == {8, 9, 10, 11}
    assert survivors({8: 3.0, 9: 3.1}, before) == set()


def test_a_lone_trial_is_judged_by_the_records():
    assert survivors({0: 7.0}) == {0}  # nobody to be judged by
    assert survivors({3: 2.05}, [2.0, 2.1, 2.2, 2.3]) == {3}
    assert survivors({3: 2.25}, [2.0, 2.1, 2.2, 2.3]) == set()


def test_a_better_loss_never_hurts():
    drawn = random.Random(0)
    for _ in range(300):
        losses = {number: drawn.random() for number in range(drawn.randint(1, 9))}
        history = [drawn.random() for _ in range(drawn.randint(0, 9))]
        kept = survivors(losses, history)
        chosen = drawn.choice(list(losses))
        better = survivors({**losses, chosen: losses[chosen] * drawn.random()}, history)
        assert chosen in better or chosen not in kept
        assert len(kept) <= -(-(len(losses) + len(history)) // 2)


def test_fewer_go_on_where_that_is_asked_for():
    assert survivors({number: float(number) for number in range(9)}, reduction=3) == {0, 1, 2}


def noise(level, count, spread=0.4, seed=0):
    drawn = random.Random(seed)
    return [level + drawn.uniform(-spread, spread) for _ in range(count)]


@pytest.mark.parametrize(
    "losses",
    [
        [],
        [5.0],
        noise(2.3, 200),
        noise(0.4, 200, spread=0.35),
        [*noise(2.3, 20), 30.0, *noise(2.3, 20)],  # one bad batch
        [*noise(2.3, 20), math.nan, math.nan, *noise(2.3, 5)],  # skipped by the protection
        [2.3 + step * 0.005 for step in range(100)],  # slowly worse: the rungs will see it
        [0.2 + step * 0.01 for step in range(60)],  # far above in share, not in nats
    ],
)
def test_what_is_noisy_or_merely_bad_goes_on(losses):
    assert diverged(losses) == ""


@pytest.mark.parametrize(
    "losses",
    [
        [2.3, math.nan, math.nan, math.nan],
        [math.inf] * 3,
        [*noise(2.3, 10), *noise(9.0, 10)],
        [2.3 * 1.1**step for step in range(40)],
    ],
)
def test_what_is_beyond_repair_is_said(losses):
    assert diverged(losses)
