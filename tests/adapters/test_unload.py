"""The base comes back bit for bit, whatever was attached and whatever ran in between."""

import copy

import peft
import pytest
import torch
import transformers
from adapter_state import assert_same, differences, state_of
from packaging.version import Version
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer

from forge.adapters import attach_adapter, safe_unload_peft_adapters
from forge.errors import ConflictError, ForgeError, UnsupportedError
from support.models import checkpointing, lora, nf4_model

# What the oldest versions admitted cannot do, with or without forge.
OLD_PEFT = Version(peft.__version__) < Version("0.20")
OLD_TRANSFORMERS = Version(transformers.__version__) < Version("5.1")
LINEAR = ["q_proj", "v_proj", "up_proj"]
TIED = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
TARGETS = {"gpt2": ["c_attn", "c_proj"], "qwen3_moe": ["q_proj", "v_proj"]}
CONFIGS = {
    "lora": lora(),
    "dora": lora(use_dora=True),
    "rslora": lora(use_rslora=True, lora_dropout=0.1),
    "bias_all": lora(bias="all"),
    "bias_lora_only": lora(bias="lora_only"),
    "pissa": lora(init_lora_weights="pissa"),
    "pissa_niter": lora(init_lora_weights="pissa_niter_4"),
    "olora": lora(init_lora_weights="olora"),
    "lm_head": lora(modules_to_save=["lm_head"]),
    "embeddings": lora(target_modules=LINEAR, modules_to_save=["embed_tokens", "lm_head"]),
    "tokens": lora(target_modules=LINEAR, trainable_token_indices=[3, 5]),
    "vera": peft.VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "loha": peft.LoHaConfig(r=4, target_modules=LINEAR, task_type="CAUSAL_LM"),
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "layer_norms": peft.LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    "unknown": peft.OSFConfig(target_modules=LINEAR, task_type="CAUSAL_LM"),
}
# Everything is trained once by each trainer somewhere in the table; what writes to the base, by all of them.
RUNS = [
    *((name, kind) for name in ("lora", "pissa", "lm_head", "tokens") for kind in ("plain", "sft", "dpo")),
    *(("bias_all", kind) for kind in ("plain", "sft")),
    *((name, "sft") for name in ("dora", "rslora", "bias_lora_only", "olora", "embeddings", "vera")),
    *((name, "plain") for name in ("pissa_niter", "loha", "ia3", "layer_norms", "prompt", "unknown")),
    *((name, None) for name in CONFIGS),
]


@pytest.fixture
def base(text_model):
    def make(family="llama", **options):
        model = text_model(family, layers=2, **options).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # begin with zeros, which a restored copy would too easily match
                torch.nn.init.normal_(parameter)
        return model

    return make


def train(make_trainer, kind, model, how="reentrant", **options):
    flags = checkpointing(how != "off", use_reentrant=how == "reentrant")
    make_trainer(kind, model, max_steps=1, rows=4, **flags, **options).train()


@pytest.mark.parametrize(("name", "kind"), RUNS)
def test_any_adapter_and_any_trainer(base, make_trainer, name, kind):
    model = base("qwen2" if name.startswith("bias") else "llama")
    model.train(name == "dora")
    model.model.layers[0].requires_grad_(name != "rslora")
    before = state_of(model)
    wrapped = attach_adapter(model, CONFIGS[name])
    assert wrapped.get_base_model() is model
    assert differences(before, state_of(model))
    if kind is not None:
        train(make_trainer, kind, wrapped, "non_reentrant" if kind == "plain" else "reentrant")
    assert safe_unload_peft_adapters(wrapped) is model
    assert_same(before, state_of(model))


@pytest.mark.parametrize("how", ["off", "reentrant", "non_reentrant"])
@pytest.mark.parametrize("family", ["qwen3", "gemma3", "gemma3_vl", "gpt2", "qwen3_moe"])
def test_any_family(base, make_trainer, family, how):
    model = base(family)
    before = state_of(model)
    kind = {"off": "dpo", "reentrant": "sft", "non_reentrant": "plain"}[how]
    kind = "plain" if family == "gemma3_vl" else kind
    bias = "none" if kind == "dpo" else "all"
    config = lora(target_modules=TARGETS.get(family, LINEAR), bias=bias, fan_in_fan_out=family == "gpt2")
    wrapped = attach_adapter(model, config)
    if not (OLD_TRANSFORMERS and family == "gemma3_vl"):  # it trains with images only there
        train(make_trainer, kind, wrapped, how)
    safe_unload_peft_adapters(wrapped)
    assert_same(before, state_of(model))


