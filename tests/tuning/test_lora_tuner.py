"""Whole runs of a tiny model."""

import json
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from forge import ConflictError, ForgeError, MonitorCallback, NonFiniteError, get_preset
from forge.tuning import LoRATuner, TuningInterrupted, TuningResult


class AtStep(transformers.TrainerCallback):
    """Does something once, at the beginning of a step."""

    def __init__(self, step: int, act: Callable[[], Any]) -> None:
        self.step, self.act, self.steps = step, act, []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(state.global_step)
        if state.global_step == self.step:
            self.act()


def test_from_rows_to_a_judged_adapter(make_tuner: Callable[..., LoRATuner], tiny_folder: Path, tmp_path: Path) -> None:
    tuner = make_tuner()
    result = tuner.run()
    assert result.run_dir == tmp_path / "run"
    for path in (result.adapter_path, result.report_path, result.model_card_path):
        assert path.exists()
    assert result.metrics["loss"] < result.metrics["base_loss"]
    assert result.metrics["steps"] == 8
    assert {"train_loss", "train_runtime_s", "estimated_memory_gb"} <= result.metrics.keys()
    shown = {name: choice.value for name, choice in get_preset("lora", **result.params).choices.items()}
    assert shown["lora_r"] == 4
    assert shown["effective_batch_size"] == 8
    assert "held-out loss" in str(result)
    assert TuningResult.load(tmp_path / "run") == result
    assert result.compare().results[1].model == "tuned"

    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder)
    reloaded = PeftModel.from_pretrained(base, result.adapter_path).eval()
    from forge import evaluate_model

    rows = [{**sample_of(one)} for one in result.tuned.samples]
    again = evaluate_model(
        reloaded, transformers.AutoTokenizer.from_pretrained(result.adapter_path), rows, bert_score=False,
        max_new_tokens=4, progress=False,
    )  # fmt: skip
    assert again.loss.mean == pytest.approx(result.metrics["loss"], abs=1e-6)
    assert [one.answer for one in again.samples] == [one.answer for one in result.tuned.samples]


def sample_of(one: Any) -> dict[str, Any]:
    return {"messages": [*one.prompt, {"role": "assistant", "content": one.reference}]}


def test_a_run_that_is_over_is_returned_and_not_done_again(
    make_tuner: Callable[..., LoRATuner], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_tuner().run()
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)
    assert make_tuner().run() == first
    with pytest.raises(ConflictError, match=r"holds another run(.|\n)*learning_rate"):
        make_tuner(learning_rate=1e-5).run()


def test_resume_false_begins_anew(make_tuner: Callable[..., LoRATuner], tmp_path: Path) -> None:
    first = make_tuner().run()
    second = make_tuner().run(resume=False)
    assert len(list(tmp_path.glob("run.before-*"))) == 1
    assert second.metrics["loss"] == first.metrics["loss"]


