"""What is measured, against an independent way of measuring it."""

import json
import math
import time
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from transformers import TrainerCallback

from forge import ForgeError, MonitorCallback, UnknownNameError, UnsupportedError
from forge.callbacks.monitor import journal
from forge.callbacks.monitor.throughput import Throughput
from support.data import lm_tokens
from support.models import lora, text_model, trainer


@pytest.fixture(autouse=True)
def _only_the_monitor_warns(warning_recorder):
    yield
    warning_recorder.assert_clean(besides="forge.monitor")


class BeforeClipping(TrainerCallback):
    """Gradients as they are before clipping, from hooks; weights before and after each step."""

    def __init__(self, model):
        self.model, self.gradients, self.ratios, self._before = model, [], [], None

    def on_step_begin(self, *_, **__):
        self._before = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}

    def watch(self, subject):
        inner = subject.accelerator.clip_grad_norm_

        def clip(parameters, *args, **kwargs):
            named = self.model.named_parameters()
            self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})
            return inner(parameters, *args, **kwargs)

        subject.accelerator.clip_grad_norm_ = clip

    def on_optimizer_step(self, *_, **__):
        now = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        moved = math.sqrt(sum((now[n] - self._before[n]).square().sum().item() for n in now))
        size = math.sqrt(sum(value.square().sum().item() for value in self._before.values()))
        self.ratios.append(moved / size)

    def norm(self, step, part):
        chosen = [g for name, g in self.gradients[step].items() if part(name)]
        return math.sqrt(sum(g.square().sum().item() for g in chosen))


def logs_of(subject):
    return [entry for entry in subject.state.log_history if "loss" in entry]


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.01, 0.0])
@pytest.mark.parametrize("attach", [True, False], ids=["attached", "plain"])
def test_gradient_norms_are_those_before_clipping(max_grad_norm, attach, tmp_path):
    model = get_peft_model(text_model(layers=2), lora(modules_to_save=["embed_tokens"]))
    truth = BeforeClipping(model)
    monitor = MonitorCallback(display=False)
    subject = trainer(
        "plain",
        tmp_path,
        model,
        max_steps=3,
        max_grad_norm=max_grad_norm,
        trainer_options={"callbacks": [truth, monitor]},
    )
    truth.watch(subject)
    if attach:
        monitor.attach(subject)
        subject.train()
    else:
        with pytest.warns(Warning, match="has no trainer"):
            subject.train()
    parts = {
        "attention": lambda name: "self_attn" in name,
        "mlp": lambda name: "mlp" in name,
        "embeddings": lambda name: "embed_tokens" in name or "lm_head" in name,
        "lora_A": lambda name: "lora_A" in name,
        "lora_B": lambda name: "lora_B" in name,
    }
    if not truth.gradients:
        pytest.skip("this transformers does not measure the norm where nothing is clipped")
    for step, entry in enumerate(logs_of(subject)):
        found = {name.removeprefix("grad_norm/"): entry[name] for name in entry if name.startswith("grad_norm/")}
        assert set(found) == set(parts)
        for name, part in parts.items():
            assert found[name] == pytest.approx(truth.norm(step, part), rel=1e-4, abs=1e-9), name
        assert entry["grad_norm"] == pytest.approx(truth.norm(step, lambda _: True), rel=1e-4)
        assert entry["update_ratio"] == pytest.approx(truth.ratios[step], rel=1e-4)


