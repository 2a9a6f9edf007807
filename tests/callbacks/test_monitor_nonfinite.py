"""The truth about NaN, proven by injecting one into running trainers."""

import math
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from forge import ForgeWarning, MonitorCallback, NonFiniteError
from forge.callbacks.monitor.guard import PATIENCE
from support.ddp import rank, run_ddp
from support.models import lora, text_model, trainer
from support.nan import inject_nan

BAD = 3


@pytest.fixture(autouse=True)
def _only_the_monitor_warns(warning_recorder):
    yield
    warning_recorder.assert_clean(besides="forge.monitor")


class Spy(TrainerCallback):
    """What there is after every step: weights and optimizer state; and what a tracker is told."""

    def __init__(self):
        self.weights, self.states, self.told = [], [], []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **_):
        self.weights.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
        self.states.append([v.clone() for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)])

    def on_log(self, args, state, control, logs=None, **_):
        self.told.append(dict(logs))


def monitored(kind, folder, *, on_nan="skip", peft=True, spy=None, attach=True, report_dir=None, **changes):
    model = text_model(layers=2)
    monitor = MonitorCallback(on_nan=on_nan, display=False, report_dir=report_dir)
    subject = trainer(
        kind,
        folder,
        get_peft_model(model, lora()) if peft else model,
        **{"max_steps": 5, **changes},
        trainer_options={"callbacks": [monitor]},
    )
    if spy is not None:  # where reporters stand: before every callback of the user's
        subject.callback_handler.callbacks.insert(1, spy)
    if attach:
        assert monitor.attach(subject) is monitor
    return subject, monitor


def finite(tensors):
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("kind", ["plain", "sft", "dpo"])
def test_skip_drops_the_update_and_goes_on(kind, accumulation, value, where, tmp_path):
    spy = Spy()
    subject, monitor = monitored(kind, tmp_path, spy=spy, gradient_accumulation_steps=accumulation)
    with inject_nan(subject, step=BAD, where=where, value=value, micro_batch=accumulation - 1):
        output = subject.train()
    assert subject.state.global_step == 5
    before, after, later = spy.weights[BAD - 2 : BAD + 1]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(after[name], later[name]) for name in after)
    assert all(torch.equal(a, b) for a, b in zip(spy.states[BAD - 2], spy.states[BAD - 1], strict=True))
    assert all(finite(weights.values()) for weights in spy.weights)
    assert all(finite(states) for states in spy.states)
    assert [(event.step, event.kind) for event in monitor.events] == [(BAD, "nonfinite")]
    assert math.isfinite(output.training_loss)
    assert output.training_loss > 0


