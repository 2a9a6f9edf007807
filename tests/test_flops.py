"""The FLOPs that forge says against those that torch's FlopCounterMode sees: equal to the last one, but for what each
test names. Attention and experts are the eager ones, whose products the counter knows (it counts neither SDPA on the
CPU nor grouped_mm), and no causal mask saves anything there, which is the convention of MFU too."""

import doctest
import importlib

import peft
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from forge.errors import UnsupportedError
from forge.freezing import setup_lp_lora_style
from forge.models import AttentionScores, TrainingFlops, decoder_layers, training_flops
from forge.models.truncation import truncation_of
from support.models import lora, nf4_model, text_model

ROWS, LENGTH = 2, 16
TOKENS = ROWS * LENGTH
DENSE = ["llama", "qwen2", "qwen3", "gemma3", "gpt2", "phi3", "granite"]
PARALLEL = {  # blocks side by side; the MLP's first matrix
    "falcon_7b": "mlp.dense_h_to_4h",
    "falcon_40b": "mlp.dense_h_to_4h",
    "gpt_neox": "mlp.dense_h_to_4h",
}
EXPERTS = ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3"]
ATTENTION = r".*(self_attn|attn|attention|self_attention)\.\w+(?<!norm)(?<!layernorm)"


def eager(family, *, layers=4):
    """The tiny model, built for eager attention: Falcon cannot be switched afterwards."""
    model = text_model(family, layers=layers)
    model = type(model)._from_config(model.config, attn_implementation="eager")
    if family in EXPERTS:
        model.set_experts_implementation("eager")
    return model.train()


def full(family):
    return eager(family)


def full_upper_half(family):
    model = eager(family)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.requires_grad_(False)
    decoder_layers(model)[:2].requires_grad_(False)
    return model


def adapted(family):
    """LoRA on every linear layer, of a mixture on those outside the experts."""
    targets = ATTENTION if family in EXPERTS else "all-linear"
    return peft.get_peft_model(eager(family), lora(target_modules=targets, fan_in_fan_out=family == "gpt2"))


def adapted_upper_half(family):
    model = adapted(family)
    decoder_layers(model)[:2].requires_grad_(False)
    return model


def measured(model):
    """FLOPs of forward, and of forward and backward."""
    ids = torch.arange(TOKENS).view(ROWS, LENGTH)
    # Gemma 3 with images asks for it in transformers 5.0.
    more = {"token_type_ids": torch.zeros_like(ids)} if model.config.model_type == "gemma3" else {}
    with FlopCounterMode(display=False) as counter:
        loss = model(input_ids=ids, labels=ids, use_cache=False, **more).loss
        forward = counter.get_total_flops()
        if loss.requires_grad:
            loss.backward()
    # transformers 5.0 makes the angles of the rotary embedding by a product: it depends on no weight.
    counts = counter.get_flop_counts().items()
    angles = sum(sum(found.values()) for name, found in counts if name.rpartition(".")[2].startswith("rotary_emb"))
    return forward - angles, counter.get_total_flops() - angles


def assert_equal(model, *, overcounted=0):
    flops = training_flops(model)
    forward, step = measured(model)
    assert flops.forward(TOKENS, LENGTH) == forward
    assert flops.step(TOKENS, LENGTH) == step + overcounted


@pytest.mark.parametrize("method", [full, full_upper_half, adapted, adapted_upper_half])
@pytest.mark.parametrize("family", [*DENSE, *EXPERTS])
def test_every_operation_is_counted(family, method):
    assert_equal(method(family))


@pytest.mark.parametrize("frozen", [2, [0, 2], [0, 1, 3], [1]], ids=str)
@pytest.mark.parametrize("method", [full, adapted])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "qwen3_moe"])
def test_truncated(family, method, frozen):
    model = method(family)
    setup_lp_lora_style(model, frozen_layers=frozen)
    assert_equal(model)


class Cache:
    """Stands in for the layers below the boundary, for all rows or none."""

    def __init__(self, served):
        self.served = served

    def below(self, index, run, args, kwargs):
        return run(*args, **kwargs) if not self.served else self.form(args[0])

    def at_boundary(self, hidden_states):
        return hidden_states

    def form(self, hidden_states):
        return hidden_states


