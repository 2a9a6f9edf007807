"""What optimizers keep: torch's and transformers' own, and bitsandbytes' by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from forge.errors import UnknownNameError, UnsupportedError
from forge.memory.tracing.hollow import Shapes, hollow
from forge.memory.tracing.optimizers import OPTIMIZERS, Optimizer, check_optimizer
from forge.memory.tracing.tape import ALLOCATED, Tape

SHAPES = [(512, 256), (64, 100), (100,)]  # paged and 8-bit, 8-bit, neither
LARGE, MIDDLE, SMALL = 512 * 256, 6400, 100


def kept(name: str, device: str) -> tuple[int, int]:
    """Bytes in the allocator, and paged, after two steps."""
    tape = Tape(shapes=Shapes(), counters=device == "cpu")
    parameters = [nn.Parameter(hollow(shape, torch.float32)) for shape in SHAPES]
    tape.register(parameters, "parameters")
    with tape:
        tape.phase("1.optimizer", "optimizer")
        optimizer = Optimizer(name, parameters, tape, device=device)
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = hollow(tuple(parameter.shape), torch.float32)
            optimizer.step()
            for parameter in parameters:
                parameter.grad = None
        found = tape.recording.when("end")
        tape.phase("end")
        found = tape.recording.when("end")
    return found["optimizer"], tape.recording.paged


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("adamw_torch", torch.optim.AdamW),
        ("adamw_torch_fused", lambda p: torch.optim.AdamW(p, fused=True)),
        ("sgd", torch.optim.SGD),
        ("adagrad", torch.optim.Adagrad),
        ("rmsprop", torch.optim.RMSprop),
    ],
)
def test_torchs_keep_what_the_real_ones_do(name: str, make: Any) -> None:
    parameters = [nn.Parameter(torch.ones(shape)) for shape in SHAPES]
    real = make(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    real.step()
    state = sum(v.nbytes for each in real.state.values() for v in each.values() if isinstance(v, torch.Tensor))
    assert kept(name, "cpu")[0] == state


def test_counters_of_a_gpus_optimizer_are_on_the_host_unless_fused() -> None:
    moments = 2 * 4 * (LARGE + MIDDLE + SMALL)
    assert kept("adamw_torch", "cuda") == (moments, 0)
    assert kept("adamw_torch_fused", "cuda") == (moments + 3 * 4, 0)


def scales(count: int) -> int:
    return 4 * -(-count // 256)


EIGHT_BIT = LARGE + scales(LARGE), MIDDLE + scales(MIDDLE), 4 * SMALL


@pytest.mark.parametrize(
    ("name", "expected", "paged"),
    [
        ("adamw_8bit", 2 * sum(EIGHT_BIT), 0),
        ("paged_adamw_8bit", 2 * (sum(EIGHT_BIT) - LARGE), 2 * LARGE),
        ("paged_adamw", 2 * 4 * (MIDDLE + SMALL), 2 * 4 * LARGE),
        ("lion_8bit", sum(EIGHT_BIT), 0),
        ("lion_32bit", 4 * (LARGE + MIDDLE + SMALL), 0),
        ("rmsprop_bnb", 4 * (LARGE + MIDDLE + SMALL), 0),
        ("ademamix", 3 * 4 * (LARGE + MIDDLE + SMALL), 0),
    ],
)
def test_bitsandbytes_by_hand(name: str, expected: int, paged: int) -> None:
    assert kept(name, "cuda") == (expected, paged)


def test_a_cpu_pages_nothing() -> None:
    assert kept("paged_adamw_8bit", "cpu") == (2 * sum(EIGHT_BIT), 0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_known_optimizer_steps_and_the_second_step_keeps_no_more(name: str) -> None:
    total, _ = kept(name, "cuda")
    assert total >= 0
    check_optimizer(name)


def test_names_that_are_wrong_or_unknown() -> None:
    with pytest.raises(UnknownNameError, match="adamw"):
        check_optimizer("adamw_touch")
    with pytest.raises(UnsupportedError, match="lomo"):
        check_optimizer("lomo")


def test_allocations_are_recorded_per_parameter() -> None:
    tape = Tape(shapes=Shapes())
    parameter = nn.Parameter(hollow((512, 256), torch.float32))
    tape.register([parameter], "parameters", 4)
    with tape:
        tape.phase("1.optimizer", "optimizer")
        parameter.grad = hollow((512, 256), torch.float32)
        Optimizer("adamw_torch_fused", [parameter], tape, device="cuda").step()
    layers = {event[4] for event in tape.recording.events if event[0] == ALLOCATED and event[3] == "optimizer"}
    assert 4 in layers
