"""Against a real MLflow server with SQLite: what arrives, once, whoever is killed on the way."""

import math
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("mlflow.server")

from forge.tuning import TuningConfig
from forge.tuning.tracking import open_tracking, upload
from support.mlflow_server import MlflowServer

SECRET = "planted-Xyz123456"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with MlflowServer(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def experiment(request):
    return request.node.name


def config(uri, experiment):
    return TuningConfig(mlflow_enabled=True, mlflow_tracking_uri=uri, mlflow_experiment_name=experiment)


def history(server, run, name):
    return [(point.step, point.value) for point in server.client().get_metric_history(run.info.run_id, name)]


def log_some(tracking, steps, folder=None):
    study = tracking.study("study", params={"preset": "lora"}, tags={"optimization_type": "single"})
    trial = study.trial(0, params={"rank": 8}, tags={"model_type": "llama"})
    for step in steps:
        trial.log_metrics({"loss": 1.0 / step}, step=step)
    if folder:
        trial.log_artifact(folder, artifact_path="adapter")
    trial.end()
    study.log_metrics({"combined_score": 0.5})
    study.end()


def test_a_study_and_its_trial_arrive(server, experiment, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "weights.bin").write_bytes(b"12")
    with open_tracking(config(server.uri, experiment), tmp_path / "run") as tracking:
        study = tracking.study("my study", params={"long": "x" * 9000}, tags={"optimization_type": "single"})
        trial = study.trial(3, params={"rank": 8, "lora_alpha": 16}, tags={"model_type": "llama"})
        trial.log_metrics({"loss": 1.0, "nan": math.nan, "inf": math.inf, "a(b)": 1.0}, step=2)
        trial.log_metrics({f"m{number}": number for number in range(1200)}, step=2)
        trial.log_params({f"p{number}": number for number in range(150)})
        trial.log_artifact(adapter, artifact_path="adapter")
        trial.end("FAILED")
        study.end()
    parent, nested = server.runs(experiment)
    assert (parent.info.run_name, parent.info.status, nested.info.status) == ("my study", "FINISHED", "FAILED")
    assert nested.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert nested.data.tags["trial_number"] == "3"
    assert nested.data.tags["model_type"] == "llama"
    assert {"rank": "8", "lora_alpha": "16", "p149": "149"}.items() <= nested.data.params.items()
    assert nested.data.metrics["m1199"] == 1199
    assert nested.data.metrics["a_b_"] == 1.0
    assert math.isnan(nested.data.metrics["nan"])
    assert nested.data.metrics["inf"] > 1e300
    (file,) = server.client().list_artifacts(nested.info.run_id, "adapter")
    assert file.path == "adapter/weights.bin"


def test_no_secret_and_no_user_arrives(server, experiment, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    uri = server.uri.replace("http://", f"http://ada:{SECRET}-url@")
    with open_tracking(config(uri, experiment), tmp_path / "run") as tracking:
        study = tracking.study(f"study {SECRET}", params={"hub_token": f"{SECRET}-own", SECRET: 1}, tags={"x": SECRET})
        study.trial(0, params={"judge": {"api_key": f"{SECRET}-deep"}}).log_metrics({f"loss/{SECRET}": 1.0})
        study.log_artifact(Path(__file__), artifact_path=f"of {SECRET}")
    assert len(server.runs(experiment)) == 2
    for folder in (server.folder / "mlflow.db", tmp_path / "run"):
        for file in [folder] if folder.is_file() else folder.rglob("*"):
            if file.is_file():
                assert SECRET.encode() not in file.read_bytes(), file
    assert not any(SECRET in str(path) for path in server.artifacts.rglob("*"))
    dump = "\n".join(sqlite3.connect(server.database).iterdump())
    assert "study [hidden]" in dump
    for run in server.runs(experiment):
        assert not {"mlflow.user", "mlflow.source.name"} & run.data.tags.keys()


def test_the_server_is_killed_midway_and_comes_back(server, experiment, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="forge.tracking")
    with open_tracking(config(server.uri, experiment), tmp_path / "run") as tracking:
        trial = tracking.study("study").trial(0)
        trial.log_metrics({"loss": 1.0}, step=1)
        _until(lambda: len(server.runs(experiment)) == 2 and server.runs(experiment)[1].data.metrics)
        server.kill()
        with monkeypatch.context() as patched:  # the training itself needs no network

            def refuse(*args, **kwargs):
                raise AssertionError("a socket")

            patched.setattr(socket, "socket", refuse)
            for step in range(2, 50):
                trial.log_metrics({"loss": 1.0 / step}, step=step)
        _until(lambda: any("takes nothing" in record.message for record in caplog.records))
        server.start()
        tracking.close(120)
    (_, nested) = server.runs(experiment)
    assert history(server, nested, "loss") == [(step, 1.0 / step) for step in range(1, 50)]
    assert sum(record.levelname == "WARNING" for record in caplog.records) == 1


@pytest.mark.long
def test_a_server_that_stays_away_leaves_a_command_that_delivers(server, experiment, tmp_path, caplog):
    with open_tracking(config("http://127.0.0.1:9", experiment), tmp_path / "run") as tracking:
        log_some(tracking, range(1, 9))
        tracking.close(8)
    said = [record.message for record in caplog.records]
    assert said[-1].endswith(f"python -m forge.tuning.tracking {tmp_path / 'run'}")
    assert len(said) <= 2
    for _ in range(2):  # again, and nothing is there twice
        done = command(tmp_path / "run", server.uri)
        assert done.returncode == 0, done.stderr
    _, nested = server.runs(experiment)
    assert history(server, nested, "loss") == [(step, 1.0 / step) for step in range(1, 9)]
    assert nested.info.status == "FINISHED"


@pytest.mark.long
def test_told_anew_from_the_beginning_nothing_is_there_twice(server, experiment, tmp_path):
    """As after a kill between a request and the note that it was made."""
    with open_tracking(config(server.uri, experiment), tmp_path / "run") as tracking:
        log_some(tracking, range(1, 9), tmp_path)
    (tmp_path / "run" / "mlflow" / "delivered.json").unlink()
    upload(tmp_path / "run", server.uri)
    parent, nested = server.runs(experiment)
    assert history(server, nested, "loss") == [(step, 1.0 / step) for step in range(1, 9)]
    assert parent.info.status == nested.info.status == "FINISHED"


PROGRAM = """
import sys, time
from pathlib import Path
from forge.tuning import TuningConfig
from forge.tuning.tracking import open_tracking
uri, experiment, folder, first, last = sys.argv[1:]
config = TuningConfig(mlflow_enabled=True, mlflow_tracking_uri=uri, mlflow_experiment_name=experiment)
tracking = open_tracking(config, Path(folder))
study = tracking.study("study")
trial = study.trial(0, params={"rank": 8})
for step in range(int(first), int(last)):
    trial.log_metrics({"loss": 1.0 / step}, step=step)
print("logged", flush=True)
if last != "20":
    time.sleep(600)
trial.end(); study.end(); tracking.close(120)
"""


def test_the_training_is_killed_and_goes_on_in_the_same_runs(server, experiment, tmp_path):
    (tmp_path / "run").mkdir()
    arguments = [sys.executable, "-c", PROGRAM, server.uri, experiment, str(tmp_path / "run")]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen([*arguments, "1", "12"], stdout=subprocess.PIPE, env=environ) as process:
        assert process.stdout.readline() == b"logged\n"
        process.send_signal(signal.SIGKILL)
    done = subprocess.run([*arguments, "8", "20"], capture_output=True, check=False, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    parent, nested = server.runs(experiment)
    assert history(server, nested, "loss") == [(step, 1.0 / step) for step in range(1, 20)]
    assert parent.info.status == nested.info.status == "FINISHED"


@pytest.mark.long
def test_a_run_that_is_killed_for_good_is_delivered_and_marked(server, experiment, tmp_path):
    (tmp_path / "run").mkdir()
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    arguments = [sys.executable, "-c", PROGRAM, server.uri, experiment, str(tmp_path / "run"), "1", "12"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, env=environ) as process:
        assert process.stdout.readline() == b"logged\n"
        process.send_signal(signal.SIGKILL)
    _until(lambda: [run.info.status for run in server.runs(experiment)] == ["KILLED", "KILLED"])
    assert len(history(server, server.runs(experiment)[1], "loss")) == 11


@pytest.mark.long
def test_sqlite_without_a_server(experiment, tmp_path):
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with open_tracking(config(uri, experiment), tmp_path / "run") as tracking:
        log_some(tracking, range(1, 4))
        tracking.close(120)
    client = MlflowClient(tracking_uri=uri)
    assert len(client.search_runs([client.get_experiment_by_name(experiment).experiment_id])) == 2


@contextmanager
def answering(answer):
    """A server that reads a request and answers with these bytes; None never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        held = []

        def serve():
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                held.append(connection)
                if answer:
                    connection.recv(65536)
                    connection.sendall(answer)
                    connection.close()

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
        for connection in held:
            connection.close()


def status(line):
    return f"HTTP/1.1 {line}\r\nContent-Length: 0\r\n\r\n".encode()


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(None, id="hangs", marks=pytest.mark.long),
        pytest.param(status("401 Unauthorized"), id="401", marks=pytest.mark.long),
        pytest.param(status("500 Internal Server Error"), id="500", marks=pytest.mark.long),
        pytest.param(status("403 Forbidden"), id="403", marks=pytest.mark.long),
        pytest.param(status("404 Not Found"), id="404", marks=pytest.mark.long),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n<ok>", id="no mlflow", marks=pytest.mark.long),
    ],
)
def test_a_server_that_does_not_do_its_work_loses_nothing(answer, tmp_path, caplog):
    with answering(answer) as uri:
        with open_tracking(config(uri, "forge"), tmp_path / "run") as tracking:
            log_some(tracking, range(1, 4))
            tracking.close(8)
        assert "python -m forge.tuning.tracking" in caplog.records[-1].message
        assert len(caplog.records) <= 2
        if answer:
            done = command(tmp_path / "run", uri)
            assert done.returncode == 1
            assert "did not take it all" in done.stderr
    text = (tmp_path / "run" / "mlflow" / "spool.jsonl").read_text()
    assert text.count('"loss"') == 3
    target = f"sqlite:///{tmp_path / 'mlflow.db'}"
    upload(tmp_path / "run", target)
    assert not (tmp_path / "run" / "mlflow" / "refused.jsonl").exists()


@pytest.mark.long
def test_a_worker_that_was_forked_does_not_hold_up_the_end(experiment, tmp_path, caplog):
    """It has inherited the pipe to the process that delivers."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tracking = open_tracking(config(uri, experiment), tmp_path / "run")
    log_some(tracking, range(1, 4))
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    os.close(reader)
    tracking.close(120)
    os.close(writer)
    os.waitpid(child, 0)
    assert not caplog.records


def command(folder, uri):
    return subprocess.run(
        [sys.executable, "-m", "forge.tuning.tracking", str(folder), "--tracking-uri", uri],
        capture_output=True,
        check=False,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def _until(what, timeout_s=120):
    end = threading.Event()
    for _ in range(int(timeout_s / 0.5)):
        if what():
            return
        end.wait(0.5)
    raise TimeoutError
