"""The optimizer of a scenario: torch's and transformers' own, or what bitsandbytes' keep on CUDA.

bitsandbytes' optimizers need CUDA to be run. What they allocate is short enough to say (bitsandbytes,
optim/optimizer.py, `Optimizer2State.init_state`): two 8-bit moments with an fp32 scale per 256 numbers each, fp32
moments for tensors of fewer than 4,096 numbers; paged ones put what has 100,000 numbers or more into managed memory,
which PyTorch's allocator does not see and the driver moves to the host when the GPU is full.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...errors import UnknownNameError, UnsupportedError
from .tape import Tape

_SMALL, _SCALED, _PAGED = 4096, 256, 100_000
_MOMENTS = {"adamw": 2, "ademamix": 3, "lion": 1, "rmsprop": 1}
_BITSANDBYTES = {
    "adamw_bnb_8bit": ("adamw", 8, False),
    "adamw_8bit": ("adamw", 8, False),
    "paged_adamw_32bit": ("adamw", 32, True),
    "paged_adamw": ("adamw", 32, True),
    "paged_adamw_8bit": ("adamw", 8, True),
    "ademamix": ("ademamix", 32, False),
    "ademamix_8bit": ("ademamix", 8, False),
    "paged_ademamix_32bit": ("ademamix", 32, True),
    "paged_ademamix_8bit": ("ademamix", 8, True),
    "lion_32bit": ("lion", 32, False),
    "lion_8bit": ("lion", 8, False),
    "paged_lion_32bit": ("lion", 32, True),
    "paged_lion_8bit": ("lion", 8, True),
    "rmsprop_bnb": ("rmsprop", 32, False),
    "rmsprop_bnb_8bit": ("rmsprop", 8, False),
    "rmsprop_bnb_32bit": ("rmsprop", 32, False),
}
_TORCH = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor")
OPTIMIZERS = (*_TORCH, *_BITSANDBYTES)


class Optimizer:
    """What steps: a real optimizer, or bitsandbytes' state.

    Args:
        name: transformers' name, of those in OPTIMIZERS.
        parameters: what trains.
        tape: where its state is recorded.
        device: "cuda" or "cpu"; bitsandbytes pages nothing on a CPU.
        embeddings: weights whose moments the Trainer keeps in 32 bits, whatever the optimizer's width.

    Raises:
        UnknownNameError: there is no such optimizer.
        UnsupportedError: transformers has it, and forge does not know what it keeps.
    """

    def __init__(
        self,
        name: str,
        parameters: Sequence[nn.Parameter],
        tape: Tape,
        *,
        device: str,
        embeddings: Sequence[torch.Tensor] = (),
    ) -> None:
        check_optimizer(name)
        self._wide = {id(weight) for weight in embeddings}  # transformers, Trainer.create_optimizer
        self._parameters, self._tape = parameters, tape
        self._made = False
        self._inner: Any = None
        self._state: list[torch.Tensor] = []
        if name in _BITSANDBYTES:
            family, bits, paged = _BITSANDBYTES[name]
            self._moments, self._bits, self._paged = _MOMENTS[family], bits, paged and device == "cuda"
        elif name == "adafactor":
            from transformers.optimization import Adafactor

            self._inner = Adafactor(parameters, scale_parameter=False, relative_step=False, lr=1e-4)
        else:
            self._inner = _torch_optimizer(name, parameters, device)
        if self._inner is not None:
            made = dict(self._inner.state)
            self._inner.state = _Turns(tape)
            self._inner.state.update(made)

    def step(self) -> None:
        """One step: the first one makes the state."""
        if self._inner is not None:
            self._inner.step()
        elif not self._made:
            self._made = True
            for parameter in self._parameters:
                if parameter.grad is not None:
                    self._make_state(parameter)

    def _make_state(self, parameter: torch.Tensor) -> None:
        count = parameter.numel()
        eight_bit = self._bits == 8 and count >= _SMALL and id(parameter) not in self._wide
        dtype = torch.uint8 if eight_bit else torch.float32
        if self._paged and count >= _PAGED:
            for _ in range(self._moments):
                self._tape.paged(count * dtype.itemsize, parameter)
        else:
            self._state += [torch.empty_like(parameter, dtype=dtype) for _ in range(self._moments)]
        if eight_bit:
            scales = -(-count // _SCALED)
            self._state += [parameter.new_empty((scales,), dtype=torch.float32) for _ in range(self._moments)]


class _Turns(defaultdict[torch.Tensor, dict[str, Any]]):
    """An optimizer's state, which it looks up when a parameter's turn comes."""

    def __init__(self, tape: Tape) -> None:
        super().__init__(dict)
        self._tape = tape

    def __getitem__(self, parameter: torch.Tensor) -> dict[str, Any]:
        self._tape.turn_of(parameter)
        return super().__getitem__(parameter)


def check_optimizer(name: str) -> None:
    """Refuse what nothing is known of.

    Raises:
        UnknownNameError: there is no such optimizer.
        UnsupportedError: transformers has it, and forge does not know what it keeps.
    """
    if name in OPTIMIZERS:
        return
    from transformers.training_args import OptimizerNames

    known = [str(each.value) for each in OptimizerNames]
    if name not in known:
        raise UnknownNameError.among("optimizer", name, known)
    raise UnsupportedError(
        f"optim={name!r}: forge does not know what this optimizer keeps. It knows {', '.join(OPTIMIZERS)}; take the "
        "nearest of them for the estimate."
    )


def _torch_optimizer(name: str, parameters: Sequence[nn.Parameter], device: str) -> Any:
    if name == "adamw_torch_fused":
        return torch.optim.AdamW(parameters, fused=True)
    several_at_once: dict[str, Any] = {"foreach": True} if device == "cuda" else {}  # torch's choice on CUDA
    if name == "adamw_torch":
        return torch.optim.AdamW(parameters, **several_at_once)
    kinds: dict[str, Any] = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "rmsprop": torch.optim.RMSprop}
    return kinds[name](parameters, lr=1e-3, **several_at_once)
