"""Killed with SIGKILL wherever it hurts, the run goes on and ends with the same bytes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.resume import printed

PROGRAM = "tuning.tuning_program:run"
TIMES = {"train_runtime_s"}


@pytest.fixture(scope="module")
def undisturbed(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of the run that nothing happened to; one for each set of fields."""
    from support.resume import kill_and_resume

    done: dict[str, Path] = {}

    def folder(**fields: Any) -> Path:
        key = json.dumps(fields, sort_keys=True)
        if key not in done:
            done[key] = tmp_path_factory.mktemp("undisturbed") / "run"
            kill_and_resume(PROGRAM, arguments={"model": str(tiny_folder), "output_dir": str(done[key]), **fields})
        return done[key]

    return folder


def outcome(folder: Path) -> dict[str, Any]:
    metrics = json.loads((folder / "metrics.json").read_text())
    answers = json.loads((folder / "evaluation" / "tuned" / "result.json").read_text())["samples"]
    return {
        "adapter": (folder / "adapter" / "adapter_model.safetensors").read_bytes(),
        "metrics": {name: value for name, value in metrics.items() if name not in TIMES},
        "answers": answers,
    }


@pytest.mark.parametrize(
    "lines",
    [
        ["base evaluated", "step 1", "saving 5", "adapter written"],
        pytest.param(["step 4"], marks=pytest.mark.long),
        pytest.param(["trained"], marks=pytest.mark.long),
        pytest.param(["tuned evaluated"], marks=pytest.mark.long),
        pytest.param(["saving 1", "saving 2", "saving 8"], marks=pytest.mark.long),
    ],
    ids=", ".join,
)
def test_a_killed_run_ends_the_same(
    lines: list[str], undisturbed: Callable[..., Path], tiny_folder: Path, tmp_path: Path, kill_and_resume: Any
) -> None:
    arguments = {"model": str(tiny_folder), "output_dir": str(tmp_path / "run")}
    runs = kill_and_resume(PROGRAM, *(printed(line) for line in lines), arguments=arguments)
    assert [run.returncode for run in runs] == [-9] * len(lines) + [0]
    assert outcome(tmp_path / "run") == outcome(undisturbed())


@pytest.mark.long
@pytest.mark.parametrize(
    "fields",
    [
        {"ema": True},
        {"freeze_ratio": 0.5},
        {"freeze_ratio": 0.5, "prefix_cache": True},
        {"preset": "dpo", "learning_rate": 5e-6},
    ],
    ids=", ".join,
)
def test_a_killed_run_ends_the_same_with(
    fields: dict[str, Any],
    undisturbed: Callable[..., Path],
    tiny_folder: Path,
    tmp_path: Path,
    kill_and_resume: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = {"model": str(tiny_folder), "output_dir": str(tmp_path / "run"), **fields}
    kill_and_resume(PROGRAM, printed("step 5"), printed("adapter written"), arguments=arguments)
    assert outcome(tmp_path / "run") == outcome(undisturbed(**fields))


@pytest.mark.long
def test_a_killed_run_of_the_real_model_ends_the_same(smollm2: Path, tmp_path: Path, kill_and_resume: Any) -> None:
    fields = {"model": str(smollm2), "preset": "qlora", "num_train_epochs": 1, "max_eval_samples": 2}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    kill_and_resume(PROGRAM, arguments={**fields, "output_dir": str(whole)}, timeout_s=900)
    kill_and_resume(PROGRAM, printed("step 2"), arguments={**fields, "output_dir": str(killed)}, timeout_s=900)
    assert outcome(killed) == outcome(whole)


def test_what_was_done_is_not_done_again(tiny_folder: Path, tmp_path: Path, kill_and_resume: Any) -> None:
    arguments = {"model": str(tiny_folder), "output_dir": str(tmp_path / "run")}
    killed, resumed = kill_and_resume(PROGRAM, printed("step 6"), arguments=arguments)
    assert "base evaluated" in killed.lines
    # A tenth of eight steps is one: each step has a checkpoint, and only that of step 6 was not yet written.
    steps = [line for line in resumed.lines if line.startswith("step ") and "/" not in line]
    assert steps == ["step 6", "step 7", "step 8"]
