"""The view: a line for each event, a table on a terminal, and no way to stop a search."""

import io
import logging
import random
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from forge.errors import ForgeError
from forge.tuning.study.__main__ import main
from forge.tuning.study.board import time_left
from forge.tuning.study.reader import open_to_read
from forge.tuning.study.reading import StudyRecord, TrialRecord, read_study
from forge.tuning.study.storage import close_storage, open_storage
from forge.tuning.study.view import StudyView
from support.studies import make_study, make_trial

PARAMS = {"learning_rate": 2.1e-4, "lora_r": 16}


def plain() -> Console:
    return Console(file=io.StringIO(), width=100)


def terminal(file: Any = None) -> Console:
    return Console(file=file or io.StringIO(), force_terminal=True, width=100, _environ={"TERM": "xterm"})


@pytest.fixture(autouse=True)
def _told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="forge.tuning")


def arrival(percent: int, loss: float) -> Any:
    return SimpleNamespace(number=7, percent=percent, loss=loss)


def test_each_event_is_a_line(caplog: pytest.LogCaptureFixture):
    with StudyView(console=plain()) as view:
        view.started(SimpleNamespace(number=7, params=PARAMS, prior="preset"))
        view.reached(arrival(25, 2.52), goes_on=True)
        view.reached(arrival(50, 2.315), goes_on=False)
        view.ended(7, "stopped", {"why": "At 50% 3 of 4 trials were better."})
    assert caplog.messages == [
        "Trial 7 (lr 2.1e-4, r 16) begins, from the prior 'preset'",
        "Trial 7 (lr 2.1e-4, r 16): held-out loss 2.52 at 25%, goes on",
        "Trial 7 (lr 2.1e-4, r 16): held-out loss 2.315 at 50%, stopped: At 50% 3 of 4 trials were better.",
    ]


def test_the_line_of_a_scored_trial_carries_its_scores(caplog: pytest.LogCaptureFixture):
    with StudyView(console=plain()) as view:
        view.started(SimpleNamespace(number=7, params=PARAMS, prior=""))
        view.ended(7, "completed", {"loss": 2.1, "bert_score": 0.87, "llm_judge_score": 71.5, "combined_score": 0.777})
    assert caplog.messages[-1] == (
        "Trial 7 (lr 2.1e-4, r 16): held-out loss 2.1, bert score 0.87, llm judge score 71.5, combined score 0.777, "
        "completed"
    )


def test_update_finds_out_what_happened(caplog: pytest.LogCaptureFixture):
    study = make_study(2)
    with StudyView(console=plain(), n_trials=4) as view:
        view.update(study, force=True)
        assert not [line for line in caplog.messages if line.startswith("Trial")]  # what was there is no news
        caplog.clear()  # Optuna's own
        study.add_trial(make_trial(2, random.Random(1), status="failed"))
        study.add_trial(make_trial(3, random.Random(2), status="running"))
        view.update(study, force=True)
        view.update(study, force=True)
    assert len(caplog.messages) == 2
    assert "failed: RuntimeError: a tensor of the wrong shape" in caplog.messages[0]
    assert "at 25%, goes on" in caplog.messages[1]


def test_it_looks_a_few_times_a_second_at_most():
    looks = []

    def source() -> Any:
        looks.append(1)
        return read_study(make_study(1))

    with StudyView(source, console=terminal()) as view:
        for _ in range(1000):
            view.update()
        assert len(looks) <= 3


def test_off_the_terminal_the_study_is_not_even_read():
    with StudyView(lambda: pytest.fail("read"), console=plain()) as view:
        view.update(force=True)


def test_a_terminal_shows_a_table():
    study = make_study(4)
    study.add_trial(make_trial(4, random.Random(2), status="running"))
    console = terminal()
    with StudyView(study, n_trials=20, console=console) as view:
        view.update(force=True, running=[{"number": 4, "percent": 37.0, "loss": 2.7}])
    said = console.file.getvalue()
    for wanted in (
        "of 20 trials over",
        "best so far: trial",
        "held-out loss",
        "37%, loss 2.7000",
        "said after 3 trials",
    ):
        assert wanted in said


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError("the terminal is gone")


def test_a_broken_terminal_stops_nothing(caplog: pytest.LogCaptureFixture):
    with StudyView(make_study(2), console=terminal(Broken())) as view:
        view.started(SimpleNamespace(number=7, params=PARAMS, prior=""))
        view.update(force=True)
    assert any("Trial 7" in message for message in caplog.messages)  # lines instead


