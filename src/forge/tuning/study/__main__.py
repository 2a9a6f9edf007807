"""`python -m forge.tuning.study FOLDER`: a look at a study that runs, or ran, without touching it."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import ForgeError
from .reader import open_to_read

if TYPE_CHECKING:
    from rich.console import Console


def main(arguments: list[str] | None = None, *, console: Console | None = None) -> None:
    """Show it once, or until it is over.

    Args:
        arguments: of the command line; None takes the process's own.
        console: rich's.
    """
    parser = argparse.ArgumentParser(prog="python -m forge.tuning.study", description=__doc__)
    parser.add_argument("folder", type=Path, help="the study's folder, or its database file")
    parser.add_argument("--storage", help="the database's address, where it is not a file in the folder")
    parser.add_argument("--study", help="its name, where the database holds several")
    parser.add_argument("--n-trials", type=int, help="how many are launched in all; with it the time left is said")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="look again every so many seconds")
    options = parser.parse_args(arguments)
    try:
        _show(options, console)
    except ForgeError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        return


def _show(options: argparse.Namespace, console: Console | None) -> None:
    from rich.console import Console

    from .board import board, time_left
    from .lines import trial_line
    from .reading import FINISHED, read_study

    console = console or Console(highlight=False)
    with open_to_read(options.folder, url=options.storage, name=options.study) as study:
        told: set[int] = set()
        while True:
            record = read_study(study, n_trials=options.n_trials)
            over = [one for one in record.trials if one.status in FINISHED]
            for trial in [one for one in over if one.number not in told][-10:]:
                console.print(trial_line(trial), markup=False, soft_wrap=True)
            told.update(one.number for one in over)
            console.print(board(record, extra=time_left(record)))
            if not options.watch:
                return
            time.sleep(max(options.watch, 1.0))
            console.rule(style="dim")


if __name__ == "__main__":
    main()
