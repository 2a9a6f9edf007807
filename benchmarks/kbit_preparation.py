"""What PEFT's `prepare_model_for_kbit_training` does to a quantised model today, and what it costs.

On SmolLM2-135M in nf4, its other weights in bf16 and in fp32: which parameters change dtype, bytes before and after,
what checkpointing and hooks it leaves on, and the loss on held-out conversations. For an 8B Llama the same casts, added
up over its shape. `python -m benchmarks.kbit_preparation` writes results/kbit_preparation.jsonl.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

from benchmarks.runner import Suite, main

GB = 2**30
CELLS = (
    {"model": "smollm2-135m", "other_weights": "bf16"},
    {"model": "smollm2-135m", "other_weights": "fp32"},
    {"model": "llama-8b", "other_weights": "bf16"},
)
SUITE = Suite("kbit_preparation", "benchmarks.kbit_preparation:measure", CELLS, timeout_s=900)
HELD_OUT, MAX_LENGTH = 6, 64


def measure(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Prepare a real model, or do the sums for one that is too large for this machine."""
    return _by_shape(settings["model"]) if settings["model"] == "llama-8b" else _really(settings["other_weights"])


def _really(other_weights: str) -> dict[str, Any]:
    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from forge import get_preset
    from forge.assets import conversations, smollm2

    folder = smollm2()
    preset = get_preset("qlora", model=folder, hardware="cpu", bf16=other_weights == "bf16")
    model = AutoModelForCausalLM.from_pretrained(folder, **preset.model_kwargs())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer.apply_chat_template(talk, tokenize=False) for talk in conversations()[-HELD_OUT:]]
    rows = [tokenizer(text, return_tensors="pt", truncation=True, max_length=MAX_LENGTH).input_ids for text in texts]

    before, loss_before = _inventory(model), _loss(model, rows)
    hooks_before = len(model.get_input_embeddings()._forward_hooks)
    model = prepare_model_for_kbit_training(model)
    after, loss_after = _inventory(model), _loss(model, rows)
    changed = Counter(
        f"{_without_layer(name)}: {dtype} -> {after[name][0]}"
        for name, (dtype, _) in before.items()
        if after[name][0] != dtype
    )
    predicted = sum(2 * size // 2 for dtype, size in before.values() if dtype == "bfloat16")
    return {
        "gb_before": _gb(before),
        "gb_after": _gb(after),
        "gb_added": round(_gb(after) - _gb(before), 4),
        "gb_added_by_shape": round(predicted / GB, 4),
        "changed": dict(changed),
        "unchanged_dtypes": dict(Counter(dtype for name, (dtype, _) in before.items() if after[name][0] == dtype)),
        "checkpointing": bool(model.is_gradient_checkpointing),
        "use_reentrant": _reentrant(model),
        "embedding_hooks_added": len(model.get_input_embeddings()._forward_hooks) - hooks_before,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "loss_before": loss_before,
        "loss_after": loss_after,
    }


def _inventory(model: Any) -> dict[str, tuple[str, int]]:
    """Dtype and bytes of each parameter."""
    return {
        name: (str(p.dtype).removeprefix("torch."), p.numel() * p.element_size())
        for name, p in model.named_parameters()
    }


def _without_layer(name: str) -> str:
    return re.sub(r"[.]\d+[.]", ".*.", name)


def _gb(inventory: Mapping[str, tuple[str, int]]) -> float:
    return round(sum(size for _, size in inventory.values()) / GB, 4)


def _loss(model: Any, rows: list[Any]) -> float:
    """Mean over all tokens, in evaluation mode."""
    import torch

    model.eval()
    total = count = 0
    with torch.no_grad():
        for ids in rows:
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            count += ids.shape[1] - 1
    model.train()
    return round(total / count, 5)


def _reentrant(model: Any) -> bool | str:
    """What the first decoder layer's checkpoint function was bound to."""
    return model.model.layers[0]._gradient_checkpointing_func.keywords.get("use_reentrant", "left to torch: True")


def _by_shape(model: str) -> dict[str, Any]:
    """Everything that bitsandbytes leaves in 16 bit doubles: embeddings, lm_head, norms."""
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    from benchmarks.gpu.shapes import shape_config

    with torch.device("meta"):
        llama = AutoModelForCausalLM.from_config(shape_config(model), dtype=torch.bfloat16)
    quantised = {
        f"{name}.weight" for name, m in llama.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"
    }
    left = {name: p.numel() for name, p in llama.named_parameters() if name not in quantised}
    groups: Counter[str] = Counter()
    for name, count in left.items():
        groups[_without_layer(name)] += count
    return {
        "gb_added": round(2 * sum(left.values()) / GB, 3),
        "gb_added_by_part": {name: round(2 * count / GB, 4) for name, count in groups.items()},
    }


if __name__ == "__main__":
    sys.exit(main(SUITE))
