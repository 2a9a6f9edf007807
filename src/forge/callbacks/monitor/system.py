"""What the machine does while a model trains, sampled beside the training by a thread of its own."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil  # type: ignore[import-untyped]

Reader = Callable[[], "float | None"]

_PEAKS = frozenset({"gpu/temperature_c", "memory/process_rss_gb", "memory/system_used_percent"})


class SystemSampler:
    """Samples once a second; `drain()` says what was seen since the last one.

    | key | meaning | since the last drain |
    |---|---|---|
    | `gpu/utilization_percent` | share of the time in which a kernel ran (not how full it was) | mean |
    | `gpu/power_w` | power drawn | mean |
    | `gpu/temperature_c` | temperature of the chip | maximum |
    | `cpu/process_percent` | CPU time of this process, 100 is one core | mean |
    | `cpu/system_percent` | CPU time of the machine, 100 is all cores | mean |
    | `memory/process_rss_gb` | resident memory of this process, GiB | maximum |
    | `memory/system_used_percent` | share of the machine's memory that is not available | maximum |

    A key whose source is missing (no GPU in use, no NVML library, a query that MIG or the driver refuses) is left out,
    and its source is not asked again. The GPU is the one that this process trains on. Nothing here ever raises.

    >>> sampler = SystemSampler()
    >>> sampler.start()
    >>> 0 < sampler.drain()["memory/system_used_percent"] < 100
    True
    >>> sampler.stop()

    Args:
        interval_s: seconds between two samples.
    """

    def __init__(self, *, interval_s: float = 1.0) -> None:
        self._interval_s = interval_s
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._values = threading.Lock()  # guards the sums; held for microseconds
        self._reading = threading.Lock()  # held while sources are asked, which a sick driver can make long
        self._sums: dict[str, tuple[float, int, float]] = {}
        self._latest: dict[str, float] = {}
        self._readers: dict[str, Reader] = {}
        self._refused: set[str] = set()
        self._gpu: tuple[str, str] | None = None
        self._nvml: Any = None

    def start(self) -> None:
        """Start sampling; does nothing where it has started."""
        if self._thread is not None:
            return
        with suppress(Exception):
            self._sums, self._latest = {}, {}
            self._readers = self._host_readers()
            self._find_gpu()
            self._stopping = threading.Event()
            thread = threading.Thread(target=self._run, args=(self._stopping,), name="forge-system", daemon=True)
            thread.start()
            self._thread = thread

    def stop(self) -> None:
        """Stop sampling and end the thread; what was seen can still be drained, and `start` starts anew."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._stopping.set()
        thread.join(timeout=2.0)
        if not thread.is_alive():  # otherwise it hangs in the driver, and is left to its fate
            with suppress(Exception):
                nvml, self._nvml = self._nvml, None
                if nvml is not None:
                    nvml.nvmlShutdown()

    def drain(self) -> dict[str, float]:
        """Means and maxima since the last drain.

        Where no sample was taken since, it is the latest one again; where there is none at all yet, one is taken here,
        without the CPU shares if the sampler was started less than a tenth of a second before.
        """
        if self._thread is not None:
            self._find_gpu()
            if not self._latest:
                self._sample()
        with self._values:
            sums, self._sums = self._sums, {}
        if not sums:
            return dict(self._latest)
        return {key: peak if key in _PEAKS else total / count for key, (total, count, peak) in sums.items()}

    def _find_gpu(self) -> None:
        """Called where the model trains: CUDA's current device is another in every thread; it may come up late, too."""
        if self._gpu is None:
            with suppress(Exception):
                self._gpu = _gpu_of_this_process()

    def _run(self, stopping: threading.Event) -> None:
        while not stopping.wait(self._interval_s):
            self._sample()

    def _sample(self) -> None:
        if not self._reading.acquire(blocking=False):  # the other thread is at it
            return
        try:
            if self._gpu is not None and self._nvml is None and "nvml" not in self._refused:
                self._open_gpu(*self._gpu)
            read = {}
            for key, reader in list(self._readers.items()):
                value = self._ask(key, reader)
                if value is not None:
                    read[key] = value
            with self._values:
                self._latest = read
                for key, value in read.items():
                    total, count, peak = self._sums.get(key, (0.0, 0, value))
                    self._sums[key] = (total + value, count + 1, max(peak, value))
        finally:
            self._reading.release()

    def _ask(self, key: str, reader: Reader) -> float | None:
        try:
            return reader()
        except Exception:  # noqa: BLE001 - any driver, any container: a reading is never worth a training run
            self._refused.add(key)
            del self._readers[key]
            return None

    def _host_readers(self) -> dict[str, Reader]:
        process = psutil.Process()
        readers: dict[str, Reader] = {
            "cpu/process_percent": _TimeShare(lambda: (sum(process.cpu_times()[:2]), time.monotonic())),
            "cpu/system_percent": _TimeShare(_machine_seconds),
            "memory/process_rss_gb": lambda: process.memory_info().rss / 2**30,
            "memory/system_used_percent": lambda: float(psutil.virtual_memory().percent),
        }
        return {key: reader for key, reader in readers.items() if key not in self._refused}

    def _open_gpu(self, uuid: str, bus_id: str) -> None:
        """Add the readers of the GPU; here and not in `start`, because NVML takes its time to come up."""
        try:
            import pynvml as nvml  # type: ignore[import-untyped]

            nvml.nvmlInit()
            self._nvml = nvml
            try:
                handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
            except Exception:  # noqa: BLE001 - NVML knows a MIG slice by another id than CUDA does
                handle = nvml.nvmlDeviceGetHandleByPciBusId(bus_id)
        except Exception:  # noqa: BLE001 - no library, no driver, no permission
            self._refused.add("nvml")
            return
        readers: dict[str, Reader] = {
            "gpu/utilization_percent": lambda: float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu),
            "gpu/power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "gpu/temperature_c": lambda: float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
        }
        self._readers.update({key: reader for key, reader in readers.items() if key not in self._refused})


class _TimeShare:
    """The busy share of a time, in per cent, since the last reading; None until that is long enough to mean anything.

    Args:
        clock: gives the seconds of work and the seconds of time so far.
    """

    def __init__(self, clock: Callable[[], tuple[float, float]]) -> None:
        self._clock = clock
        self._last = clock()

    def __call__(self) -> float | None:
        busy, now = self._clock()
        if now - self._last[1] < 0.1:  # the kernel counts in hundredths of a second
            return None
        (busy_before, before), self._last = self._last, (busy, now)
        return 100 * (busy - busy_before) / (now - before)


def _machine_seconds() -> tuple[float, float]:
    """Seconds in which the machine's cores worked, and seconds in all, both for one core."""
    times: Any = psutil.cpu_times()
    total = sum(times) - getattr(times, "guest", 0) - getattr(times, "guest_nice", 0)  # those are in `user` too
    return (total - times.idle - getattr(times, "iowait", 0)) / _cores(), total / _cores()


def _cores() -> int:
    return psutil.cpu_count() or 1


def _gpu_of_this_process() -> tuple[str, str] | None:
    """NVML's UUID and bus id of torch's current GPU (CUDA_VISIBLE_DEVICES renumbers); None while CUDA is not in use."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    return f"GPU-{gpu.uuid}", f"{gpu.pci_domain_id:08X}:{gpu.pci_bus_id:02X}:{gpu.pci_device_id:02X}.0"
