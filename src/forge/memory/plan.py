"""`plan_training`: does it fit on this GPU, and if not, what to change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

from ..errors import ConflictError, ForgeError, UnknownNameError
from ..hardware import Hardware
from ..models.anatomy import load_config
from ..presets import Preset, get_preset, list_presets
from ..reporting import Table
from .cards import Card, find_card
from .estimate import estimate_model_memory
from .levers import Pull, Settings, pulls
from .options import check_numbers
from .result import MemoryEstimate

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel
    from typing_extensions import Unpack

    from .options import RunOptions

GB = 2**30
_CLASSES_GB = (8, 12, 16, 24, 32, 48, 80, 141)
_MOST_PULLS = 12  # levers pulled in a row before the plan gives up


@dataclass(frozen=True)
class Lever:
    """One change, by itself.

    Args:
        name: what it is called.
        change: what to write, as code.
        cost: what it costs.
        saved_gb: GiB less than without it, estimated anew.
        estimate: with this change alone.
    """

    name: str
    change: str
    cost: str
    saved_gb: float
    estimate: MemoryEstimate


@dataclass(frozen=True)
class TrainingPlan:
    """What fits, and what to change; made by `plan_training`.

    Args:
        gpu: the card.
        before: the estimate of what was asked for.
        levers: every single change, those that save most first.
        applied: the changes that the plan makes, in order; empty where it fits as it is.
        estimate: with all of them.
        preset: the recipe with them applied.
        batch_size: rows in a micro-batch, with them.
        sequence_length: tokens in a row, with them.
        options: what the preset cannot say: `freeze_ratio` for `setup_lp_lora_style`, `frozen_layers` of a live model.
    """

    gpu: Card
    before: MemoryEstimate
    levers: tuple[Lever, ...]
    applied: tuple[str, ...]
    estimate: MemoryEstimate
    preset: Preset
    batch_size: int
    sequence_length: int
    options: Mapping[str, Any]

    @property
    def fits(self) -> bool:
        """Whether the plan surely fits."""
        return self.estimate.bytes.high <= self.gpu.usable_bytes

    def _class_that_holds(self) -> str:
        for gb in _CLASSES_GB:
            if self.estimate.bytes.high <= find_card(f"{gb}GB").usable_bytes:
                return f"{gb} GB"
        return "none; share it over several GPUs (sharding=)"

    def print(self) -> None:
        """Print it."""
        self._table().print()

    def __str__(self) -> str:
        return str(self._table())

    def _table(self) -> Table:
        before, usable = self.before, self.gpu.usable_bytes / GB
        asked = f"{before.model}, {before.batch_size} x {before.sequence_length} tokens on {self.gpu.name}"
        title = f"{asked}: {before['total_estimated_gb']:.1f} of {usable:.1f} GiB"
        if not self.applied and self.fits:
            table = Table(("plan", "GiB"), title=f"{title}. It fits.")
            table.footer = _by_formulas(before)
            table.add("as it is", f"{before['low_gb']:.1f} to {before['high_gb']:.1f}")
            return table
        table = Table(("alone", "saves, GiB", "change", "cost"), title=f"{title}.")
        for lever in self.levers:
            table.add(lever.name, f"{lever.saved_gb:.1f}", lever.change, lever.cost)
        after = f"{self.estimate['total_estimated_gb']:.1f} GiB, at most {self.estimate['high_gb']:.1f}"
        if self.fits:
            table.footer = f"plan: {'; '.join(self.applied)}. Then it needs {after}: it fits."
            table.footer += _by_formulas(self.estimate)
        else:
            table.footer = f"With everything pulled ({'; '.join(self.applied)}) it needs {after}: it does not fit."
            table.footer += f" The smallest class of card that holds that: {self._class_that_holds()}."
        return table


def plan_training(
    model: PreTrainedModel | PeftModel | PreTrainedConfig | str | PathLike[str],
    *,
    gpu: str | int | None = None,
    preset: Preset | str = "qlora",
    batch_size: int | None = None,
    sequence_length: int | None = None,
    **options: Unpack[RunOptions],
) -> TrainingPlan:
    """Whether a run fits on a GPU, and the changes that make it fit, each with the GiB that it saves.

    Every number is an estimate made anew with the change in place, none a rule of thumb. Changes that leave the result
    as it is (checkpointing, a smaller micro-batch with more accumulation) are made before those that do not.

    >>> from transformers import LlamaConfig
    >>> sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8, "vocab_size": 32000}
    >>> plan = plan_training(LlamaConfig(**sizes, num_attention_heads=16), gpu="24GB", preset="lora")
    >>> plan.fits, plan.applied
    (True, ())

    Args:
        model: as for `estimate_model_memory`.
        gpu: "24GB", "RTX 4090", "H100", or bytes; by default the first one of this machine.
        preset: what `get_preset` returns, or the name of one.
        batch_size: rows in a micro-batch; by default the preset's.
        sequence_length: tokens in a row; by default the preset's `max_length`.
        **options: as for `estimate_model_memory`.

    Returns:
        A plan; `plan.preset` is the recipe with the changes applied, and fits if `plan.fits`.

    Raises:
        ForgeError: no GPU was named and this machine has none.
        UnknownNameError: an unknown GPU, preset or option.
    """
    card = find_card(_this_gpu() if gpu is None else gpu)
    if isinstance(model, (str, PathLike)):
        model = load_config(str(model))
    recipe = _recipe(model, preset, card)
    table = recipe.tables["dpo" if options.get("trainer", recipe.objective) == "dpo" else "sft"]
    length = table["max_length"].value if sequence_length is None else sequence_length
    micro = table["per_device_train_batch_size"].value if batch_size is None else batch_size
    check_numbers(micro, length)
    now = Settings(_with_batch(recipe, micro, length), micro, length, {**_frozen_already(model), **options})
    before = _estimate(model, now)
    before.card(card.usable_bytes)  # refuses a preset for a CPU
    if before.bytes.high <= card.usable_bytes:
        return TrainingPlan(card, before, (), (), before, now.preset, micro, length, now.options)
    alone = [(pull, _possible(model, pull.settings)) for pull in pulls(now)]
    levers = [_lever(pull, before, after) for pull, after in alone if after is not None]
    levers.sort(key=lambda lever: -lever.saved_gb)
    search = _Search(model, now, before, card, levers)
    applied, after = search.run(), search.settings
    return TrainingPlan(
        gpu=card,
        before=before,
        levers=tuple(levers),
        applied=applied,
        estimate=search.estimate,
        preset=after.preset,
        batch_size=after.batch_size,
        sequence_length=after.sequence_length,
        options=after.options,
    )


def _recipe(model: Any, preset: Preset | str, card: Card) -> Preset:
    if isinstance(preset, Preset):
        return preset
    if not isinstance(preset, str) or preset not in list_presets():
        raise UnknownNameError.among("preset", str(preset), list_presets())
    return get_preset(preset, model=model, hardware=Hardware.named(card.profile or "ampere"))


def _by_formulas(estimate: MemoryEstimate) -> str:
    return " (By formulas: the step could not be traced.)" if estimate.engine == "analytic" else ""


def _this_gpu() -> str | int:
    import torch

    if not torch.cuda.is_available():
        raise ForgeError('This machine has no GPU to plan for. Name one: gpu="24GB", gpu="RTX 4090", gpu="H100".')
    return int(torch.cuda.get_device_properties(0).total_memory)


def _with_batch(preset: Preset, micro: int, length: int) -> Preset:
    """The preset with another micro-batch and length, and with the effective batch as it was where that goes."""
    if preset.choices["max_length"].value != length:
        preset = preset.replace(max_length=length)
    if preset.choices["per_device_train_batch_size"].value == micro:
        return preset
    effective, world_size = preset.choices["effective_batch_size"].value, preset.choices["world_size"].value
    steps = max(1, -(-effective // (micro * world_size)))
    return preset.replace(
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=steps,
        effective_batch_size=micro * steps * world_size,
    )


def _frozen_already(model: Any) -> dict[str, Any]:
    """Of a live model that `setup_lp_lora_style` has changed, so that nobody proposes it once more."""
    from torch import nn

    from ..models.truncation import truncation_of

    truncation = truncation_of(model) if isinstance(model, nn.Module) else None
    return {} if truncation is None else {"frozen_layers": truncation.depth}


def _estimate(model: Any, settings: Settings) -> MemoryEstimate:
    """Of the epoch that needs most."""
    return estimate_model_memory(
        model, settings.batch_size, settings.sequence_length, preset=settings.preset, **settings.options
    ).heaviest


def _possible(model: Any, settings: Settings) -> MemoryEstimate | None:
    """The estimate, None where a lever contradicts the model: a tower that trains below layers to be frozen."""
    try:
        return _estimate(model, settings)
    except ConflictError:
        return None


def _lever(pull: Pull, before: MemoryEstimate, after: MemoryEstimate) -> Lever:
    saved = before["total_estimated_gb"] - after["total_estimated_gb"]
    return Lever(pull.name, pull.change, pull.cost, saved, after)


class _Search:
    """Pulls levers until it fits: those that leave the result as it is first, of each kind the strongest.

    Then every lever that turns out not to be needed is let go again, the first one first.
    """

    def __init__(self, model: Any, start: Settings, before: MemoryEstimate, card: Card, levers: list[Lever]) -> None:
        self._model, self._start, self._card = model, start, card
        self._saved = {lever.name: lever.saved_gb for lever in levers}
        self.settings, self.estimate = start, before
        self._pulled: list[str] = []

    def run(self) -> tuple[str, ...]:
        """The changes, as code."""
        for _ in range(_MOST_PULLS):
            useful = [pull for pull in pulls(self.settings) if self._saved.get(pull.name, 1.0) > 0]
            if not useful or self._fits(self.estimate):
                break
            pull = max(useful, key=lambda p: (p.same_result, self._saved.get(p.name, 0.0)))
            after = _possible(self._model, pull.settings)
            self._saved[pull.name] = (
                0.0 if after is None else self.estimate["total_estimated_gb"] - after["total_estimated_gb"]
            )
            if after is not None and self._saved[pull.name] > 0:
                self._pulled.append(pull.name)
                self.settings, self.estimate = pull.settings, after
        if self._fits(self.estimate):
            self._let_go()
        return self._changes(self._pulled)

    def _fits(self, estimate: MemoryEstimate) -> bool:
        return estimate.bytes.high <= self._card.usable_bytes

    def _let_go(self) -> None:
        for name in self._pulled[:-1]:
            fewer = list(self._pulled)
            fewer.remove(name)
            settings = self._with(fewer)
            estimate = None if settings is None else _possible(self._model, settings)
            if settings is not None and estimate is not None and self._fits(estimate):
                self._pulled, self.settings, self.estimate = fewer, settings, estimate

    def _with(self, names: list[str]) -> Settings | None:
        settings = self._start
        for name in names:
            pull = next((pull for pull in pulls(settings) if pull.name == name), None)
            if pull is None:
                return None
            settings = pull.settings
        return settings

    def _changes(self, names: list[str]) -> tuple[str, ...]:
        """What to write; of a lever that was pulled more than once, the last."""
        changes, settings = dict[str, str](), self._start
        for name in names:
            pull = next(pull for pull in pulls(settings) if pull.name == name)
            changes[name], settings = pull.change, pull.settings
        return tuple(changes.values())
