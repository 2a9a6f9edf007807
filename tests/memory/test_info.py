import doctest
import importlib
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from forge.errors import ForgeError, UnsupportedError
from forge.memory.info import ModelInfo, Part, print_model_info
from forge.models import read_anatomy
from support.families import FAMILIES, NUM_LAYERS, tiny_config, tiny_model
from support.models import lora, nf4_model
from support.upstream import ALLOWED
from support.warnings import WarningRecorder

TIED = {"qwen2", "gemma3", "gemma3_vl", "gpt2", "falcon_7b", "falcon_40b"}
TOWERS = {
    "qwen2_5_vl": {"model.visual"},
    "gemma3_vl": {"model.vision_tower", "model.multi_modal_projector"},
    "llava": {"model.vision_tower", "model.multi_modal_projector"},
    "smolvlm": {"model.vision_model", "model.connector"},
}
MOE = {"mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3"}


def adapt(model: Any, **changes: Any) -> Any:
    from peft import get_peft_model

    with WarningRecorder(ALLOWED) as recorder:
        wrapped = get_peft_model(model, lora(**changes))
    recorder.assert_clean()
    return wrapped


def part(info: ModelInfo, name: str, inside: str = "") -> Part:
    (found,) = [part for part in info.parts if (part.name, part.inside) == (name, inside)]
    return found


def names(info: ModelInfo, inside: str = "") -> set[str]:
    return {part.name for part in info.parts if part.inside == inside}


def assert_sums(info: ModelInfo) -> None:
    outer = [part for part in info.parts if not part.inside]
    total = info.num_parameters + info.adapter_parameters
    assert sum(part.parameters for part in outer) == total == sum(part.parameters for part in info.dtypes)
    assert sum(part.trainable for part in outer) == info.trainable_parameters
    assert info.trainable_parameters + info.frozen_parameters == total
    assert sum(part.bytes for part in outer) == info.memory_bytes
    assert sum(part.bytes for part in info.dtypes) == info.parameter_bytes
    assert sum(size for packed in info.quantized for _, size in packed.constants) == info.constant_bytes
    for whole in outer:
        inner = [part for part in info.parts if part.inside == whole.name]
        for key in ("parameters", "trainable", "bytes") if inner else ():
            assert sum(getattr(part, key) for part in inner) == getattr(whole, key)


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_sum_to_the_whole_live_on_meta_and_from_a_config(family):
    model = tiny_model(family)
    live = print_model_info(model)
    assert_sums(live)
    assert live.num_parameters == sum(p.numel() for p in model.parameters())
    assert live.memory_bytes == sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    assert live.memory_bytes == model.get_memory_footprint()
    assert (live.num_layers, live.layers_path) == (NUM_LAYERS, read_anatomy(model).decoder_layers)
    assert bool(live.tied) == (family in TIED)
    assert live.devices == ("cpu",)

    own = {"embeddings", "decoder layers", "final norm", "head"} | TOWERS.get(family, set())
    assert own <= names(live) <= own | {"other"}
    assert part(live, "embeddings").parameters >= 64 * 32
    mixer = {"attention", "norms"} | ({"experts", "router"} if family in MOE else {"mlp"})
    assert mixer <= names(live, "decoder layers") <= mixer | {"mlp"}, "nothing is left for 'other'"
    assert (part(live, "head").parameters == 0) == (family in TIED)

    assert live.notes == ()
    model.to("meta").tie_weights()  # PyTorch unties what it moves there
    on_meta = print_model_info(model)
    from_config = print_model_info(tiny_config(family))
    for info in (on_meta, from_config):
        assert_sums(info)
        assert info.notes
        assert replace(info, notes=(), devices=(), name="") == replace(live, notes=(), devices=(), name="")
        assert info.devices == ("meta",)


def test_the_parts_of_a_llama_by_hand(tiny_model):
    info = print_model_info(tiny_model("llama"))
    attention = 32 * 32 * 2 + 32 * 16 * 2  # q and o; k and v with two of four heads
    assert part(info, "attention", "decoder layers").parameters == 2 * attention
    assert part(info, "mlp", "decoder layers").parameters == 2 * 3 * 32 * 48
    assert part(info, "norms", "decoder layers").parameters == 2 * 2 * 32
    assert part(info, "final norm").parameters == 32
    assert part(info, "embeddings").parameters == part(info, "head").parameters == 64 * 32
    assert part(info, "other") == Part("other", 0, 0, (), info.buffer_bytes)