def test_the_groups_of_a_full_model(tmp_path):
    monitor = MonitorCallback(display=False)
    subject = trainer("plain", tmp_path, text_model("qwen3", layers=2), trainer_options={"callbacks": [monitor]})
    monitor.attach(subject)
    subject.train()
    found = {name for entry in logs_of(subject) for name in entry if name.startswith("grad_norm/")}
    assert found == {f"grad_norm/{name}" for name in ("attention", "mlp", "embeddings", "norms")}


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("gpt2", {"attention", "mlp", "embeddings", "norms"}),
        ("falcon_7b", {"attention", "mlp", "embeddings", "norms"}),
        ("mixtral", {"attention", "mlp", "embeddings", "norms"}),
        ("gemma3", {"attention", "mlp", "embeddings", "norms"}),
        ("gpt_neox", {"attention", "mlp", "embeddings", "norms"}),
        ("phi3", {"attention", "mlp", "embeddings", "norms"}),
    ],
)
def test_the_groups_of_every_family(family, expected, tiny_model):
    from forge.callbacks.monitor.gradients import GradientGroups

    assert set(GradientGroups(tiny_model(family)).names) == expected


def test_a_dead_adapter_is_noticed(tmp_path):
    """The second layer's output is cut off, so nothing in the first ever learns."""
    model = get_peft_model(text_model(layers=2), lora(target_modules=["q_proj", "gate_proj"], layers_to_transform=[0]))
    model.get_base_model().model.layers[0].mlp.register_forward_hook(lambda module, args, output: output * 0)
    monitor = MonitorCallback(display=False)
    subject = trainer("plain", tmp_path, model, max_steps=6, trainer_options={"callbacks": [monitor]})
    monitor.attach(subject)
    subject.train()
    (event,) = monitor.events
    assert event.kind == "zero_gradient"
    assert "gradients of mlp have been exactly 0" in event.message


def test_a_dead_adapter_is_noticed_where_nothing_is_logged(tmp_path):
    model = get_peft_model(text_model(layers=2), lora(target_modules=["q_proj", "gate_proj"], layers_to_transform=[0]))
    model.get_base_model().model.layers[0].mlp.register_forward_hook(lambda module, args, output: output * 0)
    monitor = MonitorCallback(display=False)
    subject = trainer(
        "plain", tmp_path, model, max_steps=4, logging_strategy="no", trainer_options={"callbacks": [monitor]}
    )
    monitor.attach(subject)
    subject.train()
    assert [event.kind for event in monitor.events] == ["zero_gradient"]


def test_a_healthy_adapter_is_not(tmp_path):
    """lora_A's gradient is exactly 0 at the first step, and at the second after a learning rate of 0."""
    monitor = MonitorCallback(display=False)
    model = get_peft_model(text_model(layers=2), lora())
    subject = trainer(
        "plain",
        tmp_path,
        model,
        max_steps=8,
        warmup_steps=3,
        lr_scheduler_type="cosine",
        trainer_options={"callbacks": [monitor]},
    )
    monitor.attach(subject)
    subject.train()
    assert monitor.events == []


