"""A study as trackers see it: a parent run, and in it a run for each trial that was launched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .tracking import Status, open_tracking, trial_params

if TYPE_CHECKING:
    from .config import TuningConfig
    from .study.reading import TrialRecord
    from .study.result import StudyResult

OPTIMIZATION_TYPE = "bayesian"
# Adapters of many trials over a slow line take their time; a server that does not answer ends the wait much earlier.
CLOSE_S = 600
_FAILED = {"failed", "out_of_memory", "infeasible"}


def tell_trackers(
    config: TuningConfig,
    result: StudyResult,
    record: Mapping[str, Any],
    recipe_of: Callable[[Mapping[str, Any]], Mapping[str, Any]],
) -> None:
    """Tell MLflow about a study that is over, if the config says so; told again, its runs go on and are no others.

    All of it is told at the end, by the process that ends the study: the trials of many workers are one study then, and
    a server that is away costs no worker anything. While it runs, `optuna-dashboard` shows the study's storage.

    Args:
        config: whether and where.
        result: of the study.
        record: what the study is of.
        recipe_of: from a trial's parameters to all values of its recipe.
    """
    if not config.mlflow_enabled:
        return
    tags = {"optimization_type": OPTIMIZATION_TYPE, "model_type": record["model"]["type"]}
    about = {
        "preset": result.preset,
        "seed": config.seed,
        "objective": result.objective,
        "n_trials": config.n_trials,
        "train_rows": record["data"]["train"]["rows"],
        "validation_rows": record["data"]["validation"]["rows"],
    }
    with open_tracking(config, result.run_dir) as tracking:
        study = tracking.study(result.run_dir.name, params=about, tags=tags)
        for trial in result.study.trials:
            params = trial_params(recipe_of(trial.params))
            run = study.trial(trial.number, params=params, tags={**tags, "status": trial.status})
            for percent, loss in sorted(trial.losses.items()):
                run.log_metrics({"eval_loss": loss}, step=percent)
            run.log_metrics(_figures(trial))
            if trial.status == "completed":
                run.log_artifact(result.run_dir / "trials" / str(trial.number) / "adapter", artifact_path="adapter")
            status: Status = "FAILED" if trial.status in _FAILED else "KILLED" if _was_stopped(trial) else "FINISHED"
            run.end(status)
        best = trial_params(recipe_of(result.best.params))
        study.log_params({f"best_{name}": value for name, value in best.items()})
        study.log_metrics({"best_value": result.best_value, **_figures(result.best)})
        study.log_artifact(result.report_path, without_paths=True)
        study.log_artifact(result.run_dir / "study.json", without_paths=True)
        study.log_artifact(result.run_dir / "plots", artifact_path="plots")
        study.log_artifact(result.best_adapter_path, artifact_path="model")
        study.end("FINISHED")
        tracking.close(CLOSE_S)


def _was_stopped(trial: TrialRecord) -> bool:
    return trial.status in ("stopped", "diverged")


def _figures(trial: TrialRecord) -> dict[str, Any]:
    found: dict[str, Any] = {"loss": trial.loss, **trial.scores, "steps": trial.steps, "tokens": trial.tokens}
    return {name: value for name, value in found.items() if value is not None}
