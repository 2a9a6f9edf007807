"""Every callback over every hook of every trainer: it fails nowhere, and changes nothing that it was not asked to."""

from itertools import product

import pytest
import torch
from peft import get_peft_model
from transformers import TrainerCallback

from forge import EMACallback, MonitorCallback
from forge.presets.fp32 import Fp32TrainableCallback
from support.data import dpo_preferences, lm_tokens, sft_messages
from support.models import lora, text_model, trainer

pytestmark = pytest.mark.usefixtures("no_foreign_warnings")

EVENTS = {
    name
    for name in vars(TrainerCallback)
    # push_begin comes with push_to_hub only, init_end before anybody can count
    if name.startswith("on_") and name not in ("on_push_begin", "on_init_end")
}


ROWS = {"plain": lm_tokens, "sft": sft_messages, "dpo": dpo_preferences}


def ema(folder):
    return EMACallback()


def monitor(folder):
    return MonitorCallback(display=False, report_dir=folder / "report")


def fp32(folder):
    return Fp32TrainableCallback()


CALLBACKS = {
    "ema": [ema],
    "monitor": [monitor],
    "fp32": [fp32],
    "all": [fp32, ema, monitor],
    "reversed": [monitor, ema],
}


class Counter(TrainerCallback):
    def __init__(self):
        self.events = set()


def _counting(name):
    def event(self, *_, **__):
        self.events.add(name)

    return event


for _name in EVENTS:
    setattr(Counter, _name, _counting(_name))


def life(kind, folder, callbacks, *, peft, accumulation, attach):
    """Evaluate, train, predict, train again, resume, as in a notebook; returns what each learnt, and the losses."""
    torch.manual_seed(0)
    model = text_model(layers=2)
    model = get_peft_model(model, lora(lora_dropout=0.1)) if peft else model
    made = [make(folder) for make in callbacks]
    counter = Counter()
    subject = trainer(
        kind,
        folder / "run",
        model,
        rows=12,
        max_steps=4,
        gradient_accumulation_steps=accumulation,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        prediction_loss_only=True,
        trainer_options={"callbacks": [*made, counter], "eval_dataset": {"one": ROWS[kind](2), "two": ROWS[kind](2)}},
    )
    for callback in made:
        if attach and hasattr(callback, "attach"):
            callback.attach(subject)
    results = []

    def remember():
        results.append(
            {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
        )

    subject.evaluate()
    subject.train()
    remember()
    subject.evaluate()
    subject.predict(subject.eval_dataset["one"])
    subject.train()
    remember()
    subject.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
    remember()
    assert counter.events == EVENTS - (set() if accumulation > 1 else {"on_substep_end"})
    return results, [entry["loss"] for entry in subject.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """What the same life learns without any callback, once per kind."""
    known = {}

    def find(**settings):
        key = tuple(settings.values())
        if key not in known:
            known[key] = life(folder=tmp_path_factory.mktemp("without"), callbacks=[], attach=False, **settings)
        return known[key]

    return find


@pytest.mark.parametrize(
    ("names", "kind", "peft", "accumulation"),
    [
        *product(["all"], ["plain", "sft", "dpo"], [True, False], [1, 4]),
        *product(["reversed"], ["plain", "sft", "dpo"], [True], [1]),
        *product(["ema", "monitor", "fp32"], ["sft"], [True, False], [1]),
    ],
)
def test_training_is_what_it_was_without(names, kind, peft, accumulation, without, tmp_path):
    settings = {"kind": kind, "peft": peft, "accumulation": accumulation}
    expected, expected_losses = without(**settings)
    results, losses = life(folder=tmp_path, callbacks=CALLBACKS[names], attach=True, **settings)
    for left, right in zip(results, expected, strict=True):
        assert all(torch.equal(left[name], right[name]) for name in right)
    assert losses == pytest.approx(expected_losses, rel=1e-6)


def test_without_attach_the_monitor_changes_nothing_either(without, tmp_path, recwarn):
    settings = {"kind": "sft", "peft": True, "accumulation": 1}
    expected, _ = without(**settings)
    with pytest.warns(Warning, match="has no trainer"):
        results, _ = life(folder=tmp_path, callbacks=[monitor, ema], attach=False, **settings)
    for left, right in zip(results, expected, strict=True):
        assert all(torch.equal(left[name], right[name]) for name in right)


def test_the_contract_test_sees_a_callback_that_meddles(without, tmp_path):
    class Meddler(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).add_(1e-6)

    settings = {"kind": "plain", "peft": True, "accumulation": 1}
    expected, _ = without(**settings)
    results, _ = life(folder=tmp_path, callbacks=[lambda folder: Meddler()], attach=True, **settings)
    assert not all(torch.equal(results[0][name], expected[0][name]) for name in expected[0])
