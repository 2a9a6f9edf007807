"""Backward visits the trained layers and no other, whatever the trainer does; loss and gradients are what they were."""

from __future__ import annotations

import copy
import io

import peft
import pytest
import torch
from transformers import TrainerCallback

from forge import compat
from forge.errors import ConflictError, UnsupportedError
from forge.freezing import setup_lp_lora_style
from forge.models.layers import decoder_layers, unwrap
from forge.models.truncation import layers_in_ratio, restore, truncate, truncated_layers, truncation_of
from support.backward import BackwardProbe
from support.models import checkpointing, lora, nf4_model, text_model

FAMILIES = ["llama", "qwen3", "gemma3", "phi3", "gpt2", "falcon_7b", "mixtral", "qwen3_moe", "gpt_oss", "gemma3_vl"]
LAYERS, FROZEN = 4, 2
CHECKPOINTING = {
    "off": checkpointing(False),
    "non_reentrant": checkpointing(use_reentrant=False),
    "reentrant": checkpointing(use_reentrant=True),
}


class Gradients(TrainerCallback):
    """Keeps the gradients of each step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def with_lora(family, **changes):
    model = text_model(family, layers=LAYERS)
    torch.manual_seed(0)  # lora_A
    return model, lora(target_modules=compat_targets(model), **changes)


def compat_targets(model):
    from forge.models import read_anatomy

    return list(read_anatomy(model).targets.target_modules)


def probed(make_trainer, kind, model, *, truncated, prepare=None, **args):
    """One optimizer step; returns the probe, the logged loss and the gradients."""
    gradients = Gradients()
    options = args.pop("trainer_options", {})
    trainer = make_trainer(kind, model, trainer_options={"callbacks": [gradients], **options}, max_steps=1, **args)
    setup_lp_lora_style(trainer.model, 0.5)
    if not truncated:
        restore(unwrap(trainer.model))
    if prepare is not None:
        prepare(trainer.model)
    torch.manual_seed(0)
    with BackwardProbe(trainer.model, layers=decoder_layers(trainer.model)) as probe:
        trainer.train()
    return probe, trainer.state.log_history[0]["loss"], gradients.steps[0]


def assert_alike(one, other):
    assert one[1] == pytest.approx(other[1], abs=1e-6)
    assert one[2].keys() == other[2].keys()
    for name, gradient in one[2].items():
        torch.testing.assert_close(gradient, other[2][name], rtol=1e-5, atol=1e-6)


def assert_stops(probe, frozen=FROZEN):
    assert probe.visited == tuple(range(frozen, LAYERS))
    assert [probe.saved_bytes[index] for index in range(frozen)] == [0] * frozen


def assert_never_twice(probe, times=1):
    assert [probe.forwards[index] for index in range(FROZEN)] == [times] * FROZEN


@pytest.mark.parametrize("kind", ["plain", "sft", "dpo"])
@pytest.mark.parametrize("how", CHECKPOINTING)
def test_every_trainer_and_every_checkpointing(make_trainer, kind, how):
    def run(truncated):
        model, config = with_lora("llama")
        args = dict(CHECKPOINTING[how])
        if kind == "plain":
            return probed(make_trainer, kind, peft.get_peft_model(model, config), truncated=truncated, **args)
        return probed(make_trainer, kind, model, truncated=truncated, trainer_options={"peft_config": config}, **args)

    one, other = run(True), run(False)
    assert_stops(one[0])
    assert_never_twice(one[0], 2 if kind == "dpo" else 1)
    assert_alike(one, other)
    if how != "off" and kind != "plain":  # freezing alone saves nothing: that is what truncation is for
        assert other[0].visited == (0, 1, 2, 3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["off", "reentrant"])
def test_every_family(make_trainer, family, how):
    def run(truncated):
        model, config = with_lora(family, **({"fan_in_fan_out": True} if family == "gpt2" else {}))
        if family == "gemma3_vl":
            config.target_modules = r".*language_model.*\.(q_proj|v_proj|down_proj)"
        model = peft.get_peft_model(model, config)
        args = dict(CHECKPOINTING[how])
        return probed(make_trainer, "plain", model, truncated=truncated, prepare=_hooked, rows=4, **args)

    def _hooked(model):
        model.enable_input_require_grads()
        if family == "gemma3_vl":
            forward = model.forward
            model.forward = lambda **batch: forward(token_type_ids=torch.zeros_like(batch["input_ids"]), **batch)

    one, other = run(True), run(False)
    assert_stops(one[0])
    assert_never_twice(one[0])
    assert_alike(one, other)
    assert other[0].visited == (0, 1, 2, 3)


@pytest.mark.parametrize("how", CHECKPOINTING)
def test_a_plain_model_trains_its_upper_layers(make_trainer, how):
    one = probed(make_trainer, "plain", text_model(layers=LAYERS), truncated=True, **CHECKPOINTING[how])
    other = probed(make_trainer, "plain", text_model(layers=LAYERS), truncated=False, **CHECKPOINTING[how])
    assert_stops(one[0])
    assert_alike(one, other)
    assert {name.split(".")[2] for name in one[2] if ".layers." in name} == {"2", "3"}
    assert "lm_head.weight" in one[2]
    assert "model.norm.weight" in one[2]


@pytest.mark.parametrize("how", CHECKPOINTING)
def test_nf4_prepared_for_kbit_training(make_trainer, tmp_path, how):
    def run(truncated):
        model = nf4_model(tmp_path / "nf4", layers=LAYERS)
        torch.manual_seed(0)
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=how != "off")
        model = peft.get_peft_model(model, lora())
        return probed(make_trainer, "sft", model, truncated=truncated, **CHECKPOINTING[how])

    one, other = run(True), run(False)
    assert_stops(one[0])
    assert_never_twice(one[0])
    assert_alike(one, other)
    assert other[0].visited == ((2, 3) if how == "off" else (0, 1, 2, 3))


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_bf16_autocast(make_trainer, kind):
    def run(truncated):
        model, config = with_lora("llama")
        options = {"peft_config": config}
        args = CHECKPOINTING["non_reentrant"]
        return probed(make_trainer, kind, model, truncated=truncated, trainer_options=options, **args, bf16=True)

    one, other = run(True), run(False)
    assert_stops(one[0])
    for name, gradient in one[2].items():
        torch.testing.assert_close(gradient, other[2][name])


@pytest.mark.parametrize("how", ["off", "reentrant"])
def test_packing(make_trainer, how):
    def run(truncated):
        model, config = with_lora("llama")
        options = {"peft_config": config}
        args = {**CHECKPOINTING[how], "packing": True}
        return probed(make_trainer, "sft", model, truncated=truncated, trainer_options=options, **args)

    one, other = run(True), run(False)
    assert_stops(one[0])
    assert_alike(one, other)


def test_dpo_does_not_wake_the_frozen_layers(make_trainer):
    """PEFT's enable_adapters switches on whatever adapter it finds, after each pass of the reference."""
    model, config = with_lora("llama")
    trainer = make_trainer("dpo", model, trainer_options={"peft_config": config}, max_steps=3)
    report = setup_lp_lora_style(trainer.model, 0.5)
    trainer.train()
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trained
    assert not any(f".layers.{index}." in name for name in trained for index in report.frozen_layers)


