"""Does the run fit into the memory that is there? Asked before any weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ForgeError, UnsupportedError
from ..memory import MemoryEstimate, estimate_model_memory, find_card, plan_training
from ..memory.overheads import CONTEXT_BYTES

if TYPE_CHECKING:
    from ..presets import Preset
    from .config import TuningConfig

GB = 2**30


@dataclass(frozen=True)
class Room:
    """What a run may use.

    Args:
        bytes: of memory.
        name: what to call it.
    """

    bytes: int
    name: str


def room_here(device: str) -> Room:
    """The free memory of this machine's GPU, or its free RAM.

    What this process has on the GPU already is counted as free: the model to be trained may be a part of it, and the
    estimate has that model in it.
    """
    if device == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info()
        own = torch.cuda.memory_reserved() + CONTEXT_BYTES
        return Room(free + own, f"this machine's {torch.cuda.get_device_name()}")
    import psutil  # type: ignore[import-untyped]

    return Room(psutil.virtual_memory().available, "this machine's free RAM")


def check_fit(model: Any, preset: Preset, config: TuningConfig, *, longest: int, packed: bool) -> MemoryEstimate:
    """The estimate of the run, refused where it surely does not fit.

    Args:
        model: a config, a model's id or folder.
        preset: the recipe.
        config: what else is wanted: frozen layers, an average, another card.
        longest: tokens in the longest row.
        packed: whether rows are packed.

    Returns:
        The estimate; `surely_fits` says whether its upper end fits too.

    Raises:
        UnsupportedError: not even the lower end of the estimate's band fits. The message says what would.
    """
    room, measured = _room(preset, config), _for_card(preset, config)
    options = _options(preset, config, packed=packed)
    estimate = _estimate(model, measured, longest, options)
    if estimate.heaviest.bytes.low > room.bytes:
        raise UnsupportedError(_does_not_fit(model, measured, estimate, room, options))
    return estimate


def excess_gb(model: Any, preset: Preset, config: TuningConfig, *, longest: int) -> float:
    """By how many GiB a run surely exceeds the memory; 0 or less where it may fit.

    Args:
        model: its config.
        preset: the recipe.
        config: what else is wanted; its `freeze_ratio` is the run's.
        longest: tokens in the longest row.
    """
    estimate = _estimate(model, _for_card(preset, config), longest, _options(preset, config, packed=False))
    return float(estimate.heaviest.bytes.low - _room(preset, config).bytes) / GB


def _options(preset: Preset, config: TuningConfig, *, packed: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"trainer": preset.objective}
    if config.freeze_ratio:
        options |= {"freeze_ratio": config.freeze_ratio, "prefix_cache": config.prefix_cache}
    if config.ema:
        options["ema"] = "device"
    if packed:
        options["packed"] = True
    return options


def _estimate(model: Any, preset: Preset, longest: int, options: dict[str, Any]) -> MemoryEstimate:
    batch = int(preset.choices["per_device_train_batch_size"].value)
    return estimate_model_memory(model, batch, longest, preset=preset, **options)


def surely_fits(estimate: MemoryEstimate, preset: Preset, config: TuningConfig) -> bool:
    """Whether the upper end of the estimate's band fits too."""
    return bool(estimate.heaviest.bytes.high <= _room(preset, config).bytes)


def _for_card(preset: Preset, config: TuningConfig) -> Preset:
    """The preset as it would be for the card that was named."""
    if config.gpu is None or preset.hardware.device == "cuda":
        return preset
    return preset.on(find_card(config.gpu).profile or "ampere")


def _room(preset: Preset, config: TuningConfig) -> Room:
    if config.gpu is None:
        return room_here(preset.hardware.device)
    card = find_card(config.gpu)
    return Room(card.usable_bytes, card.name)


def _does_not_fit(model: Any, preset: Preset, estimate: MemoryEstimate, room: Room, options: dict[str, Any]) -> str:
    need = estimate.heaviest.bytes
    said = (
        f"The run does not fit: it needs {need.total / GB:.2f} GiB (at least {need.low / GB:.2f}), with "
        f"{estimate.batch_size} x {estimate.sequence_length} tokens, and {room.name} has {room.bytes / GB:.2f} GiB."
    )
    if preset.hardware.device != "cuda":
        return f"{said} Set a smaller per_device_train_batch_size or max_length, or take a smaller model."
    try:
        plan = plan_training(model, gpu=room.bytes, preset=preset, sequence_length=estimate.sequence_length, **options)
    except ForgeError as error:
        return f"{said} No plan was found: {error}"
    if plan.fits:
        return f"{said} This would fit: {'; '.join(plan.applied)}."
    return f"{said} Nothing that plan_training can change makes it fit: take a smaller model or a larger GPU."
