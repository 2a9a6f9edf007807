"""What attach_adapter promises: PEFT's own adapter, an untouched config, no warnings, and nothing kept alive."""

import copy
import gc
import io
import pickle
import weakref

import peft
import pytest
import torch
from adapter_state import assert_same, live, state_of

from forge.adapters import attach_adapter, safe_unload_peft_adapters
from forge.errors import ConflictError, ForgeError, UnsupportedError
from support.models import lora

REWRITING = lora(init_lora_weights="pissa")


@pytest.mark.parametrize("config", [lora(), REWRITING, lora(init_lora_weights="gaussian", bias="all")])
def test_the_adapter_is_pefts_own(text_model, config):
    """The same modules with the same random numbers, also where forge asks PEFT first what it will adapt."""
    torch.manual_seed(3)
    plain = peft.get_peft_model(text_model(), copy.deepcopy(config))
    after_plain = torch.rand(1)
    torch.manual_seed(3)
    ours = attach_adapter(text_model(), config)
    assert torch.equal(torch.rand(1), after_plain)
    expected, found = plain.state_dict(), ours.state_dict()
    assert list(expected) == list(found)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert [p.requires_grad for p in plain.parameters()] == [p.requires_grad for p in ours.parameters()]


def test_the_config_stays_the_callers(text_model, tmp_path, no_foreign_warnings):
    config = lora(target_modules="all-linear")
    before = copy.deepcopy(config).to_dict()
    models = []
    for name in ("one", "another"):
        text_model().save_pretrained(tmp_path / name)
        base = type(text_model()).from_pretrained(tmp_path / name)
        models.append(attach_adapter(base, config))
    assert config.to_dict() == before
    assert [str(each.peft_config["default"].base_model_name_or_path) for each in models] == [
        str(tmp_path / name) for name in ("one", "another")
    ]


def test_its_name(text_model):
    model = attach_adapter(text_model(), lora(), adapter_name="mine")
    assert list(model.peft_config) == ["mine"]


def test_what_has_adapters_is_refused(text_model):
    base = text_model()
    model = attach_adapter(base, lora())
    for each in (
        model,
        base,
        peft.get_peft_model(text_model(), lora()),
        peft.get_peft_model(text_model(), lora()).get_base_model(),
    ):
        with pytest.raises(ConflictError, match=r"has an adapter already.*safe_unload_peft_adapters"):
            attach_adapter(each, lora())


def test_what_is_no_model_or_config_is_refused(text_model):
    with pytest.raises(UnsupportedError, match="takes a model, not a str"):
        attach_adapter("folder", lora())
    with pytest.raises(ForgeError, match="peft_config is a dict"):
        attach_adapter(text_model(), {"r": 4})
    with pytest.raises(UnsupportedError, match="wrapped"):
        attach_adapter(torch.nn.DataParallel(text_model()), lora())


@pytest.mark.parametrize(
    "config",
    [
        lora(target_modules=["no_such_layer"]),
        lora(target_modules=["no_such_layer"], init_lora_weights="pissa"),
        lora(target_modules=["q_proj"], init_lora_weights="corda", corda_config=peft.tuners.lora.config.CordaConfig()),
        lora(target_modules=["q_proj"], modules_to_save=["norm"], layers_to_transform=[77]),
    ],
)
def test_what_peft_refuses_leaves_the_base(text_model, config):
    base = text_model()
    before = state_of(base)
    with pytest.raises(ValueError):
        attach_adapter(base, config)
    assert_same(before, state_of(base))
    safe_unload_peft_adapters(attach_adapter(base, lora()))


def test_interrupted_while_peft_rewrites_the_weights(text_model, monkeypatch):
    base = text_model()
    before = state_of(base)
    init, calls = peft.tuners.lora.layer.LoraLayer.pissa_init, []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        init(*args, **kwargs)

    monkeypatch.setattr(peft.tuners.lora.layer.LoraLayer, "pissa_init", interrupted)
    with pytest.raises(KeyboardInterrupt):
        attach_adapter(base, REWRITING)
    assert len(calls) == 3
    assert_same(before, state_of(base))


@pytest.mark.parametrize("pickled", [False, True])
def test_a_copy_brings_no_memory_along(text_model, pickled):
    """Not the weights that were copied to the host, and not a memory of the other model."""
    base = text_model("qwen2")
    before = state_of(base)
    model = attach_adapter(base, lora(bias="all"))
    other = pickle.loads(pickle.dumps(model)) if pickled else copy.deepcopy(model)
    assert vars(other.get_base_model()).get("_forge_memento") is None
    with pytest.raises(ForgeError, match="attached without forge"):
        safe_unload_peft_adapters(other)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    safe_unload_peft_adapters(model)
    assert_same(before, state_of(base))


def test_a_file_of_the_model_has_no_memory(text_model):
    """`torch.save` of the model is not larger by the copies."""

    def size(model):
        file = io.BytesIO()
        torch.save(model, file)
        return file.tell()

    plain, ours = text_model("qwen2"), text_model("qwen2")
    config = lora(init_lora_weights="pissa", bias="all")
    assert size(attach_adapter(ours, config)) < size(peft.get_peft_model(plain, copy.deepcopy(config))) + 500


def test_no_circle_keeps_anything_alive(text_model):
    base = text_model()
    model = attach_adapter(base, REWRITING)
    adapters = weakref.ref(model.base_model.model.model.layers[0].self_attn.q_proj)
    gc.collect()
    gc.disable()
    try:
        safe_unload_peft_adapters(model)
        assert adapters() is None
        wrapper, memory = weakref.ref(model), weakref.ref(base)
        del model
        assert wrapper() is None
        model = attach_adapter(base, REWRITING)
        kept = weakref.ref(vars(base)["_forge_memento"])
        del base
        model.base_model.model.to("cpu")
        del model
        assert kept() is None
        assert memory() is None
    finally:
        gc.enable()


def test_only_what_changes_is_copied(text_model):
    """Beyond the adapter itself, attaching brings the memory of nothing for plain LoRA, and of biases for `bias`."""

    def brought(config):
        base = text_model("qwen2")
        before = live()["bytes"]
        model = attach_adapter(base, config)
        after = live()["bytes"]
        adapter = sum(p.nbytes for name, p in model.named_parameters() if "lora_" in name)
        return after - before - adapter, base

    assert brought(lora())[0] == 0
    size, base = brought(lora(bias="all"))
    assert size == sum(p.nbytes for name, p in base.named_parameters() if name.endswith("bias"))
    size, base = brought(lora(target_modules=["q_proj"], init_lora_weights="pissa"))
    assert size == sum(
        p.nbytes
        for name, p in base.named_parameters()
        if "q_proj" in name and name.endswith("weight") and "lora" not in name
    )