@pytest.mark.parametrize(
    ("family", "changes", "kind"),
    [
        ("gpt2", {"modules_to_save": ["lm_head"]}, "sft"),
        ("gpt2", {"modules_to_save": ["wte"]}, "dpo"),
        ("qwen2", {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, "sft"),
        ("qwen2", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, "plain"),
        ("qwen2", {"trainable_token_indices": [3]}, "plain"),  # TRL's head does not know the wrapper of a tied head
    ],
)
def test_ties(text_model, make_trainer, family, changes, kind):
    if OLD_PEFT and "ensure_weight_tying" in changes:
        pytest.skip("fails in PEFT itself")
    model = text_model(family, layers=2)
    embeddings = model.get_input_embeddings()
    assert model.lm_head.weight is embeddings.weight
    before = state_of(model)
    targets = TIED if family == "gpt2" else {"target_modules": LINEAR}
    wrapped = attach_adapter(model, lora(**targets, **changes))
    train(make_trainer, kind, wrapped)
    safe_unload_peft_adapters(wrapped)
    assert model.lm_head.weight is embeddings.weight
    assert_same(before, state_of(model))


@pytest.mark.parametrize("kind", ["plain", "sft", "dpo", None])
def test_experts_as_parameters(base, make_trainer, kind):
    if OLD_PEFT and kind == "dpo":
        pytest.skip("PEFT adds no second adapter to parameters, which DPOTrainer's reference is")
    model = base("qwen3_moe")
    before = state_of(model)
    config = lora(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    wrapped = attach_adapter(model, config)
    if kind:
        train(make_trainer, kind, wrapped)
    safe_unload_peft_adapters(wrapped)
    assert_same(before, state_of(model))


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("kind", ["plain", "sft", "dpo", None])
@pytest.mark.parametrize("packed", ["nf4", "int8"])
def test_quantised(tmp_path, text_model, make_trainer, packed, kind):
    if packed == "nf4":
        model = nf4_model(tmp_path / "model", layers=2)
    else:
        text_model(layers=2).save_pretrained(tmp_path / "model")
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map={"": "cpu"}
        )
    before = state_of(model)
    # TRL 1.0 trains a bf16 copy of the head on fp32 states.
    wrapped = attach_adapter(model, lora(modules_to_save=None if kind in ("sft", "dpo") else ["lm_head"]))
    if kind:
        train(make_trainer, kind, wrapped)
    safe_unload_peft_adapters(wrapped)
    assert_same(before, state_of(model))


def test_prepared_for_kbit_training(tmp_path, text_model, make_trainer):
    """The norms are cast to fp32 and checkpointing is on; both are undone."""
    text_model(layers=2).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", quantization_config=quantization, device_map={"": "cpu"}
    )
    before = state_of(model)
    wrapped = attach_adapter(model, lora())
    peft.prepare_model_for_kbit_training(wrapped)
    assert model.model.norm.weight.dtype == torch.float32
    safe_unload_peft_adapters(wrapped)
    assert_same(before, state_of(model))


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
def test_merging_into_packed_weights(tmp_path, how):
    """PEFT puts new packed weights in place of the old ones, which are remembered."""
    model = nf4_model(tmp_path / "model", layers=2)
    before = state_of(model)
    wrapped = attach_adapter(model, lora(init_lora_weights=False))
    with pytest.warns(UserWarning, match="Merge lora module"):
        getattr(wrapped, how)()
    assert safe_unload_peft_adapters(model) is model
    assert_same(before, state_of(model))


def test_what_a_trainer_refuses(base, make_trainer):
    """DPOTrainer adds an adapter for its reference, and PEFT allows trained biases to one adapter only."""
    model = base("qwen2")
    before = state_of(model)
    wrapped = attach_adapter(model, lora(bias="all"))
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        train(make_trainer, "dpo", wrapped)
    safe_unload_peft_adapters(wrapped)
    assert_same(before, state_of(model))


class StopError(Exception):
    pass


@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_training_that_broke_off(base, make_trainer, kind, error):
    """In the middle of a forward pass, where PEFT has parametrised the experts."""
    model = base("qwen3_moe")
    before = state_of(model)
    parameters = None if OLD_PEFT and kind == "dpo" else ["mlp.experts.down_proj"]
    config = lora(target_modules=["q_proj"], target_parameters=parameters)
    wrapped = attach_adapter(model, config)
    calls = []

    def broken(module, args):
        calls.append(module)
        if len(calls) == 3:
            raise error

    model.model.layers[1].mlp.experts.get_submodule("").register_forward_pre_hook(broken)
    with pytest.raises(error):
        make_trainer(kind, wrapped, max_steps=4, **checkpointing(True, use_reentrant=False)).train()
    del broken
    safe_unload_peft_adapters(wrapped)
    assert_same(before, state_of(model))


