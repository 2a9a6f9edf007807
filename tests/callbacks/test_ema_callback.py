import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback

from forge import ConflictError, EMACallback, ForgeError, ForgeWarning, UnsupportedError
from forge.callbacks.ema.support import refuse_model
from support.data import lm_tokens
from support.models import lora, text_model
from support.models import trainer as make_plain_trainer

pytestmark = pytest.mark.usefixtures("no_foreign_warnings")

KINDS = ("plain", "sft", "dpo")


class Spy(TrainerCallback):
    """What a user's own bookkeeping would see: the raw weights after every step, and the average by its definition."""

    def __init__(self, ema):
        self.ema, self.raw, self.expected, self.updates = ema, [], None, 0

    def on_train_begin(self, args, state, control, model=None, **_):
        self.expected = {k: v.detach().double().clone() for k, v in trainable(model).items()}

    def on_step_end(self, args, state, control, model=None, **_):
        self.raw.append({k: v.detach().clone() for k, v in trainable(model).items()})
        decay = self.ema._schedule.at(self.updates)
        self.updates += 1
        for name, value in self.expected.items():
            value.mul_(decay).add_(self.raw[-1][name].double(), alpha=1 - decay)


def trainable(model):
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def adapted(**changes):
    from peft import get_peft_model

    return get_peft_model(text_model(layers=2), lora(**changes))


def close(left, right, atol=1e-6):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name].double(), right[name].double(), rtol=0, atol=atol, msg=name)


