from __future__ import annotations

import doctest
import importlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from forge.errors import UnsupportedError
from forge.models import DEFAULT_TARGET_PATTERN, LoraTargets, ModelAnatomy, decoder_layers, read_anatomy
from support.families import FAMILIES, NUM_LAYERS, VOCAB_SIZE, tiny_config, tiny_model
from support.models import nf4_model
from support.upstream import ALLOWED
from support.warnings import WarningRecorder

ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
MLP = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
FALCON = ["self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LATENT = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]

# By hand: the decoder's layers, and what LoRA adapts in the last of them. Experts are parameters, the rest modules.
EXPECTED: dict[str, tuple[str, list[str]]] = {
    "llama": ("model.layers", ATTENTION + MLP),
    "mistral": ("model.layers", ATTENTION + MLP),
    "qwen2": ("model.layers", ATTENTION + MLP),
    "qwen3": ("model.layers", ATTENTION + MLP),
    "gemma3": ("model.layers", ATTENTION + MLP),
    "phi3": ("model.layers", ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]),
    "gpt2": ("transformer.h", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
    "falcon_7b": ("transformer.h", FALCON),
    "falcon_40b": ("transformer.h", FALCON),
    "olmo2": ("model.layers", ATTENTION + MLP),
    "granite": ("model.layers", ATTENTION + MLP),
    "gpt_neox": (
        "gpt_neox.layers",
        ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
    ),
    "mixtral": ("model.layers", ATTENTION + EXPERTS),
    "qwen2_moe": (
        "model.layers",
        [*ATTENTION, *EXPERTS, *(f"mlp.shared_expert.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj"))],
    ),
    "qwen3_moe": ("model.layers", ATTENTION + EXPERTS),
    "gpt_oss": ("model.layers", ATTENTION + EXPERTS),
    "deepseek_v3": (
        "model.layers",
        [
            *(f"self_attn.{leaf}" for leaf in LATENT),
            *EXPERTS,
            *(f"mlp.shared_experts.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj")),
        ],
    ),
    "qwen2_5_vl": ("model.language_model.layers", ATTENTION + MLP),
    "gemma3_vl": ("model.language_model.layers", ATTENTION + MLP),
    "llava": ("model.language_model.layers", ATTENTION + MLP),
    "smolvlm": ("model.text_model.layers", ATTENTION + MLP),
}
# Layers that are not like the last.
EXPECTED_IN_LAYER_0 = {"deepseek_v3": [*(f"self_attn.{leaf}" for leaf in LATENT), *MLP]}
ROUTERS = {
    "mixtral": ("mlp.gate",),
    "qwen2_moe": ("mlp.gate", "mlp.shared_expert_gate"),
    "qwen3_moe": ("mlp.gate",),
    "gpt_oss": ("mlp.router",),
    "deepseek_v3": ("mlp.gate",),
}


def expected_names(family: str) -> set[str]:
    path, last = EXPECTED[family]
    first = EXPECTED_IN_LAYER_0.get(family, last)
    return {f"{path}.0.{name}" for name in first} | {f"{path}.{NUM_LAYERS - 1}.{name}" for name in last}


def adapt(model: Any, lora_kwargs: dict[str, Any]) -> Any:
    """`get_peft_model`, allowing no warning but upstream's own."""
    from peft import LoraConfig, get_peft_model

    with WarningRecorder(ALLOWED) as recorder:
        wrapped = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, **lora_kwargs))
    recorder.assert_clean()
    return wrapped


def adapted_names(wrapped: Any) -> set[str]:
    """What PEFT adapted: module names, and `owner.parameter` for a wrapped expert parameter."""
    names = set()
    for name, module in wrapped.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            parameter = getattr(module, "parameter_name", None)
            owner = name.replace(".base_layer", "")
            # A linear layer adapted through its weight is that layer.
            names.add(owner if parameter in (None, "weight") else f"{owner}.{parameter}")
    return names


def logits_and_backward(wrapped: Any) -> Any:
    import torch

    torch.manual_seed(0)
    ids = torch.randint(3, VOCAB_SIZE - 8, (2, 16))
    # Gemma 3 wants to know which tokens are an image's, also where none is.
    types = {"token_type_ids": torch.zeros_like(ids)} if wrapped.config.model_type == "gemma3" else {}
    output = wrapped(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False, **types)
    output.loss.backward()
    return output.logits.detach()