def test_what_else_may_happen_in_between(base):
    """Other adapters, hooks, dtypes, embeddings, configs: all of it is undone."""
    model = base()
    seen = []
    handle = model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    before = state_of(model)
    wrapped = attach_adapter(model, lora())
    wrapped.add_adapter("second", lora(r=2))
    wrapped.set_adapter("second")
    model.resize_token_embeddings(300)
    later = model.model.layers[1].register_forward_hook(lambda *_: None)
    model.double()
    model.config.use_cache, model.config.rope_parameters["new"] = False, 1
    model.generation_config.max_new_tokens = 7
    model.forward = lambda *args, **kwargs: None
    safe_unload_peft_adapters(wrapped)
    assert_same(before, state_of(model))
    later.remove()
    model(input_ids=torch.tensor([[1, 2]]))
    assert seen == [1]
    handle.remove()
    assert not model.model.layers[0]._forward_hooks


def test_the_base_alone_is_enough(base):
    """The PeftModel went out of scope, or PEFT's own unload() was called."""
    model = base("qwen2")
    before = state_of(model)
    wrapped = attach_adapter(model, lora(bias="all"))
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.base_layer.bias.add_(1)
    del wrapped
    assert safe_unload_peft_adapters(model) is model
    assert_same(before, state_of(model))

    attach_adapter(model, lora(init_lora_weights="pissa")).unload()
    assert differences(before, state_of(model))
    with pytest.raises(ConflictError, match="not brought back"):
        attach_adapter(model, lora())
    safe_unload_peft_adapters(model)
    assert_same(before, state_of(model))


def test_twice_is_once(base):
    model = base()
    first = attach_adapter(model, lora())
    assert safe_unload_peft_adapters(first) is model
    second = attach_adapter(model, lora())
    assert safe_unload_peft_adapters(first) is model  # and does nothing to the second
    assert any("lora_A" in name for name, _ in model.named_parameters())
    assert safe_unload_peft_adapters(second) is model
    model.requires_grad_(False)
    assert safe_unload_peft_adapters(second) is safe_unload_peft_adapters(model) is model
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_another_peft_model_of_the_same_base(base):
    model = base()
    foreign = peft.get_peft_model(model, lora())
    foreign.unload()
    attached = attach_adapter(model, lora())
    with pytest.raises(ConflictError, match="another adapter by now"):
        safe_unload_peft_adapters(foreign)
    safe_unload_peft_adapters(attached)


def test_wrapped_models(base):
    model = base()
    before = state_of(model)
    compiled = torch.compile(attach_adapter(model, lora()))
    assert safe_unload_peft_adapters(compiled) is model
    assert_same(before, state_of(model))


@pytest.mark.parametrize("what", [None, "folder", 3, Trainer])
def test_no_model(what):
    with pytest.raises(UnsupportedError, match="takes a PeftModel"):
        safe_unload_peft_adapters(what)


# What nobody copied


def merged(model):
    wrapped = attach_adapter(model, lora(init_lora_weights=False))
    wrapped.merge_adapter()
    return wrapped


def trained_norm(model):
    wrapped = attach_adapter(model, lora())
    with torch.no_grad():
        model.model.norm.weight.requires_grad_(True).add_(1)
    return wrapped


@pytest.mark.parametrize("change", [merged, trained_norm])
def test_what_nobody_copied_raises_and_leaves_the_model(base, change):
    model = base()
    wrapped = change(model)
    during = state_of(wrapped)
    with pytest.raises(ForgeError, match=r"(q_proj|norm)\.weight.*no copy was kept.*restore_from="):
        safe_unload_peft_adapters(wrapped)
    assert_same(during, state_of(wrapped))
    wrapped(input_ids=torch.tensor([[1, 2]]))


@pytest.mark.parametrize("change", [merged, trained_norm])
@pytest.mark.parametrize("kind", ["state_dict", "model", "folder", "path"])
def test_restore_from(tmp_path, base, change, kind):
    model = base()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    source = {
        "state_dict": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "model": copy.deepcopy(model),
        "folder": str(tmp_path),
        "path": tmp_path,
    }[kind]
    before = state_of(model)
    safe_unload_peft_adapters(change(model), restore_from=source)
    assert_same(before, state_of(model))


