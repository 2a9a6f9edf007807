from types import SimpleNamespace

import pytest
import torch

from forge import Hardware, UnknownNameError, UnsupportedError, get_preset
from forge.hardware import peak_flops


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that torch sees a GPU of this compute capability."""

    def pretend(capability, *, name="a GPU", hip=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
        monkeypatch.setattr(torch, "version", SimpleNamespace(hip=hip, cuda="13.0"))

    return pretend


@pytest.mark.parametrize(
    ("capability", "profile"),
    [
        ((7, 0), "turing"),
        ((7, 5), "turing"),
        ((8, 0), "ampere"),
        ((8, 6), "ampere"),
        ((8, 9), "ampere"),
        ((9, 0), "hopper"),
        ((10, 0), "hopper"),
        ((12, 0), "hopper"),
    ],
)
def test_detection_by_compute_capability(gpu, capability, profile):
    gpu(capability)
    assert Hardware.detect().name == profile
    assert get_preset("lora").hardware.name == profile


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Hardware.detect().name == "cpu"


def test_gpus_that_forge_does_not_know_name_the_remedy(gpu):
    gpu((6, 1), name="GTX 1080")
    with pytest.raises(UnsupportedError, match=r"GTX 1080 has compute capability 6\.1.*hardware=\"turing\""):
        Hardware.detect()
    gpu((9, 4), name="MI300X", hip="6.4")
    with pytest.raises(UnsupportedError, match="AMD"):
        get_preset("lora")
    assert get_preset("lora", hardware="ampere").choices["bf16"].value


def test_a_profile_above_this_gpu_is_missing_here(gpu):
    gpu((7, 5))
    assert Hardware.named("turing").missing_here() is None
    assert "compute capability 8.0" in Hardware.named("ampere").missing_here()
    with pytest.raises(UnsupportedError, match=r"this GPU has 7\.5"):
        get_preset("lora", hardware="hopper").get_training_args()


@pytest.mark.parametrize("name", ["hoper", "", "gpu", 9])
def test_unknown_profiles(name):
    with pytest.raises(UnknownNameError, match="Unknown hardware"):
        Hardware.named(name)


@pytest.mark.parametrize(("name", "profile"), [("T4", "turing"), ("RTX 4090", "ampere"), ("h100", "hopper")])
def test_a_gpu_s_name_tells_its_profile(name, profile):
    with pytest.raises(UnknownNameError, match=f'called "{profile}"'):
        Hardware.named(name)


def test_what_the_profiles_decide():
    table = {
        name: (p.compute_dtype, p.tf32, p.device)
        for name in ("cpu", "turing", "ampere", "hopper")
        for p in [Hardware.named(name)]
    }
    assert table == {
        "cpu": ("float32", False, "cpu"),
        "turing": ("float16", False, "cuda"),
        "ampere": ("bfloat16", True, "cuda"),
        "hopper": ("bfloat16", True, "cuda"),
    }
    for name, optim in {"cpu": "adamw_torch_fused", "turing": "paged_adamw_8bit", "hopper": "paged_adamw_8bit"}.items():
        assert get_preset("qlora", hardware=name).choices["optim"].value == optim
    assert "tf32" not in get_preset("qlora", hardware="turing").choices
    assert get_preset("qlora", hardware="ampere").choices["tf32"].value


def test_the_device_follows_the_launcher(monkeypatch):
    preset = get_preset("lora", hardware="hopper")
    assert preset.model_kwargs()["device_map"] == {"": 0}
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert preset.model_kwargs()["device_map"] == {"": 3}
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "device_map" not in preset.model_kwargs()
    assert get_preset("lora", hardware="hopper", device_map="auto").model_kwargs()["device_map"] == "auto"


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA B200", 2250),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA GH200 144G HBM3e", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("A100-SXM4-40GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A40", 149.7),
        ("NVIDIA RTX A6000", 154.8),
        ("RTX A5000", 111.1),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181.05),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("Tesla T4", 65),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla V100-PCIE-32GB", 112),
        ("NVIDIA GeForce RTX 3090", 71),
        ("GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 3090 Ti", 80),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 5090", 209.5),
    ],
)
def test_peak_flops(name, tflops):
    assert peak_flops(name) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "NVIDIA A100-SXM-64GB",
        "NVIDIA A10G",
        "NVIDIA A10-24Q",
        "GRID A100-40C",
        "NVIDIA GB200",
        "NVIDIA T400 4GB",
        "NVIDIA RTX 6000",
        "Quadro RTX 6000",
        "Tesla V100-FHHL-16GB",
        "AMD Instinct MI300X",
        "NVIDIA",
        "",
    ],
)
def test_no_peak_is_guessed(name):
    assert peak_flops(name) is None


def test_dense_peaks_agree_with_cores_and_clock():
    """Tensor cores run at a multiple of fp32 (2 per core and clock): 2 on GeForce cards, 4 on professional ones."""
    cores_and_ghz = {
        "NVIDIA GeForce RTX 3090": (10496, 1.695, 2),
        "NVIDIA GeForce RTX 3090 Ti": (10752, 1.86, 2),
        "NVIDIA GeForce RTX 4090": (16384, 2.52, 2),
        "NVIDIA GeForce RTX 5090": (21760, 2.407, 2),
        "NVIDIA RTX A6000": (10752, 1.8, 4),
        "NVIDIA RTX A5000": (8192, 1.695, 4),
        "NVIDIA RTX 6000 Ada Generation": (18176, 2.505, 4),
        "NVIDIA A40": (10752, 1.74, 4),
        "NVIDIA L40S": (18176, 2.52, 4),
    }
    for name, (cores, ghz, multiple) in cores_and_ghz.items():
        assert peak_flops(name) == pytest.approx(2 * cores * ghz * 1e9 * multiple, rel=0.02), name