def same(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def loss_of(model, rows):
    """The loss of the model as it is, by a trainer without callbacks: how tokens are counted depends on its version."""
    with tempfile.TemporaryDirectory() as folder:
        plain = make_plain_trainer("plain", Path(folder), model, per_device_eval_batch_size=8)
        return plain.evaluate(Dataset.from_dict(rows[:]))["eval_loss"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("peft", [True, False], ids=["peft", "full"])
def test_the_average_follows_its_definition_over_optimizer_steps(kind, accumulation, peft, make_trainer):
    ema = EMACallback(half_life_steps=2)
    spy = Spy(ema)
    trainer = make_trainer(
        kind,
        adapted() if peft else None,
        max_steps=3,
        gradient_accumulation_steps=accumulation,
        trainer_options={"callbacks": [ema, spy]},
    )
    trainer.train()
    assert ema.steps == spy.updates == 3
    close(ema.state_dict()["average"], spy.expected)
    same(trainable(trainer.model), spy.raw[-1])


def test_the_guides_decay(make_trainer):
    ema = EMACallback(decay=0.999)
    spy = Spy(ema)
    trainer = make_trainer("plain", max_steps=3, trainer_options={"callbacks": [ema, spy]})
    with pytest.warns(ForgeWarning, match=r"after max_steps=3, 100% of the average.*still"):
        trainer.train()
    close(ema.state_dict()["average"], spy.expected)
    ema.apply_ema(trainer.model)
    close(trainable(trainer.model), spy.expected)
    ema.restore(trainer.model)
    same(trainable(trainer.model), spy.raw[-1])


def test_frozen_parameters_are_not_averaged_and_modules_to_save_are(make_trainer):
    model = adapted(modules_to_save=["lm_head"])
    ema = EMACallback()
    make_trainer("plain", model, trainer_options={"callbacks": [ema]}).train()
    names = set(ema.state_dict()["average"])
    assert names == set(trainable(model))
    assert any("modules_to_save" in name for name in names)


def test_update_every(make_trainer):
    ema = EMACallback(half_life_steps=3, update_every=2)
    make_trainer("plain", max_steps=5, trainer_options={"callbacks": [ema]}).train()
    assert (ema.steps, ema.state_dict()["updates"]) == (5, 2)


def test_nothing_is_read_from_the_device(make_trainer, device_reads):
    trainer = make_trainer("plain", adapted(), max_steps=3, trainer_options={"callbacks": [EMACallback()]})
    with device_reads() as reads:
        trainer.train()
        trainer.evaluate(lm_tokens(2))
    reads.assert_none(inside="forge", below="transformers")


def test_a_dropped_update_does_not_count(make_trainer):
    class Drop(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            if state.global_step == 1:
                for value in model.parameters():
                    value.grad = None

    class Scaler(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **_):
            optimizer._is_overflow = state.global_step == 2  # what accelerate sets when fp16's scaler skips

    ema = EMACallback()
    make_trainer("plain", max_steps=4, trainer_options={"callbacks": [ema, Drop(), Scaler()]}).train()
    assert ema.steps == 2


# ---- evaluation


@pytest.mark.parametrize("attach", [False, True], ids=["plain", "attached"])
@pytest.mark.parametrize("peft", [True, False], ids=["peft", "full"])
def test_evaluation_sees_the_average_and_raw_weights_come_back(attach, peft, make_trainer):
    rows = lm_tokens(8, seed=5)
    ema, seen = EMACallback(half_life_steps=3), []

    class Compare(TrainerCallback):
        def on_evaluate(self, args, state, control, model=None, metrics=None, **_):
            raw = {name: value.clone() for name, value in trainable(model).items()}
            with ema.swapped(model):
                averaged = loss_of(model, rows)
            same(trainable(model), raw)
            seen.append((metrics, averaged, loss_of(model, rows)))

    trainer = make_trainer(
        "plain",
        adapted() if peft else None,
        max_steps=4,
        learning_rate=1e-2,
        per_device_eval_batch_size=8,
        eval_strategy="steps",
        eval_steps=2,
        trainer_options={"callbacks": [ema, Compare()], "eval_dataset": {"one": rows, "two": rows}},
    )
    if attach:
        assert ema.attach(trainer) is ema
    trainer.train()
    trainer.evaluate()
    assert len(seen) == 6
    for metrics, averaged, raw in seen:
        (loss,) = [value for name, value in metrics.items() if name.endswith("_loss")]
        assert loss == pytest.approx(averaged, abs=1e-6)
        assert abs(loss - raw) > 1e-4
    raw = {name: value.clone() for name, value in trainable(trainer.model).items()}
    prediction = trainer.predict(rows)
    assert prediction.metrics["test_loss"] == pytest.approx(seen[-1][1], abs=1e-6)
    same(trainable(trainer.model), raw)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_evaluation_in_the_trl_trainers(kind, make_trainer):
    """The same trainer scores the applied average alike."""
    ema = EMACallback(half_life_steps=2)
    trainer = make_trainer(kind, adapted(), max_steps=3, learning_rate=1e-2, trainer_options={"callbacks": [ema]})
    rows = trainer.train_dataset
    before = trainer.evaluate(rows)["eval_loss"]
    assert before == pytest.approx(trainer.evaluate(rows)["eval_loss"])  # raw before any training
    trainer.train()
    during = trainer.evaluate(rows)["eval_loss"]
    ema.evaluate = False
    raw = trainer.evaluate(rows)["eval_loss"]
    with ema.swapped(trainer.model):
        averaged = trainer.evaluate(rows)["eval_loss"]
    assert during == pytest.approx(averaged, abs=1e-6)
    assert abs(during - raw) > 1e-5


def test_evaluate_false_is_raw(make_trainer):
    rows = lm_tokens(8, seed=5)
    ema = EMACallback(evaluate=False)
    trainer = make_trainer(
        "plain", learning_rate=1e-2, per_device_eval_batch_size=8, trainer_options={"callbacks": [ema]}
    )
    trainer.train()
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(loss_of(trainer.model, rows), abs=1e-6)


@pytest.mark.parametrize("attach", [False, True], ids=["plain", "attached"])
@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["forward", "metrics"])
def test_raw_weights_come_back_after_an_exception(attach, kind, where, make_trainer):
    rows = lm_tokens(4, seed=5)

    def fail(*_, **__):
        raise kind("stop here")

    ema = EMACallback()
    trainer = make_trainer(
        "plain",
        adapted(),
        learning_rate=1e-2,
        trainer_options={"callbacks": [ema], "compute_metrics": fail if where == "metrics" else None},
    )
    if attach:
        ema.attach(trainer)
    trainer.train()
    raw = {name: value.clone() for name, value in trainable(trainer.model).items()}
    raw_loss = loss_of(trainer.model, rows)
    handle = None
    if where == "forward":
        norm = trainer.model.get_base_model().model.norm
        handle = norm.register_forward_pre_hook(fail)
    with pytest.raises(kind, match="stop here"):
        trainer.evaluate(rows)
    if handle:
        handle.remove()
    same(trainable(trainer.model), raw)
    assert loss_of(trainer.model, rows) == raw_loss  # nor does a forward pass of the user's see the average


@pytest.mark.parametrize("attach", [False, True], ids=["plain", "attached"])
def test_the_best_model_is_the_one_that_earned_the_score(attach, make_trainer, tmp_path):
    rows = lm_tokens(8, seed=5)
    ema = EMACallback(half_life_steps=2)
    trainer = make_trainer(
        "plain",
        adapted(),
        max_steps=6,
        learning_rate=3e-2,  # too high, so that the best is not the last
        lr_scheduler_type="constant",
        per_device_eval_batch_size=8,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        save_total_limit=1,
        load_best_model_at_end=True,
        trainer_options={"callbacks": [ema], "eval_dataset": rows},
    )
    if attach:
        ema.attach(trainer)
    trainer.train()
    assert loss_of(trainer.model, rows) == pytest.approx(trainer.state.best_metric, abs=1e-6)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-6)
    averaged = {name: value.clone() for name, value in trainable(trainer.model).items()}
    ema.apply_ema(trainer.model)  # as the guide ends; it is applied already
    same(trainable(trainer.model), averaged)
    ema.restore(trainer.model)
    best = PeftModel.from_pretrained(text_model(layers=2), trainer.state.best_model_checkpoint)
    same(dict(trainer.model.state_dict()), dict(best.state_dict()))


def test_generate_inside_an_evaluation_loop_sees_the_average(make_trainer, tokenizer):
    """A trainer that evaluates by generating calls the inner model, past the PeftModel's forward."""
    from transformers import Trainer

    logits = []

    class Generating(Trainer):
        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            ids = torch.tensor([[5, 6, 7]])
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=2,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            logits.append(out.logits[0])
            return torch.zeros(()), None, None

    ema = EMACallback(half_life_steps=2)
    base = make_trainer("plain", adapted(), learning_rate=1e-2)
    trainer = Generating(base.model, base.args, train_dataset=lm_tokens(8), eval_dataset=lm_tokens(2), callbacks=[ema])
    trainer.train()
    trainer.evaluate()
    with ema.swapped(trainer.model), torch.no_grad():
        averaged = trainer.model(input_ids=torch.tensor([[5, 6, 7]])).logits[:, -1]
    torch.testing.assert_close(logits[0], averaged, rtol=0, atol=1e-6)


def test_an_evaluation_that_goes_past_the_forward_says_so(make_trainer):
    from transformers import Trainer

    class Past(Trainer):
        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            return model.lm_head(torch.zeros(1, 32)).mean().detach(), None, None

    base = make_trainer("plain")
    ema = EMACallback()
    trainer = Past(base.model, base.args, train_dataset=lm_tokens(8), eval_dataset=lm_tokens(2), callbacks=[ema])
    trainer.train()
    with pytest.warns(ForgeWarning, match="ran on the raw weights"):
        trainer.evaluate()
    ema.attach(trainer)
    trainer.train()
    trainer.evaluate()  # and says nothing more


# ---- checkpoints


def saving(make_trainer, kind="plain", model=None, ema=None, **changes):
    ema = ema or EMACallback(half_life_steps=3)
    options = {"callbacks": [ema], **changes.pop("trainer_options", {})}
    arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2, **changes}
    return ema, make_trainer(kind, model, trainer_options=options, **arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_the_checkpoints_folder_loads_as_an_adapter(kind, make_trainer, tmp_path):
    ema, trainer = saving(make_trainer, kind, adapted())
    trainer.train()
    for step in (2, 4):
        assert (tmp_path / f"checkpoint-{step}" / "ema" / "adapter_model.safetensors").is_file()
    loaded = PeftModel.from_pretrained(text_model(layers=2), tmp_path / "checkpoint-4" / "ema")
    ema.apply_ema(trainer.model)
    same(dict(loaded.state_dict()), {k: v for k, v in trainer.model.state_dict().items() if ".ref." not in k})


def test_the_checkpoints_folder_loads_as_an_adapter_of_another_name(make_trainer, tmp_path):
    from peft import get_peft_model

    model = get_peft_model(text_model(layers=2), lora(), adapter_name="mine")
    ema, trainer = saving(make_trainer, "plain", model)
    trainer.train()
    loaded = PeftModel.from_pretrained(text_model(layers=2), tmp_path / "checkpoint-4" / "ema", adapter_name="mine")
    ema.apply_ema(trainer.model)
    same(dict(loaded.state_dict()), dict(trainer.model.state_dict()))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert set(trainer.model.peft_config) == {"mine"}


def test_the_checkpoints_folder_loads_as_a_model(make_trainer, tmp_path):
    ema, trainer = saving(make_trainer)
    trainer.train()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4" / "ema")
    ema.apply_ema(trainer.model)
    same(dict(loaded.state_dict()), dict(trainer.model.state_dict()))


def test_save_false_saves_nothing(make_trainer, tmp_path):
    _, trainer = saving(make_trainer, ema=EMACallback(save=False))
    trainer.train()
    assert (tmp_path / "checkpoint-4").is_dir()
    assert not (tmp_path / "checkpoint-4" / "ema").exists()


def test_rotation_never_leaves_a_checkpoint_without_its_average(make_trainer, tmp_path):
    _, trainer = saving(make_trainer, save_steps=1, save_total_limit=1)
    trainer.train()
    (left,) = tmp_path.glob("checkpoint-*")
    assert (left / "ema" / "average.safetensors").is_file()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("peft", [True, False], ids=["peft", "full"])
def test_resuming_is_exact(kind, peft, make_trainer, tmp_path):
    """By kill -9 in test_ema_resume.py; here over the trainers, in one process."""

    def run(resume):
        torch.manual_seed(7)
        ema, trainer = saving(make_trainer, kind, adapted() if peft else None, max_steps=6, save_steps=3)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3") if resume else None)
        adapters = set(getattr(trainer.model, "peft_config", {})) - {"ref"}
        assert adapters == ({"default"} if peft else set())
        return ema, {name: value.clone() for name, value in trainable(trainer.model).items()}

    straight, raw = run(resume=False)
    resumed, raw_again = run(resume=True)
    same(raw, raw_again)
    same(straight.state_dict()["average"], resumed.state_dict()["average"])
    assert (resumed.steps, resumed.state_dict()["updates"]) == (6, 6)
    # and a checkpoint of the resumed run holds one adapter again
    assert sorted(path.name for path in (tmp_path / "checkpoint-6").iterdir() if path.is_dir()) in (
        ["ema"],
        ["ema", "ref"],
    )


def test_a_checkpoint_without_its_average_raises(make_trainer, tmp_path):
    _, trainer = saving(make_trainer, ema=EMACallback(save=False))
    trainer.train()
    folder = str(tmp_path / "checkpoint-2")
    _, trainer = saving(make_trainer)
    with pytest.raises(ForgeError, match=r"saved without EMACallback.*resume_from="):
        trainer.train(resume_from_checkpoint=folder)
    ema, trainer = saving(make_trainer, ema=EMACallback(resume_from="weights"))
    trainer.train(resume_from_checkpoint=folder)
    assert ema.steps == 2  # of the 4: the two before had no average
    assert (tmp_path / "checkpoint-4" / "ema" / "average.safetensors").is_file()


def test_a_checkpoint_that_never_knew_the_callback(make_trainer, tmp_path):
    trainer = make_trainer("plain", max_steps=4, save_strategy="steps", save_steps=2)
    trainer.train()
    folder = str(tmp_path / "checkpoint-2")
    _, trainer = saving(make_trainer)
    with pytest.raises(ForgeError, match="resume_from="):
        trainer.train(resume_from_checkpoint=folder)
    _, trainer = saving(make_trainer, ema=EMACallback(resume_from="weights"))
    trainer.train(resume_from_checkpoint=folder)
    assert (tmp_path / "checkpoint-4" / "ema" / "average.safetensors").is_file()


def test_a_new_average_beside_one_that_is_there(make_trainer, tmp_path):
    """resume_from="weights", though the checkpoint has an average: the adapter is the checkpoint's all the same."""
    _, straight = saving(make_trainer, "plain", adapted())
    straight.train()
    ema, trainer = saving(make_trainer, "plain", adapted(), ema=EMACallback(resume_from="weights"))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (ema.steps, set(trainer.model.peft_config)) == (2, {"default"})
    same(trainable(trainer.model), trainable(straight.model))


def test_a_moved_checkpoint(make_trainer, tmp_path):
    first, trainer = saving(make_trainer)
    trainer.train()
    moved = tmp_path / "elsewhere" / "kept"
    shutil.move(tmp_path / "checkpoint-2", moved)
    _, trainer = saving(make_trainer)
    with pytest.raises(ForgeError, match=r"checkpoint was moved.*resume_from="):
        trainer.train(resume_from_checkpoint=str(moved))
    second, trainer = saving(make_trainer, ema=EMACallback(half_life_steps=3, resume_from=moved))
    trainer.train(resume_from_checkpoint=str(moved))
    same(first.state_dict()["average"], second.state_dict()["average"])
    third, trainer = saving(make_trainer, resume_from_checkpoint=str(moved))  # named in the arguments: found
    trainer.train(resume_from_checkpoint=str(moved))
    same(first.state_dict()["average"], third.state_dict()["average"])


def test_another_runs_average_is_not_taken(make_trainer, tmp_path):
    """A checkpoint of the same step and place, but of another run: the token tells."""
    _, trainer = saving(make_trainer)
    trainer.train()
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "kept")
    _, trainer = saving(make_trainer)
    trainer.train()  # overwrites checkpoint-2
    _, trainer = saving(make_trainer)
    with pytest.raises(ForgeError, match="resume_from="):
        trainer.train(resume_from_checkpoint=str(tmp_path / "kept"))