def test_restore_from_reads_what_is_needed_only(tmp_path, base, monkeypatch):
    import safetensors

    model = base()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    opened = []
    real = safetensors.safe_open
    monkeypatch.setattr("safetensors.safe_open", lambda path, **options: opened.append(path) or real(path, **options))
    safe_unload_peft_adapters(trained_norm(model), restore_from=tmp_path)
    assert len(opened) == 1 < len(list(tmp_path.glob("*.safetensors")))


@pytest.mark.parametrize("family", ["gemma3_vl", "qwen3_moe"])
def test_restore_from_a_checkpoint_with_other_names(tmp_path, base, family):
    """transformers stores some models' tensors under other names than theirs, and experts one by one."""
    model = base(family)
    model.save_pretrained(tmp_path)
    before = state_of(model)
    wrapped = attach_adapter(model, lora(target_modules=["q_proj"]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    safe_unload_peft_adapters(wrapped, restore_from=tmp_path)
    assert_same(before, state_of(model))


def test_restore_from_the_wrong_place(tmp_path, base):
    wrapped = trained_norm(base())
    during = state_of(wrapped)
    with pytest.raises(ForgeError, match="no values there that are those of the base"):
        safe_unload_peft_adapters(wrapped, restore_from={"model.norm.weight": torch.zeros(32)})
    with pytest.raises(ForgeError, match="no checkpoint of a LlamaForCausalLM"):
        safe_unload_peft_adapters(wrapped, restore_from=tmp_path)
    with pytest.raises(ForgeError, match="must be a state dict"):
        safe_unload_peft_adapters(wrapped, restore_from=3)
    assert_same(during, state_of(wrapped))


class Elsewhere(torch.Tensor):
    """A tensor that says it is on another device."""

    @property
    def device(self):
        return torch.device("cuda", 0)


def test_what_moved_stays_where_it_is(base):
    """A buffer that another stands for since the model moved: kept if it has the same bytes, else put back there."""
    from forge.adapters.memento import memento_of

    model = base()
    wrapped = attach_adapter(model, lora())
    rotary, weights = model.model.rotary_emb, memento_of(model).weights
    original = rotary.inv_freq
    rotary.inv_freq = original.clone().as_subclass(Elsewhere)
    repairs = weights.repairs(model, None)
    assert [(each.tensor is original, found is rotary.inv_freq) for each, found in repairs.moved] == [(True, True)]
    assert repairs.values == repairs.devices == []
    rotary.inv_freq = (original + 1).as_subclass(Elsewhere)
    repairs = weights.repairs(model, None)
    assert [(each.tensor is original, str(device)) for each, device in repairs.devices] == [(True, "cuda:0")]
    rotary.inv_freq = moved = original.clone().as_subclass(Elsewhere)
    safe_unload_peft_adapters(wrapped)
    assert rotary.inv_freq is moved


def test_the_real_model(smollm2, conversations, tmp_path):
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    question = tokenizer("The capital of France is", return_tensors="pt")
    before, logits = state_of(model), model(**question).logits
    rows = Dataset.from_list([{"messages": list(messages)} for messages in conversations[:2]])
    wrapped = attach_adapter(model, lora(init_lora_weights="pissa_niter_4", target_modules=["q_proj", "down_proj"]))
    args = SFTConfig(
        str(tmp_path),
        **{"use_cpu": True, "bf16": False, "max_length": 32, "max_steps": 1, "per_device_train_batch_size": 1},
        **{"learning_rate": 1e-2, "report_to": [], "save_strategy": "no", "disable_tqdm": True},
        **checkpointing(True),
    )
    SFTTrainer(wrapped, args=args, train_dataset=rows, processing_class=tokenizer).train()
    assert not torch.equal(wrapped(**question).logits, logits)
    assert safe_unload_peft_adapters(wrapped) is model
    assert_same(before, state_of(model))
    assert torch.equal(model(**question).logits, logits)


@pytest.mark.filterwarnings("ignore")  # PEFT's own, of a second adapter on the model
def test_a_peft_model_in_a_peft_model(text_model):
    base = text_model("llama", layers=2)
    before = state_of(base)
    nested = peft.get_peft_model(attach_adapter(base, lora()), lora(target_modules=["q_proj"]))
    assert safe_unload_peft_adapters(nested) is base
    assert_same(before, state_of(base))
