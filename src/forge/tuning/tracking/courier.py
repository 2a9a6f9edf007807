"""The process beside the training that delivers, and the end of it that the training holds.

A process, not a thread: MLflow's requests wait and repeat by environment variables, which are the caller's own; nothing
of it can hold up the training, its data loaders or its end; and it outlives a training that is killed.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

from .delivery import STATE
from .spool import LINES

logger = logging.getLogger("forge.tracking")

LOG = "delivery.log"
# Not in the arguments, which every user of the machine can read.
URI, EXPERIMENT = "FORGE_TRACKING_URI", "FORGE_TRACKING_EXPERIMENT"
# Retries are ours, so that an outage is known at once and a request never hangs for minutes.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}


class Courier:
    """Starts the process, and tells it when all is said.

    Args:
        folder: the spool's.
        uri: MLflow's address; None is the one that MLflow finds itself.
        experiment: its name.
    """

    def __init__(self, folder: Path, uri: str | None, experiment: str) -> None:
        self._folder = folder
        try:
            with (folder / LOG).open("ab") as log:
                self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
                    [sys.executable, "-m", __package__, str(folder.parent), "--follow"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=environment(uri, experiment),
                    start_new_session=True,  # Ctrl-C is for the training
                )
        except OSError as error:
            self._process = None
            logger.warning("MLflow is not told while the run goes on: %s", error)
            return
        threading.Thread(target=_hand_on, args=(self._process.stdout,), daemon=True).start()

    def finish(self, timeout_s: float) -> bool:
        """Wait until all is delivered, but no longer than that.

        Args:
            timeout_s: seconds.

        Returns:
            Whether it is.
        """
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        return all_delivered(self._folder)


def environment(uri: str | None, experiment: str) -> dict[str, str]:
    """This process's, with what the other one needs; forge is found where this one found it."""
    paths = os.pathsep.join(filter(None, sys.path))
    own = {EXPERIMENT: experiment, **({} if uri is None else {URI: uri}), **_PATIENCE}
    return {**os.environ, "PYTHONPATH": paths, **own}


def all_delivered(folder: Path) -> bool:
    """Whether the last line that was written is delivered.

    Args:
        folder: the spool's.
    """
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        return bool(state["offset"] == (folder / LINES).stat().st_size)
    except (OSError, ValueError, KeyError):
        return False


def _hand_on(lines: IO[bytes] | None) -> None:
    """What the process has to say becomes log records of this one."""
    for line in lines or ():
        try:
            record = json.loads(line)
            level, message = record["forge"], record["message"]
        except (ValueError, KeyError, TypeError):  # MLflow prints, too
            continue
        logger.log(level, message)
