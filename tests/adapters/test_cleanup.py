"""A run's memory is given back, whoever still holds the trainer, and nobody else loses anything."""

import gc
import logging
import weakref

import peft
import pytest
import torch
from accelerate import Accelerator
from adapter_state import assert_same, live, state_of

from forge import EMACallback, MonitorCallback, PrefixCache, setup_lp_lora_style, unfreeze
from forge.adapters import attach_adapter, cleanup_peft_model, safe_unload_peft_adapters
from forge.errors import ForgeError, UnsupportedError
from support.models import checkpointing, lora


def moments(optimizer):
    return sum(tensor.numel() for state in optimizer.state.values() for tensor in state.values())


@pytest.mark.parametrize("given", ["model", "trainer"])
@pytest.mark.parametrize("kind", ["plain", "sft", "dpo"])
@pytest.mark.parametrize("forges", [True, False])
def test_what_a_trainer_holds(text_model, make_trainer, caplog, kind, given, forges):
    base = text_model().eval()
    before, modules = state_of(base), live()["modules"]
    attach = attach_adapter if forges else peft.get_peft_model
    trainer = make_trainer(kind, attach(base, lora()), **checkpointing())
    trainer.train()
    inner = trainer.optimizer.optimizer
    adapter = weakref.ref(next(p for p in trainer.model.parameters() if p.requires_grad))
    assert moments(inner) > 0
    with caplog.at_level(logging.INFO, logger="forge.adapters"):
        assert cleanup_peft_model(trainer if given == "trainer" else trainer.model) is None
    assert len([r for r in caplog.records if "memory has been returned" in r.getMessage()]) == 1
    assert "MiB of resident host memory" in caplog.text
    after = state_of(base)
    if forges:
        assert_same(before, after)
    handler = trainer.callback_handler
    assert (trainer.optimizer, trainer.lr_scheduler, trainer.model_wrapped) == (None, None, None)
    assert (handler.model, handler.optimizer, handler.lr_scheduler) == (None, None, None)
    assert (trainer.accelerator._models, trainer.accelerator._optimizers) == ([], [])
    assert (moments(inner), inner.param_groups[0]["params"]) == (0, [])
    assert adapter() is None  # though the trainer, the optimizer and the PeftModel are all still in variables
    assert trainer.model.get_base_model() is base
    del trainer, handler
    assert live()["modules"] == modules


