"""Lines of a spool to runs in MLflow, each once, whenever it answers."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...reporting.charts import write_whole
from .names import METRICS_A_BATCH, PARAMS_A_BATCH, PARENT, RUN_KEY, TAG, TAGS_A_BATCH, texts
from .private import told
from .reading import batches, parts, unread
from .spool import LINES

logger = logging.getLogger("forge.tracking")

STATE, REFUSED = "delivered.json", "refused.jsonl"
_UNKNOWN = "RESOURCE_DOES_NOT_EXIST"
# What MLflow says of a request that no repetition makes better.
_USELESS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE", "RESOURCE_ALREADY_EXISTS", _UNKNOWN}
# Of HTTP's own: who may, how long, how often. What else a server answers with 4xx it will answer again.
_MAY_CHANGE = {401, 403, 407, 408, 425, 429}
_SIGN_IN = "; it wants MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"


@dataclass
class State:
    """How far the delivery is.

    Args:
        to: the address and experiment that it goes to.
        offset: of the first line, in bytes, that was not delivered.
        runs: MLflow's ids by forge's keys.
        open: the keys of the runs that have begun and not ended.
    """

    to: str = ""
    offset: int = 0
    runs: dict[str, str] = field(default_factory=dict)
    open: list[str] = field(default_factory=list)


class _NeverBegunError(Exception):
    """A line of a run whose beginning is lost."""


class _UnknownThereError(Exception):
    """MLflow had the runs, and has them no more."""


class Delivery:
    """Brings the lines of a spool to MLflow. Telling a run's lines anew changes nothing that MLflow has.

    Args:
        folder: the spool's.
        uri: MLflow's address; None is the one that MLflow finds itself.
        experiment: its name.
    """

    def __init__(self, folder: Path, uri: str | None, experiment: str) -> None:
        from mlflow import MlflowClient

        self._folder, self._experiment = folder, experiment
        self._client = MlflowClient(tracking_uri=uri)
        self.to = told("uri", uri or self._client.tracking_uri)
        self._state = self._read_state()
        if self._state.to != f"{self.to} {experiment}":
            self._state = State(to=f"{self.to} {experiment}")
        self._experiment_id: str | None = None

    def deliver(self, until: int | None = None) -> None:
        """Deliver all whole lines that are there.

        Args:
            until: the offset in bytes that none goes beyond.

        Raises:
            Exception: whatever MLflow raises; what was delivered before is not delivered again.
        """
        try:
            self._deliver(until)
        except _UnknownThereError as error:
            logger.warning("MLflow no longer knows the runs (%s); all of them are told anew.", error)
            self._state, self._experiment_id = State(to=self._state.to), None
            self._write_state()
            self._deliver(until)

    def _deliver(self, until: int | None) -> None:
        while lines := unread(self._folder, self._state.offset, until):
            for batch, end in batches(lines):
                if batch:
                    self._send_or_refuse(batch)
                self._state.offset = end
                self._write_state()

    def abandon(self) -> None:
        """Mark the runs that were not ended as killed: the process that wrote the lines is gone."""
        for key in list(self._state.open):
            self._client.set_terminated(self._state.runs[key], "KILLED")
            self._state.open.remove(key)
            self._write_state()

    def _send_or_refuse(self, lines: list[dict[str, Any]]) -> None:
        try:
            self._send(lines)
        except Exception as error:
            if not self._is_their_fault(lines[0], error):
                raise
            if len(lines) > 1:  # the others are good, perhaps
                for line in lines:
                    self._send_or_refuse([line])
            else:
                self._refused(lines[0], error)

    def _send(self, lines: list[dict[str, Any]]) -> None:
        first = lines[0]
        if first["do"] == "begin":
            self._begin(first)
            return
        if first["run"] not in self._state.runs:
            raise _NeverBegunError(f"the beginning of the run {first['run']} is missing")
        run = self._state.runs[first["run"]]
        if first["do"] == "end":
            self._client.set_terminated(run, first["status"], end_time=first["time"])
            if first["run"] in self._state.open:
                self._state.open.remove(first["run"])
        elif first["do"] == "artifact":
            self._artifact(run, first)
        else:
            self._batch(run, lines)

    def _begin(self, line: dict[str, Any]) -> None:
        key = line["run"]
        known = self._state.runs.get(key) or self._found(key)
        if known:
            self._client.update_run(known, status="RUNNING")
        self._state.runs[key] = known or self._created(line)
        if key not in self._state.open:
            self._state.open.append(key)

    def _created(self, line: dict[str, Any]) -> str:
        tags = {RUN_KEY: line["run"]}
        if line["parent"] in self._state.runs:
            tags[PARENT] = self._state.runs[line["parent"]]
        run = self._client.create_run(self._in_experiment(), start_time=line["time"], tags=tags, run_name=line["name"])
        return str(run.info.run_id)

    def _found(self, key: str) -> str | None:
        """The run of that key, which an earlier process made and could not write down any more."""
        found = self._client.search_runs([self._in_experiment()], f"tags.`{RUN_KEY}` = '{key}'", max_results=1)
        return str(found[0].info.run_id) if found else None

    def _in_experiment(self) -> str:
        if self._experiment_id is None:
            from mlflow.exceptions import MlflowException

            known = self._client.get_experiment_by_name(self._experiment)
            if known is not None and known.lifecycle_stage != "active":
                self._client.restore_experiment(known.experiment_id)
            try:
                made = known.experiment_id if known else self._client.create_experiment(self._experiment)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                made = self._client.get_experiment_by_name(self._experiment).experiment_id  # somebody was faster
            self._experiment_id = str(made)
        return self._experiment_id

    def _batch(self, run: str, lines: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric, RunTag

        metrics: list[Any] = []
        params: dict[str, str] = {}
        tags: dict[str, str] = {}
        for line in lines:
            if line["do"] == "metrics":
                metrics += [Metric(name, value, line["time"], line["step"]) for name, value in line["values"].items()]
            else:
                (params if line["do"] == "params" else tags).update(line["values"])
        for part in parts(metrics, METRICS_A_BATCH):
            self._client.log_batch(run, metrics=part)
        if params:
            tags |= self._params(run, params)
        for some in parts([RunTag(name, value) for name, value in tags.items()], TAGS_A_BATCH):
            self._client.log_batch(run, tags=some)

    def _params(self, run: str, params: dict[str, str]) -> dict[str, str]:
        """Log params, which MLflow never changes; those that have another value now come back as tags."""
        from mlflow.entities import Param

        before = self._client.get_run(run).data.params
        new = [Param(name, value) for name, value in params.items() if name not in before]
        for part in parts(new, PARAMS_A_BATCH):
            self._client.log_batch(run, params=part)
        changed = {f"changed.{name}": value for name, value in params.items() if before.get(name, value) != value}
        return texts(changed, TAG)

    def _artifact(self, run: str, line: dict[str, Any]) -> None:
        path = Path(line["path"])
        if path.is_dir():
            self._client.log_artifacts(run, str(path), line["to"])
        elif path.is_file():
            self._client.log_artifact(run, str(path), line["to"])
        else:
            logger.warning("%s is gone, and MLflow does not get it.", path)

    def _is_their_fault(self, line: dict[str, Any], error: Exception) -> bool:
        """Whether the lines are at fault, and another try would end the same, and not the server or what is before it.

        Raises:
            _UnknownThereError: it does not know the run.
        """
        if isinstance(error, (_NeverBegunError, FileNotFoundError, PermissionError)):
            return True
        status = getattr(getattr(error, "response", None), "status_code", 0)
        refused = getattr(error, "error_code", None) in _USELESS or (400 <= status < 500 and status not in _MAY_CHANGE)
        run = self._state.runs.get(line["run"])
        if run is None or not refused:  # nothing can be told of a run that could not begin
            return False
        # A wrong address, or a proxy without its server, refuses everything: not so a server that knows the run.
        try:
            self._client.get_run(run)
        except Exception as why:  # noqa: BLE001
            if getattr(why, "error_code", None) == _UNKNOWN:
                raise _UnknownThereError(told("error", why)) from error
            return False
        return True

    def _refused(self, line: dict[str, Any], error: Exception) -> None:
        with (self._folder / REFUSED).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        logger.warning("MLflow refused a line, which is kept in %s: %s", self._folder / REFUSED, first_line(error))

    def _read_state(self) -> State:
        try:
            state = State(**json.loads((self._folder / STATE).read_text(encoding="utf-8")))
            there = (self._folder / LINES).stat().st_size
        except (OSError, ValueError, TypeError):
            return State()
        return state if state.offset <= there else State()

    def _write_state(self) -> None:
        write_whole(self._folder / STATE, json.dumps(asdict(self._state)).encode())


def first_line(error: Exception) -> str:
    """What went wrong, in a line and without what is secret."""
    text = told("error", (str(error) or type(error).__name__).splitlines()[0])[:300]
    return text + _SIGN_IN if re.search(r"\b(?:401|403)\b|PERMISSION_DENIED|UNAUTHENTICATED", text) else text