class TuplesCache(Cache):
    def form(self, hidden_states):
        return hidden_states, None


@pytest.mark.parametrize("served", [0.0, 1.0])
@pytest.mark.parametrize("method", [full, adapted])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "qwen3_moe", "falcon_7b"])
def test_served(family, method, served):
    model = method(family)
    setup_lp_lora_style(model, 0.75)
    truncation_of(model).shortcut = (TuplesCache if family == "falcon_7b" else Cache)(served)
    flops = training_flops(model)
    over = 0
    if family == "falcon_7b":  # of the blocks side by side, see below
        first = decoder_layers(model)[3].get_submodule(PARALLEL[family])
        over = 2 * TOKENS * sum(p.numel() for n, p in first.named_parameters() if "lora_B" not in n)
    if method is full:
        over = 0
    assert (flops.forward(TOKENS, LENGTH, served=served), flops.step(TOKENS, LENGTH, served=served) - over) == measured(
        model
    )


def test_what_is_half_served_costs_half_of_the_prefix():
    model = adapted("gemma3")
    setup_lp_lora_style(model)
    flops = training_flops(model)
    for cost in (flops.forward, flops.step):
        none, half, everything = (cost(TOKENS, LENGTH, served=served) for served in (0.0, 0.5, 1.0))
        assert half == (none + everything) / 2 < none
    assert training_flops(adapted("gemma3")).prefix_per_token == 0


@pytest.mark.parametrize("method", [full, full_upper_half, adapted, adapted_upper_half])
@pytest.mark.parametrize("family", PARALLEL)
def test_side_by_side_blocks(family, method):
    """LoRA's lowest MLP is said to stand behind its attention: one matrix and its A too many, 3 % of a tiny model."""
    model = method(family)
    over = 0
    if method in (adapted, adapted_upper_half):
        first = decoder_layers(model)[0].get_submodule(PARALLEL[family])
        over = 2 * TOKENS * (first.weight.numel() + first.lora_A["default"].weight.numel())
    assert_equal(model, overcounted=over)


def test_a_norm_behind_the_attention():
    """OLMo 2 has its norms behind the blocks; forge takes them to stand before."""
    layer = decoder_layers(model := full_upper_half("olmo2"))[2].self_attn
    reads = sum(matrix.weight.numel() for matrix in (layer.q_proj, layer.k_proj, layer.v_proj))
    assert_equal(model, overcounted=2 * TOKENS * reads)
    assert_equal(full("olmo2"))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["gate_proj", "up_proj"]},  # the lowest attention is not visited
        {"target_modules": ["down_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "k_proj", "v_proj"], "modules_to_save": ["mlp"]},
        {"target_modules": ["q_proj", "k_proj", "v_proj", "lm_head"]},
        {"trainable_token_indices": [1, 2]},
        {"target_modules": ["q_proj", "k_proj", "v_proj", "up_proj"], "layers_to_transform": [3]},
    ],
    ids=str,
)
def test_parts_of_a_model(settings):
    assert_equal(peft.get_peft_model(eager("llama"), lora(**settings)))


def test_only_q_or_only_v():
    """In the lowest layer nobody asks for k's gradient: one product of backward's four too many, in that layer."""
    model = peft.get_peft_model(eager("llama"), lora(target_modules=["q_proj", "v_proj"]))
    assert_equal(model, overcounted=2 * TOKENS * LENGTH * 32)


@pytest.mark.parametrize("trains", ["head", "nothing"])
def test_hardly_anything_trains(trains):
    model = eager("llama")
    model.requires_grad_(False)
    model.lm_head.requires_grad_(trains == "head")
    assert_equal(model)
    assert (training_flops(model).backward_per_token == 0) == (trains == "nothing")


def test_only_what_runs_is_counted():
    model = adapted("llama")
    one = training_flops(model)
    model.add_adapter("second", lora(r=2))
    assert training_flops(model) == one
    with model.disable_adapter():
        assert training_flops(model).forward_per_token == training_flops(eager("llama")).forward_per_token
        assert_equal(model)
    model.merge_adapter()
    assert training_flops(model).forward_per_token == training_flops(eager("llama")).forward_per_token