def test_a_study_that_cannot_be_read_stops_nothing():
    def source() -> Any:
        raise RuntimeError("the database is away")

    with StudyView(source, console=terminal()) as view:
        view.ended(1, "completed", {"loss": "no number"})
        view.update("no study", force=True)


def test_another_live_of_richs_stops_nothing():
    from rich.live import Live

    console = terminal()
    with Live("theirs", console=console, auto_refresh=False), StudyView(make_study(2), console=console) as view:
        view.update(force=True)


def test_time_left_is_the_pace_and_says_so():
    over = [TrialRecord(n, "completed", {}, {}, began=1000.0, ended=1100.0) for n in range(4)]
    study = StudyRecord("s", "minimize", tuple(over), n_trials=10)
    assert time_left(study, now=1400.0) == "about 10 min left, at the pace of the last 4 trials"
    assert "said after 3" in time_left(study, since=1300.0, before=2, now=1400.0)
    assert time_left(StudyRecord("s", "minimize", tuple(over), n_trials=4)) == "all trials are over"
    assert time_left(StudyRecord("s", "minimize", tuple(over))) == ""
    too_big = TrialRecord(4, "infeasible", {}, {})
    assert time_left(StudyRecord("s", "minimize", (*over, too_big), n_trials=5), now=1400.0).startswith("about")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "a {study} of 100%"
    storage = open_storage(None, path)
    make_study(8, storage=storage)
    close_storage(storage)
    return path


def test_a_look_from_another_terminal(folder: Path):
    console = plain()
    main([str(folder), "--n-trials", "20"], console=console)
    said = console.file.getvalue()
    assert "of 20 trials over" in said
    assert "best so far: trial" in said
    assert "Trial 5" in said


def test_a_look_changes_nothing(folder: Path):
    before = (folder / "study.db").read_bytes()
    with open_to_read(folder) as study, pytest.raises(Exception, match=r"readonly|raised during the commit"):
        study.set_user_attr("winner", 1)
    assert (folder / "study.db").read_bytes() == before


def test_a_look_while_somebody_writes(folder: Path):
    storage = open_storage(None, folder)
    import optuna

    study = optuna.load_study(study_name="a study", storage=storage)
    study.add_trial(make_trial(8, random.Random(8), status="running"))
    with open_to_read(folder, url=f"sqlite:///{folder / 'study.db'}") as seen:
        assert read_study(seen).counts["running"] == 1
    close_storage(storage)


def test_a_study_in_a_folder_that_cannot_be_written_to(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with open_to_read(folder) as study:
            assert len(study.trials) == 8
    finally:
        folder.chmod(stat.S_IRWXU)


def test_a_look_at_nothing_says_what_to_do(tmp_path: Path):
    with pytest.raises(ForgeError, match=r"holds no study\.db"), open_to_read(tmp_path):
        pass
    (tmp_path / "study.db").touch()
    with pytest.raises(ForgeError, match="no study that can be read"), open_to_read(tmp_path):
        pass
    with pytest.raises(SystemExit, match="error: "):
        main([str(tmp_path / "none")])


def test_an_unknown_name_is_refused(folder: Path):
    with pytest.raises(ForgeError, match="Unknown study"), open_to_read(folder, name="another"):
        pass


def test_it_is_a_command(folder: Path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "forge.tuning.study", str(folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "trials over" in done.stdout
    assert done.stderr == ""


def test_looking_needs_no_training_stack():
    code = (
        "import sys\n"
        "import forge.tuning.study.result, forge.tuning.study.view, forge.tuning.study.__main__\n"
        "import forge.tuning.study.study_report\n"
        "heavy = {'torch', 'transformers', 'peft', 'optuna', 'pandas', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("level", "written"), [(logging.WARNING, True), (logging.INFO, False)])
def test_where_nobody_listens_to_the_log_the_lines_are_written(
    level: int, written: bool, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(level, logger="forge.tuning")
    with StudyView(console=plain()) as view:
        view.started(SimpleNamespace(number=7, params=PARAMS, prior=""))
        view.reached(arrival(25, 2.52), goes_on=True)
    assert ("held-out loss 2.52 at 25%, goes on" in capsys.readouterr().err) == written
    assert any("2.52" in message for message in caplog.messages) != written
