"""The tracing engine: a scenario's step on a model without weights, at the depth that is needed."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ...errors import ForgeError, UnsupportedError
from ...models.layers import decoder_layers_path, unwrap
from ..allocator import replay
from ..scenario import Scenario
from . import step
from .hollow import Shapes, hollow
from .optimizers import check_optimizer
from .sharding import shared_out
from .skeleton import build
from .tape import ALLOCATOR_BLOCK, Peak, Recording
from .unroll import IrregularError, kind_of, relabelled, runs_of, shortened, units_of, unroll

_one_at_a_time = threading.Lock()  # a trace stands in for a few functions of TRL while it runs


class UntraceableError(UnsupportedError):
    """The step cannot be run on tensors without memory; the message says in one line what stood in the way."""


@dataclass(frozen=True)
class Traced:
    """What tracing found.

    Args:
        peak: the instant when most is alive.
        reserved: bytes that the caching allocator holds at most; on a CPU those that are alive.
        unsplit: bytes of blocks that are larger than what was asked for, which the allocator counts as allocated.
        paged: bytes of optimizer state in managed memory, outside of the allocator.
        layers: how many decoder layers were traced.
        depth: how many there are.
        recording: the tape of them all.
    """

    peak: Peak
    reserved: int
    unsplit: int
    paged: int
    layers: int
    depth: int
    recording: Recording


@contextmanager
def _outside_autocast() -> Iterator[None]:
    """As if no autocast were on: its cache of cast weights is dropped when the outermost one ends, the step's own."""
    depth, enabled = torch.autocast_increment_nesting() - 1, torch.is_autocast_enabled("cpu")
    for _ in range(depth + 1):
        torch.autocast_decrement_nesting()
    torch.set_autocast_enabled("cpu", False)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cpu", enabled)
        for _ in range(depth):
            torch.autocast_increment_nesting()


def trace(source: nn.Module, scenario: Scenario, *, all_layers: bool = False) -> Traced:
    """Trace two steps.

    Args:
        source: the model, live or on meta; it is not changed.
        scenario: what runs on it.
        all_layers: trace every layer, even of many alike.

    Raises:
        UnknownNameError: there is no such optimizer.
        UntraceableError: anything else; `__cause__` has it.
    """
    check_optimizer(scenario.optim)
    try:
        with _one_at_a_time, _as_in_training():
            whole = all_layers or _looks_across_layers(source, scenario) or _layers_are_told_apart(source, scenario)
            return _trace(source, scenario, all_layers=whole)
    except ForgeError:
        raise
    except Exception as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise UntraceableError(
            f"The step of this model cannot be run without memory: {type(error).__name__}: {reason}"
        ) from error


def _trace(source: nn.Module, scenario: Scenario, *, all_layers: bool) -> Traced:
    kinds = _kinds(source, scenario)
    everything = range(len(kinds))
    units = [[index] for index in everything] if all_layers else units_of(kinds)
    runs = runs_of([tuple(kinds[index] for index in unit) for unit in units])
    few = list(everything) if all_layers else [index for number in shortened(runs) for index in units[number]]
    recording = _run(source, scenario, few)
    if len(few) < len(everything):
        try:
            places = [place for place, number in enumerate(shortened(runs)) for _ in units[number]]
            recording = unroll(relabelled(recording, places), runs)
        except IrregularError:
            units, few = [[index] for index in everything], list(everything)
            recording = _run(source, scenario, few)
    recording = shared_out(recording, scenario)
    cuda = scenario.device == "cuda"
    peak = recording.peak(ALLOCATOR_BLOCK if cuda else 1)
    if peak.layer is not None:
        peak = replace(peak, layer=units[peak.layer][-1])
    if not cuda:
        return Traced(peak, peak.total, 0, recording.paged, len(few), len(everything), recording)
    replayed = replay(recording.blocks())
    unsplit = max(0, replayed.allocated_peak - peak.total)
    return Traced(peak, replayed.reserved_peak, unsplit, recording.paged, len(few), len(everything), recording)


@contextmanager
def _as_in_training() -> Iterator[None]:
    """Whatever the caller switched off or on around the call."""
    with torch.inference_mode(False), torch.enable_grad(), _outside_autocast(), torch.device("cpu"), _quiet():
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing is logged of a run that does not take place."""
    loggers = [logging.getLogger(name) for name in ("transformers", "trl", "peft", "accelerate", "bitsandbytes")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _run(source: nn.Module, scenario: Scenario, layers: Sequence[int]) -> Recording:
    prefix = sum(index < scenario.frozen_layers for index in layers)  # of a frozen prefix, those that are left of it
    shorter = replace(scenario, frozen_layers=prefix)
    return step.run(build(source, shorter, layers, hollow), shorter, hollow, Shapes())


def _looks_across_layers(source: nn.Module, scenario: Scenario) -> bool:
    """Whether tensors beside the layers hold something of all of them, and grow with the depth."""
    prefixes = any(hasattr(each, "prefix_projection") for each in _adapters(source, scenario))
    return bool(prefixes or getattr(_text_config(source), "hidden_size_per_layer_input", None))


_NUMBERED = re.compile(r"\.\d+(\.|$)|\\d|\[\d")


def _layers_are_told_apart(source: nn.Module, scenario: Scenario) -> bool:
    """Whether the adapter to come names layers by their number, which a shorter model would give to others."""
    if scenario.peft_config is None:
        return False
    for config in _adapters(source, scenario):
        values = vars(config)
        if any(values.get(name) for name in ("layers_to_transform", "layer_replication", "num_layers")):
            return True
        names = [values.get(n) for n in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters")]
        names += [list(values.get(n) or ()) for n in ("rank_pattern", "alpha_pattern")]
        if any(
            _NUMBERED.search(name) for each in names if each for name in ([each] if isinstance(each, str) else each)
        ):
            return True
    return False


def _adapters(source: Any, scenario: Scenario) -> list[Any]:
    live = getattr(source, "peft_config", None)
    configs = list(live.values()) if isinstance(live, dict) else []
    return [*configs, scenario.peft_config] if scenario.peft_config is not None else configs


def _kinds(source: nn.Module, scenario: Scenario) -> list[int]:
    base: Any = unwrap(source)
    layers = list(base.get_submodule(decoder_layers_path(base)))
    lists = [v for v in vars(_text_config(source)).values() if isinstance(v, list) and len(v) == len(layers)]
    return [
        kind_of(layer, *(repr(each[index]) for each in lists), index < scenario.frozen_layers)
        for index, layer in enumerate(layers)
    ]


def _text_config(source: nn.Module) -> Any:
    base: Any = unwrap(source)
    return base.config.get_text_config(decoder=True) if hasattr(base.config, "get_text_config") else base.config
