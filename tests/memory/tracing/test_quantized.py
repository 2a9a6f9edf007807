"""The stand-ins for bitsandbytes' layers against the real ones, on the CPU."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import pytest
import torch
from torch import nn

from forge.memory.tracing.hollow import Shapes, hollow
from forge.memory.tracing.quantized import empty_packed, is_packed, packed_constants
from forge.memory.tracing.tape import ALLOCATED, Tape

WIDTH, OUT, TOKENS = 256, 512, 32


def four_bit(kind: str, nested: bool) -> Any:
    layer: Any = bitsandbytes.nn.Linear4bit(
        WIDTH, OUT, bias=False, compute_dtype=torch.float32, compress_statistics=nested, quant_type=kind
    )
    return layer.to("cpu")  # which packs it


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_packed_weights_and_their_constants_have_the_real_sizes(kind: str, nested: bool) -> None:
    real, ours = four_bit(kind, nested), four_bit(kind, nested)
    empty_packed(ours, hollow)
    assert is_packed(ours)
    assert isinstance(ours, bitsandbytes.nn.Linear4bit)
    assert (ours.weight.shape, ours.weight.dtype) == (real.weight.shape, real.weight.dtype)
    assert [t.nbytes for t in packed_constants(ours)] == [t.nbytes for t in packed_constants(real)]


@pytest.mark.parametrize("nested", [False, True])
def test_the_step_is_the_real_one_and_the_weight_unpacked_in_it(nested: bool) -> None:
    """The real one may unpack inside of an operation that the tape sees as one; the stand-in unpacks in the open."""
    unpacked = OUT * WIDTH * 4
    real, ours = four_bit("nf4", nested), four_bit("nf4", nested)
    empty_packed(ours, hollow)
    seen = _step(real, torch.randn(TOKENS, WIDTH), None)
    traced = _step(ours, hollow((TOKENS, WIDTH), torch.float32), Shapes())
    assert traced.count(unpacked) == 2  # forward and backward
    large = {TOKENS * OUT * 4, TOKENS * WIDTH * 4}
    assert [size for size in traced if size in large] == [size for size in seen if size in large]
    assert seen.count(unpacked) <= 2


def _step(layer: Any, x: torch.Tensor, shapes: Shapes | None) -> list[int]:
    tape = Tape(shapes=shapes)
    x.requires_grad_()
    tape.register([x, layer.weight, *packed_constants(layer)], "parameters")
    with tape:
        layer(x).backward(x.new_ones((TOKENS, OUT)) if shapes is None else hollow((TOKENS, OUT), torch.float32))
    return [event[2] for event in tape.recording.events if event[0] == ALLOCATED and event[3] != "parameters"]


def test_eight_bit_weights_are_a_byte_each_with_a_scale_per_row() -> None:
    layer: Any = bitsandbytes.nn.Linear8bitLt(WIDTH, OUT, bias=False, has_fp16_weights=False)
    empty_packed(layer, hollow)
    assert layer.weight.nbytes == WIDTH * OUT
    assert [t.nbytes for t in packed_constants(layer)] == [OUT * 4]
    sizes = _step(layer, hollow((TOKENS, WIDTH), torch.float32), Shapes())
    assert TOKENS * OUT * 4 in sizes  # int32 sums, fp32 result
    assert OUT * WIDTH * 4 in sizes  # unpacked for backward


def test_other_layers_are_not_packed() -> None:
    assert not is_packed(nn.Linear(4, 4))
