"""Adapters that were attached without forge: exact where that can be, refused before anything changes elsewhere."""

import copy

import peft
import pytest
import torch
from adapter_state import assert_same, differences, state_of
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from forge.adapters import attach_adapter, safe_unload_peft_adapters
from forge.errors import ForgeError
from support.models import checkpointing, lora

LINEAR = ["q_proj", "v_proj", "up_proj"]
TASK = {"task_type": "CAUSAL_LM"}
EXACT = {
    "lora": lora(),
    "dora": lora(use_dora=True),
    "rslora": lora(use_rslora=True),
    "modules_to_save": lora(target_modules=LINEAR, modules_to_save=["lm_head", "embed_tokens"]),
    "tokens": lora(target_modules=LINEAR, trainable_token_indices=[3]),
    "embeddings": lora(target_modules=["embed_tokens", "q_proj"]),
    "orthogonal": lora(init_lora_weights="orthogonal"),
    "vera": peft.VeraConfig(r=4, target_modules=["q_proj"], **TASK),
    "loha": peft.LoHaConfig(r=4, target_modules=LINEAR, **TASK),
    "lokr": peft.LoKrConfig(r=4, target_modules=LINEAR, **TASK),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **TASK),
    "oft": peft.OFTConfig(r=8, oft_block_size=0, target_modules=["q_proj"], **TASK),
    "layer_norms": peft.LNTuningConfig(target_modules=["input_layernorm"], **TASK),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=2, **TASK),
}
REFUSED = {
    "bias='all'": lora(bias="all"),
    "bias='lora_only'": lora(bias="lora_only"),
    "init_lora_weights='pissa'": lora(init_lora_weights="pissa"),
    "init_lora_weights='olora'": lora(init_lora_weights="olora"),
    "does not know what OSF": peft.OSFConfig(target_modules=LINEAR, **TASK),
    "layer_replication": lora(layer_replication=[[0, 2], [1, 2]]),
}


@pytest.fixture
def loaded(tmp_path, text_model):
    def load(family="llama", quantization=None, dtype=torch.float32):
        folder = tmp_path / family
        model = text_model(family, layers=2).to(dtype)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
        model.save_pretrained(folder)
        options = {} if quantization is None else {"quantization_config": quantization, "device_map": {"": "cpu"}}
        return AutoModelForCausalLM.from_pretrained(folder, **options)

    return load


def train(make_trainer, kind, model, **options):
    run = make_trainer(kind, model, max_steps=1, rows=4, **checkpointing(True, use_reentrant=kind == "sft"), **options)
    run.train()
    return run.model


def assert_back(before, model):
    """TRL tags the models that it trains, and transformers 5.0 writes one stop token as a list: both mean nothing."""
    vars(model).pop("model_tags", None)
    after = state_of(model)
    for name in (" .model_tags", "generation_config eos_token_id"):
        before.pop(name, None)
        after.pop(name, None)
    assert_same(before, after)


@pytest.mark.parametrize("kind", ["plain", "sft", None])
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.")
def test_exact(loaded, make_trainer, name, kind):
    model = loaded()
    before = state_of(model)
    wrapped = peft.get_peft_model(model, copy.deepcopy(EXACT[name]))
    if kind and name != "oft":  # its warnings are its own
        train(make_trainer, kind, wrapped)
    assert safe_unload_peft_adapters(wrapped) is model
    assert_back(before, model)
    model.eval().requires_grad_(False)
    assert safe_unload_peft_adapters(wrapped) is model  # once is enough: the base is the caller's again
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_attached_by_the_trainer(loaded, make_trainer, family, kind):
    model = loaded(family)
    if family == "qwen3_moe":  # transformers leaves hooks of its own where a router's logits are asked for
        model(input_ids=torch.tensor([[1, 2]]), output_router_logits=True)
    before = state_of(model)
    targets = (
        {"target_modules": ["c_attn"], "fan_in_fan_out": True} if family == "gpt2" else {"target_modules": LINEAR[:2]}
    )
    if family == "qwen3_moe":
        targets["target_parameters"] = ["mlp.experts.down_proj"]
    wrapped = train(make_trainer, kind, model, trainer_options={"peft_config": lora(**targets)})
    assert wrapped is not model
    assert safe_unload_peft_adapters(wrapped) is model
    assert_back(before, model)