def test_every_family_has_its_expectation():
    assert EXPECTED.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_the_decoder_is_adapted_and_learns(family):
    model = tiny_model(family)
    anatomy = read_anatomy(model)
    assert anatomy == read_anatomy(tiny_config(family)), "a config says the same as the live model"
    assert anatomy.decoder_layers == EXPECTED[family][0]
    assert anatomy.routers == ROUTERS.get(family, ())
    assert anatomy.is_moe == (family in ROUTERS)
    assert anatomy.num_parameters == sum(p.numel() for p in model.parameters())
    assert (anatomy.num_hidden_layers, anatomy.hidden_size, anatomy.vocab_size) == (NUM_LAYERS, 32, VOCAB_SIZE)
    assert anatomy.targets.uncovered == ()

    wrapped = adapt(model, anatomy.targets.lora_kwargs())
    assert adapted_names(wrapped) == expected_names(family)
    assert read_anatomy(wrapped) == anatomy, "adapters do not change the anatomy"
    assert len(decoder_layers(wrapped)) == NUM_LAYERS

    logits_and_backward(wrapped)
    silent = [
        name
        for name, parameter in wrapped.named_parameters()
        if "lora_B" in name and (parameter.grad is None or not parameter.grad.any())
    ]
    assert silent == [], "every adapter gets a gradient at the first step"
    assert not any(p.requires_grad for name, p in wrapped.named_parameters() if "lora_" not in name)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "gemma3_vl"])
def test_adapters_survive_saving_and_loading(family, tmp_path):
    # PEFT rewrites configs and weights of some mixtures of experts when it loads them: ours must pass unchanged.
    import torch
    from peft import PeftModel

    wrapped = adapt(tiny_model(family), read_anatomy(tiny_config(family)).targets.lora_kwargs())
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    wrapped.eval()
    before = logits_and_backward(wrapped)
    wrapped.save_pretrained(tmp_path)
    with WarningRecorder(ALLOWED) as recorder:
        loaded = PeftModel.from_pretrained(tiny_model(family), tmp_path, is_trainable=True).eval()
    recorder.assert_clean()
    assert adapted_names(loaded) == expected_names(family)
    assert torch.equal(logits_and_backward(loaded), before)
    assert not torch.equal(logits_and_backward(tiny_model(family).eval()), before), "the adapters do something"


@pytest.mark.parametrize("family", FAMILIES)
def test_default_pattern_names_the_same_modules(family):
    names = [name for name, _ in tiny_model(family).named_modules()]
    fused = {name for name in expected_names(family) if ".experts." in name}
    assert {name for name in names if re.fullmatch(DEFAULT_TARGET_PATTERN, name)} == expected_names(family) - fused


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe", "gpt_oss", "qwen2_5_vl"])
def test_default_pattern_works_in_peft(family):
    fused = {name for name in expected_names(family) if ".experts." in name}
    wrapped = adapt(tiny_model(family), {"target_modules": DEFAULT_TARGET_PATTERN})
    assert adapted_names(wrapped) == expected_names(family) - fused


@pytest.mark.parametrize(
    "name",
    [
        "model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj",
        "vision_model.transformer.layers.3.mlp.fc1",
        "model.visual.blocks.0.attn.q_proj",
        "thinker.audio_tower.layers.0.fc1",
        "model.multi_modal_projector.layers.0.up_proj",
        "model.layers.0.mlp.gate",
        "model.layers.0.mlp.shared_expert_gate",
        "model.layers.0.block_sparse_moe.router.layer",
        "model.embed_tokens",
        "lm_head",
    ],
)
def test_default_pattern_leaves_out(name):
    assert not re.fullmatch(DEFAULT_TARGET_PATTERN, name)


def test_import_is_light():
    code = "import sys, forge.models; print({'torch', 'transformers', 'peft'} & set(sys.modules) or 'light')"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "light"


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "gemma3_vl"])
def test_json_round_trip(family):
    anatomy = read_anatomy(tiny_config(family))
    assert ModelAnatomy.from_dict(json.loads(json.dumps(anatomy.to_dict()))) == anatomy


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "mixtral", "qwen2_5_vl"])
def test_reads_a_folder_that_holds_only_a_config(family, tmp_path):
    model = tiny_model(family)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    assert read_anatomy(tmp_path) == read_anatomy(str(tmp_path))
    assert read_anatomy(tmp_path) == replace(read_anatomy(model), name_or_path=str(tmp_path))


