"""CUDA's ways, for a step traced on the CPU: its autocast, its dropout, its attention kernels, TRL's Triton tiles.

A fake tensor says "cpu", so Python and torch take the CPU's paths, some of which allocate what a GPU never would:
whole score matrices where a fused kernel has none, fp32 tiles where a Triton kernel works in registers. Everything here
acts on the calling thread alone, and is undone when the context ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_tracing = threading.local()

# What CUDA's autocast runs in fp32 and the CPU's does not: "CUDA Ops that can autocast to float32", torch's amp docs.
_TO_FP32: frozenset[Any] = frozenset(
    {
        *(F.layer_norm, F.group_norm, F.softplus, F.nll_loss, F.kl_div, F.mse_loss, F.l1_loss, F.smooth_l1_loss),
        *(F.binary_cross_entropy_with_logits, F.cosine_similarity, F.rms_norm),
        *(torch.pow, torch.Tensor.pow, torch.Tensor.__pow__, torch.Tensor.__rpow__, torch.Tensor.__rtruediv__),
        *(torch.exp, torch.Tensor.exp, torch.expm1, torch.log, torch.Tensor.log, torch.log1p, torch.log2, torch.log10),
        *(torch.reciprocal, torch.Tensor.reciprocal, torch.rsqrt, torch.Tensor.rsqrt, torch.norm, torch.Tensor.norm),
        *(torch.cumsum, torch.Tensor.cumsum, torch.cumprod, torch.prod, torch.Tensor.prod, torch.sum, torch.Tensor.sum),
    }
)
_TO_FP32_UNLESS_SAID: frozenset[Any] = frozenset(
    {F.softmax, torch.softmax, torch.Tensor.softmax, F.log_softmax, torch.log_softmax, torch.Tensor.log_softmax}
)


class CudaWays(TorchFunctionMode):
    """Replaces functions that a GPU would run otherwise, as they are called.

    Args:
        flash: whether torch has a flash kernel for the GPU.
    """

    def __init__(self, *, flash: bool = True) -> None:
        super().__init__()
        self._flash = flash

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function, or what CUDA runs in its place."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return attention(*args, **kwargs, flash=self._flash)
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        if torch.is_autocast_enabled("cpu") and (
            func in _TO_FP32 or (func in _TO_FP32_UNLESS_SAID and kwargs.get("dtype") is None)
        ):
            args = tuple(_fp32(value) for value in args)
        return func(*args, **kwargs)


def _fp32(value: Any) -> Any:
    half = isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, *_: Any, **__: Any) -> torch.Tensor:
    """CUDA keeps a mask of one byte per element; the CPU's fallback one as wide as the input."""
    if not training or p == 0:
        return input
    return torch.native_dropout(input, p, True)[0]


def attention(  # noqa: PLR0917  (torch's signature)
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,  # noqa: ARG001  (the fused kernels draw in registers)
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    flash: bool = True,
) -> torch.Tensor:
    """`scaled_dot_product_attention` as torch dispatches it on CUDA: flash, memory-efficient, or plain mathematics.

    Flash takes 16-bit inputs without a mask and heads up to 256 wide; memory-efficient attention takes masks and fp32,
    but no grouped queries (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp). What is neither computes the scores.
    """
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (t.to(dtype) for t in (query, key, value))
    fused: Any = _Fused
    half = query.dtype in (torch.float16, torch.bfloat16)
    grouped = key.shape[1] != query.shape[1]
    same_width = query.shape[-1] == value.shape[-1]
    if flash and attn_mask is None and half and same_width and query.shape[-1] <= 256:
        return fused.apply(query, key, value, None)  # type: ignore[no-any-return]
    if not grouped:
        bias = None
        if attn_mask is not None:
            bias = attn_mask
            if bias.dtype == torch.bool:  # made anew in every layer, and kept for backward
                bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask.logical_not(), -1.0)
            if bias.shape[-1] % 8:
                bias = F.pad(bias, (0, 8 - bias.shape[-1] % 8))
        return fused.apply(query, key, value, bias)  # type: ignore[no-any-return]
    out: torch.Tensor = torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]
    return out