def test_loaded_from_a_folder(loaded, tmp_path, make_trainer):
    peft.get_peft_model(loaded(), lora(modules_to_save=["lm_head"])).save_pretrained(tmp_path / "adapter")
    model = loaded()
    before = state_of(model)
    wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True)
    train(make_trainer, "sft", wrapped)
    del wrapped
    assert safe_unload_peft_adapters(model) is model
    assert_back(before, model)


def test_added_by_transformers(loaded):
    model = loaded()
    before = state_of(model)
    model.add_adapter(lora(target_modules=LINEAR))
    assert safe_unload_peft_adapters(model) is model
    model._hf_peft_config_loaded = False  # the class says so
    assert_back(before | {" ._hf_peft_config_loaded": False}, model)


def test_mixed(loaded):
    model = loaded()
    before = state_of(model)
    wrapped = peft.get_peft_model(model, lora(target_modules=LINEAR), mixed=True)
    wrapped.add_adapter("other", peft.LoHaConfig(r=2, target_modules=["k_proj", "q_proj"]))
    wrapped.set_adapter(["default", "other"])
    assert safe_unload_peft_adapters(wrapped) is model
    assert_back(before, model)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("packed", ["nf4", "int8"])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_quantised(loaded, make_trainer, packed, kind):
    options = {"load_in_4bit": True} if packed == "nf4" else {"load_in_8bit": True}
    model = loaded(quantization=BitsAndBytesConfig(**options), dtype=torch.float32)
    model(input_ids=torch.tensor([[1, 2]]))  # an int8 layer moves its scales when it first runs, adapters or not
    before = state_of(model)
    wrapped = peft.get_peft_model(model, lora())
    train(make_trainer, kind, wrapped)
    assert safe_unload_peft_adapters(wrapped) is model
    assert_back(before, model)


def test_prepared_for_kbit_training(loaded):
    model = loaded(quantization=BitsAndBytesConfig(load_in_4bit=True), dtype=torch.bfloat16)
    before = state_of(model)
    wrapped = peft.get_peft_model(peft.prepare_model_for_kbit_training(model), lora())
    assert safe_unload_peft_adapters(wrapped) is model
    assert_back(before, model)


@pytest.mark.parametrize("reason", REFUSED)
def test_refused_before_anything_changes(loaded, tmp_path, reason):
    model = loaded("qwen2")
    before = state_of(model)
    wrapped = peft.get_peft_model(model, copy.deepcopy(REFUSED[reason]))
    during = state_of(wrapped)
    with pytest.raises(ForgeError, match=f"{reason}.*restore_from=.*attach_adapter"):
        safe_unload_peft_adapters(wrapped)
    assert_same(during, state_of(wrapped))
    assert differences(before, state_of(model))


@pytest.mark.parametrize("reason", [each for each in REFUSED if each != "layer_replication"])
@pytest.mark.parametrize("kind", ["folder", "state_dict"])
def test_restored(loaded, tmp_path, make_trainer, reason, kind):
    model = loaded("qwen2")
    before = state_of(model)
    source = {name: tensor.clone() for name, tensor in model.state_dict().items()} if kind == "state_dict" else None
    wrapped = peft.get_peft_model(model, copy.deepcopy(REFUSED[reason]))
    train(make_trainer, "plain" if "OSF" in reason else "sft", wrapped)
    assert safe_unload_peft_adapters(wrapped, restore_from=source or str(tmp_path / "qwen2")) is model
    assert_back(before, model)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.")
