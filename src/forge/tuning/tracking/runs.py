"""A study and its trials, as tuners tell of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from ...errors import ConflictError, UnsupportedError
from ...reporting.private import public
from .names import PARAM, TAG, numbers, texts
from .private import told
from .spool import Spool

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from ..config import TuningConfig
    from .courier import Courier

logger = logging.getLogger("forge.tracking")

Status = Literal["FINISHED", "FAILED", "KILLED"]
FOLDER = "mlflow"
_SCHEMES = ("", "http", "https", "file", "sqlite", "postgresql", "mysql", "mssql", "databricks", "databricks-uc")


class Run:
    """One run in MLflow; every method returns at once and none raises for what MLflow does.

    Args:
        spool: where its lines go; None tells nobody.
        key: what it is known by.
    """

    def __init__(self, spool: Spool | None, key: str) -> None:
        self._spool, self._key = spool, key

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Settings, as text."""
        if self._spool and params:
            self._spool.add(self._key, "params", values=texts(params, PARAM))

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Labels, as text."""
        if self._spool and tags:
            self._spool.add(self._key, "tags", values=texts(tags, TAG))

    def log_metrics(self, metrics: Mapping[str, Any], *, step: int = 0) -> None:
        """Figures; what is no number is left out."""
        if self._spool and (found := numbers(metrics)):
            self._spool.add_metrics(self._key, found, int(step))

    def log_artifact(self, path: str | Path, *, artifact_path: str | None = None, without_paths: bool = False) -> None:
        """A file or a folder, which is read when it is delivered: leave it where it is.

        Args:
            path: of it.
            artifact_path: the folder in MLflow that it goes to.
            without_paths: whether a copy of a text file is logged in its place, which is made now: without credentials,
                and with no more than the last part of each path on this machine.
        """
        if self._spool:
            to = None if artifact_path is None else told("", artifact_path)
            logged = self._spool.keep(self._key, Path(path), _for_others) if without_paths else path
            if logged is not None:
                # abspath never raises.
                self._spool.add(self._key, "artifact", path=os.path.abspath(logged), to=to)  # noqa: PTH100

    def end(self, status: Status = "FINISHED") -> None:
        """Say how it ended."""
        if self._spool:
            self._spool.add(self._key, "end", status=status)

    def callback(self) -> TrainerCallback:
        """Hands on the Trainer's log, under the names that it has there."""
        from .callback import TrackingCallback

        return TrackingCallback(self)


class Study(Run):
    """The parent run; its trials are nested in it."""

    def trial(
        self, number: int, *, params: Mapping[str, Any] | None = None, tags: Mapping[str, Any] | None = None
    ) -> Run:
        """The run of a trial; opened again by the same number, it goes on.

        Args:
            number: of the trial, which becomes the tag `trial_number`.
            params: see `trial_params`.
            tags: beside that.
        """
        key = f"{self._key}/trial-{number}"
        run = Run(self._spool, key)
        if self._spool:
            self._spool.add(key, "begin", name=f"trial-{number}", parent=self._key)
        run.set_tags({"trial_number": number, **(tags or {})})
        run.log_params(params or {})
        return run


class Tracking:
    """What a tuner tells, on its way to MLflow.

    Args:
        spool: the lines; None when nobody is to be told.
        courier: who delivers them.
        uri: MLflow's, for messages.
    """

    def __init__(self, spool: Spool | None = None, courier: Courier | None = None, uri: str | None = None) -> None:
        self._spool, self._courier, self._uri = spool, courier, uri

    def study(
        self, name: str, *, params: Mapping[str, Any] | None = None, tags: Mapping[str, Any] | None = None
    ) -> Study:
        """The parent run; opened again in the same folder, it goes on.

        Args:
            name: as people will see it.
            params: its settings.
            tags: its labels.
        """
        key = self._spool.key if self._spool else ""
        study = Study(self._spool, key)
        if self._spool:
            self._spool.add(key, "begin", name=told("name", name), parent=None)
        study.set_tags(tags or {})
        study.log_params(params or {})
        return study

    def close(self, timeout_s: float = 30) -> None:
        """Wait until all is delivered, but no longer than that; what is left stays, and a warning says how to send it.

        Args:
            timeout_s: seconds.
        """
        if self._courier is not None and self._spool is not None and not self._courier.finish(timeout_s):
            folder = self._spool.path.parent.parent
            logger.warning(
                "MLflow%s has not taken all of the run. What is left is kept; send it with: "
                "python -m forge.tuning.tracking %s",
                f" at {told('uri', self._uri)}" if self._uri else "",
                folder,
            )
        self._courier = None

    def __enter__(self) -> Tracking:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _for_others(text: str) -> str:
    return told("", public(text))


def open_tracking(config: TuningConfig, folder: Path) -> Tracking:
    """Begin to tell MLflow, if the config says so.

    Args:
        config: `mlflow_enabled`, `mlflow_tracking_uri`, `mlflow_experiment_name`.
        folder: the run's own, which keeps what is not delivered yet in `mlflow/`.

    Raises:
        UnsupportedError: MLflow is not installed.
        ConflictError: an address that MLflow does not know.
    """
    if not config.mlflow_enabled:
        return Tracking()
    uri = _anchored(config.mlflow_tracking_uri)
    check_tracking(uri)
    from .courier import Courier

    spool = Spool(folder / FOLDER)
    return Tracking(spool, Courier(folder / FOLDER, uri, config.mlflow_experiment_name), uri)


def _anchored(uri: str | None) -> str | None:
    """A relative path made absolute: what is left may be sent from another folder."""
    if not uri or uri.startswith("databricks"):
        return uri
    if uri.startswith("sqlite:///") and (path := uri.removeprefix("sqlite:///")) not in ("", ":memory:"):
        return f"sqlite:///{os.path.abspath(path)}"  # noqa: PTH100
    return uri if urlsplit(uri).scheme else os.path.abspath(uri)  # noqa: PTH100


def check_tracking(uri: str | None) -> None:
    """Refuse what could never work.

    Raises:
        UnsupportedError: MLflow is not installed.
        ConflictError: an address that MLflow does not know.
    """
    if find_spec("mlflow") is None:
        raise UnsupportedError(
            "mlflow_enabled=True, and MLflow is not installed: pip install 'transformers-forge[mlflow]', or leave it "
            "out."
        )
    scheme = urlsplit(uri or "").scheme.partition("+")[0]
    if scheme not in _SCHEMES:
        raise ConflictError(
            f"mlflow_tracking_uri={told('uri', uri)!r}: MLflow knows no scheme {scheme!r}. Give an address such as "
            "http://localhost:5000, sqlite:///mlflow.db, or a folder."
        )