def test_dpo_on_an_adapter_that_is_there_already(make_trainer):
    """DPOTrainer copies it to a second one, `ref`, by its config: not into the frozen layers."""
    model, config = with_lora("llama")
    model = peft.get_peft_model(model, config)
    setup_lp_lora_style(model, 0.5)
    trainer = make_trainer("dpo", model, max_steps=2)
    trainer.train()
    names = [name for name, _ in model.named_parameters() if "lora" in name]
    assert names
    assert not any(".layers.0." in name or ".layers.1." in name for name in names)


def test_a_tower_beside_the_decoder_keeps_nothing(make_trainer):
    """transformers hooks the embeddings of towers too, so that they would be walked by autograd for nothing."""
    model = text_model("llava", layers=LAYERS)
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    setup_lp_lora_style(model, 0.5)
    model.enable_input_require_grads()
    model.train()
    ids = torch.full((1, 12), 5)
    ids[0, 2:6] = model.config.image_token_id
    batch = {"input_ids": ids, "labels": ids.clone(), "pixel_values": torch.randn(1, 3, 28, 28)}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model.model.get_image_features(batch["pixel_values"])
    assert not kept
    with BackwardProbe(model, layers=decoder_layers(model)) as probe:
        model(**batch).loss.backward()
    assert_stops(probe)