@pytest.mark.parametrize("bias", ["none", "all"])
def test_a_live_model_comes_back_as_it_was(
    make_tuner: Callable[..., LoRATuner], text_model: Callable[..., Any], tokenizer: Any, bias: str
) -> None:
    model = text_model("qwen2", layers=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    training = model.training
    result = make_tuner(model, tokenizer=tokenizer, overrides={"lora_r": 4, "bias": bias, "logging_steps": 4}).run()
    assert result.metrics["loss"] < result.metrics["base_loss"]
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert grads == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert hooks == sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    assert model.training == training


def test_it_comes_back_as_it_was_also_when_the_training_fails(
    make_tuner: Callable[..., LoRATuner],
    text_model: Callable[..., Any],
    tokenizer: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = text_model("llama", layers=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def fail() -> None:
        raise RuntimeError("the disk is on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        make_tuner(model, tokenizer=tokenizer, callbacks=[AtStep(3, fail)]).run()
    assert f"What is finished is in {tmp_path / 'run'}" in caplog.text
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    steps = AtStep(-1, fail)
    make_tuner(model, tokenizer=tokenizer, callbacks=[steps]).run()
    assert steps.steps == [3, 4, 5, 6, 7]


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(
    make_tuner: Callable[..., LoRATuner], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    stop = AtStep(2, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(TuningInterrupted, match=r"after step 3 of 8.*Run the same again"):
        make_tuner(callbacks=[stop], overrides={"lora_r": 4, "save_steps": 100, "logging_steps": 1}).run()
    assert signal.getsignal(signal.SIGINT) is handler
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-3" / "trainer_state.json").is_file()
    rest = AtStep(-1, lambda: None)
    result = make_tuner(callbacks=[rest], overrides={"lora_r": 4, "save_steps": 100, "logging_steps": 1}).run()
    assert rest.steps == [3, 4, 5, 6, 7]
    assert result.metrics["steps"] == 8


def test_sigterm_does_too_and_ends_the_process(make_tuner: Callable[..., LoRATuner], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        make_tuner(callbacks=[AtStep(2, lambda: os.kill(os.getpid(), signal.SIGTERM))]).run()
    assert stopped.value.code == 143
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-3" / "trainer_state.json").is_file()


def test_a_signal_in_the_last_step_does_not_lose_the_training(make_tuner: Callable[..., LoRATuner]) -> None:
    with pytest.raises(TuningInterrupted, match="trained to its end"):
        make_tuner(callbacks=[AtStep(7, lambda: os.kill(os.getpid(), signal.SIGINT))]).run()
    rest = AtStep(-1, lambda: None)
    assert make_tuner(callbacks=[rest]).run().metrics["steps"] == 8
    assert rest.steps == []


def test_nan_stops_the_run_and_is_said(make_tuner: Callable[..., LoRATuner], text_model: Any, tokenizer: Any) -> None:
    model = text_model("llama", layers=2)

    def poison() -> None:
        model.model.norm.register_forward_hook(lambda module, inputs, output: output * float("nan"))

    with pytest.raises(NonFiniteError, match=r"stopped at step \d+ of 8.*learning rate"):
        make_tuner(model, tokenizer=tokenizer, callbacks=[AtStep(3, poison)]).run()


def test_frozen_averaged_and_cached(
    make_tuner: Callable[..., LoRATuner], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    result = make_tuner(freeze_ratio=0.5, prefix_cache=True, ema=True).run()
    from safetensors.torch import load_file

    names = load_file(result.adapter_path / "adapter_model.safetensors")
    assert not any(".layers.0." in name for name in names)
    assert any(".layers.1." in name for name in names)
    assert any("average" in note for note in result.notes)


def test_preferences_go_to_dpo(make_tuner: Callable[..., LoRATuner]) -> None:
    pairs = [{"prompt": f"q {n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(24)]
    result = make_tuner(train=pairs, preset="dpo", learning_rate=5e-6).run()
    assert result.metrics["steps"] == 4
    assert "rewards/margins" in json.dumps(json.loads((result.run_dir / "training.json").read_text())["log"])


def test_a_monitor_of_ones_own_replaces_that_of_forge(make_tuner: Callable[..., LoRATuner], tmp_path: Path) -> None:
    own = MonitorCallback(report_dir=tmp_path / "mine", display=False)
    make_tuner(callbacks=[own]).run()
    assert (tmp_path / "mine" / "report.html").is_file()
    assert not (tmp_path / "run" / "training").exists()


def test_a_folder_is_enough_to_do_it_again(
    make_tuner: Callable[..., LoRATuner], tmp_path: Path, rows: list[Any], tiny_folder: Path
) -> None:
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = make_tuner(train=str(data), seed=7).run()
    again = LoRATuner.from_run(tmp_path / "run", output_dir=str(tmp_path / "again")).run()
    assert again.params == first.params
    same = [Path(one.adapter_path, "adapter_model.safetensors").read_bytes() for one in (first, again)]
    assert same[0] == same[1]
    assert LoRATuner.from_run(tmp_path / "run").run() == first

    data.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    with pytest.raises(ConflictError, match="fingerprint"):
        LoRATuner.from_run(tmp_path / "run").run()


def test_what_a_folder_does_not_hold_must_be_handed_in(
    make_tuner: Callable[..., LoRATuner], tmp_path: Path, rows: list[Any], text_model: Any, tokenizer: Any
) -> None:
    first = make_tuner().run()
    with pytest.raises(ForgeError, match=r"does not hold its train.*list.*train="):
        LoRATuner.from_run(tmp_path / "run")
    assert LoRATuner.from_run(tmp_path / "run", train=rows).run() == first
    with pytest.raises(ForgeError, match="no run"):
        LoRATuner.from_run(tmp_path / "nowhere")


def test_a_judge_that_was_an_object_is_asked_for_again(
    make_tuner: Callable[..., LoRATuner], tmp_path: Path, rows: list[Any]
) -> None:
    from forge import get_judge, register_judge

    @register_judge("fair")
    def fair(prompt: str, answer: str) -> float:
        return 50.0

    first = make_tuner(judge=get_judge("fair")).run()
    with pytest.raises(ForgeError, match=r"does not hold its judge.*judge="):
        LoRATuner.from_run(tmp_path / "run", train=rows)
    assert LoRATuner.from_run(tmp_path / "run", train=rows, judge=get_judge("fair")).run() == first


def test_a_result_that_is_not_there(make_tuner: Callable[..., LoRATuner], tmp_path: Path) -> None:
    with pytest.raises(ForgeError, match="no run is there"):
        TuningResult.load(tmp_path)
    with pytest.raises(TuningInterrupted):
        make_tuner(callbacks=[AtStep(2, lambda: os.kill(os.getpid(), signal.SIGINT))]).run()
    with pytest.raises(ForgeError, match="not over"):
        TuningResult.load(tmp_path / "run")


def test_nothing_warns(make_tuner: Callable[..., LoRATuner], no_foreign_warnings: None) -> None:
    make_tuner().run()


def test_the_log_tells_the_stages(make_tuner: Callable[..., LoRATuner], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "forge.tuning"):
        make_tuner().run()
    said = [record.message for record in caplog.records if record.name == "forge.tuning"]
    assert [line.split()[0] for line in said] == ["Loading", "Evaluating", "Training.", "Evaluating", "Done:"]


@pytest.mark.parametrize("family", ["mixtral", "gpt2", "gemma3"])
def test_other_families(make_tuner: Callable[..., LoRATuner], text_model: Any, tokenizer: Any, family: str) -> None:
    """Of the mixture, TRL leaves the router's auxiliary loss on, and nothing could be generated afterwards."""
    overrides = {"lora_r": 4, "logging_steps": 4}
    result = make_tuner(text_model(family, layers=2), tokenizer=tokenizer, overrides=overrides).run()
    assert result.metrics["steps"] == 8
    assert all(one.answer is not None for one in result.tuned.samples)


@pytest.mark.parametrize(
    "overrides",
    [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5, 6]}],
    ids=lambda one: next(iter(one)),
)
def test_a_base_in_bf16_with_what_trains_beside_the_adapter(
    make_tuner: Callable[..., LoRATuner], text_model: Any, tokenizer: Any, overrides: dict[str, Any], tmp_path: Path
) -> None:
    model = text_model("llama", layers=2).to(torch.bfloat16)
    fields = {"overrides": {"lora_r": 4, **overrides}}
    first = make_tuner(model, tokenizer=tokenizer, **fields).run()
    # The evaluation of what was trained is that of what is loaded.
    for left in ("result.json", "evaluation/tuned/result.json"):
        (tmp_path / "run" / left).unlink()
    again = make_tuner(model, tokenizer=tokenizer, **fields).run()
    assert again.metrics["loss"] == first.metrics["loss"]


def test_the_best_checkpoint_is_loaded_when_that_is_asked_for(make_tuner: Callable[..., LoRATuner]) -> None:
    best = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "greater_is_better": True}
    result = make_tuner(overrides={"lora_r": 4, "logging_steps": 1, **best}).run()
    assert any("best checkpoint, step 3" in note for note in result.notes)


def test_a_live_model_is_let_go_when_the_prefix_cannot_be_frozen(
    make_tuner: Callable[..., LoRATuner], text_model: Any, tokenizer: Any
) -> None:
    model = text_model("llama", layers=2)
    overrides = {"lora_r": 4, "target_modules": ["q_proj"], "layers_to_transform": [0]}
    with pytest.raises(ForgeError):
        make_tuner(model, tokenizer=tokenizer, freeze_ratio=0.5, overrides=overrides).run()
    assert not any("lora" in name for name, _ in model.named_modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_judge_of_whom_nothing_is_heard_stops_the_run_before_the_training(
    make_tuner: Callable[..., LoRATuner], tmp_path: Path
) -> None:
    from forge import get_judge, register_judge

    broken = [True]

    @register_judge("sometimes")
    def sometimes(prompt: str, answer: str) -> float:
        if broken[0]:
            raise RuntimeError("no such model")
        return 50.0

    with pytest.raises(ForgeError, match=r"no score for any of 4 answers.*no such model"):
        make_tuner(judge=get_judge("sometimes")).run()
    assert not (tmp_path / "run" / "checkpoints").exists()
    broken[0] = False
    result = make_tuner(judge=get_judge("sometimes")).run()
    assert result.metrics["llm_judge_score"] == 50
    assert "LLM judge" in str(result)


def test_the_same_tuner_goes_on_with_the_same_callbacks(make_tuner: Callable[..., LoRATuner], tmp_path: Path) -> None:
    stop = AtStep(2, lambda: os.kill(os.getpid(), signal.SIGINT))
    own = MonitorCallback(report_dir=tmp_path / "mine", display=False)
    tuner = make_tuner(callbacks=[own, stop])
    with pytest.raises(TuningInterrupted):
        tuner.run()
    assert any("interrupted" in note for note in tuner.run().notes)


def test_two_processes_do_not_work_in_one_folder(make_tuner: Callable[..., LoRATuner], tmp_path: Path) -> None:
    from filelock import FileLock

    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / "lock"), pytest.raises(ForgeError, match="Another process is at work"):
        make_tuner().run()
    make_tuner().run()


def test_a_path_is_a_model_and_the_folder_may_be_left(
    make_tuner: Callable[..., LoRATuner], tiny_folder: Path, tmp_path: Path, rows: list[Any], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tiny_folder.parent)
    result = make_tuner(Path(tiny_folder.name), output_dir=os.path.relpath(tmp_path / "run")).run()
    monkeypatch.chdir(tmp_path)
    assert "held-out loss" in str(result)
    assert LoRATuner.from_run(tmp_path / "run", train=rows).run() == result


def test_other_weights_are_another_run(
    make_tuner: Callable[..., LoRATuner], tiny_folder: Path, tmp_path: Path, text_model: Any
) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    first = make_tuner(str(folder)).run()
    assert make_tuner(str(folder)).run() == first
    text_model("llama", layers=2, seed=1).save_pretrained(folder)
    with pytest.raises(ConflictError, match=r"holds another run(.|\n)*model\.weights"):
        make_tuner(str(folder)).run()


def test_a_run_whose_adapter_is_gone_is_not_over(make_tuner: Callable[..., LoRATuner], tmp_path: Path) -> None:
    import shutil

    first = make_tuner().run()
    adapter = (first.adapter_path / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(first.adapter_path)
    make_tuner().run()
    assert (first.adapter_path / "adapter_model.safetensors").read_bytes() == adapter


def test_trackers_of_the_trainer_are_handed_on(make_tuner: Callable[..., LoRATuner], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    make_tuner(report_to=("tensorboard",)).run()
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))