def test_only_what_may_have_changed_is_asked_for(loaded):
    model = loaded("qwen2")
    before = state_of(model)
    biases = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.endswith("bias")}
    wrapped = peft.get_peft_model(model, lora(bias="all"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(1)
    name, value = biases.popitem()
    with pytest.raises(ForgeError, match=r"restore_from has no values for model\.layers\.1"):
        safe_unload_peft_adapters(wrapped, restore_from=biases)
    safe_unload_peft_adapters(wrapped, restore_from={**biases, name: value})
    assert_back(before, model)


def test_merged(loaded, tmp_path):
    model = loaded()
    before = state_of(model)
    wrapped = peft.get_peft_model(model, lora(init_lora_weights=False))
    wrapped.merge_adapter()
    with pytest.raises(ForgeError, match="merged into the weights"):
        safe_unload_peft_adapters(wrapped)
    safe_unload_peft_adapters(wrapped, restore_from=tmp_path / "llama")
    assert_back(before, model)


def test_a_base_that_trained(loaded, tmp_path):
    model = loaded()
    before = state_of(model)
    wrapped = peft.get_peft_model(model, lora())
    with torch.no_grad():
        model.model.norm.weight.requires_grad_(True).add_(1)
    with pytest.raises(ForgeError, match=r"model\.norm\.weight of the base trained"):
        safe_unload_peft_adapters(wrapped)
    with pytest.raises(ForgeError, match="restore_from has no values for"):
        safe_unload_peft_adapters(wrapped, restore_from={})
    safe_unload_peft_adapters(wrapped, restore_from=tmp_path / "llama")
    assert_back(before, model)


def test_after_it_the_base_can_be_attached_to(loaded, no_foreign_warnings):
    model = loaded()
    safe_unload_peft_adapters(peft.get_peft_model(model, lora()))
    before = state_of(model)
    safe_unload_peft_adapters(attach_adapter(model, lora()))
    assert_same(before, state_of(model))


def test_a_plain_model_is_returned_as_it_is(loaded):
    model = loaded().train().requires_grad_(False)
    before = state_of(model)
    assert safe_unload_peft_adapters(model) is model
    assert_same(before, state_of(model))


def test_an_adapter_that_was_merged_and_taken_off_is_not_a_base(text_model):
    base = text_model("llama", layers=2)
    model = peft.get_peft_model(base, lora(init_lora_weights=False))
    model.merge_and_unload()
    with pytest.raises(ForgeError, match="taken off before"):
        safe_unload_peft_adapters(model)
    fresh = text_model("llama", layers=2)
    restored = safe_unload_peft_adapters(model, restore_from=fresh)
    assert all(torch.equal(a, b) for a, b in zip(restored.parameters(), fresh.parameters(), strict=True))


def test_what_is_no_source_of_the_base_is_refused(text_model, tmp_path):
    base = text_model("llama", layers=2)
    model = peft.get_peft_model(base, lora(init_lora_weights="pissa"))
    model.save_pretrained(tmp_path / "adapter")
    text_model("gpt2", layers=2).save_pretrained(tmp_path / "gpt2")
    for source, why in ((tmp_path / "adapter", "holds an adapter"), (tmp_path / "gpt2", "'gpt2'"), (model, "carries")):
        with pytest.raises(ForgeError, match=why):
            safe_unload_peft_adapters(model, restore_from=source)


def test_what_a_checkpoint_lacks_is_not_made_up(text_model, tmp_path):
    from transformers import AutoModelForSequenceClassification

    text_model("llama", layers=2).save_pretrained(tmp_path)
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    before = base.score.weight.clone()
    model = peft.get_peft_model(base, lora(init_lora_weights="pissa", target_modules=["q_proj"], task_type="SEQ_CLS"))
    with pytest.raises(ForgeError, match=r"no values for .*score"):
        safe_unload_peft_adapters(model, restore_from=tmp_path)
    assert torch.equal(base.score.original_module.weight, before)
