"""What a training step costs: a callback with a stop-watch, and the memory of the process as three witnesses see it."""

from __future__ import annotations

import os
import resource
import statistics
import time
from itertools import pairwise
from typing import Any

import torch
from transformers import TrainerCallback

GB = 2**30


class StepClock(TrainerCallback):
    """Time each step from end to end, the device's queue emptied in between; `result` sums up those after the warm-up.

    Args:
        warm_up: steps that are not counted.
        tokens: per step, to give tokens per second.
    """

    def __init__(self, *, warm_up: int, tokens: int) -> None:
        self.warm_up, self.tokens = warm_up, tokens
        self.ends: list[float] = []
        self.memory: dict[str, float | None] = {}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start, with the peaks forgotten that loading left behind."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self._tick()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Take the time."""
        self._tick()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Read the memory while the optimizer is still there."""
        self.memory = memory()

    def _tick(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    @property
    def result(self) -> dict[str, Any]:
        """Seconds of every step, the median and the tokens per second of the counted ones, and the memory."""
        steps = [after - before for before, after in pairwise(self.ends)]
        counted = steps[self.warm_up :]
        return {
            "step_s": round(statistics.median(counted), 4),
            "tokens_per_s": round(self.tokens * len(counted) / sum(counted), 1),
            "steps_s": [round(step, 4) for step in steps],
            **self.memory,
        }


def memory() -> dict[str, float | None]:
    """Peaks in GiB: torch's allocator (in use, and held), the process as NVML sees it now, and in main memory."""
    cuda = torch.cuda.is_available()
    return {
        "max_allocated_gb": round(torch.cuda.max_memory_allocated() / GB, 3) if cuda else None,
        "max_reserved_gb": round(torch.cuda.max_memory_reserved() / GB, 3) if cuda else None,
        "nvml_process_gb": nvml_process_gb() if cuda else None,
        "max_resident_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB, 3),
    }


def nvml_process_gb() -> float | None:
    """What nvidia-smi would show for this process; None where the driver does not tell."""
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
    processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    # In a container the driver may know the process by another id; alone on the device, it is still ours.
    mine = [p for p in processes if p.pid == os.getpid()] or (processes if len(processes) == 1 else [])
    used = [p.usedGpuMemory for p in mine if p.usedGpuMemory is not None]
    return round(sum(used) / GB, 3) if used else None
