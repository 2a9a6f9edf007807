"""The callback that holds an estimate against a run, with a GPU's counters stood in for."""

import pytest
from transformers import LlamaConfig

from forge import ForgeWarning, estimate_model_memory

GB = 2**30


@pytest.fixture(scope="module")
def estimate():
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=500
    )
    return estimate_model_memory(config, 2, 64, preset="lora")


@pytest.fixture
def gpu(monkeypatch, estimate):
    """Counters that a test sets; what forge reads of torch.cuda and no more."""
    counters = {
        "allocated": estimate["allocated_peak_gb"] * GB,
        "reserved": estimate["reserved_peak_gb"] * GB,
        "resets": 0,
    }

    def reset():
        counters["resets"] += 1

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: counters["allocated"])
    monkeypatch.setattr("torch.cuda.max_memory_reserved", lambda: counters["reserved"])
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", reset)
    return counters


class _Run:
    per_device_train_batch_size = 2
    is_world_process_zero = True


def _train(callback, steps=3, run=_Run):
    callback.on_train_begin(run, run, None)
    for _ in range(steps):
        callback.on_step_end(run, run, None)


def test_it_compares_once_after_the_second_step(estimate, gpu, capsys):
    gpu["allocated"] /= 1.02
    callback = estimate.calibration_callback()
    _train(callback, steps=1)
    assert callback.result is None
    _train(callback)
    assert gpu["resets"] == 2
    assert callback.result.allocated_error == pytest.approx(0.02)
    assert callback.result.reserved_error == pytest.approx(0)
    assert capsys.readouterr().out.count("+2.0%") == 1


def test_an_estimate_outside_of_its_band_warns(estimate, gpu):
    gpu["reserved"] += 3 * GB
    with pytest.warns(ForgeWarning, match="outside of the estimate's band"):
        _train(estimate.calibration_callback())


def test_another_batch_than_estimated_warns(estimate, gpu):
    class Other(_Run):
        per_device_train_batch_size = 8

    with pytest.warns(ForgeWarning, match=r"micro-batch of 2, this run has 8.*estimate.at"):
        estimate.calibration_callback().on_train_begin(Other, Other, None)


def test_in_a_real_trainer_without_a_gpu_it_says_so(estimate, make_trainer):
    callback = estimate.calibration_callback()
    with pytest.warns(ForgeWarning, match="no CUDA device"):
        make_trainer("sft", trainer_options={"callbacks": [callback]}).train()
    assert callback.result is None
