"""bitsandbytes' linear layers without their weights: the real classes, whose packed weights are given shapes only.

Forward and backward allocate what bitsandbytes does on CUDA for more than some hundred tokens: the whole weight is
unpacked to 16 bits, multiplied and dropped, in each direction (bitsandbytes, backends/cuda/ops.py). Its own fused
operation would hide that from the tape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

Empty = Callable[..., torch.Tensor]
"""Makes a tensor of a shape and a dtype: a fake one, or a real one where a test runs the step for real."""

_BLOCK, _OUTER_BLOCK, _CODES = 64, 256, {"4bit": 16, "8bit": 256}


def is_packed(module: nn.Module) -> bool:
    """Whether the module is one of bitsandbytes' linear layers."""
    classes = type(module).__mro__
    return hasattr(module, "in_features") and any(each.__module__.startswith("bitsandbytes.") for each in classes)


def empty_packed(module: Any, empty: Empty) -> None:
    """Give a bitsandbytes layer weights of the right shapes and a step that allocates what CUDA's does."""
    if "Linear8bit" in type(module).__name__:
        codes = empty((module.out_features, module.in_features), torch.int8)
        module._parameters["weight"] = nn.Parameter(codes, requires_grad=False)
        module.weight_scales = empty((module.out_features,), torch.float32)
        module.__class__ = _eight_bit_class()
        return
    old = module.weight
    nested, dtype = bool(getattr(old, "compress_statistics", True)), getattr(module, "unpacked_dtype", None)
    if (known := getattr(old, "quant_state", None)) is not None:
        nested, dtype = bool(known.nested), known.dtype
    storage = getattr(old, "quant_storage", torch.uint8)
    shape = torch.Size((module.out_features, module.in_features))
    kind = str(getattr(old, "quant_type", "nf4"))
    state = _quant_state(shape, kind, dtype or module.compute_dtype, nested, empty)
    length = -(-shape.numel() // 2) // storage.itemsize
    weight: Any = nn.Parameter(empty((length, 1), storage), requires_grad=False)
    weight.quant_state, weight.quant_type, weight.compress_statistics = state, kind, nested  # PEFT reads the latter two
    weight.quant_storage = storage
    module._parameters["weight"] = weight
    module.quant_state = state
    module.__class__ = _four_bit_class()


def without_weights(model: nn.Module) -> None:
    """Pack the model's layers on meta already, for adapters that ask them for their weights: DoRA."""

    def on_meta(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for module in model.modules():
        if is_packed(module):
            empty_packed(module, on_meta)


def packed_constants(module: nn.Module) -> Iterator[torch.Tensor]:
    """The scales and codebooks beside packed weights."""
    if (scales := getattr(module, "weight_scales", None)) is not None:
        yield scales
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    while state is not None:
        yield from (t for t in (state.absmax, state.code, state.offset) if isinstance(t, torch.Tensor))
        state = state.state2 if state.nested else None


def _quant_state(shape: torch.Size, quant_type: str, dtype: Any, nested: bool, empty: Empty) -> Any:
    from bitsandbytes.functional import QuantState

    blocks = -(-shape.numel() // _BLOCK)
    common = {"shape": shape, "dtype": dtype or torch.bfloat16, "blocksize": _BLOCK, "quant_type": quant_type}
    code = empty((_CODES["4bit"],), torch.float32)
    if not nested:
        return QuantState(absmax=empty((blocks,), torch.float32), code=code, **common)
    outer = QuantState(
        absmax=empty((-(-blocks // _OUTER_BLOCK),), torch.float32),
        code=empty((_CODES["8bit"],), torch.float32),
        blocksize=_OUTER_BLOCK,
        dtype=torch.float32,
    )
    absmax = empty((blocks,), torch.uint8)
    return QuantState(absmax=absmax, code=code, offset=empty((), torch.float32), state2=outer, **common)


class _FourBitProduct(torch.autograd.Function):
    """x W^T with W unpacked for the occasion."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Any, bias: Any) -> torch.Tensor:
        from bitsandbytes.functional import dequantize_4bit

        ctx.weight = weight
        return nn.functional.linear(x, dequantize_4bit(weight.data, weight.quant_state).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        from bitsandbytes.functional import dequantize_4bit

        if not ctx.needs_input_grad[0]:
            return None, None, None
        unpacked = dequantize_4bit(ctx.weight.data, ctx.weight.quant_state).to(grad.dtype)
        return torch.matmul(grad, unpacked), None, None


class _EightBitProduct(torch.autograd.Function):
    """LLM.int8() without outliers: x is quantised, multiplied to int32 and scaled; backward unpacks the weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: Any) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        ctx.weight, ctx.scales, ctx.dtype = weight, scales, x.dtype
        ctx.kept = flat if ctx.needs_input_grad[0] else None  # bitsandbytes keeps its input, which no backward reads
        half = flat.to(torch.float16)
        quantised, row_scales = half.new_empty(half.shape, dtype=torch.int8), half.new_empty(half.shape[:1]).float()
        del half
        accumulated = quantised.new_empty((flat.shape[0], weight.shape[0]), dtype=torch.int32)
        product = accumulated.new_empty(accumulated.shape, dtype=torch.float16)
        del accumulated, row_scales, quantised
        out = product.to(x.dtype)
        return (out if bias is None else out.add_(bias)).reshape(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        unpacked = ctx.weight.to(ctx.dtype, copy=True).mul_(ctx.scales.unsqueeze(1).mul(1 / 127))
        return torch.matmul(grad.to(ctx.dtype), unpacked), None, None, None


_classes: dict[str, type] = {}


def _four_bit_class() -> type:
    """A subclass of bitsandbytes' layer, made when it is there."""
    if "4bit" not in _classes:
        from bitsandbytes.nn import Linear4bit

        def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
            inner = x.to(self.compute_dtype) if self.compute_dtype is not None else x
            bias = None if self.bias is None else self.bias.to(inner.dtype)
            result: torch.Tensor = _FourBitProduct.apply(inner, self.weight, bias)  # type: ignore[no-untyped-call]
            return result.to(x.dtype)

        def dequantize(self: Any) -> torch.Tensor:
            from bitsandbytes.functional import dequantize_4bit

            return dequantize_4bit(self.weight.data, self.weight.quant_state)  # type: ignore[no-any-return]

        # PEFT's DoRA unpacks a base weight by the class of the parameter, which a fake cannot have, or by asking the
        # module, if it has HQQ's W_q.
        methods = {"forward": forward, "dequantize": dequantize, "W_q": property(lambda self: self.weight)}
        _classes["4bit"] = type("WeightlessLinear4bit", (Linear4bit,), methods)
    return _classes["4bit"]


def _eight_bit_class() -> type:
    if "8bit" not in _classes:
        from bitsandbytes.nn import Linear8bitLt

        def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
            product: Any = _EightBitProduct
            return product.apply(x, self.weight, self.weight_scales, self.bias)  # type: ignore[no-any-return]

        def dequantize(self: Any) -> torch.Tensor:
            return self.weight * self.weight_scales.view(-1, 1) * (1 / 127)  # type: ignore[no-any-return]

        methods = {"forward": forward, "dequantize": dequantize, "W_q": property(lambda self: self.weight)}
        _classes["8bit"] = type("WeightlessLinear8bitLt", (Linear8bitLt,), methods)
    return _classes["8bit"]
