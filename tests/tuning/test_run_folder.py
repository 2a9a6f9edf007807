import json
import logging
from pathlib import Path
from typing import Any

import pytest

from forge import ConflictError, ForgeError
from forge.tuning.run_folder import IDENTITY, RunFolder

RECORD: dict[str, Any] = {
    "config": {"seed": 42},
    "preset": "lora",
    "params": {"lora_r": 8},
    "model": {"name": "m"},
    "data": {"train": {"fingerprint": "a"}},
    "encoder": "BertScore('m', layer 6 of 6)",
    "seed": 42,
    "versions": {"torch": "2.13"},
}


def test_a_new_folder_gets_a_record(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "deep" / "run")
    folder.begin(RECORD, resume=True)
    assert folder.read().items() >= RECORD.items()
    assert not folder.finished
    assert not list(folder.path.glob("*.tmp"))


def begun(path: Path, record: dict[str, Any] = RECORD) -> RunFolder:
    """A run that came as far as a checkpoint."""
    folder = RunFolder(path)
    folder.begin(record, resume=True)
    checkpoint(folder.checkpoints / "checkpoint-1")
    return folder


@pytest.mark.parametrize("name", IDENTITY)
def test_a_run_that_did_nothing_yet_may_change(tmp_path: Path, name: str) -> None:
    folder = RunFolder(tmp_path)
    folder.begin(RECORD, resume=True)
    folder.begin({**RECORD, name: "other"}, resume=True)
    assert folder.read()[name] == "other"


@pytest.mark.parametrize("name", IDENTITY)
def test_another_run_is_refused_and_the_difference_named(tmp_path: Path, name: str) -> None:
    folder = begun(tmp_path)
    other = {**RECORD, name: {"lora_r": 9} if isinstance(RECORD[name], dict) else "other"}
    with pytest.raises(ConflictError, match=rf"holds another run(.|\n)*{name}(.|\n)*resume=False"):
        folder.begin(other, resume=True)
    assert folder.read().items() >= RECORD.items()


def test_other_versions_go_on_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = begun(tmp_path)
    with caplog.at_level(logging.WARNING, "forge.tuning"):
        folder.begin(RECORD, resume=True)
        assert not caplog.records
        folder.begin({**RECORD, "versions": {"torch": "2.14"}}, resume=True)
    assert "torch 2.13 -> 2.14" in caplog.text


def test_without_resume_the_old_run_is_moved_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = RunFolder(tmp_path / "run")
    for seed in (1, 2, 3):
        folder.begin({**RECORD, "seed": seed}, resume=False)
        checkpoint(folder.checkpoints / "checkpoint-1")
        (folder.path / "mine.txt").write_text(str(seed))
    assert folder.read()["seed"] == 3
    aside = sorted(tmp_path.glob("run.before-*"), key=lambda path: (path / "mine.txt").read_text())
    assert [(path / "mine.txt").read_text() for path in aside] == ["1", "2"]
    assert str(aside[0]) in caplog.text


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    for resume in (True, False):
        with pytest.raises(ForgeError, match=r"holds no run .thesis\.tex"):
            RunFolder(tmp_path).begin(RECORD, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ForgeError, match="is a file"):
        RunFolder(tmp_path / "thesis.tex").begin(RECORD, resume=True)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"forge_run": 99}', '{"a": 1}'])
def test_a_broken_record_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ForgeError, match=r"run\.json"):
        RunFolder(tmp_path).begin(RECORD, resume=True)


def test_the_newest_whole_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = RunFolder(tmp_path)
    assert folder.last_checkpoint() is None
    for step in (9, 10, 100):
        checkpoint(folder.checkpoints / f"checkpoint-{step}")
    (folder.checkpoints / "checkpoint-best").mkdir()
    assert folder.last_checkpoint() == folder.checkpoints / "checkpoint-100"


@pytest.mark.parametrize("missing", ["trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_that_is_not_whole_is_passed_over(
    tmp_path: Path, missing: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = RunFolder(tmp_path)
    for step in (2, 4):
        checkpoint(folder.checkpoints / f"checkpoint-{step}")
    (folder.checkpoints / "checkpoint-4" / missing).unlink()
    assert folder.last_checkpoint() == folder.checkpoints / "checkpoint-2"
    assert "checkpoint-4 was not written to its end" in caplog.text


def test_a_state_cut_short_is_not_whole(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    checkpoint(folder.checkpoints / "checkpoint-2")
    (folder.checkpoints / "checkpoint-2" / "trainer_state.json").write_text('{"log_history": [')
    assert folder.last_checkpoint() is None


def checkpoint(path: Path) -> None:
    path.mkdir(parents=True)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (path / name).write_bytes(b"x")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": 1}))