def test_the_architecture_in_the_config_decides_the_class():
    config = tiny_config("llama")
    without_head = read_anatomy(config).num_parameters - VOCAB_SIZE * 32
    config.architectures = ["LlamaModel"]
    bare = read_anatomy(config)
    assert (bare.num_parameters, bare.decoder_layers) == (without_head, "layers")
    config.architectures = ["ClassOfAnotherLibrary"]
    assert read_anatomy(config).decoder_layers == "model.layers"


# The parameter counts that the hub shows for these checkpoints.
PUBLISHED = {
    "Llama-3-8B": (
        8_030_261_248,
        "LlamaConfig",
        {"vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8},
    ),
    "Llama-3-70B": (
        70_553_706_496,
        "LlamaConfig",
        {
            "vocab_size": 128256,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
        },
    ),
    "Mixtral-8x7B": (46_702_792_704, "MixtralConfig", {"vocab_size": 32000, "num_key_value_heads": 8}),
    "gpt-oss-20b": (20_914_757_184, "GptOssConfig", {"num_hidden_layers": 24, "num_local_experts": 32}),
    "gpt2": (124_439_808, "GPT2Config", {}),
}


@pytest.mark.parametrize("checkpoint", PUBLISHED)
def test_counts_large_models_without_their_weights(checkpoint):
    import transformers

    count, config_class, changes = PUBLISHED[checkpoint]
    config = getattr(transformers, config_class)(**changes)
    before = config.to_dict()
    assert read_anatomy(config).num_parameters == count
    assert config.to_dict() == before, "reading leaves the config alone"


def test_nf4_and_int8_models_say_what_they_are(tmp_path):
    plain = read_anatomy(tiny_model("llama"))
    quantized = nf4_model(tmp_path / "nf4", layers=NUM_LAYERS)
    anatomy = read_anatomy(quantized)
    assert anatomy.quantization == "nf4"
    assert anatomy.num_parameters == quantized.num_parameters()
    assert anatomy.targets == plain.targets
    assert adapted_names(adapt(quantized, anatomy.targets.lora_kwargs(quantized=True))) == expected_names("llama")
    assert read_anatomy(quantized.config) == replace(anatomy, name_or_path=anatomy.name_or_path)

    config = tiny_config("llama")
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    assert read_anatomy(config).quantization == "int8"
    config.quantization_config = {"quant_method": "mxfp4"}
    assert read_anatomy(config).quantization == "mxfp4"


def test_experts_of_an_nf4_model_learn(tmp_path):
    # bitsandbytes packs linear layers only: the fused experts stay as they were, beside them.
    quantized = nf4_model(tmp_path, "mixtral", layers=NUM_LAYERS)
    wrapped = adapt(quantized, read_anatomy(quantized).targets.lora_kwargs(quantized=True))
    assert adapted_names(wrapped) == expected_names("mixtral")
    logits_and_backward(wrapped)
    experts = {name: p for name, p in wrapped.named_parameters() if "lora_B" in name and ".experts." in name}
    assert len(experts) == 2 * NUM_LAYERS
    assert all(p.grad is not None and p.grad.any() for p in experts.values())


def test_a_gate_is_a_router_by_structure_and_not_by_name():
    from torch import nn

    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.gate = nn.Linear(32, 4)  # as wide as a router of four experts, but there are none
    assert read_anatomy(model).routers == ()
    assert "gate" in read_anatomy(model).targets.target_modules

    for layer in model.model.layers:
        layer.mlp.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 32)) for _ in range(4))
    anatomy = read_anatomy(model)
    assert anatomy.routers == ("mlp.gate",)
    wrapped = adapt(model, anatomy.targets.lora_kwargs())
    in_layer_0 = {name.removeprefix("model.layers.0.") for name in adapted_names(wrapped) if ".layers.0." in name}
    assert in_layer_0 == {*ATTENTION, *MLP, *(f"mlp.experts.{e}.{i}" for e in range(4) for i in range(2))}


def test_a_stack_of_matrices_without_a_router_is_not_experts():
    import torch
    from torch import nn

    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.block_diagonal = nn.Parameter(torch.zeros(4, 8, 8))  # a head each, as in RecurrentGemma
    assert read_anatomy(model).targets == read_anatomy(tiny_config("llama")).targets


