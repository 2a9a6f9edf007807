"""The judgements, without a trainer."""

import math
import random

import pytest

from forge.callbacks.monitor.events import Events
from forge.callbacks.monitor.guard import PATIENCE, Guard
from forge.callbacks.monitor.loss import StepLoss
from forge.callbacks.monitor.watch import ACTIVE_AFTER, FLAT_STEPS, WINDOW, ZERO_RATE_STEPS, SpikeDetector


def guard(on_nan="skip", on_spike="warn"):
    events = Events()
    events.is_main = False
    return Guard(on_nan, on_spike, events)


def noisy(steps, seed=0, mean=2.0):
    rng = random.Random(seed)
    return [rng.gauss(mean, 0.1) for _ in range(steps)]


@pytest.mark.parametrize("on_spike", ["warn", "skip", "stop"])
@pytest.mark.parametrize("name", ["loss", "norm"])
def test_a_spike(on_spike, name):
    subject = guard(on_spike=on_spike)
    for step, value in enumerate(noisy(100), 1):
        assert subject.judge(step, loss=value, norm=value) == "take"
    values = {"loss": 2.0, "norm": 2.0, name: 4.0}
    assert subject.judge(101, **values) == ("take" if on_spike == "warn" else on_spike)
    (event,) = subject.events.all
    assert (event.step, event.kind) == (101, "spike")
    assert "is 4, more than 6 sigma above the mean of the last 100 steps (1.99" in event.message
    assert subject.judge(102, loss=2.0, norm=2.0) == "take"


def test_no_spike_before_there_is_enough_to_compare_with():
    detector = SpikeDetector()
    assert not any(detector.is_spike(value) for value in [*noisy(ACTIVE_AFTER - 1), 100.0])
    assert not detector.is_spike(2.0)


def test_normal_noise_hardly_ever_alarms():
    alarms = 0
    for seed in range(20):
        detector = SpikeDetector()
        alarms += sum(detector.is_spike(value) for value in noisy(500, seed))
    assert alarms <= 1


def test_a_second_spike_is_not_hidden_by_the_first_and_a_new_level_is_accepted():
    detector = SpikeDetector()
    for value in noisy(WINDOW):
        detector.is_spike(value)
    assert detector.is_spike(50.0)
    assert detector.is_spike(50.0)
    judged = [detector.is_spike(4.0) for _ in range(WINDOW)]
    assert judged[0]
    assert not judged[-1]


def test_a_falling_loss_is_no_spike():
    subject = guard(on_spike="stop")
    losses = [5.5 * math.exp(-step / 100) + noise - 2 for step, noise in enumerate(noisy(400))]
    assert {subject.judge(step, loss=loss, norm=1.0) for step, loss in enumerate(losses, 1)} == {"take"}


def test_a_loss_that_does_not_move_is_said_once():
    subject = guard()
    for step in range(1, 200):
        assert subject.judge(step, loss=3.25, norm=0.5 + step / 1000) == "take"
    (event,) = subject.events.all
    assert (event.step, event.kind) == (FLAT_STEPS, "flat_loss")


def test_a_learning_rate_that_stays_zero_is_said_once():
    subject = guard()
    for step, loss in enumerate(noisy(30), 1):
        subject.judge(step, loss=loss, norm=1.0, learning_rate=0.0)
    (event,) = subject.events.all
    assert (event.step, event.kind) == (ZERO_RATE_STEPS, "zero_learning_rate")


def test_a_warm_up_from_zero_says_nothing():
    subject = guard()
    for step, loss in enumerate(noisy(30), 1):
        subject.judge(step, loss=loss, norm=1.0, learning_rate=1e-5 * (step - 1))
    assert subject.events.all == []


def test_the_scalers_infinities_are_its_own_until_they_do_not_end():
    subject = guard("stop")
    for step in range(1, PATIENCE + 1):
        assert subject.judge(step, loss=2.0, norm=math.inf, scaled=True) == "take"
    assert subject.events.all == []
    assert subject.judge(PATIENCE + 1, loss=2.0, norm=math.inf, scaled=True) == "stop"
    fresh = guard("stop")
    assert fresh.judge(1, loss=math.nan, norm=math.inf, scaled=True) == "stop"  # the loss is nobody's business to scale


def test_bad_steps_in_a_row_are_counted_anew_after_a_good_one():
    subject = guard("skip")
    for step in range(1, 4 * PATIENCE):
        bad = step % PATIENCE != 0
        assert subject.judge(step, loss=math.nan if bad else 2.0, norm=1.0) == ("skip" if bad else "take")


def test_the_step_loss_is_the_sum_of_its_micro_batches():
    import torch

    loss = StepLoss()
    given = [loss.add(torch.tensor(value)) for value in (1.0, math.nan, -math.inf, 2.0)]
    assert [value.item() for value in given] == [1.0, 0.0, 0.0, 2.0]
    assert math.isnan(loss.take().item())
    assert loss.take() is None
    assert math.isnan(loss.mean)
    for value in (2.0, math.nan, 4.0):
        loss.finish(value)
    assert (loss.mean, loss.nonfinite) == (3.0, 1)
    assert repr(loss.drain()) == repr([2.0, math.nan, 4.0])
    assert loss.drain() == []
