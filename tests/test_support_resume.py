import os
import signal
import sys
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from support.resume import exists, kill_and_resume, printed, report


def count_up(folder, steps=6, resume=False):
    """Count to `steps` in a file, one step at a time; this is what the tests run in another process."""
    path = Path(folder, "count")
    if not resume:
        path.write_text("0")
    while (count := int(path.read_text())) < steps:
        path.write_text(str(count + 1))
        report(f"step {count + 1}")
    print(f"done by {os.getpid()}")


def train(folder, resume=False):
    """Train six steps with a checkpoint at each second, as a user's script would."""
    from transformers import TrainerCallback

    from support.models import text_model, trainer

    class Report(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            report(f"step {state.global_step}")

    model = text_model(layers=2)
    subject = trainer("plain", Path(folder), model, max_steps=6, save_strategy="steps", save_steps=2)
    subject.add_callback(Report())
    subject.train(resume_from_checkpoint=resume)
    print(f"sum {sum(value.double().sum().item() for value in model.parameters())!r}")


def test_the_kill_comes_by_sigkill_at_that_step_and_the_second_run_completes(tmp_path):
    killed, resumed = kill_and_resume(
        "test_support_resume:count_up", printed("step 3"), arguments={"folder": str(tmp_path)}
    )
    assert killed.returncode == -signal.SIGKILL
    assert killed.lines == ["step 1", "step 2", "step 3"]
    assert resumed.returncode == 0
    assert resumed.lines[:-1] == ["step 4", "step 5", "step 6"]


def test_several_kills(tmp_path):
    conditions = [printed(f"step {step}") for step in (1, 2, 5)]
    runs = kill_and_resume("test_support_resume:count_up", *conditions, arguments={"folder": str(tmp_path)})
    assert [run.returncode for run in runs] == [-signal.SIGKILL] * 3 + [0]
    assert [run.lines[:-1] for run in runs] == [[], [], ["step 3", "step 4"], ["step 6"]]


def test_a_script_is_killed_when_a_folder_appears(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, time, pathlib\n"
        "if '--resume' in sys.argv: sys.exit(print('resumed', sys.argv[1]))\n"
        "pathlib.Path('checkpoint-1').mkdir()\n"
        "time.sleep(60)\n"
    )
    began = time.monotonic()
    killed, resumed = kill_and_resume(script, exists(tmp_path / "checkpoint-1"), arguments=["now"], cwd=tmp_path)
    assert killed.returncode == -signal.SIGKILL
    assert resumed.lines == ["resumed now"]
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("code", "message"), [("print('short')", "ended with 0 before the line 'step 9'.*short"), ("1/0", "ZeroDivision")]
)
def test_a_program_that_ends_too_early_fails(tmp_path, code, message):
    script = tmp_path / "script.py"
    script.write_text(code)
    with pytest.raises(AssertionError, match=f"(?s){message}"):
        kill_and_resume(script, printed("step 9"))


def test_a_resumed_run_that_fails_fails(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys, support.resume as r\nsys.exit('broken') if sys.argv[1:] else r.report('step 1')")
    with pytest.raises(AssertionError, match=r"(?s)ended with 1:.*broken"):
        kill_and_resume(script, printed("step 1"))


def test_a_program_that_hangs_times_out_and_leaves_no_process_behind(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import subprocess, sys, pathlib, time\n"
        f"child = subprocess.Popen([{sys.executable!r}, '-c', 'import time; time.sleep(60)'])\n"
        "pathlib.Path('child').write_text(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    with pytest.raises(TimeoutError, match="did not reach its end in 1 s"):
        kill_and_resume(script, cwd=tmp_path, timeout_s=1)
    child = Path("/proc", (tmp_path / "child").read_text(), "stat")
    deadline = time.monotonic() + 5
    while child.exists() and child.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_a_real_training_killed_and_resumed_equals_an_uninterrupted_one(tmp_path):
    with redirect_stdout(StringIO()) as straight:  # in this process, which has the libraries in it already
        train(tmp_path / "straight")
    killed, resumed = kill_and_resume(
        "test_support_resume:train", printed("step 5"), arguments={"folder": str(tmp_path / "killed")}
    )
    assert "step 5" in killed.lines
    assert "step 6" not in killed.lines
    steps = [line for line in resumed.lines if line.startswith("step")]
    assert steps == ["step 5", "step 6"]  # the checkpoint of step 4 was the last
    assert resumed.lines[-1] == straight.getvalue().splitlines()[-1]