# ---- the user's hands


def test_a_second_training_starts_anew(make_trainer):
    ema = EMACallback(half_life_steps=2)
    spy = Spy(ema)
    trainer = make_trainer("plain", max_steps=2, trainer_options={"callbacks": [ema, spy]})
    trainer.train()
    ema.apply_ema(trainer.model)
    spy.updates = 0
    trainer.train()
    assert ema.steps == 2
    close(ema.state_dict()["average"], spy.expected)
    with pytest.raises(ForgeError, match="nothing to restore"):
        ema.restore(trainer.model)


def test_state_dict_round_trip_into_another_run(make_trainer):
    first = EMACallback(half_life_steps=2)
    make_trainer("plain", trainer_options={"callbacks": [first]}).train()
    second = EMACallback(half_life_steps=2)
    second.load_state_dict(first.state_dict())
    trainer = make_trainer("plain", trainer_options={"callbacks": [second]})
    trainer.train()
    assert second.steps == 4
    second.load_state_dict(first.state_dict())
    assert second.steps == 2
    second.apply_ema(trainer.model)
    same(trainable(trainer.model), first.state_dict()["average"])


def test_applying_to_a_model_that_was_loaded_anew(make_trainer):
    ema = EMACallback()
    trainer = make_trainer("plain", adapted(), trainer_options={"callbacks": [ema]})
    trainer.train()
    other = adapted()
    ema.apply_ema(other)
    close(trainable(other), ema.state_dict()["average"])
    for act in (ema.apply_ema, ema.restore):
        with pytest.raises(ForgeError, match=r"in another model: call ema\.restore\(that_model\) first"):
            act(trainer.model)
    with pytest.raises(ForgeError, match="in another model"), ema.swapped(trainer.model):
        pass
    ema.restore(other)
    with pytest.raises(ForgeError, match=r"lacks \d+ of the .* that is trainer\.model"):
        ema.apply_ema(text_model(layers=2))


