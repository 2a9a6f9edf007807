"""Delivering: once and to the end, or for as long as somebody writes."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from pathlib import Path

from ...errors import ForgeError
from .courier import EXPERIMENT, URI, all_delivered
from .delivery import Delivery
from .private import told
from .runs import FOLDER, check_tracking
from .spool import LINES

logger = logging.getLogger("forge.tracking")

TARGET = "target.json"
_EVERY_S = 1.0
_LONGEST_WAIT_S = 60.0
_AFTER_THE_END_S = 60.0  # how long a server that is down is waited for when the training is gone


def upload(folder: str | os.PathLike[str], tracking_uri: str | None = None) -> None:
    """Send what a run could not tell MLflow while it ran; what was told is not told again.

    Args:
        folder: the run's.
        tracking_uri: MLflow's address; None is the run's own (without the password that it may have had), else the one
            that MLflow finds itself.

    Raises:
        ForgeError: there is nothing of a run in the folder, or MLflow does not answer.
    """
    spool = Path(folder) / FOLDER
    if not (spool / LINES).is_file():
        raise ForgeError(f"{folder} holds nothing for MLflow: there is no {FOLDER}/{LINES} in it. Name a run's folder.")
    target = _target(spool)
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or target.get("uri")
    check_tracking(uri)
    from filelock import FileLock

    with FileLock(spool / "lock"):
        try:
            Delivery(spool, uri, target.get("experiment", "forge")).deliver()
        except Exception as error:
            raise ForgeError(f"MLflow{_at(uri)} did not take it all: {_first_line(error)}. Try again.") from error


def follow(folder: Path) -> None:
    """Deliver what is written, until standard input ends and all is delivered, or the server stays away.

    Args:
        folder: the run's.
    """
    spool = folder / FOLDER
    uri, experiment = os.environ.get(URI), os.environ.get(EXPERIMENT, "forge")
    (spool / TARGET).write_text(
        json.dumps({"uri": None if uri is None else told("uri", uri), "experiment": experiment}), encoding="utf-8"
    )
    over = threading.Event()
    threading.Thread(target=_wait_for_the_end, args=(over,), daemon=True).start()
    from filelock import FileLock

    with FileLock(spool / "lock"):  # a courier of a run that was killed may still be at work
        _deliver_until(over, spool, uri, experiment)


def _deliver_until(over: threading.Event, spool: Path, uri: str | None, experiment: str) -> None:
    delivery: Delivery | None = None
    wait_s, down = _EVERY_S, False
    last_success = time.monotonic()
    while True:
        ending = over.is_set()
        if ending and not down:
            last_success = time.monotonic()
        try:
            delivery = delivery or Delivery(spool, uri, experiment)
            delivery.deliver()
            if ending and all_delivered(spool):
                delivery.abandon()
                return
            if down:
                _say(logging.INFO, f"MLflow{_at(uri)} answers again.")
            wait_s, down, last_success = _EVERY_S, False, time.monotonic()
        except Exception as error:  # whatever it is, the training must not hear of it but once
            if not down:
                _say(
                    logging.WARNING,
                    f"MLflow{_at(uri)} takes nothing at the moment ({_first_line(error)}). The run goes on; what it has "
                    "to tell is kept on disk, and told when MLflow answers.",
                )
            wait_s, down = min(2 * wait_s, _LONGEST_WAIT_S), True
        if ending and time.monotonic() - last_success > _AFTER_THE_END_S:
            return
        over.wait(wait_s) if not ending else time.sleep(min(wait_s, 2.0))


def _wait_for_the_end(over: threading.Event) -> None:
    """Standard input ends when the training says that all is said, or is gone."""
    while sys.stdin.buffer.read(4096):
        pass
    over.set()


def _target(spool: Path) -> dict[str, str]:
    try:
        return dict(json.loads((spool / TARGET).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _say(level: int, message: str) -> None:
    print(json.dumps({"forge": level, "message": message}), flush=True)  # noqa: T201  # the other end reads it


def _at(uri: str | None) -> str:
    return f" at {told('uri', uri)}" if uri else ""


def _first_line(error: Exception) -> str:
    return told("error", (str(error) or type(error).__name__).splitlines()[0])[:300]