def test_routers_may_score_more_experts_than_are_in_the_stack():
    # Inkling's router scores the shared experts too, which are a second stack; Zaya's ends an MLP of its own.
    import torch
    from torch import nn

    def stack(experts: int) -> nn.Module:
        module = nn.Module()
        module.up_proj = nn.Parameter(torch.zeros(experts, 8, 32))
        module.down_proj = nn.Parameter(torch.zeros(experts, 32, 8))
        return module

    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp = nn.Module()
        layer.mlp.gate = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 6))
        layer.mlp.experts, layer.mlp.shared_experts = stack(4), stack(2)
    anatomy = read_anatomy(model)
    assert anatomy.routers == ("mlp.gate",)
    stacks = [f"mlp.{name}.{leaf}" for name in ("experts", "shared_experts") for leaf in ("up_proj", "down_proj")]
    assert anatomy.targets == LoraTargets(("q_proj", "k_proj", "v_proj", "o_proj"), tuple(stacks))


def test_experts_that_peft_cannot_adapt_are_never_left_out_in_silence():
    import torch
    from torch import nn

    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.experts = nn.Module()
        layer.mlp.experts.w1 = nn.Parameter(torch.zeros(4 * 48, 32))  # all experts in one matrix, as in DBRX
    targets = read_anatomy(model).targets
    assert targets.uncovered == ("mlp.experts.w1",)
    with pytest.raises(UnsupportedError, match=r"cannot adapt mlp\.experts\.w1 .* target_modules=\['q_proj'"):
        targets.lora_kwargs()


@pytest.mark.parametrize(
    ("config_class", "adapted", "bypassed"),
    [
        ("MambaConfig", ("in_proj",), ("mixer.x_proj", "mixer.dt_proj", "mixer.out_proj")),
        ("Mamba2Config", ("in_proj",), ("mixer.out_proj",)),
        ("JambaConfig", None, ("mamba.dt_proj",)),
    ],
)
def test_layers_that_a_state_space_kernel_bypasses_are_left_out(config_class, adapted, bypassed):
    import transformers

    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    own = {
        "MambaConfig": {"state_size": 4},
        "Mamba2Config": {"head_dim": 8, "num_heads": 8, "expand": 2, "n_groups": 1},
        "JambaConfig": {"mamba_d_state": 4},
    }[config_class]
    targets = read_anatomy(getattr(transformers, config_class)(**sizes, **own)).targets
    assert targets.bypassed == bypassed
    assert adapted in (None, targets.target_modules)
    assert "dt_proj" not in targets.lora_kwargs()["target_modules"]


def test_linear_layers_named_by_their_weight_exclude_quantisation():
    targets = LoraTargets(("q_proj",), ("mlp.up_proj.weight",), linear_parameters=("mlp.up_proj.weight",))
    assert targets.lora_kwargs()["target_parameters"] == ["mlp.up_proj.weight"]
    with pytest.raises(UnsupportedError, match=r"mlp\.up_proj\.weight .* quantised model"):
        targets.lora_kwargs(quantized=True)


def test_encoder_decoder_models_are_unsupported():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=VOCAB_SIZE, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    for model in (config, T5ForConditionalGeneration(config)):
        with pytest.raises(UnsupportedError, match=r"'t5' is an encoder-decoder model.*causal"):
            read_anatomy(model)


def test_nothing_to_adapt_names_the_model_and_what_was_seen():
    from torch import nn

    model = tiny_model("llama")
    model.model.layers = nn.ModuleList(nn.Identity() for _ in range(NUM_LAYERS))
    with pytest.raises(UnsupportedError, match=r"LlamaForCausalLM, model type 'llama'.*lm_head.*target_modules=\["):
        read_anatomy(model)
    model.model.layers = nn.ModuleList()
    with pytest.raises(UnsupportedError, match=r"No decoder layers .* 'llama'.*target_modules=\["):
        read_anatomy(model)


def test_what_is_not_a_language_model_is_refused():
    from transformers import ViTConfig

    with pytest.raises(UnsupportedError, match=r"no causal or image-text-to-text model for ViTConfig"):
        read_anatomy(ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4))
    with pytest.raises(UnsupportedError, match=r"not of a dict"):
        read_anatomy({"model_type": "llama"})  # type: ignore[arg-type]


@pytest.mark.parametrize("module", ["anatomy", "layers", "matching", "targets"])
def test_docstrings_run(module):
    results = doctest.testmod(importlib.import_module(f"forge.models.{module}"))
    assert results.attempted
    assert not results.failed