def test_the_base_model_that_the_trainer_wrapped_will_do(make_trainer):
    """As in the guide: model goes into SFTTrainer with peft_config, and ema.apply_ema(model) comes after."""
    base = text_model(layers=2)
    ema = EMACallback(half_life_steps=2)
    trainer = make_trainer("sft", base, trainer_options={"callbacks": [ema], "peft_config": lora()})
    trainer.train()
    assert trainer.model is not base
    ema.apply_ema(base)
    same(trainable(trainer.model), ema.state_dict()["average"])
    ema.restore(trainer.model)


def test_state_of_an_earlier_run_without_any_training(make_trainer):
    first = EMACallback(half_life_steps=2)
    trainer = make_trainer("plain", trainer_options={"callbacks": [first]})
    trainer.train()
    second = EMACallback()
    second.load_state_dict(first.state_dict())
    same(second.state_dict()["average"], first.state_dict()["average"])
    second.apply_ema(trainer.model)
    same(trainable(trainer.model), first.state_dict()["average"])


def test_parameters_that_begin_to_train_later_join(make_trainer):
    model = adapted()
    frozen = [parameter for name, parameter in model.named_parameters() if ".layers.0." in name and "lora" in name]
    for parameter in frozen:
        parameter.requires_grad_(False)

    class Thaw(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **_):
            for parameter in frozen:
                parameter.requires_grad_(state.epoch >= 1)

    ema = EMACallback()
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if "lora" in n], lr=1e-2)
    trainer = make_trainer(
        "plain",
        model,
        rows=4,
        max_steps=4,
        trainer_options={"callbacks": [Thaw(), ema], "optimizers": (optimizer, None)},
    )
    trainer.train()
    assert set(ema.state_dict()["average"]) == set(trainable(model))
    assert any(".layers.0." in name for name in ema.state_dict()["average"])


