"""Runs benchmarks cell by cell and writes a row per cell as soon as it is done, so that a killed run resumes.

A cell is a flat mapping of settings; sorted, they are its key. A row is one JSON line: the settings, what came out of
them ("ok" with a result; "oom", "error", "timeout" or "killed" with the message), the versions, the machine and the
time. What a cell found before it failed is kept: an exception's `partial`, where it has one, goes into the row. Cells
that have a row are skipped: a failure is a result too, until `--retry-errors` asks again. Where a cell has several
rows, the last counts.

    SUITE = Suite("name", "benchmarks.name:measure", ({"preset": "qlora"}, {"preset": "lora"}), timeout_s=600)
    if __name__ == "__main__":
        sys.exit(main(SUITE))
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.provenance import ROOT, machine, versions

RESULTS = Path(__file__).parent / "results"

Settings = Mapping[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Suite:
    """Cells that one function measures.

    Args:
        name: of the file benchmarks/results/<name>.jsonl.
        target: "module:function"; it takes a cell's settings and returns what JSON can hold.
        cells: the settings of each.
        timeout_s: how long a cell may take, in a process of its own; None runs the cells in this process.
    """

    name: str
    target: str
    cells: tuple[Settings, ...]
    timeout_s: float | None = 600


def key(settings: Settings) -> str:
    """The name of a cell, whatever the order in which its settings were written."""
    return " ".join(f"{name}={settings[name]}" for name in sorted(settings))


def read_rows(path: Path) -> list[Row]:
    """The rows of a results file. A last line cut short by a kill is removed from the file."""
    if not path.exists():
        return []
    complete, _, rest = path.read_bytes().rpartition(b"\n")
    if rest:
        with path.open("r+b") as file:
            file.truncate(len(complete) + 1 if complete else 0)
    return [json.loads(line) for line in complete.splitlines() if line]


def last_rows(path: Path) -> dict[str, Row]:
    """The row that counts for each key."""
    return {row["key"]: row for row in read_rows(path)}


def run(
    suite: Suite, path: Path, *, only: str = "", retry_errors: bool = False, budget_s: float = float("inf")
) -> dict[str, Row]:
    """Run what has no row yet; return the rows that count, of the selected cells.

    Args:
        suite: The cells.
        path: The results file.
        only: Select the cells whose key contains this.
        retry_errors: Run again what failed otherwise than by running out of memory, which is a result.
        budget_s: Begin no further cell after this time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rows, begin = last_rows(path), time.monotonic()
    selected = {key(cell): cell for cell in suite.cells if only in key(cell)}
    for name, settings in selected.items():
        if name in rows and not (retry_errors and rows[name]["status"] not in ("ok", "oom")):
            continue
        if time.monotonic() - begin > budget_s:
            print(f"stopped after {budget_s:.0f} s; the same command goes on from here", flush=True)
            break
        row = {"key": name, "settings": dict(settings), "date": f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}"}
        row |= {"machine": machine(), "versions": versions()}
        started = time.monotonic()
        row |= _apart(suite, settings) if suite.timeout_s else _outcome(suite.target, settings)
        row["seconds"] = round(time.monotonic() - started, 2)
        with path.open("a") as sink:
            sink.write(json.dumps(row) + "\n")
            sink.flush()
            os.fsync(sink.fileno())
        rows[name] = row
        print(f"{row['status']:>8} {row['seconds']:7.1f} s  {name}  {row.get('error', '')[:200]}", flush=True)
    return {name: rows[name] for name in selected if name in rows}


def _outcome(target: str, settings: Settings) -> Row:
    module, _, function = target.partition(":")
    try:
        result = getattr(importlib.import_module(module), function)(settings)
        json.dumps(result)
        return {"status": "ok", "result": result}
    except Exception as error:  # noqa: BLE001  (whatever it was, it is this cell's result)
        text = f"{type(error).__name__}: {error}"
        no_memory = isinstance(error, MemoryError) or "OutOfMemory" in text or "out of memory" in text.lower()
        no_memory = no_memory or "can't allocate memory" in text or "CUBLAS_STATUS_ALLOC_FAILED" in text
        row = {"status": "oom" if no_memory else "error", "error": text[:2000]}
        partial = getattr(error, "partial", None)
        return row | {"traceback": traceback.format_exc()[-4000:]} | ({"partial": partial} if partial else {})


def _apart(suite: Suite, settings: Settings) -> Row:
    """The outcome of a cell in a process of its own, which cannot take anything down with it."""
    path = os.pathsep.join(filter(None, [str(ROOT), *sys.path]))
    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ, "PYTHONPATH": path}
    with tempfile.TemporaryDirectory() as folder, Path(folder, "log").open("w+b") as log:
        outcome = Path(folder, "outcome")
        command = [sys.executable, "-m", "benchmarks.runner", suite.target, json.dumps(dict(settings)), str(outcome)]
        with subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
        ) as process:
            try:
                process.wait(suite.timeout_s)
            except subprocess.TimeoutExpired:
                return {"status": "timeout", "error": f"not done after {suite.timeout_s} s"}
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        if outcome.exists():
            return json.loads(outcome.read_text())  # type: ignore[no-any-return]
        code = process.returncode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        log.seek(0)
        return {"status": "killed", "error": f"{how}: {log.read()[-2000:].decode(errors='replace')}"}


def _serve(target: str, settings: str, path: str) -> None:
    """What the process of one cell does."""

    def end_with_parent() -> None:
        # The parent never writes here: reading ends when it is gone, and a cell without a parent has no reader.
        os.read(sys.stdin.fileno(), 1)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    text = json.dumps(_outcome(target, json.loads(settings)))
    Path(path + ".part").write_text(text)
    Path(path + ".part").rename(path)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that every suite has."""
    parser.add_argument("--list", action="store_true", help="list the cells and their status, run nothing")
    parser.add_argument("--only", default="", metavar="TEXT", help="the cells whose key contains TEXT")
    parser.add_argument("--retry-errors", action="store_true", help="run again what failed (not: ran out of memory)")
    parser.add_argument("--results", type=Path, metavar="FILE", help="another file than benchmarks/results/NAME.jsonl")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="begin no cell after this many seconds")


def run_as_asked(suite: Suite, options: argparse.Namespace) -> int:
    """Run or list; return the exit status, 0 when every selected cell is done and none failed."""
    path = options.results or RESULTS / f"{suite.name}.jsonl"
    if options.list:
        rows = last_rows(path)
        for name in (key(cell) for cell in suite.cells if options.only in key(cell)):
            print(f"{rows[name]['status'] if name in rows else '-':>8}  {name}")
        return 0
    rows = run(suite, path, only=options.only, retry_errors=options.retry_errors, budget_s=options.budget_s)
    return 0 if all(row["status"] in ("ok", "oom") for row in rows.values()) else 1


def main(suite: Suite, arguments: Sequence[str] | None = None) -> int:
    """The command line of a suite."""
    parser = argparse.ArgumentParser(description=f"the cells of {suite.name}")
    add_options(parser)
    return run_as_asked(suite, parser.parse_args(arguments))


if __name__ == "__main__":
    _serve(*sys.argv[1:])
