"""The tracing engine: a scenario's step on a model without weights, at the depth that is needed."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ...models.layers import decoder_layers_path, unwrap
from ..allocator import replay
from ..scenario import Scenario
from . import step
from .hollow import Shapes, hollow
from .skeleton import build
from .tape import ALLOCATOR_BLOCK, Peak, Recording
from .unroll import IrregularError, kind_of, runs_of, shortened, unroll

_one_at_a_time = threading.Lock()  # a trace stands in for a few functions of TRL while it runs


@dataclass(frozen=True)
class Traced:
    """What tracing found.

    Args:
        peak: the instant when most is alive.
        reserved: bytes that the caching allocator holds at most; on a CPU those that are alive.
        paged: bytes of optimizer state in managed memory, outside of the allocator.
        layers: how many decoder layers were traced.
        depth: how many there are.
        recording: the tape of them all.
    """

    peak: Peak
    reserved: int
    paged: int
    layers: int
    depth: int
    recording: Recording


def trace(source: nn.Module, scenario: Scenario, *, all_layers: bool = False) -> Traced:
    """Trace two steps.

    Args:
        source: the model, live or on meta; it is not changed.
        scenario: what runs on it.
        all_layers: trace every layer, even of many alike.
    """
    runs = runs_of(_kinds(source, scenario))
    everything = range(runs[-1][-1] + 1)
    few: Sequence[int] = everything if all_layers else shortened(runs)
    with _one_at_a_time:
        recording = _run(source, scenario, few)
        if len(few) < len(everything):
            try:
                recording = unroll(recording, runs)
            except IrregularError:
                few = everything
                recording = _run(source, scenario, few)
    cuda = scenario.device == "cuda"
    peak = recording.peak(ALLOCATOR_BLOCK if cuda else 1)
    reserved = replay(recording.blocks()).reserved_peak if cuda else peak.total
    return Traced(peak, reserved, recording.paged, len(few), len(everything), recording)


def _run(source: nn.Module, scenario: Scenario, layers: Sequence[int]) -> Recording:
    prefix = sum(index < scenario.frozen_layers for index in layers)  # of a frozen prefix, those that are left of it
    shorter = replace(scenario, frozen_layers=prefix)
    return step.run(build(source, shorter, layers, hollow), shorter, hollow, Shapes())


def _kinds(source: nn.Module, scenario: Scenario) -> list[int]:
    base: Any = unwrap(source)
    config = base.config.get_text_config(decoder=True) if hasattr(base.config, "get_text_config") else base.config
    types = getattr(config, "layer_types", None) or ()
    return [
        kind_of(layer, types[index] if index < len(types) else "", index < scenario.frozen_layers)
        for index, layer in enumerate(base.get_submodule(decoder_layers_path(base)))
    ]