@pytest.mark.parametrize("attach", [False, True], ids=["plain", "attached"])
def test_one_callback_and_two_trainers(attach, make_trainer):
    ema = EMACallback(half_life_steps=2)
    first, second = (make_trainer("plain", adapted(), trainer_options={"callbacks": [ema]}) for _ in range(2))
    if attach:
        ema.attach(first)
        with pytest.raises(ForgeError, match="attached to another trainer"):
            ema.attach(second)
        first.train()
        with pytest.raises(ForgeError, match="attached to another trainer"):
            second.train()
    else:
        first.train()
        second.train()
        rows = lm_tokens(4)
        score = second.evaluate(rows)["eval_loss"]
        with ema.swapped(second.model):
            assert second.evaluate(rows)["eval_loss"] == score


@pytest.mark.parametrize("attach", [False, True], ids=["plain", "attached"])
def test_a_callback_that_was_removed_is_gone(attach, make_trainer):
    rows = lm_tokens(8, seed=5)
    ema = EMACallback()
    trainer = make_trainer(
        "plain", learning_rate=1e-2, per_device_eval_batch_size=8, trainer_options={"callbacks": [ema]}
    )
    if attach:
        ema.attach(trainer)
    trainer.train()
    trainer.remove_callback(ema)
    trainer.train()
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(loss_of(trainer.model, rows), abs=1e-6)