def test_a_router_learns_the_same(make_trainer):
    """The auxiliary loss looks at the routers of all layers; those of frozen layers are constants to the others."""

    def run(truncated):
        model, config = with_lora("mixtral")
        options = {"peft_config": config}
        return probed(
            make_trainer, "sft", model, truncated=truncated, trainer_options=options, **CHECKPOINTING["reentrant"]
        )

    one, other = run(True), run(False)
    assert_stops(one[0])
    assert_alike(one, other)


def test_checkpointing_that_comes_and_goes():
    """The flag of a frozen layer is kept for the day when it is given back."""
    model = text_model(layers=LAYERS)
    report = setup_lp_lora_style(model, 0.5)
    compat.enable_checkpointing(model, use_reentrant=False)
    layers = decoder_layers(model)
    assert [layer.gradient_checkpointing for layer in layers] == [False, False, True, True]
    report.undo()
    assert [layer.gradient_checkpointing for layer in layers] == [True] * 4


def test_what_trains_below_is_found_at_the_first_step():
    model = text_model(layers=LAYERS)
    setup_lp_lora_style(model, 0.5)
    model.train()
    ids = torch.tensor([[5, 6, 7]])
    model(input_ids=ids, labels=ids).loss.backward()
    model.model.embed_tokens.requires_grad_(True)
    with pytest.raises(ConflictError, match=r"model\.embed_tokens\.weight: trains below"):
        model(input_ids=ids, labels=ids)
    model.eval()
    model(input_ids=ids, labels=ids)
    with torch.no_grad():
        model.train()
        model(input_ids=ids, labels=ids)


def test_an_adapter_that_comes_later_is_found_at_the_first_step(make_trainer):
    model, config = with_lora("llama")
    report = setup_lp_lora_style(model, 0.5)
    trainer = make_trainer("sft", model, trainer_options={"peft_config": config})
    with pytest.raises(ConflictError, match=r"lora_A.* of decoder layer 0 trains"):
        trainer.train()
    setup_lp_lora_style(trainer.model, 0.5)
    trainer.train()
    assert report.exclude_modules
    assert not any("lora" in name for name, _ in decoder_layers(trainer.model)[:2].named_parameters())


def test_an_adapter_that_is_kept_out(make_trainer):
    model, config = with_lora("llama")
    report = setup_lp_lora_style(model, 0.5)
    config.exclude_modules = report.exclude_modules
    trainer = make_trainer("sft", model, trainer_options={"peft_config": config})
    trainer.train()
    names = [name for name, _ in trainer.model.named_parameters() if "lora_A" in name]
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in names} == {2, 3}


def test_a_copy_is_truncated_too_and_can_be_pickled():
    model = text_model(layers=LAYERS)
    setup_lp_lora_style(model, 0.5)
    again = copy.deepcopy(model)
    assert truncated_layers(again) == 2
    assert truncation_of(again) is not truncation_of(model)
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert truncated_layers(loaded) == 2
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_classes_keep_their_names():
    """FSDP and accelerate look for the layers by the name of their class."""
    model = text_model(layers=LAYERS)
    before = [type(layer) for layer in decoder_layers(model)]
    truncate(model, 2)
    assert [type(layer).__name__ for layer in decoder_layers(model)] == [kind.__name__ for kind in before]
    assert all(isinstance(layer, kind) for layer, kind in zip(decoder_layers(model), before, strict=True))
    restore(model)
    assert [type(layer) for layer in decoder_layers(model)] == before
    assert not any(name.startswith("_truncation") for layer in decoder_layers(model) for name in vars(layer))


def test_truncating_twice_or_too_deep():
    model = text_model(layers=LAYERS)
    with pytest.raises(UnsupportedError, match="depth=4"):
        truncate(model, 4)
    truncate(model, 1)
    with pytest.raises(UnsupportedError, match="truncated already"):
        truncate(model, 1)


def test_a_share_of_layers_is_a_number_of_them():
    for num_layers in range(1, 130):
        assert [layers_in_ratio(k / num_layers, num_layers) for k in range(num_layers)] == list(range(num_layers))
