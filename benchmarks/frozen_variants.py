"""The ways of training a model with its lower layers frozen that benchmarks/freezing.py compares, as ready trainers.

- `all`: LoRA in every layer, nothing frozen.
- `truncated-F`: forge's `setup_lp_lora_style(trainer.model, F)`. `cached-F`: the same with a PrefixCache.
- `layers_to_transform-F`: the usual way. PEFT's `layers_to_transform` names the upper layers; TRL's defaults.
- `full-truncated-F`, `full-cached-F`: forge on a model without adapters, whose upper layers' own weights train.
- `full-requires_grad-F`: the usual way for that: requires_grad=False below, and the trainer's own checkpointing.
- `full-llama-factory-F`: LLaMA-Factory's freeze tuning (`finetuning_type: freeze`, `freeze_trainable_layers: n`) as
  its sources of 2025 have it (model/adapter.py, model/model_utils/checkpointing.py): the weights of the last n layers
  train, all others have requires_grad=False; only layers that train are checkpointed, by the reentrant kind, and a
  layer's input is made to require gradients just before. Written anew from that description, inside the same trainer,
  so that loss, data and optimizer are the same.

All are SFTTrainers with TRL's defaults but for what a cell sets (checkpointing, lengths), and share the base model's
frozen weights, so that they fit into one process and none has warmer memory.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EPOCHS = ("all", "truncated-0.5", "truncated-0.75", "cached-0.5", "cached-0.75")
FULL = ("full-requires_grad-0.5", "full-llama-factory-0.5", "full-truncated-0.5", "full-cached-0.5")
VARIANTS = {"lora": (*EPOCHS, "layers_to_transform-0.5"), "full": ("all", *FULL)}

_MODELS: dict[str, dict[str, int]] = {
    # layers dominate: head and embeddings are 1.3% of the weights
    "deep": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 24,
        "num_attention_heads": 4,
        "vocab_size": 512,
    },
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "vocab_size": 64,
    },
}


def load(name: str) -> tuple[Any, Any]:
    """A model in fp32 with all weights frozen, and its tokenizer: "smollm2" is real, "deep" and "tiny" are random."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    from benchmarks.gpu.models import make_tokenizer

    if name == "smollm2":
        from forge.assets import smollm2

        folder = smollm2()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    else:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(**_MODELS[name], pad_token_id=0, bos_token_id=1, eos_token_id=2)
        )
        tokenizer = make_tokenizer()
    return model.requires_grad_(False), tokenizer


def dataset(name: str, rows: int, lengths: tuple[int, int]) -> Any:
    """Real conversations for the real model, random tokens for the others.

    Args:
        name: of the model.
        rows: how many.
        lengths: in tokens, from and to. The conversations are cut at the second and chosen by characters: where both
            are the same, the longest are taken, which are all cut.
    """
    import random

    from datasets import Dataset

    rng = random.Random(0)
    if name == "smollm2":
        from forge.assets import conversations

        talks = conversations()
        if lengths[0] == lengths[1]:
            talks = sorted(talks, key=_characters, reverse=True)
        else:
            talks = [talk for talk in talks if 4 * lengths[0] <= _characters(talk) <= 4 * lengths[1]]
        return Dataset.from_dict({"messages": talks[:rows]})
    most = _MODELS[name]["vocab_size"]
    return Dataset.from_dict(
        {"input_ids": [[rng.randrange(3, most) for _ in range(rng.randint(*lengths))] for _ in range(rows)]}
    )


def share_of(variant: str) -> float:
    """The share of the layers that a variant freezes."""
    return 0.0 if variant == "all" else float(variant.rpartition("-")[2])


def build(variant: str, model: Any, folder: Path, arguments: dict[str, Any], **trainer: Any) -> tuple[Any, Any]:
    """A trainer that is ready to train, and its PrefixCache or None.

    Args:
        variant: see the module.
        model: the base, with all weights frozen; its parameters are shared, those that a variant trains are copied.
        folder: for the cache.
        arguments: of SFTConfig.
        trainer: what else SFTTrainer takes.
    """
    import torch
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    from forge import PrefixCache, setup_lp_lora_style

    share = share_of(variant)
    depth = int(share * len(model.model.layers))
    above = list(range(depth, len(model.model.layers)))
    full = variant.startswith("full-")
    torch.manual_seed(0)  # the same adapters in all
    mine = sharing(model, above if full else ())
    if not full:
        only = {"layers_to_transform": above} if variant.startswith("layers_to_transform") else {}
        trainer["peft_config"] = LoraConfig(target_modules=LINEAR, **only, **LORA)
    if "llama-factory" in variant:
        arguments = arguments | {"activation_checkpointing": False}  # it brings its own
        _checkpoint_as_llama_factory(mine.model.layers[depth:])
    made = SFTTrainer(model=mine, args=SFTConfig(**arguments), **trainer)
    made.remove_callback(PrinterCallback)
    cache = None
    if "truncated" in variant or "cached" in variant:
        setup_lp_lora_style(made.model, share)
    if "cached" in variant:
        cache = PrefixCache(folder / variant).attach(made)
    return made, cache


def sharing(model: Any, trained: Sequence[int] = ()) -> Any:
    """A copy with the same parameters, those of some layers excepted, which are copied and train."""
    own = {id(p) for index in trained for p in model.model.layers[index].parameters()}
    made = copy.deepcopy(model, {id(p): p for p in model.parameters() if id(p) not in own})
    for index in trained:
        made.model.layers[index].requires_grad_(True)
    return made


def _checkpoint_as_llama_factory(layers: Any) -> None:
    from torch.utils.checkpoint import checkpoint

    def recomputed(function: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(function, hidden_states.requires_grad_(), *args, use_reentrant=True, **kwargs)

    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = recomputed


def _characters(talk: Sequence[dict[str, str]]) -> int:
    return sum(len(message["content"]) for message in talk)


@contextmanager
def serving_times() -> Iterator[dict[tuple[int, str], float]]:
    """Wall-clock seconds spent in PrefixCache's methods meanwhile, by thread and method.

    `find_samples` makes the keys, `_look_up` finds the states (and checks them, when they are first read), `_read`
    copies them into a batch; `_before` and `at_boundary` contain them, and with `_after` are all that the cache does.
    """
    import threading
    import time
    from functools import wraps

    from forge.freezing.cache import cache, serving

    spent: dict[tuple[int, str], float] = {}
    places = [(cache, "find_samples"), (cache.PrefixCache, "_before"), (cache.PrefixCache, "_after")]
    places += [(serving.Serving, name) for name in ("_look_up", "_read", "at_boundary")]
    inner = [(owner, name, getattr(owner, name)) for owner, name in places]

    def timed(name: str, function: Any) -> Any:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                key = threading.get_ident(), name
                spent[key] = spent.get(key, 0.0) + time.perf_counter() - begin

        return call

    for owner, name, function in inner:
        setattr(owner, name, timed(name, function))
    try:
        yield spent
    finally:
        for owner, name, function in inner:
            setattr(owner, name, function)
