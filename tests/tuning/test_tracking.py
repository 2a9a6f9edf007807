"""What a run tells MLflow, before there is a server: the lines, names, secrets, refusals; and nothing that waits."""

import json
import os
import re
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest

from forge.errors import ConflictError, ForgeError, UnsupportedError
from forge.tuning import TuningConfig
from forge.tuning.tracking import open_tracking, trial_params, upload
from forge.tuning.tracking.names import key, texts
from forge.tuning.tracking.private import HIDDEN, told
from forge.tuning.tracking.runs import Study
from forge.tuning.tracking.spool import Spool


def lines(folder):
    return [json.loads(line) for line in (folder / "spool.jsonl").read_text().splitlines() if line.startswith("{")]


@pytest.fixture
def study(tmp_path):
    """A study that is written down and delivered by nobody."""
    spool = Spool(tmp_path / "mlflow")
    return Study(spool, spool.key)


def test_off_is_the_same_calls_and_nothing_on_disk(tmp_path):
    with open_tracking(TuningConfig(), tmp_path) as tracking:
        study = tracking.study("name", params={"a": 1}, tags={"b": 2})
        trial = study.trial(0, params={"a": 1}, tags={"b": 2})
        for run in (study, trial):
            run.log_metrics({"loss": 1.0}, step=3)
            run.log_params({"a": 1})
            run.set_tags({"a": 1})
            run.log_artifact(tmp_path, artifact_path="adapter")
            run.callback().on_log(None, SimpleNamespace(is_world_process_zero=True, global_step=1), None, {"loss": 1.0})
            run.end("FAILED")
    assert list(tmp_path.iterdir()) == []


def test_without_mlflow_the_install_command_is_named_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("forge.tuning.tracking.runs.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=re.escape("pip install 'transformers-forge[mlflow]'")):
        open_tracking(TuningConfig(mlflow_enabled=True), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_address_that_can_never_work_is_refused_at_once(tmp_path):
    pytest.importorskip("mlflow")
    with pytest.raises(ConflictError, match="ftp"):
        open_tracking(TuningConfig(mlflow_enabled=True, mlflow_tracking_uri="ftp://ada:sesame9@host"), tmp_path)
    with pytest.raises(ConflictError) as caught:
        open_tracking(TuningConfig(mlflow_enabled=True, mlflow_tracking_uri="ftp://ada:sesame9@host"), tmp_path)
    assert "sesame9" not in str(caught.value)


def test_the_training_never_touches_a_socket(study, monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError("a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    trial = study.trial(0, params={"rank": 8}, tags={"model_type": "llama"})
    state = SimpleNamespace(is_world_process_zero=True, global_step=5)
    trial.callback().on_log(None, state, None, {"loss": 1.5, "eval_loss": 2, "note": "text", "flag": True})
    trial.log_artifact(tmp_path)
    trial.end()
    (metrics,) = [line for line in lines(tmp_path / "mlflow") if line["do"] == "metrics"]
    assert metrics["values"] == {"loss": 1.5, "eval_loss": 2.0}
    assert metrics["step"] == 5


def test_other_ranks_log_nothing(study, tmp_path):
    state = SimpleNamespace(is_world_process_zero=False, global_step=5)
    study.callback().on_log(None, state, None, {"loss": 1.5})
    assert not (tmp_path / "mlflow" / "spool.jsonl").exists()


def test_what_cannot_be_written_costs_one_warning_and_no_step(study, tmp_path, caplog):
    (tmp_path / "mlflow" / "spool.jsonl").mkdir()
    for step in range(3):
        study.log_metrics({"loss": 1.0}, step=step)
    assert len(caplog.records) == 1


def test_a_step_repeated_from_a_checkpoint_is_told_once(tmp_path):
    for loss in (1.0, 2.0):
        spool = Spool(tmp_path)
        Study(spool, spool.key).log_metrics({"loss": loss}, step=3)
    spool = Spool(tmp_path)
    Study(spool, spool.key).log_metrics({"loss": 1.0, "new": 4.0}, step=3)
    assert [line["values"] for line in lines(tmp_path)] == [{"loss": 1.0}, {"new": 4.0}]


def test_within_one_process_nothing_is_dropped(study, tmp_path):
    study.log_metrics({"loss": 1.0}, step=3)
    study.log_metrics({"loss": 2.0}, step=3)
    assert [line["values"]["loss"] for line in lines(tmp_path / "mlflow")] == [1.0, 2.0]


def test_a_line_cut_short_by_a_kill_is_ended(tmp_path):
    spool = Spool(tmp_path)
    spool.add(spool.key, "tags", values={"a": "1"})
    with spool.path.open("ab") as file:
        file.write(b'{"run": "x", "do": "tag')
    again = Spool(tmp_path)
    again.add(again.key, "tags", values={"b": "2"})
    assert again.key == spool.key
    whole = [line for line in spool.path.read_bytes().split(b"\n") if line.endswith(b"}")]
    assert len(whole) == 2


@pytest.mark.parametrize("name", ["a(b)[c]", "/absolute", "../up", "a//b", "", "é" * 400, "x" * 400, "a\nb"])
def test_every_name_becomes_one_that_mlflow_takes(name):
    validation = pytest.importorskip("mlflow.utils.validation")
    validation._validate_metric_name(key(name))
    validation._validate_param_name(key(name))
    validation._validate_tag_name(key(name))


def test_long_values_are_cut():
    assert len(texts({"a": "x" * 9000}, 6000)["a"]) == 6000


def test_a_preset_s_names_become_those_of_a_trial():
    assert trial_params({"lora_r": 8, "learning_rate": 1e-4}) == {"rank": 8, "learning_rate": 1e-4}


SECRET = "planted-Xyz123456"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hub_token", SECRET),
        ("judge.api_key", SECRET),
        ("accessToken", SECRET),
        ("AWS_SECRET_ACCESS_KEY", SECRET),
        ("note", {"inner": {"api_key": SECRET}}),
        ("note", f'{{"password": "{SECRET}"}}'),
        ("note", f"--api-key={SECRET} --x=1"),
        ("uri", f"http://ada:{SECRET}@host:5000/x"),
        ("uri", f"https://host/x?token={SECRET}&a=1"),
        ("note", "of a token: hf_abcdefghijklmnopqrstuv" + SECRET),
        ("note", f"the variable's value is {SECRET}-env"),
    ],
)
def test_secrets_are_not_told(name, value, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", f"{SECRET}-env")
    assert SECRET not in told(name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("eos_token", "</s>"), ("max_new_tokens", 64), ("note", "tokens: 12"), ("pad_token_id", 0), ("hub_token", None)],
)
def test_what_is_no_secret_is_told(name, value):
    assert told(name, value) == str(value)


def test_no_secret_in_the_spool(study, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    study.log_params({"a": SECRET, SECRET: 1, "hub_token": "short"})
    study.set_tags({"b": [SECRET]})
    study.log_metrics({f"loss/{SECRET}": 1.0})
    study.log_artifact(tmp_path, artifact_path=SECRET)
    text = (tmp_path / "mlflow" / "spool.jsonl").read_text()
    assert SECRET not in text
    assert "short" not in text
    assert HIDDEN in text


def test_a_folder_of_no_run_is_refused_by_name(tmp_path):
    with pytest.raises(ForgeError, match="holds nothing for MLflow"):
        upload(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "forge.tuning.tracking", str(tmp_path)],
        capture_output=True,
        check=False,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 1
    assert "holds nothing for MLflow" in done.stderr
    assert "Traceback" not in done.stderr