@pytest.mark.parametrize("nan_filter", [True, False])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("kind", ["plain", "sft"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_the_log_tells_the_truth_at_every_step(kind, accumulation, nan_filter, bf16, tmp_path):
    honest = Spy()
    subject, _ = monitored(
        kind,
        tmp_path / "one",
        spy=honest,
        gradient_accumulation_steps=accumulation,
        logging_nan_inf_filter=nan_filter,
        bf16=bf16,
    )
    with inject_nan(subject, step=BAD):
        output = subject.train()
    losses = [entry["loss"] for entry in subject.state.log_history if "loss" in entry]
    assert [math.isnan(loss) for loss in losses] == [step == BAD for step in range(1, 6)]
    assert all(loss > 1 for loss in losses if not math.isnan(loss))  # log(256) is 5.5: none is 0.0
    assert [entry.get("nonfinite_steps", 0) for entry in subject.state.log_history if "loss" in entry] == [
        0,
        0,
        1,
        0,
        0,
    ]
    told = [entry["loss"] for entry in honest.told if "loss" in entry]
    assert [repr(loss) for loss in told] == [repr(loss) for loss in losses]
    final = subject.state.log_history[-1]
    expected = sum(loss for loss in losses if not math.isnan(loss)) / 4
    assert final["train_loss"] == honest.told[-1]["train_loss"] == pytest.approx(expected)
    assert output.training_loss == output.metrics["train_loss"] == pytest.approx(expected)
    assert final["nonfinite_steps"] == 1
    assert math.isnan(next(entry["grad_norm"] for entry in subject.state.log_history if entry["step"] == BAD))


@pytest.mark.parametrize("nan_filter", [True, False])
@pytest.mark.parametrize("bad", [{2}, {1, 3}, {1, 2, 3}])
def test_an_entry_of_several_steps_is_the_mean_of_the_finite_ones(bad, nan_filter, tmp_path):
    def losses(faulty, **changes):
        spy = Spy()
        subject, _ = monitored("plain", tmp_path, spy=spy, learning_rate=0.0, max_steps=6, **changes)
        if faulty:
            with inject_nan(subject, step=bad):
                subject.train()
        else:
            subject.train()
        return [(entry["loss"], entry.get("nonfinite_steps", 0)) for entry in spy.told if "loss" in entry]

    single = [loss for loss, _ in losses(False)]  # the learning rate is 0: each batch's loss is what it is
    first, second = losses(True, logging_steps=3, logging_nan_inf_filter=nan_filter)
    good = [single[step - 1] for step in (1, 2, 3) if step not in bad]
    assert first[1] == len(bad)
    if good:
        assert first[0] == pytest.approx(sum(good) / len(good), rel=1e-5)
    else:
        assert math.isnan(first[0])
    assert second == (pytest.approx(sum(single[3:]) / 3, rel=1e-5), 0)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("kind", ["plain", "sft"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_stop_ends_with_a_checkpoint_of_finite_weights(kind, accumulation, where, bf16, tmp_path):
    spy = Spy()
    subject, monitor = monitored(
        kind, tmp_path, on_nan="stop", spy=spy, gradient_accumulation_steps=accumulation, bf16=bf16
    )
    with inject_nan(subject, step=BAD, where=where):
        subject.train()
    assert subject.state.global_step == BAD
    saved = load_file(tmp_path / f"checkpoint-{BAD}" / "adapter_model.safetensors")
    assert saved
    assert finite(saved.values())
    assert finite(spy.weights[-1].values())
    optimizer = torch.load(tmp_path / f"checkpoint-{BAD}" / "optimizer.pt", weights_only=True)
    assert finite(v for s in optimizer["state"].values() for v in s.values() if torch.is_tensor(v))
    assert "training stops with a checkpoint" in monitor.events[-1].message
    losses = [entry["loss"] for entry in spy.told if "loss" in entry]
    assert math.isnan(losses[BAD - 1]) == (where == "loss")
    # and it can be resumed
    again, _ = monitored(kind, tmp_path, gradient_accumulation_steps=accumulation, bf16=bf16)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 5


def test_stop_leaves_a_checkpoint_with_save_strategy_best_too(tmp_path):
    from support.data import lm_tokens

    monitor = MonitorCallback(on_nan="stop", display=False)
    subject = trainer(
        "plain", tmp_path, text_model(layers=2), max_steps=5, save_strategy="best", eval_strategy="steps", eval_steps=1,
        learning_rate=0.0, metric_for_best_model="loss",  # no step is better than the first
        trainer_options={"callbacks": [monitor], "eval_dataset": lm_tokens(2)},
    )  # fmt: skip
    monitor.attach(subject)
    with inject_nan(subject, step=BAD):
        subject.train()
    assert (tmp_path / f"checkpoint-{BAD}").is_dir()


def test_stop_does_not_save_weights_that_are_bad_themselves(tmp_path):
    spy = Spy()
    subject, monitor = monitored("plain", tmp_path, on_nan="stop", spy=spy, save_strategy="steps", save_steps=1)
    with inject_nan(subject, step=BAD, where="weight"):
        subject.train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    assert "itself is not finite: no checkpoint is written" in monitor.events[-1].message


def test_raise_raises_before_the_weights_change(tmp_path):
    spy = Spy()
    subject, monitor = monitored("sft", tmp_path, on_nan="raise", spy=spy)
    with (
        inject_nan(subject, step=BAD, where="gradient"),
        pytest.raises(
            NonFiniteError, match=r"Step 3: the gradient norm is nan though the loss is [\d.]+.*usual causes"
        ),
    ):
        subject.train()
    now = {name: value for name, value in subject.model.named_parameters() if value.requires_grad}
    assert all(torch.equal(spy.weights[-1][name], now[name]) for name in now)
    assert monitor.events[-1].step == BAD
    # what attach() had put on the trainer for the run is gone
    assert "training_step" not in vars(subject)
    assert "clip_grad_norm_" not in vars(subject.accelerator)


def test_a_loss_that_is_nan_with_finite_gradients(tmp_path):
    """As when a constant goes wrong: only the loss tells."""
    spy = Spy()
    subject, monitor = monitored("plain", tmp_path, spy=spy)
    inner = subject.compute_loss
    subject.compute_loss = lambda *a, **k: inner(*a, **k) + (math.nan if subject.state.global_step == BAD - 1 else 0.0)
    subject.train()
    assert [event.step for event in monitor.events] == [BAD]
    assert all(torch.equal(spy.weights[BAD - 2][n], spy.weights[BAD - 1][n]) for n in spy.weights[0])


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.1])
def test_with_and_without_clipping(max_grad_norm, tmp_path):
    spy = Spy()
    subject, _ = monitored("plain", tmp_path, spy=spy, max_grad_norm=max_grad_norm)
    with inject_nan(subject, step=BAD, where="gradient", value=math.inf):
        subject.train()
    assert finite(spy.weights[-1].values())
    assert all(torch.equal(spy.weights[BAD - 2][n], spy.weights[BAD - 1][n]) for n in spy.weights[0])


def test_a_full_model_with_another_optimizer(tmp_path):
    spy = Spy()
    subject, _ = monitored("plain", tmp_path, spy=spy, peft=False, optim="adafactor")
    with inject_nan(subject, step=BAD):
        subject.train()
    assert finite(spy.weights[-1].values())
    assert all(torch.equal(spy.weights[BAD - 2][n], spy.weights[BAD - 1][n]) for n in spy.weights[0])


def test_skipping_for_ever_stops(tmp_path):
    subject, monitor = monitored("plain", tmp_path, max_steps=PATIENCE + 10)
    with inject_nan(subject, step=range(2, PATIENCE + 3)):
        subject.train()
    assert subject.state.global_step == PATIENCE + 2
    assert f"the {PATIENCE + 1}th in a row" in monitor.events[-1].message
    assert (tmp_path / f"checkpoint-{PATIENCE + 2}").is_dir()


def test_without_attach_gradients_are_guarded_and_the_rest_is_said(tmp_path):
    spy = Spy()
    subject, monitor = monitored("plain", tmp_path, spy=spy, attach=False)
    with (
        inject_nan(subject, step=BAD),
        pytest.warns(ForgeWarning, match=r"cannot see the loss.*monitor\.attach\(trainer\)"),
    ):
        subject.train()
    assert [event.step for event in monitor.events] == [BAD]
    assert all(torch.equal(spy.weights[BAD - 2][n], spy.weights[BAD - 1][n]) for n in spy.weights[0])
    losses = [entry["loss"] for entry in subject.state.log_history if "loss" in entry]
    assert [math.isnan(loss) for loss in losses] == [False, False, True, False, False]


def test_weights_that_are_not_finite_to_begin_with(tmp_path):
    subject, _ = monitored("plain", tmp_path)
    parameter = next(p for n, p in subject.model.named_parameters() if "lora_B" in n)
    with torch.no_grad():
        parameter[0, 0] = math.inf
    with pytest.raises(
        NonFiniteError, match=r"q_proj\.lora_B\.default\.weight holds NaN or infinity before the first step"
    ):
        subject.train()


def test_fp16s_scaler_is_left_to_its_work(tmp_path):
    """Its infinities are how it finds the scale: the step is skipped by it, and nothing is said."""

    class Scaled(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer=None, **_):
            optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
            optimizer._accelerate_step_called = False
            optimizer._optimizer_original_step_method = optimizer.optimizer.step

            def step(*args, **kwargs):
                optimizer._accelerate_step_called = True
                return optimizer._optimizer_original_step_method(*args, **kwargs)

            optimizer._optimizer_patched_step_method = step
            subject.accelerator.scaler = optimizer.scaler
            subject.accelerator.native_amp = True
            subject.accelerator.state._mixed_precision = "fp16"

    spy = Spy()
    subject, monitor = monitored("plain", tmp_path, spy=spy)
    subject.add_callback(Scaled())
    try:
        with inject_nan(subject, step=BAD, where="gradient", value=math.inf):
            subject.train()
    finally:
        subject.accelerator.state._mixed_precision = "no"
    assert monitor.events == []
    assert all(torch.equal(spy.weights[BAD - 2][n], spy.weights[BAD - 1][n]) for n in spy.weights[0])
    assert any(not torch.equal(spy.weights[BAD - 1][n], spy.weights[BAD][n]) for n in spy.weights[0])
    assert finite(spy.weights[-1].values())


@pytest.mark.parametrize("kind", ["plain", "sft"])
def test_at_most_one_read_a_step(kind, tmp_path, device_reads):
    subject, _ = monitored(kind, tmp_path, max_steps=8, logging_steps=4, gradient_accumulation_steps=2)
    with device_reads() as reads:
        subject.train()
    inside = reads.matching("forge", below="transformers")
    scalars = [read for read in inside if read.kind == "scalar"]
    assert len([read for read in scalars if "run.py" in str(read)]) == 8
    elsewhere = [str(read) for read in inside if "run.py" not in str(read) and "_refuse_bad_weights" not in str(read)]
    assert elsewhere == []
    hosts = [read for read in inside if read.kind == "host" and "_read_window" in str(read)]
    assert len(hosts) == 2  # one for each entry of the log
    assert {read.kind for read in inside} <= {"scalar", "host"}


def test_looking_at_the_loss_alone(tmp_path):
    spy = Spy()
    model = get_peft_model(text_model(layers=2), lora())
    monitor = MonitorCallback(check_gradients=False, on_nan="skip", display=False)
    subject = trainer("plain", tmp_path, model, max_steps=4, trainer_options={"callbacks": [monitor, spy]})
    monitor.attach(subject)
    with inject_nan(subject, step=2):
        subject.train()
    assert [event.step for event in monitor.events] == [2]
    assert not any(name.startswith("grad_norm/") for entry in spy.told for name in entry)
    assert finite(spy.weights[-1].values())


@pytest.mark.parametrize("on_nan", ["skip", "stop"])
def test_on_real_weights_and_conversations(on_nan, smollm2, conversations, tmp_path):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTTrainer

    from forge import get_preset

    preset = get_preset(
        "qlora", model=smollm2, hardware="cpu", max_steps=3, max_length=64, logging_steps=1, output_dir=str(tmp_path),
        per_device_train_batch_size=2, gradient_accumulation_steps=2, disable_tqdm=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(smollm2, **preset.model_kwargs())
    spy, monitor = Spy(), MonitorCallback(on_nan=on_nan, display=False, report_dir=tmp_path / "report")
    subject = SFTTrainer(
        model=model,
        args=preset.get_sft_config(),
        train_dataset=Dataset.from_list([{"messages": chat[:2]} for chat in conversations[:16]]),
        processing_class=AutoTokenizer.from_pretrained(smollm2),
        peft_config=preset.get_lora_config(),
        callbacks=[*preset.get_callbacks(), spy, monitor],
    )
    monitor.attach(subject)
    with inject_nan(subject, step=2, micro_batch=1):
        subject.train()
    assert subject.state.global_step == (3 if on_nan == "skip" else 2)
    assert all(torch.equal(spy.weights[0][name], spy.weights[1][name]) for name in spy.weights[0])
    assert finite(spy.weights[-1].values())
    assert all(finite(states) for states in spy.states)
    losses = [entry["loss"] for entry in subject.state.log_history if "loss" in entry]
    assert [math.isnan(loss) for loss in losses] == [False, True, False][: len(losses)]
    if on_nan == "stop":
        assert finite(load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors").values())
    assert "the loss is nan" in (tmp_path / "report" / "report.html").read_text()


def train_in_ddp(folder, processes, on_nan):
    """The second process alone has a bad batch."""
    spy = Spy()
    subject, monitor = monitored(
        "plain", Path(folder, "run"), on_nan=on_nan, spy=spy, ddp_backend="gloo", learning_rate=1e-2
    )
    if rank() == 1:
        with inject_nan(subject, step=BAD, where="loss"):
            subject.train()
    else:
        subject.train()
    seen = {
        "steps": torch.tensor([event.step for event in monitor.events]),
        "last": torch.tensor(subject.state.global_step),
        "losses": torch.tensor([entry["loss"] for entry in subject.state.log_history if "loss" in entry]),
    }
    save_file({**seen, **spy.weights[-1]}, Path(folder, f"{rank()}.safetensors"))


@pytest.mark.parametrize(("on_nan", "last"), [("skip", 5), ("stop", BAD)])
def test_two_processes_decide_alike(on_nan, last, tmp_path):
    run_ddp("callbacks.test_monitor_nonfinite:train_in_ddp", folder=str(tmp_path), on_nan=on_nan)
    first, second = (load_file(tmp_path / f"{number}.safetensors") for number in (0, 1))
    for side in (first, second):
        assert side["steps"].tolist() == [BAD]
        assert side["last"].item() == last
        assert side["losses"].isnan().tolist() == [step == BAD for step in range(1, last + 1)]
    weights = [name for name in first if name not in ("steps", "last", "losses")]
    assert finite(first[name] for name in weights)
    assert all(torch.equal(first[name], second[name]) for name in weights)
