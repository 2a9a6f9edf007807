"""Combined scores and the order of systems: who is ranked with a judge, what is a tie, and who shares a place."""

import json
import math

import numpy as np
import pytest

from forge.errors import ConflictError, ForgeError
from forge.evaluation.combined import combined_score, describe_scores
from forge.evaluation.ranking import SystemScores, rank

GENERATOR = np.random.default_rng(0)
HARD = GENERATOR.normal(0.6, 0.08, 64)
NOISE = GENERATOR.normal(0, 0.01, (4, 64))
JUDGE_HARD = GENERATOR.normal(40, 6, 64)


def system(number, gain=0.0, judge=0.0, judged=64):
    """A system that is `gain` better than another, and whose first `judged` answers a judge likes `judge` more."""
    opinions = [*(JUDGE_HARD[:judged] + judge + 100 * NOISE[number][:judged]), *[None] * (64 - judged)]
    return SystemScores((HARD + gain + NOISE[number]).tolist(), opinions)


def blind(number, gain=0.0):
    return SystemScores(system(number, gain).bert)


def places(ranking):
    return {row.name: row.place for row in ranking.rows}


class TestCombined:
    def test_the_judge_counts_for_three_fifths(self):
        assert combined_score(0.823, 78.5) == pytest.approx(0.4 * 0.823 + 0.6 * 0.785)
        assert combined_score(0.0, 100) == pytest.approx(0.6)
        assert combined_score(1.0, 0) == pytest.approx(0.4)

    def test_without_a_judge_it_is_bert_score(self):
        assert combined_score(0.823) == 0.823

    @pytest.mark.parametrize("bert", [-3.4, 0, 1, 1.0000002, np.float32(0.5)])
    def test_rescaled_and_rounded_scores_are_fine(self, bert):
        assert combined_score(bert, 50) == pytest.approx(0.4 * float(bert) + 0.3)

    @pytest.mark.parametrize("bert", [82.3, 1.1, math.nan, math.inf, -math.inf, True, None, "0.8"])
    def test_what_is_no_bert_score_is_refused(self, bert):
        with pytest.raises(ForgeError, match="bert_score="):
            combined_score(bert, 50)

    @pytest.mark.parametrize("judge", [-1, 100.1, math.nan, math.inf, True, "78"])
    def test_what_is_no_judges_score_is_refused(self, judge):
        with pytest.raises(ForgeError, match="judge_score="):
            combined_score(0.8, judge)

    def test_a_line_as_people_write_it(self):
        assert describe_scores(0.823, 78.5) == "BERTScore 0.823, judge 78.5, combined 0.800"


class TestWithAndWithoutAJudge:
    def test_scores_are_means_and_what_combined_score_makes_of_them(self):
        systems = {"base": system(0), "tuned": system(1, 0.1, 10)}
        ranking = rank(systems)
        best = ranking.rows[0]
        assert (best.name, best.place, ranking.judged_samples, ranking.notes) == ("tuned", 1, 64, ())
        assert best.bert == pytest.approx(np.mean(systems["tuned"].bert))
        assert best.judge == pytest.approx(np.mean(systems["tuned"].judge))
        assert best.combined == combined_score(best.bert, best.judge)

    def test_one_system_without_a_judge_makes_all_be_ranked_without(self):
        ranking = rank({"base": blind(0), "judged": system(1, -0.1, 40), "tuned": system(2, 0.1, 10)})
        assert not ranking.with_judge
        assert [row.name for row in ranking.rows] == ["tuned", "base", "judged"]  # with the judge, "judged" would lead
        assert all(row.judge is None and row.combined == row.bert for row in ranking.rows)
        assert "base has no judge scores" in ranking.notes[0]

    def test_a_judge_that_failed_on_every_sample_is_no_judge(self):
        ranking = rank({"base": system(0, judged=0), "tuned": system(1, 0.1)})
        assert not ranking.with_judge
        assert "base has no judge scores" in ranking.notes[0]

    def test_several_are_named(self):
        ranking = rank({"a": blind(0), "b": blind(1), "c": system(2)})
        assert "a, b have no judge scores" in ranking.notes[0]

    def test_nobody_expects_a_judge_that_nobody_asked(self):
        ranking = rank({"base": blind(0), "tuned": blind(1, 0.1)})
        assert ranking.notes == ()
        assert ranking.conclusions()[0].startswith("BERTScore: tuned is better than base (+0.099 [")

    def test_the_judges_part_rests_on_what_was_judged_in_every_system(self):
        missing = {"base": {3, 7}, "tuned": {7, 11, 12}}
        systems = {}
        for number, (name, places_missing) in enumerate(missing.items()):
            full = system(number, 0.1 * number, 5 * number)
            opinions = [None if place in places_missing else score for place, score in enumerate(full.judge)]
            systems[name] = SystemScores(full.bert, opinions)
        ranking = rank(systems)
        common = [place for place in range(64) if place not in {3, 7, 11, 12}]
        assert ranking.judged_samples == 60
        assert ranking.rows[0].judge == pytest.approx(np.mean([systems["tuned"].judge[place] for place in common]))
        assert ranking.rows[0].bert == pytest.approx(np.mean(systems["tuned"].bert))  # of all samples
        assert "60 of 64 samples" in ranking.notes[0]
        assert "base: 62, tuned: 61" in ranking.notes[0]

    def test_a_judge_asked_about_the_same_few_samples_counts(self):
        ranking = rank({"base": system(0, judged=16), "tuned": system(1, 0.1, 10, judged=16)})
        assert ranking.judged_samples == 16
        assert ranking.notes == ("The judge's part rests on 16 of 64 samples.",)

    @pytest.mark.parametrize(("common", "with_judge"), [(20, True), (19, False)])
    def test_too_few_in_common_make_all_be_ranked_without(self, common, with_judge):
        ranking = rank({"base": system(0, judged=40), "tuned": system(1, 0.1, 10, judged=common)})
        assert ranking.with_judge is with_judge
        if not with_judge:
            assert (
                "19 samples were judged in every system, fewer than half of the 40 judged in base" in ranking.notes[0]
            )


