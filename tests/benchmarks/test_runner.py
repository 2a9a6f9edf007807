"""The runner loses nothing and repeats nothing, whatever dies: a cell, the runner, or a half-written line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from benchmarks.runner import Suite, key, last_rows, main, read_rows, run

from support.resume import exists, kill_and_resume


def measure(settings):
    """Leave a mark per call; then do what the cell says."""
    with Path(settings["marks"]).open("a") as marks:
        marks.write(f"{settings['n']}\n")
    match settings.get("does"):
        case "raise":
            raise ValueError("no such thing")
        case "no memory":
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        case "no memory, but something":
            error = RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")
            error.partial = {"estimate": 12.5}
            raise error
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            time.sleep(60)
        case "set":
            return {1, 2}
    return {"twice": 2 * settings["n"]}


def suite_of(marks, *does, timeout_s=60.0):
    cells = tuple({"n": n, "marks": str(marks), **({"does": what} if what else {})} for n, what in enumerate(does))
    return Suite("test", "test_runner:measure", cells, timeout_s=timeout_s)


@pytest.fixture
def results(tmp_path):
    return tmp_path / "rows.jsonl"


@pytest.fixture
def marks(tmp_path):
    path = tmp_path / "marks"
    path.touch()
    return path


def test_a_row_says_where_its_number_comes_from(results, marks):
    rows = run(suite_of(marks, None), results)
    (row,) = rows.values()
    assert row == read_rows(results)[0]
    assert row["status"] == "ok"
    assert row["result"] == {"twice": 0}
    assert row["settings"]["n"] == 0
    assert row["seconds"] > 0
    assert {"python", "torch", "transformers", "trl", "peft", "forge", "commit"} <= row["versions"].keys()
    assert {"cpu", "cores", "memory_gb", "gpu"} <= row["machine"].keys()
    assert row["date"].endswith("Z")


def test_no_failure_stops_the_rest(results, marks):
    suite = suite_of(marks, "raise", "no memory", "die", "set", None)
    statuses = [row["status"] for row in run(suite, results).values()]
    assert statuses == ["error", "oom", "killed", "error", "ok"]
    first, _, dead, *_ = read_rows(results)
    assert first["error"] == "ValueError: no such thing"
    assert "test_runner.py" in first["traceback"]
    assert dead["error"].startswith("killed by SIGKILL")


@pytest.mark.parametrize("timeout_s", [None, 60.0])
def test_what_was_found_before_the_end_is_in_the_row(results, marks, timeout_s):
    (row, plain) = run(suite_of(marks, "no memory, but something", "raise", timeout_s=timeout_s), results).values()
    assert (row["status"], row["partial"]) == ("oom", {"estimate": 12.5})
    assert "partial" not in plain
    assert read_rows(results)[0] == row


def test_a_cell_that_hangs_is_ended(results, marks):
    rows = run(suite_of(marks, "hang", timeout_s=3), results)
    (row,) = rows.values()
    assert row["status"] == "timeout"


def test_what_has_a_row_is_not_run_again_unless_asked(results, marks):
    suite = suite_of(marks, "raise", "no memory", None, timeout_s=None)
    run(suite, results)
    run(suite, results)
    assert marks.read_text().split() == ["0", "1", "2"]
    run(suite, results, retry_errors=True)
    assert marks.read_text().split() == ["0", "1", "2", "0"], "running out of memory is a result"
    assert [row["settings"]["n"] for row in read_rows(results)] == [0, 1, 2, 0]
    assert len(last_rows(results)) == 3


def test_killed_half_way_it_resumes_without_loss_or_repetition(tmp_path, results, marks):
    third = Path(str(marks) + "-third")
    # The mark of the third cell is there before its row is: the kill comes between the two.
    killed, resumed = kill_and_resume(
        "test_runner:slow_third", exists(third), arguments={"folder": str(tmp_path)}, cwd=tmp_path
    )
    assert killed.returncode == -signal.SIGKILL
    assert [row["settings"]["n"] for row in read_rows(results)] == [0, 1, 2, 3]
    assert all(row["status"] == "ok" for row in read_rows(results))
    assert resumed.output.count(" ok ") == 2


def slow_third(folder, resume=False):
    """Four cells in this process; the third waits to be killed, the first time."""
    marks = Path(folder, "marks")
    cells = tuple({"n": n, "marks": str(marks)} for n in range(4))
    target = "test_runner:measure" if resume else "test_runner:wait_in_third"
    run(Suite("test", target, cells, timeout_s=None), Path(folder, "rows.jsonl"))


def wait_in_third(settings):
    if settings["n"] == 2:
        Path(settings["marks"] + "-third").touch()
        signal.pause()
    return measure(settings)


def test_a_cell_does_not_outlive_a_killed_runner(tmp_path, marks):
    alive = Path(str(marks) + "-alive")
    code = f"import test_runner; test_runner.one_beating_cell({str(tmp_path)!r})"
    path = os.pathsep.join(filter(None, sys.path))
    runner = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path})
    deadline = time.monotonic() + 60
    while not alive.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    runner.kill()
    runner.wait()
    time.sleep(1)
    beats = alive.stat().st_size
    time.sleep(1)
    assert beats == alive.stat().st_size


def one_beating_cell(folder):
    settings = {"n": 0, "marks": str(Path(folder, "marks"))}
    run(Suite("test", "test_runner:beat", (settings,), timeout_s=60), Path(folder, "rows.jsonl"))


def beat(settings):
    for _ in range(300):
        with Path(settings["marks"] + "-alive").open("a") as alive:
            alive.write(".")
        time.sleep(0.1)


def test_a_line_cut_short_is_removed_and_its_cell_run_again(results, marks):
    suite = suite_of(marks, None, None, timeout_s=None)
    run(suite, results)
    whole = results.read_bytes()
    for cut in (10, 1):  # in the middle of the last row, and just before its end of line
        results.write_bytes(whole[:-cut])
        assert len(read_rows(results)) == 1
        run(suite, results)
        assert [row["settings"]["n"] for row in read_rows(results)] == [0, 1]
    results.write_bytes(b'{"key": "n=')
    assert read_rows(results) == []
    assert results.read_bytes() == b""


def test_a_damaged_line_in_the_middle_is_an_error(results):
    results.write_text('{"key": "a"}\n{"ke\n{"key": "b"}\n')
    with pytest.raises(json.JSONDecodeError):
        read_rows(results)


def test_command_line(results, marks, capsys):
    suite = suite_of(marks, None, "raise", None, timeout_s=None)
    assert main(suite, ["--results", str(results), "--only", "n=2"]) == 0
    assert main(suite, ["--results", str(results), "--list"]) == 0
    listed = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split()[0] for line in listed] == ["-", "-", "ok"]
    assert main(suite, ["--results", str(results)]) == 1
    assert main(suite, ["--results", str(results), "--budget-s", "0"]) == 1, "an error stays one"


def test_the_budget_begins_no_further_cell(results, marks, capsys):
    assert main(suite_of(marks, None, timeout_s=None), ["--results", str(results), "--budget-s", "-1"]) == 0
    assert marks.read_text() == ""
    assert "goes on from here" in capsys.readouterr().out


def test_the_key_does_not_depend_on_the_order():
    assert key({"b": 1, "a": "x"}) == key({"a": "x", "b": 1}) == "a=x b=1"
