# ruff: noqa: N802 - NVML's names
import doctest
import sys
import threading
import time
from types import ModuleType, SimpleNamespace

import psutil
import pytest
import torch

from forge.callbacks.monitor import system
from forge.callbacks.monitor.system import SystemSampler

GPU = {"gpu/utilization_percent", "gpu/power_w", "gpu/temperature_c"}
CPU = {"cpu/process_percent", "cpu/system_percent"}
MEMORY = {"memory/process_rss_gb", "memory/system_used_percent"}
UUIDS = ["aaaa", "bbbb"]


class NVMLError(Exception):
    pass


class FakeNVML(ModuleType):
    """Two GPUs: the first at 10 % and 100 W, the second at 20 % and 200 W; `asked` counts the queries by name."""

    NVML_TEMPERATURE_GPU = 0

    def __init__(self, *, unsupported=(), opens=True, knows_uuids=True):
        super().__init__("pynvml")
        self.unsupported, self.opens, self.knows_uuids = set(unsupported), opens, knows_uuids
        self.asked, self.inits, self.temperature = [], 0, 40

    def _ask(self, name):
        self.asked.append(name)
        if name in self.unsupported:
            raise NVMLError("Not Supported")

    def nvmlInit(self):
        self._ask("init")
        if not self.opens:
            raise NVMLError("Driver Not Loaded")
        self.inits += 1

    def nvmlShutdown(self):
        self.inits -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if not self.knows_uuids:
            raise NVMLError("Not Found")
        return 1 + UUIDS.index(uuid.removeprefix("GPU-"))

    def nvmlDeviceGetHandleByPciBusId(self, bus_id):
        return 1 + ["00000000:0A:00.0", "00000000:1B:00.0"].index(bus_id)

    def nvmlDeviceGetUtilizationRates(self, handle):
        self._ask("utilization")
        return SimpleNamespace(gpu=10 * handle, memory=3)

    def nvmlDeviceGetPowerUsage(self, handle):
        self._ask("power")
        return 100_000 * handle

    def nvmlDeviceGetTemperature(self, handle, sensor):
        self._ask("temperature")
        return self.temperature


@pytest.fixture
def machine(monkeypatch):
    """`machine(current=1)`: CUDA in use, torch's current device being the first or second of NVML's two."""

    def make(nvml=None, *, current=0):
        nvml = FakeNVML() if nvml is None else nvml
        gpus = [
            SimpleNamespace(uuid=uuid, pci_domain_id=0, pci_bus_id=bus, pci_device_id=0)
            for uuid, bus in zip(UUIDS, (0x0A, 0x1B), strict=True)
        ]
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)  # as torch numbers what it can see
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpus[current])
        return nvml

    return make


@pytest.fixture
def sampler():
    sampler = SystemSampler(interval_s=0.02)
    yield sampler
    sampler.stop()


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "forge-system"]


