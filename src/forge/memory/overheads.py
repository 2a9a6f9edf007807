"""What a process takes on a GPU beside its tensors, and how sure forge is of a total.

None of these constants has been measured by forge yet: the GPU matrix (benchmarks/gpu) records what they should be
fitted to. Until it has run, they are others' reports, and how wide the band around a total has to be is a guess.
"""

from __future__ import annotations

MIB = 2**20

CONTEXT_BYTES = 512 * MIB
"""The CUDA context and the kernels that a training run loads into it. Reported for the context alone: 426 MiB (RTX 6000
Ada, PyTorch 2.10, CUDA 13: github.com/unslothai/unsloth-zoo/pull/1053) and 274 MiB (PyTorch 1.13:
github.com/pytorch/pytorch/pull/86509).
"""
CONTEXT_BAND = (-192 * MIB, 256 * MIB)

CUBLAS_WORKSPACE = {
    "hopper": 32 * MIB,
    "ampere": 4096 * 2 * 1024 + 16 * 8 * 1024,
    "turing": 4096 * 2 * 1024 + 16 * 8 * 1024,
}
"""Bytes of the workspace that PyTorch gives each cuBLAS handle, by hardware profile: 32 MiB from compute capability 9.0
on, `:4096:2:16:8` below (torch docs, CUBLAS_WORKSPACE_CONFIG; aten/src/ATen/cuda/CublasHandlePool.cpp)."""
CUBLAS_HANDLES = 2  # the thread that runs forward, and autograd's for backward

TRACE_BAND = (-0.03, 0.05)
"""Share of the reserved peak by which a traced estimate may be off: the caching allocator's fragmentation, kernels'
own workspaces, evaluation order. A guess until the GPU matrix has run."""
ANALYTIC_BAND = (-0.25, 0.8)
"""The same for the formulas. Of the 40 runs of benchmarks/memory_formulas.py they were from 44% below the trace (GPT-2,
with its dropout) to 25% above it; this band holds all of them."""