def test_a_new_callback_on_the_same_trainer(make_trainer):
    trainer = make_trainer("plain", trainer_options={"callbacks": [EMACallback()]})
    trainer.train()
    trainer.remove_callback(EMACallback)
    fresh = EMACallback(half_life_steps=1)
    trainer.add_callback(fresh)
    trainer.train()
    assert fresh.steps == 2


def test_two_averages_in_one_list_are_refused(make_trainer):
    trainer = make_trainer("plain", trainer_options={"callbacks": [EMACallback(evaluate=False)]})
    trainer.callback_handler.callbacks.append(EMACallback(evaluate=False))
    with pytest.raises(ConflictError, match="Two EMACallbacks"):
        trainer.train()


def test_an_interrupted_run_leaves_earlier_checkpoints_alone(make_trainer, tmp_path):
    """The Trainer asks for the state of its callbacks at the beginning of every train(), too."""
    rows = lm_tokens(4)
    _, trainer = saving(make_trainer, eval_strategy="steps", eval_steps=2, trainer_options={"eval_dataset": rows})
    trainer.train()
    kept = (tmp_path / "checkpoint-2" / "ema" / "average.safetensors").read_bytes()

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    ema, trainer = saving(make_trainer, eval_strategy="steps", eval_steps=2, trainer_options={"eval_dataset": rows})
    inner, trainer.evaluate = trainer.evaluate, interrupt
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.evaluate = inner
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (tmp_path / "checkpoint-2" / "ema" / "average.safetensors").read_bytes() == kept
    assert ema.steps == 4


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"layer_replication": [(0, 1), (0, 2)]}, "layer_replication"),
    ],
)
def test_adapters_that_could_not_be_resumed_are_refused(changes, says, make_trainer):
    """A second loading would change the base weights again (PiSSA, OLoRA), or is not allowed."""
    trainer = make_trainer("plain", adapted(**changes), trainer_options={"callbacks": [EMACallback()]})
    with pytest.raises(UnsupportedError, match=f"{says}.*could not resume.*save=False"):
        trainer.train()
    trainer = make_trainer("plain", adapted(**changes), trainer_options={"callbacks": [EMACallback(save=False)]})
    trainer.train()


