"""Delivering: once and to the end, or for as long as somebody writes."""

from __future__ import annotations

import json
import logging
import os
import select
import sys
import threading
import time
from pathlib import Path

from ...errors import ForgeError
from .courier import EXPERIMENT, URI
from .delivery import Delivery, first_line
from .private import told
from .runs import FOLDER, check_tracking
from .spool import LINES

logger = logging.getLogger("forge.tracking")

TARGET = "target.json"
_EVERY_S = 1.0
_LONGEST_WAIT_S = 60.0
_AFTER_THE_END_S = 60.0  # how long a server that is down is waited for when the training is gone
_FOR_ANOTHER_S = 90.0  # how long a courier is waited for


def upload(folder: str | os.PathLike[str], tracking_uri: str | None = None) -> None:
    """Send what a run could not tell MLflow while it ran; what was told is not told again.

    Args:
        folder: the run's.
        tracking_uri: MLflow's address; None is the run's own, which is kept without its password (MLFLOW_TRACKING_URI
            may be the same with it), else the one that MLflow finds itself.

    Raises:
        ForgeError: there is nothing of a run in the folder, or MLflow does not answer.
    """
    spool = Path(folder) / FOLDER
    if not (spool / LINES).is_file():
        raise ForgeError(f"{folder} holds nothing for MLflow: there is no {FOLDER}/{LINES} in it. Name a run's folder.")
    target = _target(spool)
    uri = tracking_uri or _with_password(target.get("uri"))
    check_tracking(uri)
    from filelock import FileLock, Timeout

    try:
        with FileLock(spool / "lock", timeout=_FOR_ANOTHER_S):
            until = (spool / LINES).stat().st_size
            delivery = Delivery(spool, uri, target.get("experiment") or "forge")
            delivery.deliver(until)
            delivery.abandon()
    except Timeout as error:
        raise ForgeError(
            f"{folder} is being delivered by another process: its run goes on, or has just ended. Wait for it."
        ) from error
    except Exception as error:
        raise ForgeError(f"MLflow{_at(uri)} did not take it all: {first_line(error)}. Try again.") from error


def follow(folder: Path) -> None:
    """Deliver what is written, until the training says that all is said or is gone, or the server stays away.

    Args:
        folder: the run's.
    """
    spool = folder / FOLDER
    uri, experiment = os.environ.get(URI), os.environ.get(EXPERIMENT, "forge")
    logger.addHandler(_ToTheTraining())
    logger.setLevel(logging.INFO)
    logger.propagate = False
    _write_target(spool, uri and told("uri", uri), experiment)
    end = _End(spool / LINES)
    from filelock import FileLock

    with FileLock(spool / "lock"):  # a courier of a run that was killed may still be at work
        _deliver_until(end, spool, uri, experiment)


class _End:
    """When the training says that all is said, or is gone; and the last line that it wrote.

    Args:
        lines: the file.
    """

    def __init__(self, lines: Path) -> None:
        self._lines, self._parent = lines, os.getppid()
        self._came = threading.Event()
        self.offset: int | None = None
        threading.Thread(target=self._watch, daemon=True).start()

    def __bool__(self) -> bool:
        return self._came.is_set()

    def wait(self, seconds: float) -> None:
        self._came.wait(seconds)

    def _watch(self) -> None:
        # Its children may hold our standard input open when it is gone; our parent is then another one.
        while not select.select([sys.stdin], [], [], 1.0)[0] and os.getppid() == self._parent:
            pass
        # The same folder may have another run soon, whose lines are another courier's.
        self.offset = self._lines.stat().st_size if self._lines.exists() else 0
        self._came.set()


def _deliver_until(end: _End, spool: Path, uri: str | None, experiment: str) -> None:
    delivery: Delivery | None = None
    wait_s, down = _EVERY_S, False
    last_success = time.monotonic()
    while True:
        ending = bool(end)
        try:
            if delivery is None:
                delivery = Delivery(spool, uri, experiment)
                _write_target(spool, delivery.to, experiment)
            delivery.deliver(end.offset)
            if ending:
                delivery.abandon()
                return
            if down:
                logger.info("MLflow%s answers again.", _at(uri))
            wait_s, down, last_success = _EVERY_S, False, time.monotonic()
        except Exception as error:  # noqa: BLE001  # whatever it is, the training must not hear of it but once
            if not down:
                logger.warning(
                    "MLflow%s takes nothing at the moment (%s). The run goes on; what it has to tell is kept on disk, "
                    "and told when MLflow answers.",
                    _at(uri),
                    first_line(error),
                )
            wait_s, down = min(2 * wait_s, _LONGEST_WAIT_S), True
        if ending:
            if time.monotonic() - last_success > _AFTER_THE_END_S:
                return
            time.sleep(min(wait_s, 2.0))
        else:
            end.wait(wait_s)


class _ToTheTraining(logging.Handler):
    """Prints records for the other end, which logs them there."""

    def emit(self, record: logging.LogRecord) -> None:
        line = json.dumps({"forge": record.levelno, "message": told("message", record.getMessage())})
        try:
            print(line, flush=True)  # noqa: T201
        except OSError:  # nobody is there any more
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115


def _write_target(spool: Path, uri: str | None, experiment: str) -> None:
    (spool / TARGET).write_text(json.dumps({"uri": uri, "experiment": experiment}), encoding="utf-8")


def _target(spool: Path) -> dict[str, str | None]:
    try:
        return dict(json.loads((spool / TARGET).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _with_password(uri: str | None) -> str | None:
    found = os.environ.get("MLFLOW_TRACKING_URI")
    return found if found and uri in (None, told("uri", found)) else uri


def _at(uri: str | None) -> str:
    return f" at {told('uri', uri)}" if uri else ""
