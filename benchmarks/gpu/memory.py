"""What the memory of a training run is, beside what the estimate and two other estimators said before it began.

A cell estimates, loads, trains three steps and reads the peaks: what torch's allocator had in use and held, and what
the driver shows for the process. The estimate is made first, from the checkpoint's config, and is in the row also when
training runs out of memory. `context_gb` is the driver's number less what the allocator holds: when CUDA has
begun, after a first matrix product, and at the end, when every kernel that the run needs is loaded.

Where a container hides the process from NVML, `nvml_process_gb` is what the whole device gained since before the
process touched it (`process_from`): right as long as nobody else uses the device.

A cell with a `card` is capped: the allocator gets what that card offers to CUDA, less the context. Whether the run came
through and what `fits` said of the card is what it is there for.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Mapping
from typing import Any

CARDS = ("RTX 5070 Ti", "RTX 4090", "A100-40GB", "L40S", "H100")
GB = 2**30


def measure(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Estimate, then train; what was found until then goes with the exception that ends it."""
    if settings.get("attention") == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        return {"not_installed": "flash_attn"}
    found: dict[str, Any] = {}
    try:
        _measure(settings, found)
    except Exception as error:
        error.partial = found | _peaks()  # type: ignore[attr-defined]
        raise
    return found


def _measure(settings: Mapping[str, Any], found: dict[str, Any]) -> None:
    from benchmarks.gpu.memory_training import load, preset_of, trainer_of
    from benchmarks.gpu.models import checkpoint

    folder = str(checkpoint(settings["model"]))
    driver = Driver()
    found |= {"process_from": driver.source, "context_gb": _context(driver)}
    with tempfile.TemporaryDirectory() as output:
        found["stage"] = "preset"
        preset = preset_of(settings, folder, output)
        found |= estimates(settings, preset, folder)
        found |= _cap(settings, found["context_gb"])
        found["stage"], begin = "load", time.perf_counter()
        model = load(preset, folder)
        found |= {"load_s": round(time.perf_counter() - begin, 1), **_peaks("load_peak"), "loaded_gb": _allocated()}
        found["stage"] = "prepare"
        clock = _clock(settings, driver)
        trainer = trainer_of(settings, preset, model, clock)
        batches: set[tuple[int, ...]] = set()
        trainer.model.register_forward_pre_hook(
            lambda _, args, kwargs: batches.add(_shape(args, kwargs)), with_kwargs=True
        )
        found |= {"stage": "train", "optimizer": str(getattr(trainer.args.optim, "value", trainer.args.optim))}
        try:
            trainer.train()
        finally:
            found |= {"steps_done": max(0, len(clock.ends) - 1), "batches": sorted(batches), **clock.at_begin}
        found |= clock.result | clock.at_end
        if driver.source is not None:
            found["context_gb"]["at_end"] = round(found["nvml_process_gb"] - found["reserved_at_end_gb"], 3)
        found["losses"] = [round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry]
        found |= _parameters(trainer.model) | {"stage": "done"}


def estimates(settings: Mapping[str, Any], preset: Any, model: Any, config: Any = None) -> dict[str, Any]:
    """The estimate, its verdict per card, the seconds it took, and the peers'; an error is part of the row.

    Args:
        settings: of the cell.
        preset: the cell's.
        model: a folder or a config.
        config: the model's; None reads it from the folder.
    """
    from transformers import AutoConfig

    from benchmarks.gpu.memory_training import said_beside_the_preset
    from benchmarks.gpu.peers import peers
    from forge import estimate_model_memory

    found: dict[str, Any] = {}
    begin = time.perf_counter()
    try:
        said = said_beside_the_preset(settings)
        made = estimate_model_memory(model, settings["rows"], settings["length"], preset=preset, **said)
        found["estimate_s"] = round(time.perf_counter() - begin, 2)
        found["estimate"] = {name: round(v, 4) if isinstance(v, float) else v for name, v in dict(made).items()}
        if preset.hardware.device == "cuda":
            found["fits"] = {card: str(made.fits(card)) for card in CARDS}
    except Exception as error:  # noqa: BLE001  (the run is measured all the same)
        found["estimate_error"] = f"{type(error).__name__}: {error}"[:600]
    try:
        found["peers"] = peers(config or AutoConfig.from_pretrained(model), settings)
    except Exception as error:  # noqa: BLE001
        found["peers_error"] = f"{type(error).__name__}: {error}"[:600]
    return found


