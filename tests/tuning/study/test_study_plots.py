"""The pictures: drawn for any study, without a warning, and they show what they should."""

from pathlib import Path

import pytest

from forge.tuning.study.importance import importances
from forge.tuning.study.plots import history, importance, learning_curves, slice_of, study_plots
from forge.tuning.study.reading import StudyRecord, TrialRecord, read_study
from forge.tuning.study.result import StudyResult
from support.studies import make_study


@pytest.mark.parametrize(("count", "maximize"), [(0, False), (1, False), (3, True), (20, False)])
def test_each_study_can_be_drawn(count: int, maximize: bool):
    plots = study_plots(read_study(make_study(count, maximize=maximize)))
    assert {"history", "importance", "learning_curves", "slice_learning_rate", "slice_lora_r"} <= plots.keys()
    for plot in plots.values():
        assert plot.png().startswith(b"\x89PNG")
        assert plot.alt


def test_they_are_files_in_the_studys_folder(tmp_path: Path):
    found = StudyResult.of(make_study(3), tmp_path).plots()
    assert found["history"] == tmp_path / "plots" / "history.png"
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in found.values())


def lines_of(plot: object) -> dict[str, object]:
    axes = plot.figure().axes[0]
    return dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))


def test_history_keeps_the_best_and_marks_what_broke():
    study = read_study(make_study(20))
    found = lines_of(history(study))
    best = [float(y) for y in found["best so far"].get_ydata()]
    assert best == sorted(best, reverse=True)
    assert best[-1] == pytest.approx(study.best().loss)
    assert list(found["diverged, failed, too big"].get_xdata()) == [5, 8, 11, 17]


def test_history_of_scores_rises():
    found = lines_of(history(read_study(make_study(20, maximize=True))))
    best = [float(y) for y in found["best so far"].get_ydata()]
    assert best == sorted(best)


def test_learning_curves_mark_the_winner_and_the_base():
    found = lines_of(learning_curves(read_study(make_study(20, winner=6))))
    assert {"winner: trial 6", "base", "completed", "stopped"} == found.keys()


def test_the_learning_rate_has_a_logarithmic_axis_as_wide_as_the_search():
    axes = slice_of(read_study(make_study(20)), "learning_rate").figure().axes[0]
    low, high = axes.get_xlim()
    assert axes.get_xscale() == "log"
    assert low < 1e-4
    assert high > 1e-3
    assert slice_of(read_study(make_study(20)), "warmup_steps").figure().axes[0].get_xscale() == "linear"


def test_choices_stand_in_their_order():
    axes = slice_of(read_study(make_study(20)), "lora_r").figure().axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["4", "8", "16", "32", "64"]


def test_importance_finds_what_matters_and_is_silent_about_few():
    found, basis = importances(read_study(make_study(60)))
    assert next(iter(found)) == "learning_rate"
    assert sum(found.values()) == pytest.approx(1)
    assert "25%" in basis
    few, why = importances(read_study(make_study(3)))
    assert few == {}
    assert "3 trials" in why
    assert "3 trials" in importance(read_study(make_study(3))).alt


def test_importance_of_trials_that_are_all_the_same():
    trials = tuple(TrialRecord(n, "stopped", {"lora_r": 8}, {25: 2.0 + n}) for n in range(12))
    assert importances(StudyRecord("s", "minimize", trials))[0] == {}


def test_one_trial_far_off_does_not_flatten_the_rest():
    trials = [TrialRecord(n, "stopped", {"a": float(n)}, {25: 2.0 + n / 100}) for n in range(12)]
    trials.append(TrialRecord(12, "stopped", {"a": 12.0}, {25: 50.0}))
    axes = learning_curves(StudyRecord("s", "minimize", tuple(trials))).figure().axes[0]
    assert axes.get_ylim()[1] < 5
    assert any("1 above" in text.get_text() for text in axes.texts)
