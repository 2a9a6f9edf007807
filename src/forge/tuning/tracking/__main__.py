"""`python -m forge.tuning.tracking FOLDER`: send MLflow what it did not hear while the run ran."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

from ...errors import ForgeError
from .upload import follow, upload


def main() -> None:
    """Deliver, and say what is left."""
    parser = argparse.ArgumentParser(prog="python -m forge.tuning.tracking", description=__doc__)
    parser.add_argument("folder", type=Path, help="a run's folder")
    parser.add_argument("--tracking-uri", help="MLflow's address; without it the run's own")
    parser.add_argument("--follow", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.follow:
        follow(options.folder)
        return
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # Of this process alone; MLflow's own defaults would repeat a request for many minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    try:
        upload(options.folder, options.tracking_uri)
    except ForgeError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"MLflow has all of {options.folder}.")  # noqa: T201


if __name__ == "__main__":
    main()
