"""Hollow tensors have sizes and no memory; operations on them give what real ones would give, but for the values."""

from __future__ import annotations

import resource
from typing import Any

import pytest
import torch

from forge.memory.tracing.hollow import Shapes, hollow
from forge.memory.tracing.tape import Tape

F = torch.nn.functional


def test_a_hollow_tensor_takes_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tensors = [hollow((1 << 30, 8), torch.float32) for _ in range(100)]  # 3.1 TiB
    assert all(each.untyped_storage().nbytes() == 1 << 35 for each in tensors)
    assert len({each.untyped_storage()._cdata for each in tensors}) == 100
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_an_empty_one_and_a_scalar() -> None:
    assert hollow((0, 3), torch.float32).shape == (0, 3)
    assert hollow((), torch.bfloat16).untyped_storage().nbytes() == 2


def grouped(dtype: torch.dtype) -> Any:
    def run(x: torch.Tensor, _: torch.Tensor) -> Any:
        offsets = torch.tensor([2, 4], dtype=torch.int32)
        rows, experts = x.new_ones((4, 8), dtype=dtype), x.new_ones((2, 8, 16), dtype=dtype)
        gradients = x.new_ones((4, 16), dtype=dtype)
        return torch._grouped_mm(rows, experts, offs=offsets), torch._grouped_mm(rows.T, gradients, offs=offsets)

    return run


OPERATIONS: dict[str, Any] = {
    "product": lambda x, y: x @ y.T,
    "mean": lambda x, y: x.mean(-1, keepdim=True),
    "transposed-sum": lambda x, y: x.T + y.T,
    "softmax-to-fp32": lambda x, y: F.softmax(x, dim=-1, dtype=torch.float32),
    "several": lambda x, y: torch.topk(x, 2),
    "list": lambda x, y: torch.split(x * 2, 1),
    "view": lambda x, y: x.view(-1)[2:],
    "in-place": lambda x, y: x.add_(y),
    "where": lambda x, y: torch.where(x > 0, x, y),
    "cat": lambda x, y: torch.cat([x, y], 1),
    "foreach": lambda x, y: torch._foreach_mul([x, y], 2.0),
    "embedding": lambda x, y: F.embedding(torch.tensor([0, 1]), x),
    "histogram": lambda x, y: torch.histc(x, bins=7, min=0, max=6),
    "grouped": grouped(torch.bfloat16),
    "grouped-fp32": grouped(torch.float32),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_results_have_the_shapes_of_real_ones(name: str) -> None:
    operation = OPERATIONS[name]
    real = _leaves(operation(torch.randn(4, 6), torch.randn(4, 6)))
    with Tape(shapes=Shapes()):
        fake = _leaves(operation(hollow((4, 6), torch.float32), hollow((4, 6), torch.float32)))
    assert [(t.shape, t.stride(), t.dtype, t.untyped_storage().nbytes()) for t in fake] == [
        (t.shape, t.stride(), t.dtype, t.untyped_storage().nbytes()) for t in real
    ]


def _leaves(out: Any) -> list[torch.Tensor]:
    return [out] if isinstance(out, torch.Tensor) else list(out)


def test_views_share_their_storage_and_results_do_not() -> None:
    with Tape(shapes=Shapes()):
        x = hollow((4, 6), torch.float32)
        assert x.T.untyped_storage()._cdata == x.untyped_storage()._cdata
        assert x.add_(1) is x
        assert (x + 1).untyped_storage()._cdata != x.untyped_storage()._cdata


def test_what_depends_on_values_takes_all_of_them() -> None:
    with Tape(shapes=Shapes()):
        x = hollow((4, 6), torch.float32)
        assert (x > 0).nonzero().shape == (24, 2)
        assert x[x > 0].shape == (24,)
        assert torch.masked_select(x, x > 0).shape == (24,)
        assert bool((x > 0).all()) is True
        assert x.sum().item() == 1.0


def test_one_recipe_serves_what_is_alike() -> None:
    shapes = Shapes()
    with Tape(shapes=shapes):
        for _ in range(3):
            _ = hollow((4, 6), torch.float32) * 2.0
        assert len(shapes._known) == 1
        _ = hollow((4, 6), torch.bfloat16) * 2.0
        assert len(shapes._known) == 2