def test_what_is_others_stays(text_model, make_trainer):
    base, other = text_model().eval(), text_model(seed=1)
    model = attach_adapter(base, lora())
    others = [*other.parameters()]
    shared = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad] + others)
    schedule = torch.optim.lr_scheduler.LambdaLR(shared, lambda step: 1.0)
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(other, torch.optim.AdamW(others))
    kept = make_trainer("plain", other, max_steps=1)
    kept.train()
    beside = make_trainer("plain", base)  # of the base itself, with nothing of the adapter
    for each in (model, other):
        each(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    shared.step()
    cleanup_peft_model(model)
    assert kept.optimizer is not None
    assert kept.model is other
    assert beside.model_wrapped is base
    assert accelerator._models == [prepared[0]]
    assert accelerator._optimizers == [prepared[1]]
    assert [id(p) for p in shared.param_groups[0]["params"]] == [id(p) for p in others]
    assert set(map(id, shared.state)) <= set(map(id, others))
    assert all(p.grad is not None for p in others)
    assert schedule.optimizer is shared
    assert next(base.parameters()).device.type == "cpu"
    base(input_ids=torch.tensor([[1, 2]]))


def test_what_cannot_be_brought_back(text_model, make_trainer):
    """It raises, after everything else was given back."""
    base = text_model("qwen2")
    model = peft.get_peft_model(base, lora(bias="all"))
    trainer = make_trainer("plain", model)
    trainer.train()
    inner = trainer.optimizer.optimizer
    with pytest.raises(ForgeError, match=r"bias='all'.*restore_from"):
        cleanup_peft_model(trainer)
    assert trainer.optimizer is None
    assert moments(inner) == 0
    model(input_ids=torch.tensor([[1, 2]]))


@pytest.mark.parametrize("what", [None, "folder", object()])
def test_neither_model_nor_trainer(what):
    with pytest.raises(UnsupportedError, match="takes a PeftModel or a trainer"):
        cleanup_peft_model(what)


def test_twice_and_on_a_plain_model(text_model, make_trainer):
    base = text_model()
    trainer = make_trainer("sft", attach_adapter(base, lora()), max_steps=1)
    trainer.train()
    cleanup_peft_model(trainer)
    before = state_of(base)
    cleanup_peft_model(trainer)
    cleanup_peft_model(base)
    assert_same(before, state_of(base))


class BrokenError(Exception):
    pass


def test_after_a_training_that_broke_off(text_model, make_trainer):
    from transformers import TrainerCallback

    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise BrokenError

    base = text_model("qwen2")
    before = state_of(base)
    trainer = make_trainer("sft", attach_adapter(base, lora(bias="all")), trainer_options={"callbacks": [Break()]})
    with pytest.raises(BrokenError):
        trainer.train()
    cleanup_peft_model(trainer)
    assert_same(before, state_of(base))


# What else of forge works on the model


@pytest.mark.parametrize("kind", ["plain", "sft", "dpo"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_frozen_layers_and_callbacks(text_model, make_trainer, tmp_path, when, kind):
    base = text_model().eval()
    original = state_of(base)
    if when == "before":
        setup_lp_lora_style(base, 0.5)
    before = state_of(base)
    options = {"layers_to_transform": [2, 3], "target_modules": ["q_proj"]} if when == "before" else {}
    model = attach_adapter(base, lora(**options))
    if when == "after":
        setup_lp_lora_style(model, 0.5)
    monitor = MonitorCallback()
    trainer = make_trainer(kind, model, trainer_options={"callbacks": [EMACallback(), monitor]}, **checkpointing(True))
    cache = PrefixCache(tmp_path / "cache").attach(trainer)
    monitor.attach(trainer)
    trainer.train()
    assert cache.misses > 0
    safe_unload_peft_adapters(model)
    assert_same(before, state_of(base))
    unfreeze(base)
    base.eval()
    if when == "before":  # what was put back before it is thawed is what was frozen
        assert_same(original, state_of(base))
    cache.detach()
    cleanup_peft_model(trainer)
    base(input_ids=torch.tensor([[1, 2]]))


def test_a_frozen_model_without_forges_memory(text_model, make_trainer):
    base = text_model().eval()
    before = state_of(base)
    model = peft.get_peft_model(base, lora())
    setup_lp_lora_style(model, 0.5)
    make_trainer("sft", model).train()
    cleanup_peft_model(model)
    vars(base).pop("model_tags", None)
    assert_same(
        {**before, "generation_config eos_token_id": 0}, {**state_of(base), "generation_config eos_token_id": 0}
    )


def test_the_collector_need_not_run(text_model):
    """Cleaning up leaves no circles behind that later collections would have to find."""
    base = text_model()
    cleanup_peft_model(attach_adapter(base, lora()))
    gc.collect()
    cleanup_peft_model(attach_adapter(base, lora()))
    assert live() == live()


def test_a_second_cleanup_leaves_the_next_run_alone(text_model, make_trainer):
    base = text_model("llama", layers=2)
    first = attach_adapter(base, lora())
    stale = make_trainer("plain", first, max_steps=1)
    stale.train()
    cleanup_peft_model(first)
    second = attach_adapter(base, lora())
    running = make_trainer("plain", second, max_steps=2)
    running.train()
    held = len(running.optimizer.param_groups[0]["params"])
    assert held
    for again in (first, stale):
        cleanup_peft_model(again)
    assert len(running.optimizer.param_groups[0]["params"]) == held
    assert stale.optimizer is None
    assert safe_unload_peft_adapters(second) is base


def test_a_base_without_adapters_keeps_its_optimizer(text_model):
    base = text_model("llama", layers=2)
    optimizer = torch.optim.AdamW(base.parameters())
    held = len(optimizer.param_groups[0]["params"])
    cleanup_peft_model(base)
    assert len(optimizer.param_groups[0]["params"]) == held


def test_an_optimizer_of_two_models_stays_in_an_accelerator_of_ones_own(text_model):
    one, other = (attach_adapter(text_model("llama", layers=2), lora()) for _ in range(2))
    trained = [p for model in (one, other) for p in model.parameters() if p.requires_grad]
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(torch.optim.AdamW(trained))
    cleanup_peft_model(one)
    assert accelerator._optimizers == [optimizer]
    assert len(optimizer.param_groups[0]["params"]) == len(trained) // 2
