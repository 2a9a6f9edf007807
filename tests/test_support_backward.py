import pytest
import torch

from support.backward import OUTSIDE, BackwardProbe, decoder_layers
from support.families import FAMILIES, tiny_config, tiny_model
from support.models import checkpointing, lora, text_model, trainer

LAYERS = 4
IDS = torch.arange(3, 67).view(2, 32)


def step(model, **inputs):
    with BackwardProbe(model) as probe:
        model(input_ids=IDS, labels=IDS, use_cache=False, **inputs).loss.backward()
    return probe


def freeze_below(model, boundary):
    model.requires_grad_(False)
    for layer in decoder_layers(model)[boundary:]:
        layer.requires_grad_(True)
    return model


def checkpoint(model, use_reentrant):
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    return model


def test_without_freezing_every_layer_is_visited_and_saves_the_same():
    probe = step(text_model(layers=LAYERS))
    assert probe.visited == (0, 1, 2, 3)
    assert probe.forwards == dict.fromkeys(range(4), 1)
    assert probe.saved_bytes[1] == probe.saved_bytes[2] == probe.saved_bytes[3] > IDS.numel() * 32 * 4
    assert probe.saved_bytes[OUTSIDE] > 0


def test_a_frozen_prefix_is_neither_visited_nor_saves_anything():
    probe = step(freeze_below(text_model(layers=LAYERS), 2))
    assert probe.visited == (2, 3)
    assert probe.saved_bytes[0] == probe.saved_bytes[1] == 0
    assert probe.saved_bytes[2] > 0


def test_inputs_that_require_grad_defeat_the_freezing_and_the_probe_says_so():
    model = freeze_below(text_model(layers=LAYERS), 2)
    model.enable_input_require_grads()
    probe = step(model)
    assert probe.visited == (0, 1, 2, 3)
    assert probe.saved_bytes[0] > 0


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_shows_as_a_second_forward_and_as_fewer_bytes(use_reentrant):
    plain = step(text_model(layers=LAYERS))
    probe = step(checkpoint(text_model(layers=LAYERS), use_reentrant))
    assert probe.visited == (0, 1, 2, 3)
    assert probe.forwards == dict.fromkeys(range(4), 2)
    hidden_bytes = IDS.numel() * 32 * 4
    for index in range(LAYERS):
        assert hidden_bytes <= probe.saved_bytes[index] < plain.saved_bytes[index] / 4


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_detached_boundary_stops_backward_under_checkpointing(use_reentrant):
    model = checkpoint(freeze_below(text_model(layers=LAYERS), 2), use_reentrant)
    model.enable_input_require_grads()
    layers = decoder_layers(model)
    for layer in layers[:2]:
        layer.gradient_checkpointing = False
    layers[1].register_forward_hook(lambda _, __, output: output.detach().requires_grad_())
    probe = step(model)
    assert probe.visited == (2, 3)
    assert probe.forwards == {0: 1, 1: 1, 2: 2, 3: 2}


def test_each_storage_counts_once_and_parameters_do_not_count():
    layer = torch.nn.Linear(4, 4, bias=False)
    layers = torch.nn.ModuleList([torch.nn.Sequential(layer)])
    value = torch.ones(8, 4, requires_grad=True)
    with BackwardProbe(layers, layers=layers) as probe:
        output = layers[0](value)  # saves the value and, as a parameter, the weight
        (output * value.view(4, 8).view(8, 4)).sum().backward()  # saves its output, and the value again as a view
    assert probe.saved_bytes == {0: 8 * 4 * 4, OUTSIDE: 8 * 4 * 4}


def test_a_layer_that_hands_its_input_on_is_not_visited():
    layers = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Identity(), torch.nn.Linear(4, 4)])
    with BackwardProbe(layers, layers=layers) as probe:
        value = torch.ones(2, 4)
        for layer in layers:
            value = layer(value)
        value.sum().backward()
    assert probe.visited == (0, 2)


def test_everything_is_undone():
    model = text_model(layers=LAYERS)
    step(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["plain", "sft", "dpo"])
@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_it_sees_through_the_standard_trainers(tmp_path, kind, use_reentrant):
    options = checkpointing(use_reentrant is not None, use_reentrant=use_reentrant)
    subject = trainer(kind, tmp_path, text_model(layers=LAYERS), max_steps=1, **options)
    with BackwardProbe(subject.model) as probe:
        subject.train()
    assert probe.visited == (0, 1, 2, 3)
    assert probe.forwards == dict.fromkeys(range(4), 1 if use_reentrant is None else 2)


def test_a_lora_in_the_upper_half_is_visited_there_only(tmp_path):
    options = {"peft_config": lora(target_modules=["q_proj", "v_proj"], layers_to_transform=[2, 3])}
    subject = trainer("sft", tmp_path, text_model(layers=LAYERS), max_steps=1, trainer_options=options)
    with BackwardProbe(subject.model) as probe:
        subject.train()
    assert probe.visited == (2, 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_is_found_in_every_family(family):
    layers = decoder_layers(tiny_model(family))
    assert len(layers) == tiny_config(family).get_text_config().num_hidden_layers
    assert all(any("attn" in name or "attention" in name for name, _ in layer.named_children()) for layer in layers)