def test_checkpointing_and_its_hook_add_nothing():
    model = adapted_upper_half("llama")
    plain = training_flops(model)
    model.enable_input_require_grads()
    assert training_flops(model) == plain
    assert measured(model)[1] > plain.step(TOKENS, LENGTH)  # the frozen half's backward runs, for nothing


def test_lora_on_fused_experts():
    """A token meets num_experts_per_tok of num_experts, 2 of 4, adapters included."""
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = peft.get_peft_model(eager("qwen3_moe"), lora(target_modules=[], target_parameters=names))
    base, flops = training_flops(eager("qwen3_moe")), training_flops(model)
    adapters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert flops.forward_per_token - base.forward_per_token == 2 * adapters / 2
    assert flops.backward_per_token < 2 * flops.forward_per_token


def test_experts_in_a_list():
    """As remote code has them; only read here, never run."""

    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w2, self.w3 = nn.Linear(32, 48), nn.Linear(48, 32), nn.Linear(32, 48)

    model = eager("mixtral")
    fused = training_flops(model)
    for layer in decoder_layers(model):
        layer.mlp.experts = nn.ModuleList(Expert() for _ in range(4))
    assert training_flops(model) == fused


def test_experts_of_which_nobody_says_how_many_run(monkeypatch):
    monkeypatch.setattr("forge.models.products._TOP_K", ("experts_of_another_name",))
    with pytest.raises(UnsupportedError, match=r"holds 4 experts.*another_name.*num_experts_per_tok"):
        training_flops(eager("mixtral"))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3_vl", "llava"])
def test_the_decoder_of_a_multimodal_model(family):
    model = eager(family)
    assert_equal(model)  # with text alone the tower does not run
    assert "linear layers beside the language decoder" in training_flops(model).note
    assert training_flops(eager("llama")).note is None


def test_a_trained_tower_is_behind_the_whole_decoder():
    model = eager("llava")
    frozen = training_flops(model.requires_grad_(False))
    model.model.multi_modal_projector.requires_grad_(True)
    assert frozen.backward_per_token == 0
    assert training_flops(model).backward_per_token == frozen.forward_per_token


def test_other_kinds_of_adapters():
    frozen = training_flops(eager("llama").requires_grad_(False))
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    flops = training_flops(peft.get_peft_model(eager("llama"), prompt))
    assert (flops.forward_per_token, flops.backward_per_token) == (frozen.forward_per_token,) * 2
    ada = peft.AdaLoraConfig(target_modules=["v_proj"], init_r=4, target_r=2, total_step=10, task_type="CAUSAL_LM")
    model = peft.get_peft_model(eager("llama"), ada)
    added = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and p.shape[-1] > 1)
    assert training_flops(model).forward_per_token - frozen.forward_per_token == 2 * added


def test_quantised_layers_count_unpacked(tmp_path):
    quantised, plain = nf4_model(tmp_path), text_model()
    assert training_flops(quantised).forward_per_token == training_flops(plain).forward_per_token
    lora_on = [training_flops(peft.get_peft_model(model, lora())) for model in (quantised, plain)]
    assert lora_on[0] == lora_on[1]


def test_full_fine_tuning_is_six_per_weight():
    model = text_model("llama")
    weights = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    flops = training_flops(model)
    assert flops.forward_per_token + flops.backward_per_token == 6 * weights
    # PaLM's 12 L H Q per token and token of the row
    assert flops.step(1, 100) - 6 * weights == 12 * 4 * 32 * 100


def test_a_window_bounds_the_scores():
    gemma = training_flops(text_model("gemma3"))
    assert {part.window for part in gemma.attention} == {None, 4096}
    flops = TrainingFlops(0, 0, (AttentionScores(1, 2, window=10), AttentionScores(1, 2)))
    assert (flops.forward(1, 5), flops.forward(1, 100)) == (10, 110)
    assert flops.step(2, 100) == 2 * 3 * 110


@pytest.mark.parametrize("module", ["forge.models.flops", "forge.models.products"])
def test_the_documented_examples(module):
    assert doctest.testmod(importlib.import_module(module)).failed == 0
