"""What an evaluation takes on a GPU: answers by batch size, and the held-out loss with its bound on logits.

A cell loads one random-init model in bf16 and answers the same prompts of 32 to 512 tokens in batches of several sizes.
A random model hardly ever stops, so that each answer has all its tokens. Of each size: `tokens_per_s` (new tokens),
`max_allocated_gb`, and `differing`, the answers that are not those of the batches of one: a random model's logits are
closer together than a real one's, and in bf16 nearly equal ones fall either way. `loss`: tokens per second and peak
memory of `held_out_loss` on rows of one length. No TRL, data sets or quantisation are needed.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.gpu.models import make_tokenizer
from benchmarks.gpu.shapes import shape_config


def cells(
    models: tuple[str, ...], *, prompts: int, new_tokens: int, sizes: tuple[int, ...], length: int
) -> Iterator[dict[str, Any]]:
    """The cells.

    Args:
        models: names of shapes.
        prompts: how many are answered.
        new_tokens: in each answer.
        sizes: of the batches; the first is the single one.
        length: of the rows whose loss is taken.
    """
    for model in models:
        yield {
            "group": "evaluation",
            "model": model,
            "prompts": prompts,
            "new_tokens": new_tokens,
            "sizes": list(sizes),
            "length": length,
        }


def measure(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Answer and score with one model."""
    import torch
    from transformers import AutoModelForCausalLM

    from forge.evaluation.generation import answer
    from forge.evaluation.loss import held_out_loss

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape_config(settings["model"]), dtype=torch.bfloat16)
    tokenizer, rng = make_tokenizer(), random.Random(0)
    longest = min(512, settings["length"])
    prompts = [[rng.randrange(3, 1000) for _ in range(rng.randint(16, longest))] for _ in range(settings["prompts"])]
    found: dict[str, Any] = {}
    answer(model, tokenizer, prompts[:2], max_new_tokens=4, batch_size=2)  # warm up
    single: list[Any] = []
    for size in settings["sizes"]:
        _reset()
        began = time.perf_counter()
        answers = answer(model, tokenizer, prompts, max_new_tokens=settings["new_tokens"], batch_size=size)
        seconds = time.perf_counter() - began
        single = single or answers
        found[f"batch_{size}"] = {
            "tokens_per_s": sum(one.tokens for one in answers) / seconds,
            "max_allocated_gb": _allocated_gb(),
            "differing": sum(one != other for one, other in zip(answers, single, strict=True)),
        }
    rows = [[rng.randrange(3, 1000) for _ in range(settings["length"])] for _ in range(8)]
    held_out_loss(model, rows[:1], rows[:1])
    _reset()
    began = time.perf_counter()
    loss = held_out_loss(model, rows, rows)
    seconds = time.perf_counter() - began
    found["loss"] = {
        "mean": loss.mean,
        "tokens_per_s": sum(map(len, rows)) / seconds,
        "max_allocated_gb": _allocated_gb(),
        "weights_gb": sum(parameter.nbytes for parameter in model.parameters()) / 2**30,
    }
    return found


def _reset() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def _allocated_gb() -> float | None:
    import torch

    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