class _Fused(torch.autograd.Function):
    """A fused attention kernel: its output, one number per row for backward, and what backward sums in fp32."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        q, k, v, bias = inputs
        rows, heads, length, _ = q.shape
        out: torch.Tensor = q.new_empty((rows, length, heads, v.shape[-1])).transpose(1, 2)
        log_sum = q.new_empty((rows, heads, _up(length, 32) if bias is not None else length), dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, log_sum, bias)
        return out

    @staticmethod
    def backward(ctx: Any, _gradient: Any) -> Any:
        q, k, v, _, _, _ = ctx.saved_tensors
        rows, heads, length, width = q.shape
        softmax_sums = q.new_empty((rows, heads, _up(length, 128)), dtype=torch.float32)
        summed = q.new_empty((rows, _up(length, 128), heads, _up(width, 32)), dtype=torch.float32)
        grads = [_empty_like(each) for each in (q, k, v)]
        if k.shape[1] != heads:  # one gradient per query head, summed over its group
            grads_per_head = [q.new_empty((rows, each.shape[2], heads, each.shape[3])) for each in (k, v)]
            del grads_per_head
        del softmax_sums, summed
        return (*grads, None)


def _empty_like(tensor: torch.Tensor) -> torch.Tensor:
    rows, heads, length, width = tensor.shape
    return tensor.new_empty((rows, length, heads, width)).transpose(1, 2)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class _NoOp:
    """A Triton kernel: launched on a grid, it allocates nothing."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        if getattr(_tracing, "on", False):
            return lambda *_args, **_kwargs: None
        kernel: Callable[..., None] = self._original[grid]
        return kernel


@contextmanager
def recomputed_alike(*, flash: bool = True) -> Iterator[None]:
    """What checkpointing recomputes runs in CUDA's ways too: autograd's engine enters backward without function modes.

    transformers binds its checkpoint function whenever checkpointing is switched on: in each step of a DPOTrainer.
    """
    from transformers import modeling_utils

    checkpoint: Any = modeling_utils.checkpoint

    def checkpointed(function: Any, *args: Any, **kwargs: Any) -> Any:
        if not getattr(_tracing, "on", False):
            return checkpoint(function, *args, **kwargs)

        def run(*inner_args: Any, **inner_kwargs: Any) -> Any:
            with CudaWays(flash=flash) if in_backward() else nullcontext():
                return function(*inner_args, **inner_kwargs)

        return checkpoint(run, *args, **kwargs)

    with _swapped([(modeling_utils, "checkpoint", checkpointed)]), _on_this_thread():
        yield


def in_backward() -> bool:
    """Whether this is called from within the autograd engine."""
    return bool(torch._C._current_graph_task_id() != -1)


@contextmanager
def triton_tiles() -> Iterator[None]:
    """TRL's fused loss takes its CUDA path in this thread: only supervised tokens, no fp32 copies of a tile."""
    try:
        from trl.kernels import chunked_logprob as kernels
        from trl.trainer import utils
    except ImportError:  # older TRL has full logits
        yield
        return
    used, add, cdiv = kernels._use_triton, kernels._addmm_fp32, getattr(kernels, "triton", None)
    forward, backward = kernels._forward_kernel, kernels._backward_kernel

    def use_triton(device: torch.device) -> bool:
        return getattr(_tracing, "on", False) or used(device)

    def add_product(acc: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        if not getattr(_tracing, "on", False):
            add(acc, a, b)

    class _Triton:
        @staticmethod
        def cdiv(number: int, by: int) -> int:
            return -(-number // by)

    replaced: list[tuple[Any, str, Any]] = [
        (kernels, "_use_triton", use_triton),
        (utils, "_use_triton", use_triton),
        (kernels, "_addmm_fp32", add_product),
        (kernels, "_forward_kernel", _NoOp(forward)),
        (kernels, "_backward_kernel", _NoOp(backward)),
    ]
    if cdiv is None:
        replaced.append((kernels, "triton", _Triton))
    with _swapped(replaced), _on_this_thread():
        yield


@contextmanager
def _swapped(replaced: list[tuple[Any, str, Any]]) -> Iterator[None]:
    missing = object()
    before = [(owner, name, getattr(owner, name, missing)) for owner, name, _ in replaced]
    try:
        for owner, name, new in replaced:
            setattr(owner, name, new)
        yield
    finally:
        for owner, name, old in before:
            if old is missing:
                delattr(owner, name)
            else:
                setattr(owner, name, old)


@contextmanager
def _on_this_thread() -> Iterator[None]:
    before = getattr(_tracing, "on", False)
    _tracing.on = True
    try:
        yield
    finally:
        _tracing.on = before
