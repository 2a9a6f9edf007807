"""A whole run of LoRATuner, as MLflow has it afterwards."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forge.tuning import LoRATuner, TuningConfig, TuningResult
from tuning.conftest import chats, small

pytest.importorskip("mlflow")
pytest.importorskip("sqlalchemy")

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # MLflow leaves connections to the collector
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy"),  # SQLAlchemy's, of MLflow's own queries
]
SECRET = "planted-Xyz123456"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tracked")


@pytest.fixture(scope="module")
def tracked(tiny_folder: Path, folder: Path) -> tuple[TuningResult, Any, Any, Any]:
    """The result, MLflow's client, the parent and the nested run."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{folder}/mlflow.db"
    mlflow = {"mlflow_enabled": True, "mlflow_tracking_uri": uri, "mlflow_experiment_name": "tuning"}
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)  # where MLflow puts artifacts
        patched.setenv("HF_TOKEN", SECRET)
        config = TuningConfig(**{**small(folder / "run"), **mlflow})
        result = LoRATuner(str(tiny_folder), chats(40), 8, preset="lora", config=config).run()
        client = MlflowClient(tracking_uri=uri)
        runs = client.search_runs([client.get_experiment_by_name("tuning").experiment_id])
    parent, nested = sorted(runs, key=lambda run: "mlflow.parentRunId" in run.data.tags)
    return result, client, parent, nested


def files(client: Any, run: Any, folder: str | None = None) -> set[str]:
    found = client.list_artifacts(run.info.run_id, folder)
    inside = set().union(*(files(client, run, one.path) for one in found if one.is_dir))
    return inside | {one.path for one in found if not one.is_dir}


def test_a_whole_run_reads_back(tracked: tuple[TuningResult, Any, Any, Any], tmp_path: Path) -> None:
    result, client, parent, nested = tracked
    assert (parent.info.status, nested.info.status) == ("FINISHED", "FINISHED")
    assert nested.data.tags["mlflow.parentRunId"] == parent.info.run_id

    assert nested.data.params["rank"] == "4"
    assert nested.data.params["lora_dropout"] == "0.1"
    assert {"lora_alpha", "learning_rate"} <= nested.data.params.keys()
    for run in (parent, nested):
        assert run.data.tags["optimization_type"] == "single"
        assert run.data.tags["model_type"] == "llama"
        assert {"loss", "base_loss", "train_loss"} <= run.data.metrics.keys()
    assert nested.data.tags["trial_number"] == "0"
    assert parent.data.params["best_rank"] == "4"
    assert parent.data.metrics["loss"] == pytest.approx(result.metrics["loss"])

    shown = files(client, nested)
    assert {"adapter/adapter_model.safetensors", "adapter/README.md", "config/run.json"} <= shown
    assert any(name.startswith("evaluation/") for name in shown)
    assert any(name.startswith("training/") for name in shown)
    of_study = files(client, parent)
    assert {"report.html", "result.json", "model/adapter_model.safetensors"} <= of_study
    fetched = Path(client.download_artifacts(nested.info.run_id, "adapter/adapter_model.safetensors", str(tmp_path)))
    assert fetched.read_bytes() == (result.adapter_path / "adapter_model.safetensors").read_bytes()


def test_the_losses_of_the_training_are_there_at_each_step(tracked: tuple[TuningResult, Any, Any, Any]) -> None:
    _, client, _, nested = tracked
    steps = [one.step for one in client.get_metric_history(nested.info.run_id, "loss") if one.step]
    assert steps == list(range(1, 9))


def test_no_secret_is_in_anything_that_mlflow_has(tracked: tuple[TuningResult, Any, Any, Any], folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            assert SECRET.encode() not in file.read_bytes(), file


@pytest.mark.long
def test_a_run_that_fails_is_failed_there_too(
    make_tuner: Callable[..., LoRATuner], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("forge.tuning.stages.Stages._evaluated", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(OSError, match="disk full"):
        make_tuner(mlflow_enabled=True, mlflow_tracking_uri=uri).run()
    client = MlflowClient(tracking_uri=uri)
    runs = client.search_runs([client.get_experiment_by_name("forge").experiment_id])
    assert [run.info.status for run in runs] == ["FAILED", "FAILED"]
