"""A whole search, as MLflow has it afterwards."""

from pathlib import Path
from typing import Any

import pytest

from forge.tuning import BayesianLoRATuner, StudyResult, TuningConfig
from tuning.conftest import chats, searching

pytest.importorskip("mlflow")

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # MLflow leaves connections to the collector
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy"),  # SQLAlchemy's, of MLflow's own queries
]


@pytest.fixture(scope="module")
def tracked(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyResult, Any, list[Any]]:
    """The result, MLflow's client, and all runs."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("tracked")
    uri = f"sqlite:///{folder}/mlflow.db"
    mlflow = {"mlflow_enabled": True, "mlflow_tracking_uri": uri, "mlflow_experiment_name": "searching"}
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)  # where MLflow puts artifacts
        config = TuningConfig(**{**searching(folder / "study"), **mlflow, "n_trials": 2})
        result = BayesianLoRATuner(str(tiny_folder), chats(40), 8, preset="lora", config=config).run()
        client = MlflowClient(tracking_uri=uri)
        runs = client.search_runs([client.get_experiment_by_name("searching").experiment_id])
    return result, client, list(runs)


def test_a_run_for_the_study_and_one_for_each_trial(tracked: tuple[StudyResult, Any, list[Any]]) -> None:
    result, client, runs = tracked
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    trials = {int(run.data.tags["trial_number"]): run for run in runs if run is not parent}
    assert sorted(trials) == [0, 1]  # and none for the prior that was not tried
    assert {run.data.tags["mlflow.parentRunId"] for run in trials.values()} == {parent.info.run_id}
    frame = result.trials.set_index("number")
    for number, run in trials.items():
        assert {"rank", "lora_alpha", "lora_dropout", "learning_rate"} <= run.data.params.keys()
        assert float(run.data.params["learning_rate"]) == frame.loc[number, "params_learning_rate"]
        assert run.data.tags["optimization_type"] == "bayesian"
        assert run.data.tags["status"] == frame.loc[number, "status"]
        assert run.info.status == ("FINISHED" if frame.loc[number, "status"] == "completed" else "KILLED")
        history = {one.step: one.value for one in client.get_metric_history(run.info.run_id, "eval_loss")}
        assert history[25] == pytest.approx(frame.loc[number, "loss_25"])
    assert parent.data.params["best_rank"] == str(frame.loc[result.best_trial, "params_lora_r"])
    assert parent.data.metrics["best_value"] == pytest.approx(result.best_value)
    names = {one.path for one in client.list_artifacts(parent.info.run_id)}
    assert {"report.html", "study.json", "plots", "model"} <= names
    assert client.list_artifacts(trials[result.best_trial].info.run_id, "adapter")