@pytest.mark.parametrize("kind", ["plain", "sft", "dpo"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_tokens_and_samples(kind, accumulation, tmp_path):
    """Against the batches that the data loader gives."""
    monitor = MonitorCallback(display=False)
    model = get_peft_model(text_model(layers=2), lora())
    subject = (
        trainer(
            kind,
            tmp_path,
            model,
            max_steps=2,
            logging_steps=2,
            gradient_accumulation_steps=accumulation,
            train_sampling_strategy="sequential",
            trainer_options={"callbacks": [monitor]},
        )
        if "train_sampling_strategy" in _fields()
        else None
    )
    if subject is None:
        pytest.skip("this transformers always shuffles")
    batches = [batch for _, batch in zip(range(2 * accumulation), subject.get_train_dataloader(), strict=False)]
    real = sum(batch["attention_mask"].sum().item() for batch in batches)
    computed = sum(batch["input_ids"].numel() for batch in batches)
    monitor.attach(subject)
    subject.train()
    (entry,) = logs_of(subject)
    assert entry["padding_share"] == pytest.approx(1 - real / computed)
    rows = sum(len(batch["input_ids"]) for batch in batches) // (2 if kind == "dpo" else 1)
    assert entry["tokens_per_second"] / entry["samples_per_second"] == pytest.approx(real / rows)


def _fields():
    from transformers import TrainingArguments

    return TrainingArguments.__dataclass_fields__


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Flops:
    def step(self, tokens, length, *, served):
        return (10.0 - 2 * served) * tokens

    def forward(self, tokens, length, *, served):
        return (3.0 - 2 * served) * tokens


def batch(rows, length, **more):
    return {"input_ids": torch.ones(rows, length, dtype=torch.long), **more}


def test_the_arithmetic_of_throughput():
    clock = Clock()
    subject = Throughput(Flops(), 1000.0, processes=2, clock=clock)
    for _ in range(2):
        clock.now += 1  # waiting for data
        subject.begin_step()
        subject.count(batch(4, 10, attention_mask=torch.ones(4, 10).tril()))
        clock.now += 3  # computing
        subject.end_step()
        subject.count_step()
        clock.now += 100  # evaluating, saving
        subject.mark()
    assert subject.real_tokens.item() == 20
    metrics = subject.drain(20.0, steps_left=6)
    assert metrics == pytest.approx(
        {
            "tokens_per_second": 2 * 20 / 8,
            "samples_per_second": 2 * 8 / 8,
            "padding_share": 1 - 20 / 80,
            "mfu": 10 * 80 / 8 / 1000,
            "data_wait_share": 2 / 8,
            "eta_s": 6 * 208 / 2,
        }
    )
    assert subject.real_tokens is None
    assert set(subject.drain(0.0, steps_left=6)) == {"eta_s"}


def test_packed_rows_are_many_samples_and_pairs_cost_a_reference_pass():
    clock = Clock()
    packed = Throughput(None, None, clock=clock)
    packed.count(batch(1, 30, cu_seq_lens_q=torch.tensor([0, 10, 20, 30])))
    clock.now += 1
    packed.end_step()
    assert packed.drain(0.0, steps_left=0) == pytest.approx(
        {"tokens_per_second": 30, "samples_per_second": 3, "padding_share": 0, "data_wait_share": 0}
    )
    for reference, work in ((False, 13), (True, 10)):
        pairs = Throughput(Flops(), 100.0, preference_pairs=True, clock=clock)
        pairs.count(batch(4, 5, **({"ref_chosen_logps": None} if reference else {})))
        clock.now += 1
        pairs.end_step()
        metrics = pairs.drain(0.0, steps_left=0)
        assert metrics["mfu"] == pytest.approx(work * 20 / 100)
        assert metrics["samples_per_second"] == 2


@pytest.mark.parametrize(("shared_reference", "work"), [(True, 9 + 2), (False, 9 + 3)])
def test_what_a_cache_serves_is_no_work(shared_reference, work):
    """The share is that of each micro-batch; a reference that is another model is served nothing."""
    clock, shares = Clock(), iter([0.0, 0.5])
    subject = Throughput(
        Flops(),
        100.0,
        preference_pairs=True,
        served=lambda: next(shares),
        shared_reference=shared_reference,
        clock=clock,
    )
    subject.count(batch(4, 5))
    subject.count(batch(4, 5))
    clock.now += 1
    subject.end_step()
    assert subject.drain(0.0, steps_left=0)["mfu"] == pytest.approx((13 + work) * 20 / 100)


def test_the_share_that_a_cache_serves_is_read_from_the_model():
    from forge.callbacks.monitor.run import _served
    from forge.models.truncation import truncate

    model = text_model()
    assert _served(model)() == _served(torch.nn.Linear(2, 2))() == 0
    model.requires_grad_(False)
    truncation = truncate(model, 2)
    served = _served(model)
    assert served() == 0
    truncation.shortcut = SimpleNamespace(served=0.25)  # a cache that is attached later
    assert served() == 0.25


def test_waiting_for_data_is_seen(tmp_path):
    monitor = MonitorCallback(display=False)
    collator = _SlowCollator()
    subject = trainer(
        "plain",
        tmp_path,
        max_steps=4,
        logging_steps=4,
        trainer_options={"callbacks": [monitor], "data_collator": collator},
    )
    monitor.attach(subject)
    subject.train()
    (entry,) = logs_of(subject)
    assert entry["data_wait_share"] > 0.5


class _SlowCollator:
    def __call__(self, rows):
        time.sleep(0.5)
        return {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "attention_mask", "labels")}


def test_an_entry_that_is_not_a_dict_is_not_counted():
    subject = Throughput(None, None)
    subject.count((torch.ones(2, 3), torch.ones(2)))
    subject.count({"input_ids": [[1, 2]]})
    assert subject.real_tokens is None


def test_one_bad_group_does_not_hide_the_others():
    from forge.callbacks.monitor.gradients import GradientGroups

    model = text_model(layers=1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.model.layers[0].self_attn.q_proj.weight.grad[0, 0] = math.nan
    groups = GradientGroups(model)
    norms = dict(zip(groups.names, groups.norms().tolist(), strict=False))
    assert math.isnan(norms["attention"])
    assert norms["mlp"] == pytest.approx(math.sqrt(3 * 32 * 48))


def test_overflows_do_not_make_groups_look_dead():
    from forge.callbacks.monitor.gradients import GradientGroups

    model = text_model(layers=1)
    groups = GradientGroups(model)
    for total, expected in ((math.inf, 0), (0.0, 1), (math.nan, 1), (1.0, 2)):
        groups.count_zeros(torch.tensor([0.0] * len(groups.names) + [total]))
        assert groups.zero_streak.tolist() == [expected] * len(groups.names)


def test_no_mfu_where_the_device_is_not_known(tmp_path):
    monitor = MonitorCallback(display=False)
    subject = trainer("plain", tmp_path, bf16=True, trainer_options={"callbacks": [monitor]})
    monitor.attach(subject)
    subject.train()
    assert not any("mfu" in entry for entry in logs_of(subject))


def test_metrics_reach_a_tracker_that_stands_before_the_users_callbacks(tmp_path):
    told = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            told.append(dict(logs))

    monitor = MonitorCallback(display=False)
    subject = trainer("sft", tmp_path, trainer_options={"callbacks": [monitor]})
    subject.callback_handler.callbacks.insert(1, Tracker())
    monitor.attach(subject)
    subject.train()
    assert {"tokens_per_second", "update_ratio", "grad_norm/mlp", "eta_s", "memory/process_rss_gb"} <= told[0].keys()
    for entry, history in zip(told, subject.state.log_history, strict=True):
        assert {**entry, "step": history["step"]} == history


def test_the_documented_keys_are_those_that_are_logged(tmp_path):
    """Every logged key is in the docstring's table; those of a GPU need one."""
    import re

    table = {
        key
        for row in MonitorCallback.__doc__.splitlines()
        if row.strip().startswith("| `")
        for key in re.findall(r"`([^`]+)`", row.split("|")[1])
    }
    monitor = MonitorCallback(display=False)
    subject = trainer("plain", tmp_path, max_steps=3, trainer_options={"callbacks": [monitor]})
    own = {"loss", "grad_norm", "learning_rate", "epoch", "step"}
    monitor.attach(subject)
    subject.train()
    logged = {key for entry in logs_of(subject) for key in entry} - own
    groups = {key for key in logged if key.startswith("grad_norm/")}
    assert "grad_norm/<group>" in table
    assert logged - groups <= table
    silent = table - logged - {"grad_norm/<group>", "nonfinite_steps", "mfu"}
    assert all(key.startswith(("gpu/", "memory/peak", "memory/allocation", "cpu/")) for key in silent), silent


# ---- what is left behind


def test_the_journal_of_a_run_that_was_killed_and_resumed(tmp_path):
    first = journal.Journal(tmp_path)
    for step in (1, 2, 3):
        first.add(step, {"loss": float(step), "other": math.nan})
    with (tmp_path / journal.FILE).open("a") as file:
        file.write('{"step": 4, "lo')  # the kill came here
    second = journal.Journal(tmp_path, step=2)
    second.add(3, {"loss": math.inf})
    entries = journal.read(tmp_path / journal.FILE)
    assert [entry["step"] for entry in entries] == [1, 2, 3]
    assert entries[-1]["loss"] == math.inf
    assert math.isnan(entries[0]["other"])
    json.loads((tmp_path / journal.FILE).read_text().splitlines()[0])
    journal.Journal(tmp_path)  # another run: the first is kept
    assert len(journal.read(tmp_path / "metrics.1.jsonl")) == 3
    assert journal.read(tmp_path / journal.FILE) == []


def test_the_report(tmp_path):
    from forge import get_preset

    monitor = MonitorCallback(display=False, report_dir=tmp_path / "report", preset=get_preset("lora", hardware="cpu"))
    subject = trainer(
        "plain",
        tmp_path,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        trainer_options={"callbacks": [monitor], "eval_dataset": {"a": lm_tokens(4), "b": lm_tokens(4)}},
    )
    monitor.attach(subject)
    subject.train()
    entries = journal.read(tmp_path / "report" / "metrics.jsonl")
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2, 3, 4]
    assert [entry["step"] for entry in entries if "eval_a_loss" in entry] == [2, 4]
    page = (tmp_path / "report" / "report.html").read_text()
    for part in ("Training loss", "Tokens per second", "No events", "lora_r", "Gradient norms by group"):
        assert part in page
    for name in ("loss", "gradient_norm", "throughput", "memory", "gradient_groups"):
        assert (tmp_path / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_of_a_crash(tmp_path):
    class Crash(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 3:
                raise RuntimeError("out of something")

    monitor = MonitorCallback(display=False, report_dir=tmp_path / "report")
    subject = trainer("plain", tmp_path, max_steps=4, trainer_options={"callbacks": [monitor, Crash()]})
    monitor.attach(subject)
    with pytest.raises(RuntimeError, match="out of something"):
        subject.train()
    assert "not ended" in (tmp_path / "report" / "report.html").read_text()
    assert "training_step" not in vars(subject)
    assert not any(thread.name == "forge-system" for thread in __import__("threading").enumerate())


# ---- what it survives


def test_a_full_disk_and_a_report_that_fails(tmp_path, monkeypatch, caplog):
    from pathlib import Path

    from forge.callbacks.monitor import report

    monitor = MonitorCallback(display=False, report_dir=tmp_path / "report")
    subject = trainer("plain", tmp_path, max_steps=2, trainer_options={"callbacks": [monitor]})
    monitor.attach(subject)

    def full(self, mode="r", **options):
        if "a" in mode:
            raise OSError(28, "No space left on device")
        return open(self, mode, **options)  # noqa: PTH123

    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(Path, "open", full)
    monkeypatch.setattr(report, "write", fail)
    with caplog.at_level("WARNING", "forge.monitor"):
        subject.train()
    assert subject.state.global_step == 2
    assert [record.message.split(":")[0].rpartition("/")[2] for record in caplog.records] == [
        "metrics.jsonl is no longer written",
        "the report was not written",
    ]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"deepspeed": {"stage": 3}}, "DeepSpeed"),
        ({"fsdp": "full_shard"}, "FSDP"),
        ({"optim": "adalomo"}, "inside backward"),
    ],
)
def test_what_hides_gradients_is_refused(change, says, tmp_path):
    subject = trainer("plain", tmp_path)
    for name, value in change.items():
        object.__setattr__(subject.args, name, value)
    with pytest.raises(UnsupportedError, match=says):
        MonitorCallback().on_init_end(subject.args, subject.state, subject.control)


