"""Questions asked of an estimate: does it fit, what is the most that does."""

import pytest
from transformers import LlamaConfig

from forge import Fit, UnknownNameError, estimate_model_memory

GB = 2**30


@pytest.fixture(scope="module")
def estimate():
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4, vocab_size=2000
    )
    return estimate_model_memory(config, 4, 256, preset="lora")


def test_fits_has_three_answers_and_only_yes_is_true(estimate):
    assert estimate.fits(int(estimate["high_gb"] * GB) + 1) == "yes"
    assert estimate.fits(int(estimate["total_estimated_gb"] * GB)) == "uncertain"
    assert estimate.fits(int(estimate["low_gb"] * GB) - 1) == "no"
    assert estimate.fits("24GB")
    assert not estimate.fits(int(estimate["total_estimated_gb"] * GB))
    assert not Fit("no")


def test_an_unknown_gpu(estimate):
    with pytest.raises(UnknownNameError, match="RTX 4090"):
        estimate.fits("RTX 4091")


@pytest.mark.parametrize("what", ["batch_size", "sequence_length"])
def test_the_largest_that_fits_does_and_the_next_does_not(estimate, what):
    usable = int((estimate["high_gb"] + 0.25) * GB)
    step = 1 if what == "batch_size" else 128
    largest = getattr(estimate, f"max_{what}")(usable)
    assert estimate.at(**{what: largest}).fits(usable)
    assert not estimate.at(**{what: largest + step}).fits(usable)


def test_the_limit_and_nothing_at_all(estimate):
    assert estimate.max_batch_size("H100", limit=8) == 8
    assert estimate.max_batch_size(int(0.1 * GB)) == 0
    assert estimate.max_sequence_length(int(0.1 * GB)) == 0
    assert estimate.max_sequence_length("H100", limit=1024) == 1024


def test_at_changes_the_batch_alone(estimate):
    other = estimate.at(batch_size=8)
    assert (other.batch_size, other.sequence_length) == (8, 256)
    assert other["parameters_gb"] == estimate["parameters_gb"]
    assert dict(other.at(batch_size=4)) == dict(estimate)
