"""A harness that runs a program, kills it with SIGKILL when a condition is met, and runs it again to resume.

    killed, resumed = kill_and_resume("my_module:train", printed("step 7"), arguments={"folder": str(tmp_path)})

The target is a script (called again with `--resume` appended) or "module:function" (called again with `resume=True`).
It can call `report("step 7")`, which prints the line and, if that is the line to be killed at, waits there for the
SIGKILL: so the kill always comes at the same instruction. `exists(path)` is the condition for programs that report
nothing. Each condition is one kill; the last run must end by itself with 0. Only processes started here are killed.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_HOLD = "SUPPORT_RESUME_HOLD_AT"


@dataclass(frozen=True)
class Run:
    """How one process ended: `returncode` is -9 where it was killed."""

    returncode: int
    output: str
    seconds: float

    @property
    def lines(self) -> list[str]:
        return self.output.splitlines()


@dataclass(frozen=True)
class Condition:
    """When to kill: `met` is asked with the output so far, `line` is where `report` waits to be killed."""

    name: str
    met: Callable[[str], bool]
    line: str | None = None


def printed(line: str) -> Condition:
    """Kill when the program has printed exactly this line."""
    return Condition(f"the line {line!r}", lambda output: line in output.split("\n")[:-1], line)


def exists(path: Path) -> Condition:
    """Kill as soon as this file or folder is there (possibly half written)."""
    return Condition(f"the path {path}", lambda _: path.exists())


def report(line: str) -> None:
    """Print a line for the harness, from inside the program; wait there if it is the one to be killed at."""
    print(line, flush=True)
    if os.environ.get(_HOLD) == line:
        while True:
            signal.pause()


def kill_and_resume(
    target: str | Path,
    *kills: Condition,
    arguments: Mapping[str, Any] | list[str] | None = None,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 120,
) -> list[Run]:
    """Run the target once per condition and once more to its end; return all the runs in order.

    Args:
        target: a script, or "module:function" of a module on this process's path.
        kills: the conditions, one per kill.
        arguments: a list for a script's command line, a mapping (as JSON can hold it) for a function.
        cwd: the working directory.
        environment: variables to add.
        timeout_s: the limit for each run.
    """
    runs = []
    for number, kill in enumerate((*kills, None)):
        resume = number > 0
        if ":" in str(target):
            keywords = {**dict(arguments or {}), **({"resume": True} if resume else {})}
            command = [sys.executable, "-m", "support.resume", str(target), json.dumps(keywords)]
        else:
            command = [sys.executable, str(target), *(arguments or []), *(["--resume"] if resume else [])]
        runs.append(run_until(command, kill, cwd=cwd, environment=environment, timeout_s=timeout_s))
    return runs


def run_until(
    command: list[str],
    kill: Condition | None,
    *,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 120,
) -> Run:
    """Run a command to its end, which must be 0, or until the condition is met, which must come before the end."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **(environment or {})}
    variables.pop(_HOLD, None)
    if kill is not None and kill.line is not None:
        variables[_HOLD] = kill.line
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "output")
        with path.open("wb") as sink:
            # A session of its own makes a group of its own, which can be cleaned up without touching anybody else.
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )

        def output() -> str:
            return path.read_text(errors="replace")

        try:
            while process.poll() is None:
                if kill is not None and kill.met(output()):
                    process.kill()
                    process.wait()
                    if process.returncode == -signal.SIGKILL:
                        return Run(process.returncode, output(), time.monotonic() - begin)
                elif time.monotonic() - begin > timeout_s:
                    what = "its end" if kill is None else kill.name
                    raise TimeoutError(f"{command} did not reach {what} in {timeout_s} s:\n{output()[-4000:]}")
                else:
                    time.sleep(0.01)
            if kill is not None or process.returncode != 0:
                before = "" if kill is None else f" before {kill.name}"
                raise AssertionError(f"{command} ended with {process.returncode}{before}:\n{output()[-4000:]}")
            return Run(process.returncode, output(), time.monotonic() - begin)
        finally:
            # What it left behind (data loader workers) belongs to its session.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


if __name__ == "__main__":
    import importlib

    module, _, function = sys.argv[1].partition(":")
    getattr(importlib.import_module(module), function)(**json.loads(sys.argv[2]))