class TestPlaces:
    def test_a_clear_order(self):
        ranking = rank({"worst": blind(0), "best": blind(1, 0.2), "middle": blind(2, 0.1)})
        assert places(ranking) == {"best": 1, "middle": 2, "worst": 3}
        assert all(row.tied_with == () for row in ranking.rows)
        assert len(ranking.conclusions()) == 2

    def test_identical_systems_share_a_place(self):
        ranking = rank({"one": system(0), "other": system(0)})
        assert places(ranking) == {"one": 1, "other": 1}
        assert ranking.rows[0].tied_with == ("other",)
        assert ranking.differences["one", "other"].mean == 0
        assert "no difference can be shown between one and other" in ranking.conclusions()[0]

    def test_after_a_shared_place_the_next_one_is_left_out(self):
        ranking = rank({"a": blind(0, 0.1), "b": blind(0, 0.1), "c": blind(1)})
        assert places(ranking) == {"a": 1, "b": 1, "c": 3}

    def test_a_tie_is_not_transitive_and_both_halves_are_told(self):
        # Each step of 0.004 is within the noise of a pair, two of them are not.
        def noisy(number, gain):
            return SystemScores((HARD + gain + np.resize([0.012, -0.012], 64) * (-1) ** number).tolist())

        ranking = rank({"a": noisy(0, 0.008), "b": noisy(1, 0.004), "c": noisy(0, 0.0)})
        assert ranking.differences["a", "b"].is_tie
        assert ranking.differences["b", "c"].is_tie
        assert not ranking.differences["a", "c"].is_tie
        assert places(ranking) == {"a": 1, "b": 1, "c": 3}
        assert ranking.rows[1].tied_with == ("a", "c")
        assert "b (place 1) and c (place 3) cannot be told apart either" in ranking.notes[0]

    def test_one_sample_shows_nothing(self):
        ranking = rank({"base": SystemScores([0.1], [10]), "tuned": SystemScores([0.9], [90])})
        assert places(ranking) == {"tuned": 1, "base": 1}
        assert "1 judged sample cannot show a difference" in ranking.notes[0]
        assert "at least 6" in ranking.notes[0]
        assert json.loads(json.dumps(ranking.to_dict(), allow_nan=False))["rows"][0]["interval"]["low"] is None

    def test_few_judged_samples_show_nothing_however_many_others_there_are(self):
        ranking = rank({"base": system(0, judged=5), "tuned": system(1, 0.1, 30, judged=5)})
        assert ranking.rows[0].tied_with == ("base",)
        assert "5 judged samples cannot show" in ranking.notes[1]

    def test_equal_scores_everywhere(self):
        ranking = rank({name: SystemScores([0.5] * 20, [70] * 20) for name in "abc"})
        assert places(ranking) == {"a": 1, "b": 1, "c": 1}
        assert ranking.rows[0].interval.low == pytest.approx(ranking.rows[0].interval.high)

    def test_constant_scores_that_differ_are_told_apart(self):
        ranking = rank({"low": SystemScores([0.5] * 20), "high": SystemScores([0.6] * 20)})
        assert places(ranking) == {"high": 1, "low": 2}

    def test_one_system_is_first(self):
        ranking = rank({"only": system(0)})
        assert places(ranking) == {"only": 1}
        assert ranking.conclusions() == []