def test_prompt_tuning_is_refused(make_trainer):
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(text_model(layers=2), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(UnsupportedError, match="peft_type=PROMPT_TUNING"):
        make_trainer("plain", model, trainer_options={"callbacks": [EMACallback()]}).train()


@pytest.mark.parametrize("kind", ["dora", "modules_to_save", "tokens", "gaussian", "ia3", "vera"])
def test_resuming_other_adapters_is_exact(kind, make_trainer, tmp_path):
    from peft import IA3Config, VeraConfig, get_peft_model

    config = {
        "dora": lambda: lora(use_dora=True),
        "modules_to_save": lambda: lora(modules_to_save=["lm_head"]),
        "tokens": lambda: lora(trainable_token_indices={"embed_tokens": [3, 4]}),
        "gaussian": lambda: lora(init_lora_weights="gaussian"),
        "ia3": lambda: IA3Config(task_type="CAUSAL_LM"),
        "vera": lambda: VeraConfig(r=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"),
    }[kind]

    def run(resume):
        torch.manual_seed(7)
        model = get_peft_model(text_model(layers=2), config())
        ema, trainer = saving(make_trainer, "plain", model)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
        return ema.state_dict()["average"], {name: value.clone() for name, value in model.named_parameters()}

    straight, resumed = run(resume=False), run(resume=True)
    same(straight[0], resumed[0])
    same(straight[1], resumed[1])


def test_update_every_longer_than_the_run_is_refused(make_trainer):
    trainer = make_trainer("plain", max_steps=2, trainer_options={"callbacks": [EMACallback(update_every=3)]})
    with pytest.raises(ConflictError, match="update_every=3 is more than the run's max_steps=2"):
        trainer.train()


def test_an_encoder_decoder_needs_attach(make_trainer):
    trainer = make_trainer("plain", trainer_options={"callbacks": [EMACallback()]})
    trainer.model.config.is_encoder_decoder = True
    trainer.state.max_steps = 2
    with pytest.raises(UnsupportedError, match=r"encoder-decoder.*ema\.attach"):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)


def test_forgetting_to_restore_inside_training(make_trainer):
    ema = EMACallback()

    class Forgetful(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            ema.apply_ema(model)

    trainer = make_trainer("plain", trainer_options={"callbacks": [ema, Forgetful()]})
    with pytest.raises(ForgeError, match=r"apply_ema.* was called during training"):
        trainer.train()


def test_before_any_training():
    ema = EMACallback()
    for act in (ema.state_dict, lambda: ema.apply_ema(nn.Linear(2, 2))):
        with pytest.raises(ForgeError, match="no average yet"):
            act()
    with pytest.raises(ForgeError, match="nothing to restore"):
        ema.restore(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"decay": 0.9, "half_life_steps": 5}, ConflictError, "say the same thing"),
        ({"decay": 1.0}, ForgeError, "decay=1.0"),
        ({"decay": 999}, ForgeError, "decay=999"),
        ({"decay": "0.9"}, ForgeError, "decay='0.9'"),
        ({"half_life_steps": 0}, ForgeError, "half_life_steps=0"),
        ({"half_life_steps": True}, ForgeError, "half_life_steps=True"),
        ({"half_life_steps": float("inf")}, ForgeError, "half_life_steps=inf"),
        ({"update_every": 0}, ForgeError, "update_every=0"),
        ({"resume_from": "nowhere"}, ForgeError, "nowhere holds no average"),
    ],
)
def test_bad_arguments(arguments, error, says):
    with pytest.raises(error, match=says):
        EMACallback(**arguments)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "DeepSpeed"),
        ({"_n_gpu": 2}, "DataParallel"),
        ({"optim": "adalomo"}, "inside backward"),
        ({"optim": "galore_adamw_layerwise"}, "inside backward"),
        ({"restore_callback_states_from_checkpoint": True}, "restore_callback_states"),
    ],
)
def test_what_is_not_supported_is_refused_when_the_trainer_is_built(change, says, make_trainer):
    trainer = make_trainer("plain")
    for name, value in change.items():
        object.__setattr__(trainer.args, name, value)
    with pytest.raises(UnsupportedError, match=says):
        type(trainer)(trainer.model, trainer.args, train_dataset=lm_tokens(4), callbacks=[EMACallback()])
    with pytest.raises(UnsupportedError, match=says):
        EMACallback().on_init_end(trainer.args, trainer.state, trainer.control)


