"""Lines of a spool to runs in MLflow, each once, whenever it answers."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...reporting.charts import write_whole
from .names import METRICS_A_BATCH, PARAMS_A_BATCH, PARENT, RUN_KEY, TAG, TAGS_A_BATCH, texts
from .spool import LINES, parsed

logger = logging.getLogger("forge.tracking")

STATE, REFUSED = "delivered.json", "refused.jsonl"
# What MLflow says of a request that no repetition makes better.
_USELESS = {
    *("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE"),
    *("RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"),
}
# Of HTTP's own: who may, how long, how often. What else a server answers with 4xx it will answer again.
_MAY_CHANGE = {401, 403, 407, 408, 425, 429}
_TOGETHER = ("metrics", "params", "tags")
_MOST_LINES = 500  # read at a time


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


class Delivery:
    """The reading end of a spool.

    Args:
        folder: the spool's.
        uri: MLflow's address; None is the one that MLflow finds itself.
        experiment: its name.
    """

    def __init__(self, folder: Path, uri: str | None, experiment: str) -> None:
        from mlflow import MlflowClient

        from .private import told

        self._folder, self._experiment = folder, experiment
        self._client = MlflowClient(tracking_uri=uri)
        to = f"{told('uri', uri or self._client.tracking_uri)} {experiment}"
        self._state = self._read_state()
        if self._state.to != to:
            self._state = State(to=to)
        self._experiment_id: str | None = None

    @property
    def is_done(self) -> bool:
        """Whether every whole line is delivered."""
        return next(self._lines(), None) is None

    def deliver(self) -> None:
        """Deliver all lines that are there.

        Raises:
            Exception: whatever MLflow raises; what was delivered before is not delivered again.
        """
        while chunk := list(self._lines()):
            for lines, end in _batches(chunk):
                self._send_or_refuse(lines)
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
            if not self._is_useless(error):
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
        if key not in self._state.runs:
            self._state.runs[key] = self._found(key) or self._created(line)
        else:
            self._client.update_run(self._state.runs[key], status="RUNNING")
        if key not in self._state.open:
            self._state.open.append(key)

    def _created(self, line: dict[str, Any]) -> str:
        tags = {RUN_KEY: line["run"]}
        if line["parent"] is not None:
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
        from mlflow.entities import Metric, Param, RunTag

        metrics, params, tags = [], {}, {}
        for line in lines:
            if line["do"] == "metrics":
                metrics += [Metric(name, value, line["time"], line["step"]) for name, value in line["values"].items()]
            else:
                (params if line["do"] == "params" else tags).update(line["values"])
        for part in _parts(metrics, METRICS_A_BATCH):
            self._client.log_batch(run, metrics=part)
        for part in _parts([RunTag(name, value) for name, value in tags.items()], TAGS_A_BATCH):
            self._client.log_batch(run, tags=part)
        if params:
            self._params(run, params, Param, RunTag)

    def _params(self, run: str, params: dict[str, str], param: Any, tag: Any) -> None:
        """Params, which MLflow never changes: of one that has another value now, a tag tells."""
        before = self._client.get_run(run).data.params
        new = [param(name, value) for name, value in params.items() if name not in before]
        changed = {f"changed.{name}": value for name, value in params.items() if before.get(name, value) != value}
        for part in _parts(new, PARAMS_A_BATCH):
            self._client.log_batch(run, params=part)
        for part in _parts([tag(name, value) for name, value in texts(changed, TAG).items()], TAGS_A_BATCH):
            self._client.log_batch(run, tags=part)

    def _artifact(self, run: str, line: dict[str, Any]) -> None:
        path = Path(line["path"])
        if path.is_dir():
            self._client.log_artifacts(run, str(path), line["to"])
        elif path.is_file():
            self._client.log_artifact(run, str(path), line["to"])
        else:
            logger.warning("%s is gone, and MLflow does not get it.", path)

    def _is_useless(self, error: Exception) -> bool:
        """Whether another try would end the same; where a run is unknown there, all is told anew."""
        code = getattr(error, "error_code", None)
        if code == "RESOURCE_DOES_NOT_EXIST" and self._state.runs and not self._knows_the_runs():
            self._state = State(to=self._state.to)
            self._experiment_id = None
            self._write_state()
            logger.warning("MLflow no longer knows the runs; all of them are told anew.")
            return False
        status = getattr(getattr(error, "response", None), "status_code", 0)
        return (
            code in _USELESS
            or isinstance(error, (KeyError, TypeError, FileNotFoundError, PermissionError))
            or (400 <= status < 500 and status not in _MAY_CHANGE)
        )

    def _knows_the_runs(self) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            for run in self._state.runs.values():
                self._client.get_run(run)
        except MlflowException as error:
            return bool(error.error_code != "RESOURCE_DOES_NOT_EXIST")
        return True

    def _refused(self, line: dict[str, Any], error: Exception) -> None:
        with (self._folder / REFUSED).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        logger.warning("MLflow refused a line, which is kept in %s: %s", self._folder / REFUSED, said)

    def _lines(self) -> Iterator[tuple[dict[str, Any] | None, int]]:
        """Whole lines that are not delivered, each with the offset of its end."""
        path = self._folder / LINES
        if not path.is_file():
            return
        with path.open("rb") as file:
            file.seek(self._state.offset)
            for _ in range(_MOST_LINES):
                line = file.readline()
                if not line.endswith(b"\n"):
                    return
                yield parsed(line), file.tell()

    def _read_state(self) -> State:
        try:
            return State(**json.loads((self._folder / STATE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return State()

    def _write_state(self) -> None:
        write_whole(self._folder / STATE, json.dumps(asdict(self._state)).encode())


def _batches(chunk: list[tuple[dict[str, Any] | None, int]]) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Lines that can go in one request: figures, settings and labels of one run that follow each other."""
    together: list[dict[str, Any]] = []
    end = 0
    for line, after in chunk:
        if line is None:  # cut short by a kill
            end = after
            continue
        same = bool(together) and together[0]["run"] == line["run"]
        if together and not (same and line["do"] in _TOGETHER and together[0]["do"] in _TOGETHER):
            yield together, end
            together = []
        together.append(line)
        end = after
    if together:
        yield together, end


def _parts(values: list[Any], most: int) -> Iterator[list[Any]]:
    for begin in range(0, len(values), most):
        yield values[begin : begin + most]
