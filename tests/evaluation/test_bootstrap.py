"""The bootstrap: intervals that contain the truth as often as they say, pairs told apart when they differ."""

import math

import numpy as np
import pytest

from forge.errors import ConflictError, ForgeError
from forge.evaluation.bootstrap import bootstrap_interval, difference, fewest_samples, paired_bootstrap, resampled_sums

TRIALS = 400


def skewed(generator, count):
    """Scores as answers have them: most are good, few are bad."""
    return 1 - generator.beta(2, 6, count)


@pytest.mark.parametrize(("samples", "confidence"), [(40, 0.95), (40, 0.8), (150, 0.95)])
def test_intervals_contain_the_truth_about_as_often_as_they_say(samples, confidence):
    generator, truth = np.random.default_rng(0), 1 - 2 / 8
    found = [
        bootstrap_interval(skewed(generator, samples), confidence=confidence, resamples=500, seed=trial)
        for trial in range(TRIALS)
    ]
    share = sum(interval.low <= truth <= interval.high for interval in found) / TRIALS
    assert abs(share - confidence) < 0.04


def test_pairs_that_do_not_differ_are_told_apart_as_rarely_as_the_interval_may_be_wrong():
    generator, wrong = np.random.default_rng(1), 0
    for trial in range(TRIALS):
        hard = generator.normal(0.7, 0.1, 64)
        a, b = (hard + generator.normal(0, 0.05, 64) for _ in range(2))
        wrong += not paired_bootstrap(a, b, resamples=500, seed=trial).is_tie
    assert 0.01 < wrong / TRIALS < 0.1


def test_pairing_shows_what_the_difference_of_two_intervals_does_not():
    generator = np.random.default_rng(2)
    hard = generator.normal(0.7, 0.1, 64)
    a, b = hard + 0.03 + generator.normal(0, 0.02, 64), hard + generator.normal(0, 0.02, 64)
    gap = paired_bootstrap(a, b)
    first, second = bootstrap_interval(a), bootstrap_interval(b)
    assert first.low < second.high  # the two overlap
    assert 0.02 < gap.low < gap.mean < gap.high < 0.04
    assert gap.p_value < 0.001


def test_an_interval_agrees_with_the_formula_of_the_standard_error():
    values = skewed(np.random.default_rng(3), 400)
    interval = bootstrap_interval(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert interval.mean == pytest.approx(values.mean())
    assert (interval.high - interval.low) / 2 == pytest.approx(half, rel=0.05)


def test_an_interval_is_the_same_for_the_same_seed_and_another_for_another():
    values = skewed(np.random.default_rng(4), 30).tolist()
    assert bootstrap_interval(values) == bootstrap_interval(np.array(values))
    assert bootstrap_interval(values) != bootstrap_interval(values, seed=1)


def test_draws_do_not_depend_on_how_many_fit_into_memory(monkeypatch):
    strata = [np.random.default_rng(5).normal(size=(37, 2)), np.random.default_rng(6).normal(size=(5, 2))]
    whole = resampled_sums(strata, 1000, 7)
    monkeypatch.setattr("forge.evaluation.bootstrap._AT_ONCE", 100)
    assert np.array_equal(resampled_sums(strata, 1000, 7), whole)


def test_a_stratum_always_gives_as_many_rows_as_it_has():
    strata = [np.tile([1.0, 0.0], (3, 1)), np.tile([0.0, 1.0], (8, 1))]
    assert np.array_equal(resampled_sums(strata, 200, 0), np.tile([3.0, 8.0], (200, 1)))


def test_columns_see_the_same_draws():
    column = np.random.default_rng(8).normal(size=(20, 1))
    drawn = resampled_sums([np.hstack([column, 2 * column])], 300, 0)
    assert np.allclose(drawn[:, 1], 2 * drawn[:, 0])


def test_equal_values_have_an_interval_without_width():
    interval = bootstrap_interval([0.1] * 7)
    assert interval.low == interval.mean == interval.high == pytest.approx(0.1)


def test_a_single_sample_says_nothing_of_others():
    interval = bootstrap_interval([0.7])
    assert (interval.low, interval.mean, interval.high) == (-math.inf, 0.7, math.inf)


def test_the_same_system_twice_is_a_tie():
    values = skewed(np.random.default_rng(9), 50)
    gap = paired_bootstrap(values, values)
    assert (gap.mean, gap.low, gap.high, gap.p_value) == (0, 0, 0, 1)
    assert gap.is_tie


def test_a_constant_gain_is_told_apart_as_soon_as_enough_samples_have_it():
    few, enough = (paired_bootstrap([0.9] * count, [0.8] * count) for count in (5, 6))
    assert few.is_tie
    assert (few.low, few.high) == (-math.inf, math.inf)
    assert few.p_value == 2 * 0.5**5
    assert not enough.is_tie
    assert enough.low == pytest.approx(0.1)


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.9, 0.95, 0.99])
def test_the_fewest_samples_are_those_that_chance_favours_rarely_enough(confidence):
    count = fewest_samples(confidence)
    assert 2 * 0.5**count <= 1 - confidence + 1e-12
    assert 2 * 0.5 ** (count - 1) > 1 - confidence + 1e-12


