import math

import pytest
import torch

from support.models import lora, text_model, trainer
from support.nan import find_parameter, inject_nan


def finite(model):
    return all(torch.isfinite(value).all() for value in model.parameters())


@pytest.mark.parametrize("kind", ["plain", "sft", "dpo"])
@pytest.mark.parametrize("where", ["loss", "gradient", "weight"])
def test_an_injected_fault_reaches_the_weights(tmp_path, kind, where):
    subject = trainer(kind, tmp_path, text_model(layers=2), max_steps=2)
    with inject_nan(subject, step=2, where=where) as fault:
        subject.train()
    assert fault.fired == [(2, 0)]
    assert not finite(subject.model)


@pytest.mark.parametrize("where", ["loss", "gradient", "weight"])
def test_nothing_happens_before_the_step_and_all_is_undone_after_it(tmp_path, where):
    subject = trainer("plain", tmp_path, text_model(layers=2), max_steps=1)
    with pytest.raises(AssertionError, match="never broken"), inject_nan(subject, step=2, where=where):
        subject.train()
    assert finite(subject.model)
    assert not {"training_step", "compute_loss"} & set(vars(subject))
    assert not any(value._backward_hooks for value in subject.model.parameters())


def test_one_micro_batch_of_an_accumulated_step_is_broken_by_one_element(tmp_path):
    subject = trainer("sft", tmp_path, text_model(layers=2), max_steps=2, gradient_accumulation_steps=4)
    _, weight = find_parameter(subject.model, "k_proj")
    bad = []
    weight.register_post_accumulate_grad_hook(lambda p: bad.append(int((~torch.isfinite(p.grad)).sum())))
    with inject_nan(subject, step=2, where="gradient", parameter="k_proj", micro_batch=3, value=math.inf) as fault:
        subject.train()
    assert fault.fired == [(2, 3)]
    assert bad == [0] * 7 + [1]


def test_a_lora_parameter_is_chosen_by_a_part_of_its_name(tmp_path):
    options = {"peft_config": lora()}
    subject = trainer("sft", tmp_path, text_model(layers=2), max_steps=1, trainer_options=options)
    with inject_nan(subject, step=1, where="weight", parameter="layers.1.mlp.up_proj.lora_B") as fault:
        subject.train()
    assert "layers.1.mlp.up_proj.lora_B" in fault.parameter
    assert not finite(subject.model)


def test_evaluation_is_left_alone(tmp_path):
    from support.data import lm_tokens

    options = {"eval_dataset": lm_tokens(4)}
    subject = trainer("plain", tmp_path, text_model(layers=2), max_steps=1, trainer_options=options)
    with inject_nan(subject, step=1) as fault:
        assert math.isfinite(subject.evaluate()["eval_loss"])
        assert fault.fired == []
        subject.train()


def test_a_name_that_fits_nothing_raises():
    with pytest.raises(ValueError, match="no trainable parameter has 'nowhere'"):
        find_parameter(text_model(layers=2), "nowhere")
