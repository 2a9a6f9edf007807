"""A whole search on a model of two layers, by every engine."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from forge import BayesianLoRATuner, SearchSpace, TuningConfig, get_preset
from forge.errors import ConflictError, ForgeError, UnsupportedError
from forge.tuning import search_run
from forge.tuning.study.result import StudyResult
from support.resume import printed
from tuning.conftest import chats, searching

PROGRAM = "tuning.search_program:run"


@pytest.fixture
def make_search(tiny_folder: Path, tmp_path: Path) -> Callable[..., BayesianLoRATuner]:
    """`make_search(model=..., folder=..., **fields of TuningConfig)`."""

    def make(model: Any = None, folder: str = "study", train: Any = None, **fields: Any) -> BayesianLoRATuner:
        config = TuningConfig(**{**searching(tmp_path / folder), **fields})
        given = str(tiny_folder) if model is None else model
        return BayesianLoRATuner(given, chats(40) if train is None else train, 8, preset="lora", config=config)

    return make


def outcome(result: StudyResult) -> list[dict[str, Any]]:
    """What a search came to, without what the clock says."""
    frame = result.trials.drop(columns=["seconds", "engine"])
    return json.loads(frame.to_json(orient="records", double_precision=15))


def losses(result: StudyResult) -> dict[tuple[int, int], float]:
    return {(trial.number, percent): loss for trial in result.study.trials for percent, loss in trial.losses.items()}


def test_a_search_from_data_to_a_winner(make_search: Callable[..., BayesianLoRATuner], tiny_folder: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tuner = make_search()
    result = tuner.run()
    assert len(result.trials) == 7
    status = result.trials["status"].tolist()
    assert set(status) == {"completed", "stopped"}
    assert status.count("stopped") >= 3
    assert result.best_value == result.trials["loss"].min() < result.base["loss"]
    preset = get_preset("lora", hardware="cpu", **result.best_params)
    winner = result.trials.set_index("number").loc[result.best_trial]
    assert preset.choices["learning_rate"].value == winner["params_learning_rate"]
    assert preset.choices["lora_r"].value == winner["params_lora_r"]
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    adapted = PeftModel.from_pretrained(base, result.best_adapter_path)
    assert adapted.peft_config["default"].r == winner["params_lora_r"]
    assert result.report_path.is_file()
    assert not list(Path(tuner.config.output_dir).glob("*/*.tmp"))


def test_the_priors_come_first_and_trials_take_freed_slots(make_search: Callable[..., BayesianLoRATuner]) -> None:
    result = make_search().run()
    frame = result.trials.set_index("number")
    # QLoRA's is the preset's own in this space.
    assert frame["prior"].tolist() == ["preset lora", "LoRA Without Regret", "low rank", "", "", "", ""]
    # The first three begin together and are halved; the fourth begins in the slot that was freed.
    assert frame.loc[[0, 1, 2], "status"].tolist().count("stopped") >= 1
    assert len(frame) == 7


def test_all_engines_find_the_same_winner(make_search: Callable[..., BayesianLoRATuner]) -> None:
    found = {engine: make_search(folder=engine, engine=engine).run() for engine in ("packed", "shared", "reload")}
    first = found["packed"]
    for engine, result in found.items():
        assert set(result.trials["engine"].dropna()) == {engine}
        assert result.best_trial == first.best_trial
        assert result.trials["status"].tolist() == first.trials["status"].tolist()
        assert losses(result) == pytest.approx(losses(first), rel=1e-4)
        columns = [name for name in result.trials if name.startswith("params_")]
        assert result.trials[columns].equals(first.trials[columns])


def test_a_live_model_comes_back_as_it_was(make_search: Callable[..., BayesianLoRATuner], tiny_folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = [type(module) for module in model.modules()]
    tuner = make_search(model, n_trials=3)
    tuner.tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tuner.run()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [type(module) for module in model.modules()] == modules
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_study_that_is_over_is_returned_and_goes_on_when_more_is_wanted(
    make_search: Callable[..., BayesianLoRATuner], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_search(n_trials=4).run()
    with monkeypatch.context() as patch:
        patch.setattr(search_run, "load_base", lambda _: pytest.fail("no weight is needed"))
        assert outcome(make_search(n_trials=4).run()) == outcome(first)
    more = make_search(n_trials=7).run()
    assert len(more.trials) == 7
    assert outcome(more)[:4] == outcome(first)
    with pytest.raises(ConflictError, match="seed"):
        make_search(n_trials=7, seed=1).run()


def test_what_does_not_fit_is_never_launched(
    make_search: Callable[..., BayesianLoRATuner], monkeypatch: pytest.MonkeyPatch
) -> None:
    estimated = []

    def excess(model: Any, preset: Any, config: Any, *, longest: int) -> float:
        rank = preset.choices["lora_r"].value
        estimated.append(rank)
        return 1.5 if rank == 8 else -3.0

    monkeypatch.setattr(search_run, "excess_gb", excess)
    result = make_search().run()
    frame = result.trials
    left_out = frame[frame["status"] == "infeasible"]
    assert len(left_out)
    assert set(left_out["params_lora_r"]) == {8}
    assert left_out["steps"].isna().all()
    assert left_out["why"].str.contains("1.50 GiB").all()
    assert len(frame) - len(left_out) == 7  # what was never launched does not count
    assert 8 not in set(frame[frame["status"] != "infeasible"]["params_lora_r"])
    assert len(estimated) == len(set(estimated))  # once for what the memory depends on


def test_a_trial_that_raises_is_recorded_and_three_alike_stop_the_search(
    make_search: Callable[..., BayesianLoRATuner], monkeypatch: pytest.MonkeyPatch
) -> None:
    from forge.tuning.engines.packed.pack import Pack

    own, broken = Pack.backward, [{1}]

    def backward(self: Any, places: Any, rows: Any, tokens: Any) -> None:
        for place in places:
            if self.slots.hypers[place].learning_rate in broken[0] or broken[0] == {"all"}:
                raise ValueError("a strange row")
        own(self, places, rows, tokens)

    monkeypatch.setattr(Pack, "backward", backward)
    broken[0] = {2e-4}  # the preset's own
    result = make_search(folder="one").run()
    failed = result.trials[result.trials["status"] == "failed"]
    assert failed["number"].tolist()[0] == 0
    assert failed["why"].tolist()[0] == "ValueError: a strange row"
    assert "strange row" in next(trial.texts["trace"] for trial in result.study.trials if trial.number == 0)
    assert len(result.trials) == 7
    broken[0] = {"all"}
    with pytest.raises(ForgeError, match=r"Trials 0, 1, 2 failed alike.*a strange row.*run the same again"):
        make_search(folder="two").run()
    broken[0] = set()
    assert len(make_search(folder="two").run().trials) == 7


def test_the_finalists_are_scored_and_the_best_of_them_wins(
    make_search: Callable[..., BayesianLoRATuner], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scored: list[int] = []

    def score(self: Any, base: Any, number: int, adapter: Path) -> tuple[float, dict[str, float]]:
        scored.append(number)
        value = 0.9 if len(scored) == 2 else 0.5  # the second of the finalists speaks best, whatever its loss
        return value, {"bert_score": value}

    monkeypatch.setattr(search_run.Search, "_scored", score)
    monkeypatch.setattr("forge.tuning.settle._encoder", lambda config: None)  # it would come from the hub
    with caplog.at_level(logging.INFO, "forge.tuning"):
        result = make_search(objective="bert_score", bert_score=True, finalists=2).run()
    completed = result.trials[result.trials["status"] == "completed"].sort_values("loss")["number"].tolist()
    assert scored == completed[:2]
    assert (result.best_trial, result.best_value, result.objective) == (completed[1], 0.9, "bert_score")
    assert "2 finalists by bert_score" in caplog.text


def test_every_trial_is_scored_where_that_is_asked_for(
    make_search: Callable[..., BayesianLoRATuner], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scored: list[int] = []

    def score(self: Any, base: Any, number: int, adapter: Path) -> tuple[float, dict[str, float]]:
        assert (adapter / "adapter_model.safetensors").is_file()
        with base as model:
            assert not any("Packed" in type(module).__name__ for module in model.modules())
        scored.append(number)
        return 0.5 - 0.01 * number, {"bert_score": 0.5 - 0.01 * number}

    monkeypatch.setattr(search_run.Search, "_scored", score)
    monkeypatch.setattr("forge.tuning.settle._encoder", lambda config: None)
    with caplog.at_level(logging.INFO, "forge.tuning"):
        result = make_search(objective="bert_score", bert_score=True, score_every_trial=True).run()
    completed = sorted(result.trials[result.trials["status"] == "completed"]["number"])
    assert sorted(set(scored)) == completed
    assert result.best_trial == completed[0]
    assert all(0 < loss < 10 for loss in losses(result).values())  # losses, whatever sign the sampler saw
    assert "bert score" in caplog.text


@pytest.mark.parametrize(
    "lines",
    [
        ["asked 1", "saved 1", "passes 10"],  # counted anew in each process
        pytest.param(["asked 0"], marks=pytest.mark.long),
        pytest.param(["finished 0", "asked 4"], marks=pytest.mark.long),
        pytest.param(["saved 1", "saved 1", "saved 1"], marks=pytest.mark.long),
        pytest.param(["passes 10", "saved 2"], marks=pytest.mark.long),
    ],
    ids=", ".join,
)
def test_a_killed_search_ends_as_if_nothing_had_happened(
    lines: list[str], tiny_folder: Path, tmp_path: Path, kill_and_resume: Any
) -> None:
    fields = {"model": str(tiny_folder)}
    kill_and_resume(PROGRAM, arguments={**fields, "output_dir": str(tmp_path / "whole")})
    runs = kill_and_resume(
        PROGRAM, *(printed(line) for line in lines), arguments={**fields, "output_dir": str(tmp_path / "killed")}
    )
    assert [run.returncode for run in runs] == [-9] * len(lines) + [0]
    whole, killed = StudyResult.load(tmp_path / "whole"), StudyResult.load(tmp_path / "killed")
    assert outcome(killed) == outcome(whole)
    name = "adapter_model.safetensors"
    assert (killed.best_adapter_path / name).read_bytes() == (whole.best_adapter_path / name).read_bytes()


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"engine": "packed", "space": {"use_dora": [True, False]}}, UnsupportedError, "use_dora.*engine='shared'"),
        ({"workers": 2}, UnsupportedError, "same script in as many processes"),
        ({"ema": True}, ForgeError, "train the winner with it"),
        ({"objective": "combined"}, ConflictError, "an encoder"),
        ({"storage": "sqlite://"}, ConflictError, "memory"),
    ],
)
def test_what_cannot_be_searched_is_refused(
    make_search: Callable[..., BayesianLoRATuner], fields: dict[str, Any], error: type, said: str
) -> None:
    with pytest.raises(error, match=said):
        make_search(**fields).run()


def test_ctrl_c_says_how_to_go_on(
    make_search: Callable[..., BayesianLoRATuner], monkeypatch: pytest.MonkeyPatch
) -> None:
    from forge import TuningInterrupted
    from forge.tuning.engines.packed.pack import Pack

    own, passes = Pack.backward, []

    def backward(self: Any, *arguments: Any) -> None:
        passes.append(1)
        if len(passes) == 9:
            raise KeyboardInterrupt
        own(self, *arguments)

    monkeypatch.setattr(Pack, "backward", backward)
    with pytest.raises(TuningInterrupted, match=r"Run the same again: each trial goes on at its last rung"):
        make_search().run()
    assert outcome(make_search().run()) == outcome(make_search(folder="whole").run())


def test_a_study_in_a_database_of_its_own_is_not_begun_anew_behind_ones_back(
    make_search: Callable[..., BayesianLoRATuner], tmp_path: Path
) -> None:
    storage = f"sqlite:///{tmp_path}/studies.db"
    make_search(n_trials=2, storage=storage).run()
    with pytest.raises(ConflictError, match=r"has a study 'study' already.*study_name="):
        make_search(n_trials=2, storage=storage).run(resume=False)
    again = make_search(n_trials=2, storage=storage, study_name="another").run(resume=False)
    assert len(again.trials) == 2


def test_what_is_missing_is_named(tiny_folder: Path) -> None:
    with pytest.raises(ConflictError, match=r"needs a model.* and data"):
        BayesianLoRATuner()
    tuner = BayesianLoRATuner(str(tiny_folder), "chats.jsonl", n_trials=5, judge="local", storage="sqlite:///x.db")
    assert (tuner.config.n_trials, tuner.config.judge, tuner.config.storage) == (5, "local", "sqlite:///x.db")
    assert "n_trials=5" in repr(tuner)


def test_auto_measures_and_keeps_its_choice(make_search: Callable[..., BayesianLoRATuner]) -> None:
    result = make_search(engine="auto", pack="auto", n_trials=6, space=SearchSpace(effective_batch_size=[8])).run()
    assert set(result.trials["engine"].dropna()) <= {"packed", "shared"}


@pytest.mark.long
def test_processes_share_a_search_and_return_one_result(tiny_folder: Path, tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    code = (
        "from tuning.search_program import run; import sys; "
        "run(sys.argv[1], sys.argv[2], n_trials=9, space={'effective_batch_size': [8], 'lora_dropout': 0.0})"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    arguments = [sys.executable, "-c", code, str(tiny_folder), str(tmp_path / "study")]
    processes = [
        subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    assert all("concluded" in output for output, _ in said)
    result = StudyResult.load(tmp_path / "study")
    assert result.trials["status"].isin(["completed", "stopped"]).all()
    assert len(result.trials) == 9
    assert len({trial.crew for trial in result.study.trials}) > 1
    numbers = [line for output, _ in said for line in output.splitlines() if line.startswith("asked ")]
    assert sorted(numbers) == sorted({f"asked {number}" for number in range(9)})  # each by one process alone