def test_swapping_the_systems_turns_the_difference_around():
    generator = np.random.default_rng(10)
    a, b = skewed(generator, 40), skewed(generator, 40)
    one, other = paired_bootstrap(a, b), paired_bootstrap(b, a)
    assert (one.mean, one.low, one.high) == pytest.approx((-other.mean, -other.high, -other.low))
    assert one.p_value == pytest.approx(other.p_value)


def test_weights_count_as_copies_of_a_sample_do_in_the_mean():
    a, b, weights = [0.5, 0.7, 0.9, 0.4, 0.6, 0.8], [0.4, 0.7, 0.8, 0.5, 0.3, 0.8], [1, 4, 2, 3, 1, 2]
    copies = [(x, y) for x, y, weight in zip(a, b, weights, strict=True) for _ in range(weight)]
    expected = np.mean([x - y for x, y in copies])
    gap = paired_bootstrap(a, b, weights=weights)
    assert gap.mean == pytest.approx(expected)
    assert gap.low < gap.mean < gap.high
    even = paired_bootstrap(a, b, weights=[3] * 6)
    plain = paired_bootstrap(a, b)
    assert (even.mean, even.low, even.high) == pytest.approx((plain.mean, plain.low, plain.high))


def test_weighted_intervals_contain_the_truth():
    """A ratio of sums, as a loss per token is: tokens and losses are drawn together."""
    generator, hits, truth = np.random.default_rng(11), 0, 0.05
    for trial in range(TRIALS):
        weights = generator.integers(5, 60, 60)
        gain = truth + generator.normal(0, 0.2, 60) / np.sqrt(weights)
        gap = paired_bootstrap(gain, np.zeros(60), weights=weights.tolist(), resamples=500, seed=trial)
        hits += gap.low <= truth <= gap.high
    assert 0.91 < hits / TRIALS < 0.99


def test_a_p_value_counts_the_draws_on_the_other_side():
    draws = np.array([-1.0] * 4 + [1.0] * 995)
    assert difference(0.9, draws, 100, 0.95).p_value == pytest.approx(2 * 5 / 1000)
    assert difference(0.9, np.abs(draws), 100, 0.95).p_value == pytest.approx(2 / 1000)


@pytest.mark.parametrize("values", [[], [0.1, None], [0.1, math.nan], [0.1, math.inf], [0.1, True], [0.1, "0.2"]])
def test_what_is_no_number_is_refused_by_its_place(values):
    with pytest.raises(ConflictError, match=r"values is empty|values\[1\]"):
        bootstrap_interval(values)


@pytest.mark.parametrize(
    "options",
    [{"confidence": 1}, {"confidence": 95}, {"confidence": True}, {"resamples": 0}, {"resamples": 1e4}, {"seed": -1}],
)
def test_options_that_are_none_are_refused(options):
    with pytest.raises(ForgeError, match=next(iter(options))):
        bootstrap_interval([0.1, 0.2], **options)


@pytest.mark.parametrize(
    ("a", "b", "weights"), [([0.1], [0.1, 0.2], None), ([0.1], [0.2], [1, 2]), ([0.1, 0.2], [0.1, 0.2], [1, 0])]
)
def test_samples_that_do_not_belong_together_are_refused(a, b, weights):
    with pytest.raises(ConflictError):
        paired_bootstrap(a, b, weights=weights)