@pytest.mark.parametrize(
    ("variable", "says"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")]
)
def test_what_accelerate_launch_set_up_is_refused(variable, says, make_trainer, monkeypatch):
    trainer = make_trainer("plain")
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UnsupportedError, match=says):
        EMACallback().on_init_end(trainer.args, trainer.state, trainer.control)


def test_sharded_and_offloaded_parameters_are_refused(make_trainer):
    trainer = make_trainer("plain", trainer_options={"callbacks": [EMACallback()]})
    parameter = next(trainer.model.parameters())
    parameter.ds_id = 0  # what ZeRO-3 marks its parameters with
    with pytest.raises(UnsupportedError, match="sharded"):
        trainer.train()
    del parameter.ds_id
    with pytest.raises(UnsupportedError, match="meta"):
        refuse_model(nn.Linear(2, 2, device="meta"))


def test_settings_that_would_lose_the_best_model(make_trainer):
    trainer = make_trainer("plain", trainer_options={"callbacks": [EMACallback(save=False)]})
    trainer.args.load_best_model_at_end = True
    with pytest.raises(ConflictError, match="load_best_model_at_end"):
        trainer.train()


def test_an_adapter_called_ema_is_refused(make_trainer):
    from peft import get_peft_model

    model = get_peft_model(text_model(layers=2), lora(), adapter_name="ema")
    with pytest.raises(ConflictError, match="Name the adapter otherwise"):
        make_trainer("plain", model, trainer_options={"callbacks": [EMACallback()]}).train()


def test_torch_compile_needs_attach(make_trainer):
    trainer = make_trainer("plain", trainer_options={"callbacks": [EMACallback()]})
    trainer.args.torch_compile = True
    trainer.state.max_steps = 2
    with pytest.raises(UnsupportedError, match=r"ema\.attach"):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)


def test_a_schedule_free_optimizer_is_refused(make_trainer):
    class ScheduleFree(torch.optim.SGD):
        def train(self): ...
        def eval(self): ...

    model = text_model(layers=2)
    trainer = make_trainer(
        "plain",
        model,
        trainer_options={"callbacks": [EMACallback()], "optimizers": (ScheduleFree(model.parameters(), 0.1), None)},
    )
    with pytest.raises(ConflictError, match="ScheduleFree evaluates on an average of its own"):
        trainer.train()


def test_nothing_is_left_on_the_model(make_trainer):
    ema = EMACallback()
    trainer = make_trainer("plain", adapted(), trainer_options={"callbacks": [ema]})
    trainer.train()
    trainer.evaluate(lm_tokens(2))
    for model in (trainer.model, trainer.model.get_base_model()):
        assert "forward" not in vars(model)
        assert not model._forward_hooks
        assert not model._forward_pre_hooks


def test_the_folder_is_not_where_it_was_expected(make_trainer, tmp_path):
    _, trainer = saving(make_trainer, max_steps=2)
    trainer._get_output_dir = lambda trial: str(tmp_path / "odd")
    with pytest.warns(ForgeWarning, match="The average is not in this checkpoint"):
        trainer.train()
    assert not list(Path(tmp_path, "odd").glob("**/ema"))


def test_a_checkpoint_that_missed_its_average_does_not_take_an_earlier_one(make_trainer, tmp_path):
    _, trainer = saving(make_trainer)
    inner = trainer._get_output_dir
    trainer._get_output_dir = lambda trial: str(tmp_path / "odd") if trainer.state.global_step == 4 else inner(trial)
    with pytest.warns(ForgeWarning, match="The average is not in this checkpoint"):
        trainer.train()
    assert (tmp_path / "checkpoint-2" / "ema").is_dir()
    _, again = saving(make_trainer, max_steps=6)
    with pytest.raises(ForgeError, match="The average of step 4 was not found"):
        again.train(resume_from_checkpoint=str(tmp_path / "odd" / "checkpoint-4"))
