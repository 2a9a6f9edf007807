"""An estimate as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..reporting import Table
from .part import PARTS

if TYPE_CHECKING:
    from .result import MemoryEstimate

_SAID = {
    "parameters": "weights as stored, adapters included",
    "gradients": "of what trains",
    "optimizer": "its state, and an EMA's shadow",
    "activations": "kept for backward, or worked on",
    "logits": "from the last hidden state to the loss",
    "quantization": "scales, and weights unpacked for the moment",
    "reference_model": "DPO's second model",
    "workspace": "cuBLAS, clipping, rounding",
}


def table(estimate: MemoryEstimate) -> Table:
    """Part, GiB, what it is; what is zero is left out."""
    rows = f"{estimate.batch_size} x {estimate.sequence_length} tokens"
    found = Table(("part", "GiB", "what"), title=f"{estimate.model}: {rows}, peak in {estimate['peak_phase']}")
    for name in PARTS:
        if estimate[f"{name}_gb"] > 0:
            found.add(name, f"{estimate[f'{name}_gb']:.2f}", _SAID[name])
    found.add("allocated", f"{estimate['allocated_peak_gb']:.2f}", "all of the above")
    if estimate.described.scenario.device == "cuda":
        found.add("reserved", f"{estimate['reserved_peak_gb']:.2f}", "with what the caching allocator cannot use")
        found.add("CUDA context", f"{estimate['cuda_context_gb']:.2f}", "and loaded kernels")
        band = f"{estimate['low_gb']:.1f} to {estimate['high_gb']:.1f}"
        found.add("total", f"{estimate['total_estimated_gb']:.2f}", f"what nvidia-smi would show; between {band}")
    found.footer = "\n".join([f"engine: {estimate.engine}", *(f"assumed: {said}" for said in estimate.assumptions)])
    return found