def test_two_trainings_evaluation_only_and_resume(tmp_path):
    monitor = MonitorCallback(display=False, report_dir=tmp_path / "report")
    rows = lm_tokens(4)

    def fresh():
        return trainer(
            "plain",
            tmp_path,
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
            trainer_options={"callbacks": [monitor], "eval_dataset": rows},
        )

    subject = fresh()
    monitor.attach(subject)
    subject.evaluate()
    subject.train()
    subject.train()
    subject.evaluate()
    subject.predict(rows)
    assert (tmp_path / "report" / "metrics.1.jsonl").is_file()
    with pytest.raises(ForgeError, match="attached to another trainer"):
        monitor.attach(fresh())
    monitor = MonitorCallback(display=False, report_dir=tmp_path / "report")
    subject = fresh()
    monitor.attach(subject).attach(subject)
    assert subject.callback_handler.callbacks.count(monitor) == 1
    subject.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    entries = journal.read(tmp_path / "report" / "metrics.jsonl")
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2, 3, 4]


def test_one_monitor_and_two_trainers(tmp_path):
    monitor = MonitorCallback(display=False)
    first, second = (trainer("plain", tmp_path, trainer_options={"callbacks": [monitor]}) for _ in range(2))
    monitor.attach(first)
    first.train()
    with pytest.raises(ForgeError, match="attached to another trainer"):
        second.train()