def test_the_parts_of_mixtures_of_experts_by_hand(tiny_model):
    info = print_model_info(tiny_model("mixtral"))
    assert part(info, "experts", "decoder layers").parameters == 2 * 4 * 3 * 32 * 48
    assert part(info, "router", "decoder layers").parameters == 2 * 4 * 32

    info = print_model_info(tiny_model("deepseek_v3"))  # layer 0 is dense, layer 1 has a shared expert
    assert part(info, "experts", "decoder layers").parameters == 4 * 3 * 32 * 16
    assert part(info, "mlp", "decoder layers").parameters == 3 * 32 * 48 + 3 * 32 * 16


def test_experts_in_a_list_are_experts():
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.gate = nn.Linear(32, 4, bias=False)
        layer.mlp.experts = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(4))
    info = print_model_info(model)
    assert part(info, "experts", "decoder layers").parameters == 2 * 4 * 32 * 32
    assert part(info, "router", "decoder layers").parameters == 2 * 4 * 32


def test_state_space_layers_have_a_name():
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    info = print_model_info(transformers.MambaConfig(**sizes))
    assert names(info, "decoder layers") == {"state space", "norms"}
    assert_sums(info)


def test_tied_weights_count_once(tiny_config):
    config = tiny_config("llama")
    config.tie_word_embeddings = True
    tied = print_model_info(transformers.AutoModelForCausalLM.from_config(config))
    untied = print_model_info(tiny_config("llama"))
    assert tied.tied == (("model.embed_tokens.weight", "lm_head.weight"),)
    assert untied.tied == ()
    assert untied.num_parameters - tied.num_parameters == 64 * 32
    assert untied.memory_bytes - tied.memory_bytes == 64 * 32 * 4


def test_a_head_that_came_untied_is_noted(tiny_model):
    info = print_model_info(tiny_model("qwen2").to("meta"))
    assert info.tied == ()
    assert "two parameters" in info.notes[1]


def test_views_of_one_storage_count_once():
    model = nn.Module()
    model.first = nn.Parameter(torch.zeros(4, 8))
    model.second = nn.Parameter(model.first.data.T)
    info = print_model_info(model)
    assert (info.num_parameters, info.parameter_bytes, info.tied) == (64, 4 * 32, ())


def test_smollm2_in_nf4_with_lora(smollm2, capsys, monkeypatch):
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2, dtype=torch.bfloat16, quantization_config=quantization
    )
    footprint = base.get_memory_footprint()
    model = adapt(base, r=16)
    monkeypatch.setenv("COLUMNS", "100")
    capsys.readouterr()
    info = print_model_info(model)
    printed = capsys.readouterr().out
    assert_sums(info)

    in_layer = 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536  # q, o; k, v; gate, up, down
    embeddings, norms = 49152 * 576, 61 * 576
    assert info.num_parameters == 134_515_008 == 30 * in_layer + embeddings + norms
    assert info.adapter_parameters == info.trainable_parameters == 30 * 16 * (2 * 1152 + 2 * 768 + 3 * 2112)
    assert info.frozen_parameters == 134_515_008
    assert {p.name: (p.parameters, p.bytes) for p in info.dtypes} == {
        "nf4": (30 * in_layer, 30 * in_layer // 2),
        "bf16": (embeddings + norms, 2 * (embeddings + norms)),
        "fp32": (info.adapter_parameters, 4 * info.adapter_parameters),
    }
    (nf4,) = info.quantized
    assert (nf4.method, nf4.num_layers, nf4.parameters) == ("nf4", 210, 30 * in_layer)
    assert len(nf4.layers) == 7
    assert nf4.layers[0] == "model.layers.*.self_attn.q_proj"
    assert dict(nf4.constants) == {
        "absmax": 30 * in_layer // 64,  # a byte for each block of 64
        "nested absmax": 30 * 4 * (2 * 21 + 2 * 7 + 3 * 54),  # a float for each 256 of them, begun ones too
        "codebooks": 210 * 4 * (16 + 256),
        "offset": 210 * 4,
    }
    # transformers' footprint has parameters and buffers, and does not see the constants.
    assert footprint == 109_777_792 == info.memory_bytes - info.constant_bytes - 4 * info.adapter_parameters
    assert info.unquantized == ("lm_head",)
    assert info.tied == (("model.embed_tokens.weight", "lm_head.weight"),)
    assert (info.num_layers, info.layers_path) == (30, "model.layers")

    assert max(map(len, printed.splitlines())) <= 100
    for text in ("134,515,008 (134.5M)", "3.50%", "210 layers to nf4", "bf16: 28,346,688", "0.122 GiB", "LoRA, r=16"):
        assert text in printed


def test_single_quantisation_and_fused_experts_left_out(tmp_path):
    model = nf4_model(tmp_path, "mixtral")
    info = print_model_info(model)
    assert_sums(info)
    assert info.num_parameters == read_anatomy(model).num_parameters == model.num_parameters()
    (nf4,) = info.quantized
    assert dict(nf4.constants).keys() == {"absmax", "codebooks"}, "no double quantisation"
    assert nf4.num_layers == 4 * 4
    assert {"lm_head", "model.layers.*.mlp.experts.down_proj"} <= set(info.unquantized)
    assert part(info, "attention", "decoder layers").dtypes == ("nf4",)
    assert part(info, "experts", "decoder layers").dtypes != ("nf4",)


def test_int8_before_and_after_its_first_step(tmp_path):
    # bitsandbytes moves the scales from the weight to the layer in the first forward pass.
    tiny_model("llama").save_pretrained(tmp_path)
    quantization = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantization, dtype=torch.float16, device_map={"": "cpu"}
    )
    info = print_model_info(model)
    assert_sums(info)
    (int8,) = info.quantized
    outputs = 2 * (32 + 16 + 16 + 32 + 48 + 48 + 32)
    assert (int8.method, int8.num_layers, dict(int8.constants)) == ("int8", 14, {"SCB": 4 * outputs})
    assert int8.weight_bytes == int8.parameters == 2 * (3072 + 3 * 32 * 48)
    assert info.num_parameters == sum(p.numel() for p in tiny_model("llama").parameters())
    model(torch.ones(1, 4, dtype=torch.long))
    assert print_model_info(model) == info


