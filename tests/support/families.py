"""Tiny models of every family that forge knows, from configs: two layers, hidden size 32, seeded, no download."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

VOCAB_SIZE = 64
NUM_LAYERS = 2

# What nearly all configs call alike. Special tokens are named because some defaults lie outside so small a vocabulary.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}


def _text(name: str, **changes: Any) -> Callable[[], Any]:
    """A maker of the config class `name` (looked up late: importing every model would take seconds)."""

    def make() -> Any:
        import transformers

        return getattr(transformers, name)(**{**_COMMON, **changes})

    return make


def _gpt2() -> Any:
    from transformers import GPT2Config

    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return GPT2Config(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=NUM_LAYERS, n_head=4, n_positions=128, **tokens)


def _falcon(*, new_decoder_architecture: bool) -> Callable[[], Any]:
    # 7B: one shared key-value head, attention and MLP in parallel. 40B: grouped heads, two layer norms.
    new = {"new_decoder_architecture": True, "num_kv_heads": 2}
    old = {"new_decoder_architecture": False, "parallel_attn": True, "multi_query": True}
    return _text("FalconConfig", ffn_hidden_size=48, **(new if new_decoder_architecture else old))


def _deepseek_v3() -> Any:
    from transformers import DeepseekV3Config

    return DeepseekV3Config(
        **{**_COMMON, "num_key_value_heads": 4},
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,  # layer 0 is dense, layer 1 has experts
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    )


def _qwen2_5_vl() -> Any:
    from transformers import Qwen2_5_VLConfig

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    special = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    return Qwen2_5_VLConfig(
        text_config={**_COMMON, "rope_parameters": rope},
        vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32},
        **special,
    )


def _gemma3_vl() -> Any:
    from transformers import Gemma3Config

    return Gemma3Config(
        text_config={**_COMMON, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
        vision_config=_VISION,
        mm_tokens_per_image=4,
        image_token_index=60,
        boi_token_index=61,
        eoi_token_index=62,
    )


def _llava() -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    return LlavaConfig(
        vision_config=CLIPVisionConfig(**_VISION, projection_dim=32),
        text_config=LlamaConfig(**_COMMON),
        image_token_index=60,
        image_seq_length=4,
    )


def _smolvlm() -> Any:
    from transformers import SmolVLMConfig

    return SmolVLMConfig(
        text_config={"model_type": "llama", **_COMMON}, vision_config=_VISION, image_token_id=60, pad_token_id=0
    )


_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": _text("LlamaConfig"),
    "mistral": _text("MistralConfig"),
    "qwen2": _text("Qwen2Config", tie_word_embeddings=True),
    "qwen3": _text("Qwen3Config", head_dim=8),
    "gemma3": _text("Gemma3TextConfig", head_dim=8, layer_types=["sliding_attention", "full_attention"]),
    "phi3": _text("Phi3Config"),
    "gpt2": _gpt2,
    "falcon_7b": _falcon(new_decoder_architecture=False),
    "falcon_40b": _falcon(new_decoder_architecture=True),
    "olmo2": _text("Olmo2Config"),
    "granite": _text("GraniteConfig"),
    "gpt_neox": _text("GPTNeoXConfig"),
    "mixtral": _text("MixtralConfig", num_local_experts=4),
    "qwen2_moe": _text("Qwen2MoeConfig", shared_expert_intermediate_size=16, **_EXPERTS),
    "qwen3_moe": _text("Qwen3MoeConfig", head_dim=8, mlp_only_layers=[], **_EXPERTS),
    "gpt_oss": _text(
        "GptOssConfig",
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        layer_types=["sliding_attention", "full_attention"],
    ),
    "deepseek_v3": _deepseek_v3,
    "qwen2_5_vl": _qwen2_5_vl,
    "gemma3_vl": _gemma3_vl,
    "llava": _llava,
    "smolvlm": _smolvlm,
}


def tiny_config(family: str) -> Any:
    """The config of a tiny model of the family."""
    return FAMILIES[family]()


def tiny_model(family: str, *, seed: int = 0) -> Any:
    """A tiny model of the family, in fp32 on the CPU, the same at every call."""
    import torch
    import transformers

    config = tiny_config(family)
    multimodal = hasattr(config, "vision_config")
    auto = transformers.AutoModelForImageTextToText if multimodal else transformers.AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return auto.from_config(config)