class Driver:
    """What the driver says that this process uses; made before the process touches the device."""

    def __init__(self) -> None:
        import torch

        self.source: str | None = None
        if not torch.cuda.is_available():
            return
        from benchmarks.steps import nvml_process_gb

        self._before = self._device_gb()
        torch.zeros(1, device="cuda")
        self.source = "device" if nvml_process_gb() is None else "process"

    def process_gb(self) -> float:
        """GiB, now."""
        from benchmarks.steps import nvml_process_gb

        return (nvml_process_gb() or 0.0) if self.source == "process" else self._device_gb() - self._before

    @staticmethod
    def _device_gb() -> float:
        import pynvml

        pynvml.nvmlInit()
        used: int = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used
        return used / GB

    def outside_gb(self) -> float:
        """GiB of the process that no allocator holds."""
        import torch

        return round(self.process_gb() - torch.cuda.memory_reserved() / GB, 3)


def _context(driver: Driver) -> dict[str, float] | None:
    """GiB of the process that no allocator holds: CUDA begun, and its first matrix product done."""
    if driver.source is None:
        return None
    import torch

    found = {"after_init": driver.outside_gb()}
    square = torch.zeros(256, 256, device="cuda", dtype=torch.bfloat16)
    torch.mm(square, square)
    torch.cuda.synchronize()
    found["after_matmul"] = driver.outside_gb()
    del square
    torch.cuda.empty_cache()
    return found


def _cap(settings: Mapping[str, Any], context: Mapping[str, float] | None) -> dict[str, Any]:
    """Leave the allocator what the card of the cell would leave it."""
    if "card" not in settings or context is None:
        return {}
    import torch

    from forge.memory.cards import find_card

    usable = find_card(settings["card"]).usable_bytes / GB
    cap = usable - context["after_matmul"]
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap * GB / torch.cuda.get_device_properties(0).total_memory))
    return {"card_usable_gb": round(usable, 3), "allocator_cap_gb": round(cap, 3)}


def _clock(settings: Mapping[str, Any], driver: Driver) -> Any:
    from benchmarks.gpu.memory_training import STEPS
    from benchmarks.steps import StepClock

    class Clock(StepClock):
        """Reads beside the peaks of training those of what came before it, and what is held at the end."""

        at_begin: dict[str, Any] = {}  # noqa: RUF012  (replaced, never changed)
        at_end: dict[str, Any] = {}  # noqa: RUF012

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.at_begin = _peaks("before_training")
            super().on_train_begin(*args, **kwargs)

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            super().on_train_end(*args, **kwargs)
            self.at_end = _held(driver)

    pairs = 2 if settings["trainer"] == "dpo" else 1
    tokens = settings["rows"] * settings["length"] * settings.get("accumulation", 1) * pairs
    return Clock(warm_up=STEPS - 2, tokens=tokens)


def _peaks(name: str = "max") -> dict[str, float]:
    import torch

    if not torch.cuda.is_available():
        return {}
    return {
        f"{name}_allocated_gb": round(torch.cuda.max_memory_allocated() / GB, 3),
        f"{name}_reserved_gb": round(torch.cuda.max_memory_reserved() / GB, 3),
    }


def _held(driver: Driver) -> dict[str, Any]:
    import torch

    if driver.source is None:
        return {}
    return {
        "nvml_process_gb": round(driver.process_gb(), 3),
        "reserved_at_end_gb": round(torch.cuda.memory_reserved() / GB, 3),
        "allocation_retries": torch.cuda.memory_stats().get("num_alloc_retries", 0),
    }


def _allocated() -> float | None:
    import torch

    return round(torch.cuda.memory_allocated() / GB, 3) if torch.cuda.is_available() else None


def _shape(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    ids = kwargs.get("input_ids", args[0] if args else None)
    return tuple(ids.shape) if ids is not None else ()


def _parameters(model: Any) -> dict[str, Any]:
    parameters = list(model.parameters())
    return {
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "trainable_dtypes": sorted({str(p.dtype) for p in parameters if p.requires_grad}),
        "frozen_dtypes": sorted({str(p.dtype) for p in parameters if not p.requires_grad}),
    }
