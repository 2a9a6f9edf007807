"""What a study leaves behind: the same after loading, a table of stable types, and honest sentences."""

import json
from pathlib import Path

import optuna
import pandas as pd
import pytest

from forge import get_preset
from forge.errors import ForgeError
from forge.tuning.study.conclusions import caveats, conclusions, saved_share, tokens
from forge.tuning.study.reading import StudyRecord, TrialRecord, read_study
from forge.tuning.study.result import StudyResult
from support.studies import BASE, make_study, make_trial


@pytest.fixture
def result(tmp_path: Path) -> StudyResult:
    return StudyResult.of(make_study(20, winner=6, finalists=[6, 10]), tmp_path)


def test_the_winner_is_a_recipe(result: StudyResult):
    assert result.best_trial == 6
    preset = get_preset(result.preset, hardware="cpu", **result.best_params)
    assert preset.choices["lora_r"].value == result.best_params["lora_r"]
    assert preset.choices["learning_rate"].value == result.best_params["learning_rate"]
    assert result.best_adapter_path == result.run_dir / "trials" / "6" / "adapter"
    assert result.best_value == pytest.approx(result.study.trial(6).loss)
    assert result.base == {"loss": BASE}


def test_given_params_come_first(tmp_path: Path):
    found = StudyResult.of(make_study(3), tmp_path, best_params={"lora_r": 8, "layers_to_transform": [4, 5]})
    assert found.best_params == {"lora_r": 8, "layers_to_transform": [4, 5]}


def test_without_a_winner_named_the_best_value_wins(tmp_path: Path):
    for maximize in (False, True):
        study = make_study(20, maximize=maximize)
        assert StudyResult.of(study, tmp_path).best_trial == study.best_trial.number


def test_no_completed_trial_is_no_result(tmp_path: Path):
    with pytest.raises(ForgeError, match="no completed trial"):
        StudyResult.of(optuna.create_study(study_name="empty"), tmp_path)


def test_it_loads_without_its_database(result: StudyResult):
    result.save()
    again = StudyResult.load(result.run_dir)
    assert again == result
    assert again.study.to_dict() == result.study.to_dict()
    pd.testing.assert_frame_equal(again.trials, result.trials)
    assert len(pd.read_csv(result.run_dir / "trials.csv")) == 20
    assert result.report_path.is_file()
    assert str(again) == str(result)


def test_loading_says_what_is_wrong(tmp_path: Path):
    with pytest.raises(ForgeError, match="no study is there"):
        StudyResult.load(tmp_path)
    (tmp_path / "study.db").touch()
    with pytest.raises(ForgeError, match="not over"):
        StudyResult.load(tmp_path)
    (tmp_path / "study.json").write_text("{}")
    with pytest.raises(ForgeError, match="not the result"):
        StudyResult.load(tmp_path)
    (tmp_path / "study.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(ForgeError, match="format 2"):
        StudyResult.load(tmp_path)


@pytest.mark.parametrize("count", [1, 3, 20])
def test_the_tables_types_do_not_depend_on_the_study(count: int, tmp_path: Path):
    found = StudyResult.of(make_study(count), tmp_path).trials
    expected = {
        **{"number": "Int64", "status": "string", "params_lora_r": "Int64", "params_learning_rate": "Float64"},
        **{"loss_25": "Float64", "loss_100": "Float64", "loss": "Float64", "combined_score": "Float64"},
        **{"steps": "Int64", "tokens": "Int64", "seconds": "Float64", "engine": "string", "why": "string"},
    }
    assert {name: str(found.dtypes[name]) for name in expected} == expected
    assert len(found) == count


def test_losses_of_a_maximised_study_are_positive():
    study = read_study(make_study(20, maximize=True))
    assert all(loss > 2 for trial in study.trials for loss in trial.losses.values())
    assert study.objective == "combined"
    assert study.value_of(study.best()) == study.best().scores["combined_score"]


def test_scores_that_came_later_are_read():
    study = make_study(3)
    study.set_user_attr("scores:0", {"bert_score": 0.91})
    assert read_study(study).trial(0).scores == {"bert_score": 0.91}


def test_a_trial_on_the_way_is_running_though_its_status_is_written():
    import random

    study = make_study(1)
    study.add_trial(make_trial(1, random.Random(3), status="running"))
    running = next(iter(study.get_trials(states=(optuna.trial.TrialState.RUNNING,))))
    study._storage.set_trial_user_attr(running._trial_id, "status", "completed")
    assert read_study(study).counts == {"completed": 1, "running": 1}


def test_tokens_are_counted_against_running_to_the_end():
    half = TrialRecord(0, "stopped", {}, {50: 2.0}, steps=50, total_steps=100, tokens=500)
    whole = TrialRecord(1, "completed", {}, {100: 2.0}, steps=100, total_steps=100, tokens=1000, value=2.0, loss=2.0)
    failed = TrialRecord(2, "failed", {}, {}, steps=10, total_steps=100, tokens=100)
    study = StudyRecord("s", "minimize", (half, whole, failed))
    assert tokens(study) == (1500, 2000)
    assert saved_share(study) == pytest.approx(0.25)
    assert "25% saved" in " ".join(conclusions(study))


def completed(number: int, loss: float, **params: object) -> TrialRecord:
    return TrialRecord(number, "completed", params, {100: loss}, value=loss, loss=loss)


@pytest.mark.parametrize(
    ("dimension", "value", "edge"),
    [
        ({"low": 1e-4, "high": 1e-3, "log": True}, 9.6e-4, "upper"),
        ({"low": 1e-4, "high": 1e-3, "log": True}, 1.05e-4, "lower"),
        ({"low": 1e-4, "high": 1e-3, "log": True}, 3e-4, None),
        ({"low": 0.0, "high": 0.1}, 0.0, None),
        ({"choices": [4, 8, 16]}, 16, "upper"),
        ({"choices": [4, 8, 16]}, 8, None),
        ({"choices": [0.0, 0.05]}, 0.05, None),
        ({"choices": ["attention", "all-linear"]}, "attention", None),
    ],
)
def test_a_winner_at_the_edge_is_told_to_widen(dimension: dict[str, object], value: object, edge: str | None):
    study = StudyRecord("s", "minimize", (completed(0, 2.0, it=value),), settings={"space": {"it": dimension}})
    said = [line for line in caveats(study) if "edge" in line]
    assert [edge in line for line in said] == ([True] if edge else [])


def test_differences_within_the_tolerance_are_said_to_be_none():
    near = StudyRecord("s", "minimize", (completed(0, 2.0), completed(1, 2.005), completed(2, 2.1)))
    assert any("Trial 1 ended within 0.5%" in line for line in caveats(near))
    far = StudyRecord("s", "minimize", (completed(0, 2.0), completed(1, 2.1)))
    assert not any("ended within" in line for line in caveats(far))


def test_a_search_that_found_nothing_says_so():
    study = StudyRecord("s", "minimize", (completed(0, 2.0),), base={"loss": 1.9})
    assert any("nothing that is better than the base" in line for line in conclusions(study))
    assert "so there is no winner" in conclusions(StudyRecord("s", "minimize", ()))[-1]


def test_who_has_the_lowest_loss_is_named_when_the_score_chose_another():
    study = StudyRecord(
        "s", "minimize", (completed(0, 2.0), completed(1, 2.2)), settings={"objective": "bert_score"}, winner=1
    )
    assert any("Trial 0 has the lowest held-out loss" in line for line in conclusions(study))
