"""`estimate_model_memory`: describe the run, trace it, add what a process takes beside its tensors."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING

from . import overheads
from .describe import Described, describe
from .part import PARTS
from .result import Bytes, MemoryEstimate

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel
    from typing_extensions import Unpack

    from ..presets import Preset
    from .options import RunOptions
    from .tracing import Traced


def estimate_model_memory(
    model: PreTrainedModel | PeftModel | PreTrainedConfig | str | PathLike[str],
    batch_size: int = 1,
    sequence_length: int = 512,
    *,
    preset: Preset | str | None = None,
    **options: Unpack[RunOptions],
) -> MemoryEstimate:
    """What training this model will need on a GPU, from its structure alone: no weights are loaded, no GPU is used.

    Two steps of the trainer are run on tensors without memory, by the code of transformers, PEFT and TRL that is
    installed, and what they allocate is recorded; the recording is replayed through a model of PyTorch's caching
    allocator. What cannot be traced is estimated by formulas, with a wider band; `estimate["engine"]` says so.

    >>> from transformers import LlamaConfig
    >>> sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 32000}
    >>> config = LlamaConfig(**sizes, num_attention_heads=32, num_key_value_heads=8)
    >>> memory = estimate_model_memory(config, batch_size=4, sequence_length=1024, preset="lora")
    >>> memory["engine"], memory["reserved_peak_gb"] >= memory["allocated_peak_gb"]
    ('trace', True)
    >>> memory.fits("RTX 4090")
    'yes'

    Args:
        model: a live model (estimated as it stands: packed, with adapters, partly frozen), a config, a hub id or a
            local folder (its config is read).
        batch_size: rows in a micro-batch of one process; pairs, under DPO.
        sequence_length: tokens in a row.
        preset: what `get_preset` returns, for hardware that need not be here, or the name of one. None means full
            fine-tuning of a config, and a live model as it stands.
        **options: `trainer` ("sft", "dpo", "plain"), `peft_config` (another adapter than the preset's), `padded` (rows
            differ in length), `packed`, `ema` ("device" or "cpu": where an EMACallback keeps its shadow), `reference`
            ("adapter_off", "copy", "precomputed": DPO's), `freeze_ratio` or `frozen_layers` (LP-LoRA's prefix, as
            `setup_lp_lora_style` freezes it), `prefix_cache` (a full PrefixCache serves it: its layers do not run) and
            `offload_prefix` (their weights have left the GPU), `sharding` ("ddp", "zero1", "zero2", "zero3", "fsdp")
            and `world_size`.
            A live model that `setup_lp_lora_style` or a PrefixCache has changed needs none of these to be said.

    Returns:
        A Mapping in GiB; see `MemoryEstimate` for its keys. With `prefix_cache` it speaks of the epochs after the
        first, and its `first_epoch` of the one that fills the cache.

    Raises:
        UnknownNameError: an unknown preset, option or optimizer.
        UnsupportedError: no causal language model, or nothing in it trains.
        ForgeError: a number that no batch has; a folder that is not there.
        ConflictError: options that contradict each other or the preset.
    """
    return estimate_described(describe(model, batch_size, sequence_length, preset, options))


def estimate_described(run: Described) -> MemoryEstimate:
    """The estimate of a run that has been described."""
    from .tracing import UntraceableError, trace

    scenario = run.scenario
    assumptions = list(run.assumptions)
    try:
        found = _from_trace(trace(run.source, scenario), run, assumptions)
        engine, band = "trace", overheads.TRACE_BAND
    except UntraceableError as why:
        from .analytic import formulas
        from .sharding import sharded

        parts, reserved, paged, phase = formulas(run)
        found = (*sharded(parts, reserved, run), paged, phase)
        engine, band = "analytic", overheads.ANALYTIC_BAND
        assumptions.append(f"by formulas, since the step could not be traced: {why}")
    parts, reserved, paged, phase = found
    if scenario.sharding != "none":
        shared = f"{scenario.sharding} over {scenario.world_size} processes, as a division"
        assumptions.append(shared + "; buffers for communication are not traced")
    elif scenario.world_size > 1:
        assumptions.append(f'{scenario.world_size} processes, each as if alone: sharding="ddp" counts its buckets')
    cuda = scenario.device == "cuda"
    if cuda:
        workspace = overheads.CUBLAS_HANDLES * overheads.CUBLAS_WORKSPACE[run.hardware.name]
        parts = {**parts, "workspace": parts["workspace"] + workspace}
        reserved += workspace
        assumptions.append(
            f"{overheads.CONTEXT_BYTES / overheads.MIB:.0f} MiB for the CUDA context: reported by others, not measured"
        )
    context = overheads.CONTEXT_BYTES if cuda else 0
    low, high = (context_share if cuda else 0 for context_share in overheads.CONTEXT_BAND)
    total = reserved + context
    first_epoch = _first_epoch(run, assumptions) if scenario.prefix_cache else None
    return MemoryEstimate(
        model=run.name,
        batch_size=scenario.batch_size,
        sequence_length=scenario.sequence_length,
        engine=engine,  # type: ignore[arg-type]
        assumptions=tuple(assumptions),
        bytes=Bytes(
            parts=parts,
            cuda_context=context,
            reserved=reserved,
            low=total + int(band[0] * reserved) + low,
            high=total + int(band[1] * reserved) + high,
            paged=paged,
            peak_phase=phase,
        ),
        described=run,
        first_epoch=first_epoch,
    )


def _first_epoch(run: Described, assumptions: list[str]) -> MemoryEstimate:
    """The estimate of the epoch that fills the cache: all layers are there and run."""
    scenario = replace(run.scenario, prefix_cache=False, offload_prefix=False)
    model, preset, options = run.asked
    asked = {name: value for name, value in options.items() if name != "offload_prefix"} | {"prefix_cache": False}
    first = estimate_described(replace(run, scenario=scenario, asked=(model, preset, asked)))
    where = "on the host" if run.scenario.offload_prefix else "on the GPU, idle"
    assumptions.append(
        f"every row is in the prefix cache: the {scenario.frozen_layers} frozen layers are {where}, and a batch of "
        f"their outputs is on the GPU. The epoch that fills the cache needs {first['total_estimated_gb']:.2f} GiB (at "
        f"most {first['high_gb']:.2f}): fits() and plans count that epoch too"
    )
    return first


def _from_trace(traced: Traced, run: Described, assumptions: list[str]) -> tuple[dict[str, int], int, int, str]:
    parts: dict[str, int] = {name: traced.peak.parts[name] for name in PARTS}
    parts["workspace"] += traced.unsplit
    if traced.paged:
        assumptions.append(
            f"{traced.paged / 2**30:.2f} GiB of paged optimizer state lie in managed memory, which the driver moves to "
            "the host when the GPU is full: not counted"
        )
    if run.scenario.quantization is not None:
        assumptions.append("of loading, in which weights are packed as they are read, nothing is estimated")
    return parts, traced.reserved, traced.paged, _in_words(traced.peak.phase, traced.peak.layer)


def _in_words(phase: str, layer: int | None) -> str:
    """The name of a phase, as people say it."""
    _, _, where = phase.partition(".")
    if layer is not None:
        return f"{where.partition('.')[0]} of layer {layer}"
    named: dict[str, str] = {
        "forward.embed": "forward",
        "forward.loss": "loss",
        "backward.loss": "backward of the loss",
        "clip": "gradient clipping",
        "optimizer": "optimizer step",
    }
    return named.get(where, "before the first step")
