"""From the lines on disk into MLflow's own database, without a server between: each thing once, whatever happened."""

import json
import logging
import math
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forge.errors import ForgeError
from forge.tuning import TuningConfig
from forge.tuning.tracking import open_tracking, upload
from forge.tuning.tracking.courier import all_delivered
from forge.tuning.tracking.delivery import Delivery
from forge.tuning.tracking.reading import batches, parts, unread
from forge.tuning.tracking.runs import Run, Study
from forge.tuning.tracking.spool import Spool

pytest.importorskip("mlflow")
pytest.importorskip("sqlalchemy")

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # MLflow leaves connections to the collector
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy"),  # SQLAlchemy's, of MLflow's own queries
]


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("database") / "empty.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def database(empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """`database("a")`: the address of an empty one."""
    monkeypatch.chdir(tmp_path)  # where MLflow puts artifacts

    def make(name: str) -> str:
        shutil.copy(empty_database, tmp_path / f"{name}.db")
        return f"sqlite:///{tmp_path / name}.db"

    return make


@pytest.fixture
def uri(database: Callable[[str], str]) -> str:
    return database("first")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def begun(run_dir: Path) -> tuple[Study, Run]:
    spool = Spool(run_dir / "mlflow")
    study = Study(spool, spool.key)
    spool.add(spool.key, "begin", name="study", parent=None)
    return study, study.trial(0, params={"rank": 8}, tags={"model_type": "llama"})


def deliver(run_dir: Path, uri: str) -> Delivery:
    delivery = Delivery(run_dir / "mlflow", uri, "forge")
    delivery.deliver()
    return delivery


def found(uri: str, *, deleted: bool = False) -> list[Any]:
    """The runs that MLflow has, the parent first."""
    from mlflow import MlflowClient
    from mlflow.entities import ViewType

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("forge")
    if experiment is None:
        return []
    runs = client.search_runs([experiment.experiment_id], run_view_type=ViewType.ALL if deleted else 1)
    return sorted(runs, key=lambda run: "mlflow.parentRunId" in run.data.tags)


def history(uri: str, run: Any, name: str) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    return [(one.step, one.value) for one in MlflowClient(tracking_uri=uri).get_metric_history(run.info.run_id, name)]


def test_a_study_and_its_trial_read_back(run_dir: Path, uri: str) -> None:
    from mlflow import MlflowClient

    study, trial = begun(run_dir)
    (run_dir / "adapter").mkdir()
    (run_dir / "adapter" / "weights").write_bytes(b"w")
    for step in range(1, 4):
        trial.log_metrics({"loss": 1 / step}, step=step)
    trial.log_metrics({"nan": math.nan, "inf": math.inf, "-inf": -math.inf}, step=1)
    trial.log_artifact(run_dir / "adapter", artifact_path="adapter")
    trial.log_artifact(run_dir / "adapter" / "weights")
    trial.end("FAILED")
    study.set_tags({"optimization_type": "single"})
    study.end()
    deliver(run_dir, uri)

    parent, nested = found(uri)
    assert (parent.info.status, nested.info.status) == ("FINISHED", "FAILED")
    assert parent.info.run_name == "study"
    assert parent.data.tags["optimization_type"] == "single"
    assert nested.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert nested.data.tags["trial_number"] == "0"
    assert nested.data.tags["model_type"] == "llama"
    assert nested.data.params == {"rank": "8"}
    assert history(uri, nested, "loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert math.isnan(nested.data.metrics["nan"])
    assert nested.data.metrics["inf"] > 1e308
    assert nested.data.metrics["-inf"] < -1e308
    client = MlflowClient(tracking_uri=uri)
    assert {one.path for one in client.list_artifacts(nested.info.run_id)} == {"adapter", "weights"}
    assert [one.path for one in client.list_artifacts(nested.info.run_id, "adapter")] == ["adapter/weights"]
    assert all_delivered(run_dir / "mlflow")


def test_the_time_is_that_of_the_logging_and_not_of_the_delivery(run_dir: Path, uri: str) -> None:
    _, trial = begun(run_dir)
    trial.log_metrics({"loss": 1.0}, step=1)
    trial.end()
    times = {line["do"]: line["time"] for line in map(json.loads, (run_dir / "mlflow" / "spool.jsonl").open())}
    deliver(run_dir, uri)
    nested = found(uri)[1]
    assert nested.info.end_time == times["end"]
    from mlflow import MlflowClient

    (metric,) = MlflowClient(tracking_uri=uri).get_metric_history(nested.info.run_id, "loss")
    assert metric.timestamp == times["metrics"]


def test_a_param_that_changed_becomes_a_tag(run_dir: Path, uri: str) -> None:
    _, trial = begun(run_dir)
    deliver(run_dir, uri)
    trial.log_params({"rank": 16, "lora_alpha": 32})
    trial.log_params({"rank": 8})
    trial.log_params({"rank": 16})
    deliver(run_dir, uri)
    nested = found(uri)[1]
    assert nested.data.params == {"rank": "8", "lora_alpha": "32"}
    assert nested.data.tags["changed.rank"] == "16"


def test_more_than_mlflow_takes_at_a_time(run_dir: Path, uri: str) -> None:
    _, trial = begun(run_dir)
    trial.log_metrics({f"m{number}": number for number in range(1500)}, step=1)
    trial.log_params({f"p{number}": number for number in range(150)})
    trial.set_tags({f"t{number}": number for number in range(150)})
    deliver(run_dir, uri)
    nested = found(uri)[1]
    assert len(nested.data.metrics) == 1500
    assert len(nested.data.params) == 151
    assert nested.data.tags["t149"] == "149"


def test_a_crash_between_making_a_run_and_writing_it_down_makes_no_second_run(
    run_dir: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(run_dir)
    with monkeypatch.context() as patched:
        patched.setattr(Delivery, "_write_state", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            deliver(run_dir, uri)
    assert len(found(uri)) == 1
    deliver(run_dir, uri)
    assert len(found(uri)) == 2


def test_telling_all_of_it_again_changes_nothing(run_dir: Path, uri: str) -> None:
    study, trial = begun(run_dir)
    for step in range(3):
        trial.log_metrics({"loss": 1.0, "nan": math.nan}, step=step)
    trial.end()
    study.end()
    deliver(run_dir, uri)
    (run_dir / "mlflow" / "delivered.json").unlink()
    deliver(run_dir, uri)
    parent, nested = found(uri)
    assert [step for step, _ in history(uri, nested, "loss")] == [0, 1, 2]
    assert [step for step, _ in history(uri, nested, "nan")] == [0, 1, 2]
    assert (parent.info.status, nested.info.status) == ("FINISHED", "FINISHED")


def test_a_line_that_mlflow_refuses_is_kept_and_the_others_arrive(
    run_dir: Path, uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    _, trial = begun(run_dir)
    spool = Spool(run_dir / "mlflow")
    trial.log_metrics({"before": 1.0})
    spool.add(f"{spool.key}/trial-0", "metrics", values={"not(allowed)": 1.0}, step=0)
    trial.log_metrics({"after": 1.0})
    deliver(run_dir, uri)
    assert found(uri)[1].data.metrics == {"before": 1.0, "after": 1.0}
    (refused,) = map(json.loads, (run_dir / "mlflow" / "refused.jsonl").open())
    assert refused["values"] == {"not(allowed)": 1.0}
    assert [record.levelname for record in caplog.records if record.name == "forge.tracking"] == ["WARNING"]


def test_lines_of_a_run_whose_beginning_is_lost_are_kept(run_dir: Path, uri: str) -> None:
    begun(run_dir)
    Spool(run_dir / "mlflow").add("nobody", "tags", values={"a": "b"})
    deliver(run_dir, uri)
    assert len(found(uri)) == 2
    assert "nobody" in (run_dir / "mlflow" / "refused.jsonl").read_text()


def test_an_emptied_database_is_told_all_of_it_anew(
    run_dir: Path, database: Callable[[str], str], empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, trial = begun(run_dir)
    trial.log_metrics({"loss": 1.0}, step=1)
    first, second = database("first"), database("second")
    deliver(run_dir, first)
    state = run_dir / "mlflow" / "delivered.json"
    state.write_text(state.read_text().replace("first.db", "second.db"))  # as if it were the first one, emptied
    trial.log_metrics({"loss": 2.0}, step=2)
    deliver(run_dir, second)
    assert history(second, found(second)[1], "loss") == [(1, 1.0), (2, 2.0)]


def test_another_address_is_told_all_of_it(run_dir: Path, database: Callable[[str], str]) -> None:
    _, trial = begun(run_dir)
    trial.log_metrics({"loss": 1.0}, step=1)
    first, second = database("first"), database("second")
    deliver(run_dir, first)
    upload(run_dir, second)
    assert history(second, found(second)[1], "loss") == [(1, 1.0)]
    assert len(found(first)) == 2


def test_a_file_is_logged_without_the_paths_of_this_machine(
    run_dir: Path, uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow import MlflowClient

    _, trial = begun(run_dir)
    record = run_dir / "run.json"
    record.write_text(json.dumps({"model": "/home/ada/models/llama", "uri": "http://ada:s3cret@host", "rank": 8}))
    trial.log_artifact(record, artifact_path="config", without_paths=True)
    record.unlink()  # the copy is of now
    trial.log_artifact(run_dir / "nowhere", without_paths=True)
    assert "nowhere is not logged" in caplog.text
    deliver(run_dir, uri)
    nested = found(uri)[1]
    fetched = MlflowClient(tracking_uri=uri).download_artifacts(nested.info.run_id, "config/run.json", str(tmp_path))
    assert json.loads(Path(fetched).read_text()) == {"model": "llama", "uri": "http://host", "rank": 8}


def test_an_artifact_that_is_gone_costs_a_warning(run_dir: Path, uri: str, caplog: pytest.LogCaptureFixture) -> None:
    _, trial = begun(run_dir)
    trial.log_artifact(run_dir / "nowhere")
    trial.log_metrics({"after": 1.0})
    deliver(run_dir, uri)
    assert found(uri)[1].data.metrics == {"after": 1.0}
    assert "nowhere is gone" in caplog.text


def test_a_deleted_experiment_is_restored(run_dir: Path, uri: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    client.delete_experiment(client.create_experiment("forge"))
    begun(run_dir)
    deliver(run_dir, uri)
    assert client.get_experiment_by_name("forge").lifecycle_stage == "active"
    assert len(found(uri)) == 2


def test_a_run_that_people_deleted_stays_deleted_and_holds_nothing_up(run_dir: Path, uri: str) -> None:
    from mlflow import MlflowClient

    study, trial = begun(run_dir)
    deliver(run_dir, uri)
    MlflowClient(tracking_uri=uri).delete_run(found(uri)[1].info.run_id)
    trial.log_metrics({"loss": 1.0})
    study.log_metrics({"loss": 2.0})
    deliver(run_dir, uri)
    (parent,) = found(uri)
    assert parent.data.metrics == {"loss": 2.0}


def test_what_is_not_ended_when_the_writer_is_gone_is_killed_and_goes_on_when_it_comes_back(
    run_dir: Path, uri: str
) -> None:
    begun(run_dir)
    deliver(run_dir, uri).abandon()
    assert [run.info.status for run in found(uri)] == ["KILLED", "KILLED"]
    study, trial = begun(run_dir)
    deliver(run_dir, uri)
    assert [run.info.status for run in found(uri)] == ["RUNNING", "RUNNING"]
    trial.end()
    study.end()
    deliver(run_dir, uri)
    assert [run.info.status for run in found(uri)] == ["FINISHED", "FINISHED"]


def test_a_last_line_cut_short_does_not_hold_up_the_rest(run_dir: Path, uri: str) -> None:
    _, trial = begun(run_dir)
    trial.log_metrics({"loss": 1.0}, step=1)
    with (run_dir / "mlflow" / "spool.jsonl").open("ab") as file:
        file.write(b'{"run": "x", "do": "metr')
    deliver(run_dir, uri)
    again = Spool(run_dir / "mlflow")
    Run(again, f"{again.key}/trial-0").log_metrics({"loss": 2.0}, step=2)
    deliver(run_dir, uri)
    assert [step for step, _ in history(uri, found(uri)[1], "loss")] == [1, 2]
    assert not (run_dir / "mlflow" / "refused.jsonl").exists()


def test_a_state_that_is_no_state_costs_nothing(run_dir: Path, uri: str) -> None:
    _, trial = begun(run_dir)
    trial.log_metrics({"loss": 1.0}, step=1)
    deliver(run_dir, uri)
    for nonsense in ("", '{"offset": 5', '{"other": 1}'):
        (run_dir / "mlflow" / "delivered.json").write_text(nonsense)
        deliver(run_dir, uri)
    assert history(uri, found(uri)[1], "loss") == [(1, 1.0)]


def test_a_database_that_cannot_be_opened_keeps_everything(run_dir: Path, uri: str, tmp_path: Path) -> None:
    begun(run_dir)
    (tmp_path / "broken.db").write_text("this is no database")
    with pytest.raises(ForgeError, match="did not take it all"):
        upload(run_dir, f"sqlite:///{tmp_path}/broken.db")
    upload(run_dir, uri)
    assert len(found(uri)) == 2


@pytest.mark.parametrize("code", ["RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST"])
def test_an_address_where_nothing_is_refuses_no_line_for_good(
    code: str, run_dir: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from mlflow.protos import databricks_pb2

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise MlflowException("404", error_code=getattr(databricks_pb2, code))

    _, trial = begun(run_dir)
    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "get_experiment_by_name", refuse)
        with pytest.raises(ForgeError, match="did not take it all: 404"):
            upload(run_dir, uri)
    deliver(run_dir, uri)
    trial.log_metrics({"loss": 1.0}, step=1)
    with monkeypatch.context() as patched:  # a proxy whose server is away
        for name in ("log_batch", "get_run"):
            patched.setattr(MlflowClient, name, refuse)
        with pytest.raises(ForgeError, match="did not take it all"):
            upload(run_dir, uri)
    upload(run_dir, uri)
    assert history(uri, found(uri)[1], "loss") == [(1, 1.0)]
    assert not (run_dir / "mlflow" / "refused.jsonl").exists()


def test_two_who_deliver_wait_for_each_other(run_dir: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from filelock import FileLock

    begun(run_dir)
    worker = threading.Thread(target=upload, args=(run_dir, uri))
    with FileLock(run_dir / "mlflow" / "lock"):
        worker.start()
        worker.join(1)
        assert worker.is_alive()
        assert found(uri) == []
    worker.join()
    assert len(found(uri)) == 2

    monkeypatch.setattr(sys.modules[upload.__module__], "_FOR_ANOTHER_S", 0.1)
    with FileLock(run_dir / "mlflow" / "lock"), pytest.raises(ForgeError, match="by another process"):
        upload(run_dir, uri)


def test_upload_takes_the_run_s_own_address_and_experiment(
    run_dir: Path, uri: str, monkeypatch: pytest.MonkeyPatch, database: Callable[[str], str]
) -> None:
    from mlflow import MlflowClient

    begun(run_dir)
    (run_dir / "mlflow" / "target.json").write_text(json.dumps({"uri": uri, "experiment": "of this run"}))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database("elsewhere"))
    upload(run_dir)
    assert MlflowClient(tracking_uri=uri).get_experiment_by_name("of this run") is not None


def test_the_process_that_delivers_dies_and_the_training_goes_on(
    run_dir: Path, uri: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "planted-Xyz123456")
    tracking = open_tracking(TuningConfig(mlflow_enabled=True, mlflow_tracking_uri=uri), run_dir)
    process = tracking._courier._process
    # Ctrl-C goes to a terminal's process group, and everyone may read arguments.
    assert os.getpgid(process.pid) != os.getpgrp()
    arguments = Path(f"/proc/{process.pid}/cmdline")
    if arguments.exists():
        assert b"sqlite" not in arguments.read_bytes()
        assert b"planted" not in arguments.read_bytes()
    os.kill(process.pid, signal.SIGKILL)
    tracking._courier._listener.join(60)
    trial = tracking.study("study").trial(0)
    trial.log_metrics({"loss": 1.0}, step=1)
    trial.end()
    tracking.close(5)
    ended, left = [record.message for record in caplog.records if record.name == "forge.tracking"]
    assert "has ended (-9;" in ended
    assert left.endswith(f"python -m forge.tuning.tracking {run_dir}")
    upload(run_dir, uri)
    parent, nested = found(uri)
    assert history(uri, nested, "loss") == [(1, 1.0)]
    # The study was never ended, and nobody is left who could.
    assert (parent.info.status, nested.info.status) == ("KILLED", "FINISHED")


def test_what_goes_in_one_request() -> None:
    def line(run: str, do: str) -> dict[str, Any]:
        return {"run": run, "do": do}

    lines = [
        line("a", "begin"),
        line("a", "params"),
        line("a", "metrics"),
        line("b", "metrics"),
        None,
        line("b", "tags"),
        line("b", "artifact"),
        line("b", "metrics"),
        None,
    ]
    together = [
        ([one["do"] for one in batch], end) for batch, end in batches([(one, i) for i, one in enumerate(lines)])
    ]
    assert together == [
        (["begin"], 0),
        (["params", "metrics"], 2),
        (["metrics", "tags"], 5),
        (["artifact"], 6),
        (["metrics"], 8),
    ]
    assert list(batches([(None, 7)])) == [([], 7)]
    assert list(parts([1, 2, 3], 2)) == [[1, 2], [3]]


def test_nothing_beyond_the_offset_is_read(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.add("a", "tags", values={})
    until = spool.path.stat().st_size
    spool.add("b", "tags", values={})
    assert [line["run"] for line, _ in unread(tmp_path, 0, until)] == ["a"]
    assert [line["run"] for line, _ in unread(tmp_path, until, None)] == ["b"]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
