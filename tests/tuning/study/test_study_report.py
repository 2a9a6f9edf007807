"""The page: everything that matters is on it, and nothing of this machine."""

import re
from pathlib import Path

import pytest

from forge import get_preset
from forge.tuning.study.result import StudyResult
from forge.tuning.study.study_report import page, snippet
from support.studies import make_study


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    tmp_path = tmp_path_factory.mktemp("report")
    study = make_study(20, winner=6, finalists=[6, 10])
    return page(StudyResult.of(study, tmp_path, notes=("trained on /home/ada/data/chats.jsonl",))).html()


def test_it_has_all_its_parts(html: str):
    headings = re.findall("<h2>(.*?)</h2>", html)
    for wanted in ("What may be concluded", "The winner", "The finalists", "Charts", "What was searched", "Trials"):
        assert wanted in headings
    assert "Stopped on evidence: 10" in headings
    assert {"Diverged: 1", "Too big for the memory: 2", "Failed: 1", "How it was run"} <= set(headings)
    assert html.count("<img") == 7
    assert "2.900 → " in html


def test_nothing_of_this_machine_is_on_it(html: str, tmp_path: Path):
    assert "/home/ada" not in html
    assert str(tmp_path) not in html
    assert "RuntimeError: a tensor of the wrong shape" in html
    assert "train.py" in html


def test_no_credentials_are_on_it(tmp_path: Path):
    study = make_study(3)
    study.set_user_attr("settings", {**study.user_attrs["settings"], "model": "http://ada:hunter2@host/model"})
    found = page(StudyResult.of(study, tmp_path, notes=("postgresql://ada:hunter2@db/forge",))).html()
    assert "hunter2" not in found


def test_the_snippet_makes_the_winners_recipe(tmp_path: Path):
    result = StudyResult.of(make_study(20), tmp_path, preset="lora", best_params={"lora_r": 8, "freeze_ratio": 0.5})
    lines = snippet(result)
    assert "freeze_ratio=0.5" in lines
    space: dict[str, object] = {}
    exec(lines, space)  # it is for people who paste it
    assert space["preset"].choices["lora_r"].value == get_preset("lora", lora_r=8).choices["lora_r"].value


def test_long_traces_are_shortened_and_alike_ones_shown_once(tmp_path: Path):
    import random

    import optuna

    from support.studies import make_trial

    study = make_study(1)
    for number in (1, 2):
        trial = make_trial(number, random.Random(number), status="failed")
        trial.set_user_attr("trace", "\n".join(f"line {n}" for n in range(100)))
        study.add_trial(trial)
    assert len(study.get_trials(states=(optuna.trial.TrialState.FAIL,))) == 2
    found = page(StudyResult.of(study, tmp_path)).html()
    assert "line 99" in found
    assert "line 50\n" not in found
    assert found.count("line 99") == 1
    assert "Trial 1, 2:" in found


def test_a_hundred_trials_and_text_that_looks_like_html(tmp_path: Path):
    study = make_study(2)
    study.set_user_attr("settings", {**study.user_attrs["settings"], "sampler": "<b>tpe</b>"})
    found = page(StudyResult.of(study, tmp_path)).html()
    assert "<b>tpe" not in found
