"""Where CUDA allocates otherwise than the CPU; and that nothing of it outlives the trace or leaves its thread."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from transformers import modeling_utils
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

from forge.memory.scenario import Scenario
from forge.memory.tracing import trace
from forge.memory.tracing.cuda import CudaWays, attention, recomputed_alike, triton_tiles
from forge.memory.tracing.hollow import Shapes, hollow
from forge.memory.tracing.tape import ALLOCATED, Tape
from support.steps import source

F = torch.nn.functional
SCORES = 2 * 8 * 64 * 64  # of the queries below


def allocated(run: Any) -> list[int]:
    tape = Tape(shapes=Shapes())
    with tape, CudaWays():
        kept = run()
    del kept
    return [event[2] for event in tape.recording.events if event[0] == ALLOCATED]


def queries(dtype: torch.dtype, *, heads: int = 8, width: int = 32, length: int = 64) -> torch.Tensor:
    return hollow((2, heads, length, width), dtype)


@pytest.mark.parametrize(
    ("dtype", "masked", "key_heads", "width", "whole_scores"),
    [
        (torch.bfloat16, False, 8, 32, False),  # flash
        (torch.bfloat16, False, 2, 32, False),  # flash takes grouped queries
        (torch.bfloat16, True, 8, 32, False),  # memory-efficient
        (torch.bfloat16, True, 2, 32, True),  # neither: a mask and grouped queries
        (torch.float32, False, 8, 32, False),  # memory-efficient
        (torch.float32, False, 2, 32, True),
        (torch.bfloat16, False, 8, 512, False),  # memory-efficient: too wide for flash
        (torch.bfloat16, False, 2, 512, True),
    ],
)
def test_which_attention_kernel_runs(
    dtype: torch.dtype, masked: bool, key_heads: int, width: int, whole_scores: bool
) -> None:
    mask = hollow((2, 1, 64, 64), torch.bool) if masked else None
    query, key = queries(dtype, width=width), queries(dtype, heads=key_heads, width=width)
    sizes = allocated(lambda: attention(query, key, key, mask, enable_gqa=key_heads != 8))
    scores = [size for size in sizes if size in {SCORES * 2, SCORES * 4}]
    outputs = {2 * 8 * 64 * width * dtype.itemsize}
    assert bool([size for size in scores if size not in outputs]) is whole_scores


def test_gradients_of_grouped_heads_are_made_per_query_head() -> None:
    def backward() -> Any:
        query = queries(torch.bfloat16).requires_grad_()
        key = queries(torch.bfloat16, heads=2).requires_grad_()
        attention(query, key, key, enable_gqa=True).sum().backward()
        return query.grad

    per_head = 2 * 8 * 64 * 32 * 2
    assert allocated(backward).count(per_head) >= 4  # output, gradient of the query, and one per query head of k and v


def test_dropout_keeps_a_byte_per_element() -> None:
    sizes = allocated(lambda: F.dropout(hollow((64, 64), torch.float32), 0.5, True))
    assert sorted(sizes) == [64 * 64, 64 * 64 * 4] or sorted(sizes) == [64 * 64, 64 * 64 * 4, 64 * 64 * 4]
    x = hollow((4,), torch.float32)
    with CudaWays():
        assert F.dropout(x, 0.5, False) is x
        assert F.dropout(x, 0.0, True) is x


@pytest.mark.parametrize(
    ("run", "dtype"),
    [
        (lambda x: F.layer_norm(x, (8,)), torch.float32),
        (lambda x: x.pow(2), torch.float32),
        (lambda x: x.sum(), torch.float32),
        (torch.exp, torch.float32),
        (lambda x: F.softmax(x, -1), torch.float32),
        (lambda x: F.softmax(x, -1, dtype=torch.bfloat16), torch.bfloat16),
        (lambda x: x + x, torch.bfloat16),
        (lambda x: x @ x.float(), torch.bfloat16),
        (F.silu, torch.bfloat16),
    ],
)
def test_what_cudas_autocast_runs_in_fp32(run: Any, dtype: torch.dtype) -> None:
    x = torch.ones(8, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16), CudaWays():
        assert run(x).dtype == dtype


def test_without_autocast_nothing_is_cast() -> None:
    with CudaWays():
        assert torch.ones(8, dtype=torch.bfloat16).pow(2).dtype == torch.bfloat16


def _patched() -> list[Any]:
    names = ("_use_triton", "_addmm_fp32", "_forward_kernel", "_backward_kernel", "triton")
    found = [getattr(chunked_logprob, name, None) for name in names]
    return [*found, trl_utils._use_triton, modeling_utils.checkpoint]


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_put_back(fails: bool) -> None:
    before = _patched()
    try:
        with triton_tiles(), recomputed_alike():
            assert chunked_logprob._use_triton(torch.device("cpu"))
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    after = _patched()
    assert all(one is other for one, other in zip(before, after, strict=True))


def test_a_trace_puts_everything_back() -> None:
    before = _patched()
    trace(source(layers=2), Scenario(checkpointing="reentrant"))
    assert all(one is other for one, other in zip(before, _patched(), strict=True))


def test_other_threads_compute_as_ever() -> None:
    found = {}

    def elsewhere() -> None:
        hidden, weight = torch.randn(6, 8), torch.randn(16, 8)
        found["triton"] = chunked_logprob._use_triton(torch.device("cpu"))
        found["loss"] = chunked_logprob.ChunkedLogProbFunction.apply(
            hidden, weight, None, torch.arange(6), 1.0, 16, None, 1.0, ()
        )[0]
        found["expected"] = (hidden @ weight.T).log_softmax(-1)[torch.arange(6), torch.arange(6)]

    with triton_tiles():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert found["triton"] is False
    torch.testing.assert_close(found["loss"], found["expected"])


def test_tiles_of_the_loss_have_no_copies_in_fp32() -> None:
    scenario = Scenario(batch_size=4, sequence_length=2048, autocast="bf16", fp32_trainable=False)
    model = source("llama", vocab_size=32_768)
    logits = {
        device: trace(model, Scenario(**{**vars(scenario), "device": device})).peak.parts["logits"]
        for device in ("cpu", "cuda")
    }
    tile = 4096 * 32_768 * 2
    assert tile <= logits["cuda"] < 1.1 * tile < 3 * tile < logits["cpu"]