def test_copies_by_modules_to_save_are_the_adapters(tiny_model):
    plain = print_model_info(tiny_model("llama"))
    info = print_model_info(adapt(tiny_model("llama"), target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert_sums(info)
    assert info.num_parameters == plain.num_parameters
    assert part(info, "default (modules_to_save)", "adapters").trainable == 64 * 32
    assert part(info, "default", "adapters").trainable == 2 * 4 * (32 + 32)
    assert part(info, "head") == replace(part(plain, "head"), trainable=0)


def test_dora_and_a_second_adapter(tiny_model, capsys):
    wrapped = adapt(tiny_model("llama"), target_modules=["q_proj"], use_dora=True)
    wrapped.add_adapter("second", lora(r=2, target_modules=["q_proj"]))
    info = print_model_info(wrapped)
    assert_sums(info)
    assert part(info, "default", "adapters").trainable == 2 * (4 * 64 + 32), "matrices, and a magnitude per output"
    assert part(info, "second", "adapters").parameters == 2 * 2 * 64
    assert info.adapters == ("default: LoRA, r=4, DoRA", "second: LoRA, r=2, not active")
    assert info.trainable_parameters == sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert "second: LoRA, r=2, not active" in capsys.readouterr().out


def test_prompt_tuning_and_adapters_of_fused_experts(tiny_model):
    from peft import PromptTuningConfig, get_peft_model

    with WarningRecorder(ALLOWED):
        prompts = get_peft_model(tiny_model("llama"), PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"))
    info = print_model_info(prompts)
    assert_sums(info)
    assert part(info, "default", "adapters").trainable == 5 * 32
    assert info.num_parameters == print_model_info(tiny_model("llama")).num_parameters

    model = tiny_model("mixtral")
    kwargs = read_anatomy(model).targets.lora_kwargs()
    before = print_model_info(model)
    info = print_model_info(adapt(model, **kwargs))
    assert_sums(info)
    assert (info.num_parameters, info.num_layers) == (before.num_parameters, before.num_layers)
    assert names(info, "decoder layers") == names(before, "decoder layers")


def test_nothing_is_changed_or_read(tmp_path, device_reads):
    model = adapt(nf4_model(tmp_path), modules_to_save=["lm_head"])

    def hooks() -> list[Any]:
        kept = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        return [(name, *(dict(getattr(m, key)) for key in kept), m.training) for name, m in model.named_modules()]

    def state() -> dict[str, Any]:
        return {key: (value.clone(), value.data_ptr()) for key, value in model.state_dict().items()}

    config, flags = model.config.to_dict(), {name: p.requires_grad for name, p in model.named_parameters()}
    objects = [(id(p), id(p.grad), p.data_ptr()) for p in model.parameters()]
    hooks_before, before = hooks(), {key: value for key, (value, _) in state().items()}
    with device_reads() as reads:
        print_model_info(model)
    reads.assert_none(inside="forge")
    assert hooks() == hooks_before
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert [(id(p), id(p.grad), p.data_ptr()) for p in model.parameters()] == objects
    assert model.config.to_dict() == config
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_a_config_decides_the_dtype_and_is_left_alone(tiny_config, capsys):
    config = tiny_config("llama")
    config.dtype = "bfloat16"
    before = config.to_dict()
    info = print_model_info(config)
    assert config.to_dict() == before
    assert [p.name for p in info.dtypes] == ["bf16"]
    assert info.parameter_bytes == 2 * info.num_parameters
    assert torch.get_default_dtype() == torch.float32
    printed = capsys.readouterr().out
    assert "built from the config in its dtype bf16" in printed
    assert "no weights loaded" in " ".join(printed.split())
    assert "fp32" in print_model_info(tiny_config("llama")).notes[0]


def test_a_folder_loads_in_the_dtypes_that_a_config_says(tmp_path):
    # Some parameters stay in fp32 whatever the checkpoint's dtype (here: none but buffers of the router).
    model = tiny_model("deepseek_v3").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    live, planned = print_model_info(loaded), print_model_info(tmp_path)
    assert (planned.name, planned.dtypes, planned.parts) == (str(tmp_path), live.dtypes, live.parts)


def test_a_config_that_asks_for_packing_says_that_it_is_not(tiny_config):
    config = tiny_config("llama")
    config.quantization_config = {"quant_method": "mxfp4"}
    info = print_model_info(config)
    assert "mxfp4" in info.notes[1]
    assert info.quantized == info.unquantized == ()


def test_an_encoder_has_totals_and_a_reason(minilm, capsys):
    model = transformers.AutoModel.from_pretrained(minilm)
    info = print_model_info(model)
    assert_sums(info)
    assert info.num_parameters == sum(p.numel() for p in model.parameters())
    assert (info.num_layers, info.layers_path) == (None, None)
    assert "'bert' is an encoder" in str(info.layers_missing)
    assert {"embeddings", "encoder", "pooler"} <= names(info)
    assert "not found: 'bert' is an encoder" in capsys.readouterr().out
    assert print_model_info(minilm).num_parameters == info.num_parameters, "and from its folder"


@pytest.mark.parametrize("name", ["BertConfig", "ViTConfig", "T5Config"])
def test_other_architectures_from_their_configs(name):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    t5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = getattr(transformers, name)(**(t5 if name == "T5Config" else sizes))
    config.architectures = {"BertConfig": ["BertForMaskedLM"]}.get(name)
    info = print_model_info(config)
    assert_sums(info)
    model = (transformers.BertForMaskedLM if name == "BertConfig" else transformers.AutoModel.from_config)(config)
    assert info.num_parameters == sum(p.numel() for p in model.parameters())
    if name == "BertConfig":
        assert {"bert.embeddings", "bert.encoder"} <= names(info)


def test_any_module_is_a_model():
    info = print_model_info(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)))
    assert_sums(info)
    assert (info.num_parameters, info.model_class, info.num_layers) == (40 + 16, "Sequential", None)
    assert info.num_buffers == 3
    assert print_model_info(nn.Identity()).memory_bytes == 0


def test_engines_around_a_model_do_not_matter(tiny_model):
    model = adapt(tiny_model("llama"))
    info = print_model_info(model)
    assert print_model_info(nn.DataParallel(model)) == info
    assert print_model_info(torch.compile(model)) == info


def test_what_is_not_a_model_is_refused(tmp_path, make_trainer):
    for value in ({"weight": torch.zeros(1)}, None, 3):
        with pytest.raises(UnsupportedError, match=rf"takes a model.*not a {type(value).__name__}"):
            print_model_info(value)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="the class LlamaForCausalLM"):
        print_model_info(transformers.LlamaForCausalLM)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match=r"not a Trainer\. Pass its \.model\."):
        print_model_info(make_trainer("plain"))  # type: ignore[arg-type]
    with pytest.raises(ForgeError, match=r"has no config\.json"):
        print_model_info(tmp_path)
    with pytest.raises(ForgeError, match="There is no folder"):
        print_model_info("./nowhere")


def test_the_value_prints_and_saves_what_was_printed(tiny_model, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    info = print_model_info(adapt(tiny_model("gemma3_vl"), target_modules=["q_proj"]))
    full = capsys.readouterr().out
    assert max(map(len, full.splitlines())) <= 100
    assert print_model_info(adapt(tiny_model("gemma3_vl"), target_modules=["q_proj"]), show_breakdown=False) == info
    short = capsys.readouterr().out
    assert full.startswith(short)
    assert "decoder layers" in full
    assert "decoder layers" not in short
    assert str(info).split() == full.split()

    values = info.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert values["memory_gb"] == info.memory_bytes / 2**30
    assert values["parts"][0]["name"] == "embeddings"


@pytest.mark.parametrize("module", ["model", "table", "pieces"])
def test_docstrings_run(module):
    results = doctest.testmod(importlib.import_module(f"forge.memory.info.{module}"))
    assert results.attempted
    assert not results.failed
