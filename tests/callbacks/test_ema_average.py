import math

import pytest
import torch
from torch import nn

from forge import EMA, ForgeError
from forge.callbacks.ema.decay import Decay


def test_against_the_definition_in_double_precision():
    weight = torch.zeros(3, 4)
    ema, expected = EMA({"w": weight}), torch.zeros(3, 4, dtype=torch.float64)
    for step in range(50):
        weight.copy_(torch.randn(3, 4, generator=torch.Generator().manual_seed(step)))
        ema.update(0.9)
        expected = 0.9 * expected + 0.1 * weight.double()
    torch.testing.assert_close(ema.average["w"].double(), expected, rtol=0, atol=1e-6)
    assert ema.updates == 50


def test_bf16_weights_have_an_fp32_shadow():
    """A bf16 shadow stands still on its way: the increments are rounded away."""
    weight = torch.zeros(4, dtype=torch.bfloat16)
    ema = EMA({"w": weight})
    weight.fill_(1)
    in_bf16 = torch.zeros(4, dtype=torch.bfloat16)
    for _ in range(8000):
        ema.update(0.999)
        in_bf16.mul_(0.999).add_(weight, alpha=1 - 0.999)
    assert ema.average["w"].dtype == torch.float32
    torch.testing.assert_close(ema.average["w"], torch.full((4,), 1 - 0.999**8000), rtol=0, atol=1e-4)
    assert in_bf16.max() <= 0.5


def test_mixed_dtypes_are_updated_alike():
    tensors = {"a": torch.ones(3), "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.ones(3, dtype=torch.float64)}
    ema = EMA(tensors)
    for tensor in tensors.values():
        tensor.zero_()
    ema.update(0.5)
    assert [shadow.dtype for shadow in ema.average.values()] == [torch.float32, torch.float32, torch.float64]
    assert all((shadow == 0.5).all() for shadow in ema.average.values())


def test_tied_weights_are_averaged_once():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    assert list(EMA(model.named_parameters(remove_duplicate=False)).average) == ["0.weight"]


def test_applying_keeps_the_targets_dtype_and_restores_exactly():
    from forge.callbacks.ema.applied import Applied

    target, applied = {"w": torch.full((2,), 0.3, dtype=torch.bfloat16), "other": torch.zeros(1)}, Applied()
    before = target["w"].clone()
    applied.apply({"w": torch.ones(2)}, target)
    assert target["w"].dtype == torch.bfloat16
    assert (target["w"] == 1).all()
    applied.restore(target)
    assert torch.equal(target["w"], before)


def test_tensors_can_join():
    ema = EMA({"a": torch.ones(2)})
    ema.update(0.5)
    late = torch.zeros(2)
    ema.add({"b": late})
    late += 1
    ema.update(0.5)
    assert (ema.average["b"] == 0.5).all()
    with pytest.raises(ForgeError, match=r"c is torch\.int64"):
        ema.add({"c": torch.zeros(2, dtype=torch.int64)})


def test_state_dict_round_trip_is_exact_and_a_copy():
    weight = torch.randn(5)
    first = EMA({"w": weight})
    weight += 1
    first.update(0.3)
    state = first.state_dict()
    second = EMA({"w": torch.zeros(5)})
    second.load_state_dict(state)
    assert torch.equal(second.average["w"], first.average["w"])
    assert second.updates == 1
    first.update(0.3)
    assert not torch.equal(state["average"]["w"], first.average["w"])


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({}, "nothing to average"),
        ({"w": torch.zeros(2, dtype=torch.int64)}, "w is torch.int64"),
        ({"w": torch.zeros(2, device="meta")}, "on meta"),
    ],
)
def test_what_cannot_be_averaged(tensors, says):
    with pytest.raises(ForgeError, match=says):
        EMA(tensors)


def test_other_names_and_shapes_change_nothing():
    from forge.callbacks.ema.applied import Applied

    ema = EMA({"a": torch.zeros(2), "b": torch.zeros(2)})
    target = {"a": torch.ones(2)}
    with pytest.raises(ForgeError, match="lacks 1 of the 2 averaged tensors, the first being 'b'"):
        Applied().apply(ema.average, target)
    assert (target["a"] == 1).all()
    with pytest.raises(ForgeError, match=r"shape \(3,\), and its average \(2,\)"):
        Applied().apply(ema.average, {"a": torch.ones(2), "b": torch.ones(3)})
    with pytest.raises(ForgeError, match="The saved average lacks"):
        ema.load_state_dict({"average": {}, "updates": 0})


def test_the_decay_per_step_does_not_depend_on_update_every():
    assert math.isclose(Decay(0.99, update_every=10).at(0), 0.99**10)
    assert math.isclose(Decay.from_half_life(20, update_every=5).at(10**6) ** 4, 0.5)
    assert math.isclose(Decay.from_half_life(20).half_life_steps, 20)


def test_the_warm_up_forgets_where_training_began():
    assert Decay.from_half_life(10).share_of_start(200) < 1e-6
    assert math.isclose(Decay(0.999).share_of_start(200), 0.999**200)
