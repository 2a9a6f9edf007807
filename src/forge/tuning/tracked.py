"""A run as trackers see it: a study of one trial."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from .interruption import TuningInterrupted
from .tracking import Status, open_tracking, trial_params

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from .result import TuningResult
    from .run_folder import RunFolder
    from .settle import Settled

OPTIMIZATION_TYPE = "single"
# An adapter over a slow line takes its time; a server that does not answer ends the wait much earlier.
CLOSE_S = 180


class TrackedRun:
    """Opens the runs in MLflow, ends them as the block ends, and delivers what is left.

    Args:
        settled: the run.
        folder: its folder.
    """

    def __init__(self, settled: Settled, folder: RunFolder) -> None:
        self._settled, self._folder = settled, folder

    def __enter__(self) -> TrackedRun:
        settled, record = self._settled, self._settled.record
        self._tracking = open_tracking(settled.config, self._folder.path)
        tags = {"optimization_type": OPTIMIZATION_TYPE, "model_type": record["model"]["type"]}
        params = {name: choice.value for name, choice in settled.preset.choices.items()}
        about = {
            "preset": settled.preset.name,
            "seed": settled.config.seed,
            "train_rows": record["data"]["train"]["rows"],
            "validation_rows": record["data"]["validation"]["rows"],
        }
        self._study = self._tracking.study(self._folder.path.name, params=about, tags=tags)
        self._trial = self._study.trial(0, params=trial_params(params), tags=tags)
        return self

    def callbacks(self) -> list[TrainerCallback]:
        """What logs while the Trainer trains."""
        return [self._trial.callback()]

    def finish(self, result: TuningResult) -> None:
        """Hand over what came of it."""
        folder = self._folder
        for run in (self._trial, self._study):
            run.log_metrics(dict(result.metrics))
        self._trial.log_artifact(folder.adapter, artifact_path="adapter")
        for file in (folder.record, folder.recipe):
            if file.is_file():
                self._trial.log_artifact(file, artifact_path="config", without_paths=True)
        for part in (folder.training, folder.evaluation):
            if part.is_dir():
                self._trial.log_artifact(part, artifact_path=part.name)
        self._study.log_params({f"best_{name}": value for name, value in trial_params(result.params).items()})
        self._study.log_artifact(folder.report, without_paths=True)
        self._study.log_artifact(folder.result)
        self._study.log_artifact(folder.adapter, artifact_path="model")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stopped = kind is not None and issubclass(kind, (TuningInterrupted, KeyboardInterrupt, SystemExit))
        status: Status = "FINISHED" if kind is None else "KILLED" if stopped else "FAILED"
        self._trial.end(status)
        self._study.end(status)
        self._tracking.close(CLOSE_S)