class TestDraws:
    def test_equal_systems_are_told_apart_as_rarely_as_the_interval_may_be_wrong(self):
        generator, told = np.random.default_rng(1), 0
        for trial in range(300):
            hard, judge_hard = generator.normal(0.6, 0.08, 40), generator.normal(60, 8, 20)
            systems = {
                name: SystemScores(
                    (hard + generator.normal(0, 0.03, 40)).tolist(),
                    [*(judge_hard + generator.normal(0, 6, 20)), *[None] * 20],
                )
                for name in "ab"
            }
            found = places(rank(systems, resamples=400, seed=trial))
            told += found["a"] != found["b"]
        assert 0.01 < told / 300 < 0.11

    def test_the_interval_contains_the_score(self):
        for row in rank({"base": system(0, judged=30), "tuned": system(1, 0.1, judged=30)}).rows:
            assert row.interval.low < row.combined < row.interval.high
            assert row.interval.mean == row.combined

    def test_the_interval_is_that_of_a_plain_bootstrap_where_all_are_judged(self):
        from forge.evaluation.bootstrap import bootstrap_interval

        scores = system(0)
        own = [combined_score(bert, judge) for bert, judge in zip(scores.bert, scores.judge, strict=True)]
        plain, found = bootstrap_interval(own), rank({"only": scores}).rows[0].interval
        assert (found.low, found.mean, found.high) == pytest.approx((plain.low, plain.mean, plain.high))

    def test_strata_keep_the_number_of_judged_samples(self):
        # All judged samples score 100 and the others have no opinion: nothing varies but BERTScore.
        scores = SystemScores([0.5] * 10, [100] * 4 + [None] * 6)
        interval = rank({"only": scores}).rows[0].interval
        assert interval.low == pytest.approx(interval.high) == pytest.approx(0.4 * 0.5 + 0.6)


class TestShown:
    def test_a_table_with_what_is_needed(self):
        text = str(rank({"base": system(0, judged=16), "tuned": system(1, 0.1, 10, judged=16)}))
        for part in ("place", "BERTScore", "judge", "combined", "95% interval", "tied with", "16 of 64 samples"):
            assert part in text

    def test_without_a_judge_the_table_does_not_speak_of_one(self):
        text = str(rank({"base": blind(0), "tuned": blind(1, 0.1)}))
        assert "judge" not in text
        assert "combined" not in text

    def test_json(self):
        ranking = rank({"base": system(0), "tuned": system(1, 0.1, 10)}, confidence=0.9)
        found = json.loads(json.dumps(ranking.to_dict(), allow_nan=False))
        assert [row["name"] for row in found["rows"]] == ["tuned", "base"]
        assert found["differences"][0]["first"] == "tuned"
        assert found["confidence"] == 0.9

    def test_printing_goes_to_standard_output(self, capsys):
        rank({"base": blind(0)}).print()
        assert "base" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("systems", "message"),
    [
        ({}, "no systems"),
        ({"a": SystemScores([])}, "no samples"),
        ({"a": SystemScores([0.1]), "b": SystemScores([0.1, 0.2])}, "a 1, b 2"),
        ({"a": SystemScores([0.1, 0.2], [50])}, "a has 1 judge scores and 2 samples"),
        ({"a": SystemScores([0.1, math.nan])}, r"a: bert\[1\]=nan"),
        ({"a": SystemScores([0.1, 0.2], [50, math.nan])}, r"a: judge\[1\]=nan"),
        ({"a": SystemScores([0.1, 0.2], [50, 101])}, r"a: judge\[1\]=101"),
        ({"a": SystemScores([0.1, None])}, r"a: bert\[1\]=None"),
    ],
)
def test_scores_that_cannot_be_compared_are_refused(systems, message):
    error = ConflictError if "=" not in message else ForgeError
    with pytest.raises(error, match=message):
        rank(systems)
