"""What building a preset costs once the libraries are imported, without a model and from the config of an 8B one."""

from typing import Any

import pytest

from benchmarks.gpu.shapes import shape_config
from forge import get_preset, list_presets


@pytest.mark.parametrize("name", list(list_presets()))
def test_without_model(benchmark: Any, name: str) -> None:
    """The LoRA targets are a pattern."""
    benchmark.group = "get_preset"
    benchmark(get_preset, name, hardware="ampere")


@pytest.mark.parametrize("name", list(list_presets()))
def test_8b_config(benchmark: Any, name: str) -> None:
    """The model's anatomy is read from its config, on the meta device."""
    benchmark.group = "get_preset(model=<8B config>)"
    config = shape_config("llama-8b")
    benchmark.pedantic(lambda: get_preset(name, model=config, hardware="ampere"), rounds=5, warmup_rounds=1)


def test_overrides(benchmark: Any) -> None:
    """Names are looked up and values are checked."""
    benchmark.group = "get_preset"
    benchmark(get_preset, "qlora", hardware="ampere", lora_r=32, learning_rate=1e-4, packing=True, use_dora=True)


@pytest.mark.parametrize("method", ["get_bnb_config", "get_lora_config", "get_training_args", "get_sft_config"])
def test_objects(benchmark: Any, method: str) -> None:
    """The real objects."""
    benchmark.group = "objects"
    benchmark(getattr(get_preset("qlora", hardware="cpu"), method))


def test_save_and_load(benchmark: Any, tmp_path: Any) -> None:
    """As JSON and back."""
    benchmark.group = "objects"
    preset, path = get_preset("qlora", hardware="ampere"), tmp_path / "preset.json"

    def round_trip() -> None:
        preset.save(path)
        type(preset).load(path)

    benchmark(round_trip)