def test_a_monitor_that_was_removed_is_gone(tmp_path):
    monitor = MonitorCallback(display=False)
    subject = trainer("plain", tmp_path, logging_nan_inf_filter=False, trainer_options={"callbacks": [monitor]})
    monitor.attach(subject)
    subject.train()
    subject.remove_callback(monitor)
    subject.train()
    assert not any("tokens_per_second" in entry for entry in subject.state.log_history)


def test_it_can_be_copied_before_it_is_attached():
    import copy
    import pickle

    assert repr(copy.deepcopy(MonitorCallback(on_nan="skip"))) == repr(
        pickle.loads(pickle.dumps(MonitorCallback(on_nan="skip")))
    )


def test_logs_of_the_users_own(tmp_path):
    import numpy as np

    monitor = MonitorCallback(display=False, report_dir=tmp_path / "report")

    class Own(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            subject.log({"own": np.float32(0.5)})

    subject = trainer("plain", tmp_path, trainer_options={"callbacks": [Own(), monitor]})
    monitor.attach(subject)
    subject.train()
    subject.log({"loss": 1.0})
    assert "tokens_per_second" not in subject.state.log_history[-1]
    entries = journal.read(tmp_path / "report" / "metrics.jsonl")
    assert [entry["own"] for entry in entries if "own" in entry] == [0.5, 0.5]


def test_attach_alone_is_enough(tmp_path):
    monitor = MonitorCallback(display=False)
    subject = trainer("plain", tmp_path)
    monitor.attach(subject)
    subject.train()
    assert "tokens_per_second" in logs_of(subject)[0]


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"on_nan": "ignore"}, UnknownNameError, "Unknown on_nan 'ignore'. Known: raise, skip, stop"),
        ({"on_spike": "raise"}, UnknownNameError, "Unknown on_spike 'raise'"),
    ],
)
def test_bad_arguments(arguments, error, says):
    with pytest.raises(error, match=says):
        MonitorCallback(**arguments)


def test_a_report_dir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ForgeError, match="is a file"):
        MonitorCallback(report_dir=tmp_path / "file")
    with pytest.raises(ForgeError, match=r"has no metrics\.jsonl yet"):
        MonitorCallback(report_dir=tmp_path / "new").write_report()
    with pytest.raises(ForgeError, match="cannot be written"):
        journal.Journal(tmp_path / "file" / "below")
    with pytest.raises(ForgeError, match=r"MonitorCallback\(report_dir="):
        MonitorCallback().write_report()
