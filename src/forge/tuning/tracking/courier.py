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
from contextlib import suppress
from pathlib import Path

from .delivery import STATE
from .spool import LINES

logger = logging.getLogger("forge.tracking")

LOG = "delivery.log"
# Not in the arguments, which every user of the machine can read.
URI, EXPERIMENT = "FORGE_TRACKING_URI", "FORGE_TRACKING_EXPERIMENT"
# Retries are ours, so that an outage is known at once and a request never hangs for long.
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "60"}
_ENVIRONMENT = {
    **PATIENCE,
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PYTHONSAFEPATH": "1",  # a folder named mlflow beside the program is no package
    "PYTHONWARNINGS": "ignore",
}


class Courier:
    """Starts the process, and tells it when all is said.

    Args:
        folder: the spool's.
        uri: MLflow's address; None is the one that MLflow finds itself.
        experiment: its name.
    """

    def __init__(self, folder: Path, uri: str | None, experiment: str) -> None:
        self._folder = folder
        self._finishing = False
        self._process: subprocess.Popen[bytes] | None = None
        try:
            with (folder / LOG).open("ab") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", str(__package__), str(folder.parent), "--follow"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=environment(uri, experiment),
                    start_new_session=True,  # Ctrl-C is for the training
                )
        except OSError as error:
            logger.warning("MLflow is not told while the run goes on: %s", error)
            return
        self._process = process
        self._listener = threading.Thread(target=self._hand_on, args=(process,), daemon=True)
        self._listener.start()

    def finish(self, timeout_s: float) -> bool:
        """Wait until all is delivered, but no longer than that.

        Args:
            timeout_s: seconds.

        Returns:
            Whether it is.
        """
        process = self._process
        if process is not None:
            self._finishing = True
            if process.stdin is not None:
                # A word and not only the end: data loaders that were forked may hold the other end open.
                with suppress(OSError):
                    process.stdin.write(b"\n")
                with suppress(OSError):
                    process.stdin.close()
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            self._listener.join(5)
            self._process = None
        return all_delivered(self._folder)

    def _hand_on(self, process: subprocess.Popen[bytes]) -> None:
        """What the process has to say becomes log records of this one."""
        if process.stdout is None:
            return
        with process.stdout as lines:
            for line in lines:
                try:
                    record = json.loads(line)
                    level, message = record["forge"], record["message"]
                except (ValueError, KeyError, TypeError):  # MLflow prints, too
                    continue
                logger.log(level, "%s", message)
        if process.wait() != 0 and not self._finishing:
            logger.warning(
                "The process that tells MLflow has ended (%s; see %s). The run goes on; what it has to tell is kept.",
                process.returncode,
                self._folder / LOG,
            )


def environment(uri: str | None, experiment: str) -> dict[str, str]:
    """This process's, with what the other one needs; forge is found where this one found it."""
    paths = os.pathsep.join(path for path in sys.path if path and os.pathsep not in path)
    own = {EXPERIMENT: experiment, **({} if uri is None else {URI: uri}), **_ENVIRONMENT}
    return {**os.environ, "PYTHONPATH": paths, **own}


def all_delivered(folder: Path) -> bool:
    """Whether the last line that was written is delivered.

    Args:
        folder: the spool's.
    """
    try:
        size = (folder / LINES).stat().st_size
    except OSError:
        return True  # nothing was ever written
    try:
        return bool(json.loads((folder / STATE).read_text(encoding="utf-8"))["offset"] == size)
    except (OSError, ValueError, KeyError):
        return size == 0
