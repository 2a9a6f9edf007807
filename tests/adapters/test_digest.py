"""Digests tell any two tensors apart, and the two ways of taking them say so alike on any device."""

import pytest
import torch

from forge.adapters.contents import Contents
from forge.adapters.digest import Digest

KINDS = ["xxh3", "sum"]
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.bool, torch.int64]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0,), (7, 11, 13)])
def test_equal_bytes_have_equal_digests(kind, dtype, shape):
    tensor = (torch.randn(shape) * 100).to(dtype)
    digest = Digest.of(tensor, kind)
    assert digest.kind == kind
    assert digest.matches(tensor.clone())
    if tensor.numel():
        changed = tensor.clone().flatten()
        changed[-1] = 1 - changed[-1] if dtype != torch.bool else ~changed[-1]
        assert not digest.matches(changed.reshape(shape))
    assert not digest.matches(tensor.reshape(1, -1, 1, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_places_count(kind):
    """Two numbers, rows or blocks that exchange their places are another tensor."""
    tensor = torch.arange(3 * (1 << 20) + 5, dtype=torch.int64)
    digest = Digest.of(tensor, kind)
    for first, second in ((0, 1), (2, 4), (0, 1 << 20), (5, (2 << 20) + 5), (1, tensor.numel() - 1)):
        other = tensor.clone()
        other[[first, second]] = other[[second, first]]
        assert not digest.matches(other), (first, second)
    assert not digest.matches(torch.cat([tensor[1 << 20 :], tensor[: 1 << 20]]))


@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_counts(kind):
    tensor = torch.randint(0, 256, (37,), dtype=torch.uint8)
    digest = Digest.of(tensor, kind)
    for index in range(37):
        for bit in range(8):
            other = tensor.clone()
            other[index] ^= 1 << bit
            assert not digest.matches(other)


def test_views_and_signed_zeros():
    storage = torch.arange(40, dtype=torch.uint8)
    for begin in range(9):
        view = storage[begin : begin + 20]
        assert Digest.of(view, "sum") == Digest.of(view.clone(), "sum")
        assert Digest.of(view) == Digest.of(view.clone())
    assert not Digest.of(torch.tensor([0.0])).matches(torch.tensor([-0.0]))
    nan = torch.tensor([float("nan")])
    assert Digest.of(nan).matches(nan.clone())


def test_the_sum_is_the_written_formula():
    tensor = torch.randint(-(2**62), 2**62, (1000,), dtype=torch.int64)
    mask, golden = (1 << 64) - 1, 0x9E3779B97F4A7C15

    def signed(value):
        return value - (1 << 64) if value >> 63 else value

    total = 0
    for index, word in enumerate(tensor.tolist()):
        factor = signed(index * golden & mask)
        total += word * (((factor ^ (factor >> 29)) | 1) & mask)
    assert Digest.of(tensor, "sum").value & mask == total & mask


def test_the_meta_device_has_no_bytes():
    meta = torch.zeros(3, device="meta")
    assert Digest.of(meta) is None
    assert not Digest.of(torch.zeros(3)).matches(meta)


def test_contents_go_back_into_the_same_objects(tiny_config):
    config = tiny_config("gemma3_vl")
    before, text, kinds = config.to_dict(), config.text_config, config.text_config.layer_types
    contents = Contents([config])
    config.text_config = None
    text.hidden_size, text.new = 1, config
    kinds.append("another")
    contents.put_back()
    assert config.text_config is text
    assert text.layer_types is kinds
    assert config.to_dict() == before
    assert not hasattr(text, "new")
