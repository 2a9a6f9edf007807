"""A scenario's step run twice, on hollow tensors and for real on the CPU, and what the two allocate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from forge.memory.scenario import Scenario
from forge.memory.tracing import step
from forge.memory.tracing.hollow import Shapes, hollow
from forge.memory.tracing.skeleton import build
from forge.memory.tracing.tape import ALLOCATED, FREED, PAGED, PHASE, Recording
from forge.models.anatomy import build_on_meta
from support.families import tiny_config


def source(family: str = "llama", layers: int | None = None, **changes: Any) -> Any:
    """A tiny model of the family without weights, with this many decoder layers."""
    config = tiny_config(family)
    text = config.get_text_config()
    count = layers or text.num_hidden_layers
    kinds = getattr(text, "layer_types", None)
    for name, value in {"num_hidden_layers": count, **changes}.items():
        setattr(text, name, value)
    if kinds:
        text.layer_types = [kinds[index % len(kinds)] for index in range(count)]
    return build_on_meta(config)


def real_tensors(scenario: Scenario, vocabulary: int = 64) -> Callable[..., torch.Tensor]:
    """What makes tensors with values that a step can run on; the last row is half padding where rows are padded."""

    def empty(shape: tuple[int, ...], dtype: torch.dtype, name: str = "") -> torch.Tensor:
        if name in {"input_ids", "labels"}:
            return torch.randint(3, vocabulary - 8, shape)
        if name in {"attention_mask", "completion_mask"}:
            mask = torch.ones(shape, dtype=dtype)
            if scenario.padded:
                mask[-1, shape[1] // 2 :] = 0
            return mask
        if name == "position_ids":
            return torch.arange(scenario.sequence_length).repeat(scenario.rows).view(shape)
        if dtype.is_floating_point:
            return (0.02 * torch.randn(shape)).to(dtype)
        return torch.zeros(shape, dtype=dtype)

    return empty


def hollow_step(model: Any, scenario: Scenario, layers: Sequence[int] | None = None) -> Recording:
    """Two steps on hollow tensors."""
    return step.run(build(model, scenario, _layers(model, layers), hollow), scenario, hollow, Shapes())


def real_step(model: Any, scenario: Scenario, layers: Sequence[int] | None = None) -> Recording:
    """Two steps on real ones."""
    empty = real_tensors(scenario)
    return step.run(build(model, scenario, _layers(model, layers), empty), scenario, empty)


def _layers(model: Any, layers: Sequence[int] | None) -> Sequence[int]:
    return range(model.config.get_text_config().num_hidden_layers) if layers is None else layers


def peak_of_each_phase(recording: Recording) -> dict[tuple[str, int | None], int]:
    """The most bytes that were alive in each phase of each layer: one large tile of the loss hides nothing here."""
    alive: dict[int, int] = {}
    total, phase = 0, ("", None)
    peaks: dict[tuple[str, int | None], int] = {}
    for event in recording.events:
        if event[0] == ALLOCATED and event[3] != PAGED:
            alive[event[1]] = event[2]
            total += event[2]
        elif event[0] == FREED:
            total -= alive.pop(event[1], 0)
        elif event[0] == PHASE:
            phase = event[1], event[2]
        peaks[phase] = max(peaks.get(phase, 0), total)
    return peaks


def largest_difference(one: Recording, other: Recording) -> tuple[float, Any]:
    """How far the two are apart in any phase, as a share of the second, and where."""
    ours, theirs = peak_of_each_phase(one), peak_of_each_phase(other)
    assert ours.keys() == theirs.keys()
    worst = max(theirs, key=lambda phase: abs(ours[phase] - theirs[phase]) / theirs[phase])
    return abs(ours[worst] - theirs[worst]) / theirs[worst], (worst, ours[worst], theirs[worst])