def drained_until(sampler, keys):
    """Drain until all the keys are there (CPU shares need a tenth of a second)."""
    deadline = time.monotonic() + 10
    while not keys <= set(values := sampler.drain()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return values


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_all_keys_with_a_gpu(machine, sampler):
    machine()
    sampler.start()
    values = drained_until(sampler, CPU)
    assert set(values) == GPU | CPU | MEMORY
    assert (values["gpu/utilization_percent"], values["gpu/power_w"], values["gpu/temperature_c"]) == (10, 100, 40)
    assert values["memory/process_rss_gb"] == pytest.approx(psutil.Process().memory_info().rss / 2**30, rel=0.3)
    assert 0 < values["memory/system_used_percent"] < 100
    assert 0 <= values["cpu/system_percent"] <= 100
    assert values["cpu/process_percent"] >= 0
    assert all(type(value) is float for value in values.values())


def test_the_gpu_is_the_one_of_this_process(machine, sampler):
    """CUDA_VISIBLE_DEVICES=1: torch's device 0 is NVML's second."""
    machine(current=1)
    sampler.start()
    assert sampler.drain()["gpu/power_w"] == 200


def test_a_gpu_that_nvml_knows_by_its_bus_alone(machine, sampler):
    machine(FakeNVML(knows_uuids=False), current=1)
    sampler.start()
    assert sampler.drain()["gpu/power_w"] == 200


def test_a_query_that_is_refused_is_not_repeated(machine, sampler):
    nvml = machine(FakeNVML(unsupported=["utilization"]))
    for _ in range(2):
        sampler.start()
        wait_for(lambda: nvml.asked.count("power") > 3)
        assert set(sampler.drain()) >= {"gpu/power_w", "gpu/temperature_c"} | MEMORY
        assert nvml.asked.count("utilization") == 1
        sampler.stop()
        nvml.asked = ["utilization"]


@pytest.mark.parametrize("nvml", [FakeNVML(opens=False), None], ids=["no driver", "no library"])
def test_without_nvml(machine, monkeypatch, sampler, nvml):
    machine()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # None makes the import fail
    sampler.start()
    assert set(drained_until(sampler, CPU)) == CPU | MEMORY
    if nvml is not None:
        assert nvml.asked == ["init"]


def test_without_a_gpu_nothing_of_cuda_is_touched(machine, monkeypatch, sampler):
    nvml = machine()

    def touched(*_):
        raise AssertionError("CUDA was asked")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    for name in ("is_available", "current_device", "get_device_properties"):
        monkeypatch.setattr(torch.cuda, name, touched)
    sampler.start()
    assert set(drained_until(sampler, CPU)) == CPU | MEMORY
    assert nvml.asked == []


def test_cuda_that_comes_up_after_the_start(machine, monkeypatch, sampler):
    machine()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    sampler.start()
    assert not GPU & set(sampler.drain())
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert set(drained_until(sampler, GPU)) >= GPU


def test_means_and_maxima(monkeypatch):
    power, temperature = iter([1.0, 2.0, 6.0]), iter([50.0, 90.0, 70.0])
    readers = {"gpu/power_w": lambda: next(power), "gpu/temperature_c": lambda: next(temperature)}
    sampler = SystemSampler(interval_s=1000)
    monkeypatch.setattr(sampler, "_host_readers", lambda: readers)
    sampler.start()
    for _ in range(3):
        sampler._sample()
    assert sampler.drain() == {"gpu/power_w": 3.0, "gpu/temperature_c": 90.0}
    assert sampler.drain() == {"gpu/power_w": 6.0, "gpu/temperature_c": 70.0}  # the latest
    sampler.stop()


def test_drain_right_after_start_and_between_two_samples():
    sampler = SystemSampler(interval_s=1000)
    assert sampler.drain() == {}
    sampler.start()
    first = sampler.drain()
    assert set(first) >= MEMORY
    assert sampler.drain() == first  # nothing new: the latest again, at no cost
    sampler.stop()


def test_a_busy_process_is_seen_as_one(sampler):
    sampler.start()
    end = time.thread_time() + 0.4
    while time.thread_time() < end:
        pass
    assert drained_until(sampler, CPU)["cpu/process_percent"] > 5


def test_start_and_stop(machine, sampler):
    nvml = machine()
    sampler.stop()
    for _ in range(3):
        sampler.start()
        sampler.start()
        assert [thread.daemon for thread in threads()] == [True]
        sampler.drain()
        assert nvml.inits == 1
        sampler.stop()
        sampler.stop()
        assert (threads(), nvml.inits) == ([], 0)


def test_stop_does_not_wait_for_the_next_sample():
    sampler = SystemSampler(interval_s=1000)
    sampler.start()
    before = time.monotonic()
    sampler.stop()
    assert time.monotonic() - before < 1
    assert threads() == []


def test_a_broken_machine_is_no_reason_to_raise(monkeypatch, capfd):
    def broken(*_, **__):
        raise OSError("no /proc")

    monkeypatch.setattr(torch.cuda, "is_initialized", broken)
    for name in ("virtual_memory", "cpu_times"):
        monkeypatch.setattr(psutil, name, broken)
    sampler = SystemSampler(interval_s=0.01)
    sampler.start()
    sampler.drain()
    time.sleep(0.05)
    sampler.drain()
    sampler.stop()
    assert capfd.readouterr() == ("", "")


def test_a_driver_that_hangs_does_not_hang_the_training(machine, monkeypatch):
    nvml, released = machine(), threading.Event()
    sampler = SystemSampler(interval_s=0.01)
    hung = threading.Event()

    def hang(handle):
        hung.set()
        released.wait(30)
        return 0

    monkeypatch.setattr(nvml, "nvmlDeviceGetPowerUsage", hang)
    sampler.start()
    assert hung.wait(10)
    before = time.monotonic()
    sampler.drain()
    assert time.monotonic() - before < 1
    released.set()
    sampler.stop()
    assert threads() == []


def test_the_documented_example():
    assert doctest.testmod(system).failed == 0
