"""The average itself: named tensors and their shadow, with no trainer in sight."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ...errors import ForgeError

if TYPE_CHECKING:
    from torch import Tensor


ON_CPU, ON_DEVICE = 2**16, 2**24
"""So many numbers are converted to the shadow's dtype at a time: 256 KiB of fp32, for a CPU's cache, or 64 MiB."""


class EMA:
    """An exponential moving average of named tensors, kept in fp32.

    After `update(decay)` every shadow is `decay * shadow + (1 - decay) * tensor`. The shadow is fp32 whatever the
    tensors are (fp64 for fp64): in bf16, with its 8 bits of mantissa, a step of `(1 - 0.999) * difference` is rounded
    away and the average stays where it began.

    >>> import torch
    >>> weight = torch.zeros(2, dtype=torch.bfloat16)
    >>> ema = EMA({"weight": weight})
    >>> weight += 1
    >>> ema.update(0.75)
    >>> ema.average["weight"]
    tensor([0.2500, 0.2500])

    The tensors are held by reference, so in-place changes (an optimizer's) are seen and replaced tensors are not.
    A tensor under two names (tied weights) is averaged once, under the first.

    The average of a product is not the product of averages: for LoRA the average is of A and of B, and the adapter's
    change to the model is `average(B) @ average(A)`, not `average(B @ A)`. The two agree while the weights move little
    within the averaging window (docs/callbacks.md).

    Args:
        tensors: Name to tensor, or pairs of them, such as `model.named_parameters()`. Floating point, any shape.
        device: Where the shadow is kept; by default beside each tensor. Another device costs a copy per update.

    Raises:
        ForgeError: There is nothing to average, or a tensor holds no floating-point values of its own.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], *, device: torch.device | str | None = None
    ) -> None:
        first_of: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in dict(tensors).items():
            first_of.setdefault(id(tensor), (name, tensor))
        self.tensors: dict[str, Tensor] = {}
        self.average: dict[str, Tensor] = {}
        self.updates = 0
        self._device = device
        self.add(dict(first_of.values()))
        if not self.tensors:
            raise ForgeError("There is nothing to average: no tensor was given. Unfreeze parameters or add an adapter.")

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Average more tensors, from what they are now.

        Raises:
            ForgeError: A tensor holds no floating-point values of its own; nothing has been added then.
        """
        for name, tensor in tensors.items():
            if not tensor.is_floating_point() or tensor.is_meta:
                raise ForgeError(
                    f"{name} is {tensor.dtype} on {tensor.device}: only floating-point values that are in memory can "
                    "be averaged."
                )
        for name, tensor in tensors.items():
            wide = torch.promote_types(tensor.dtype, torch.float32)
            self.tensors[name] = tensor
            self.average[name] = tensor.detach().to(self._device or tensor.device, wide, copy=True)
        self._groups = self._grouped()

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Move the average towards the tensors.

        Args:
            decay: What the average keeps of itself, in [0, 1].
        """
        for shadows, tensors in self._groups:
            device, dtype = shadows[0].device, shadows[0].dtype
            # Without waiting only towards a device: a copy to the host would be read before it has arrived.
            here = [tensor.detach().to(device, dtype, non_blocking=device.type != "cpu") for tensor in tensors]
            torch._foreach_lerp_(shadows, here, 1 - decay)
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """`{"average": {name: tensor}, "updates": int}`; the tensors are copies."""
        return {"average": {name: shadow.clone() for name, shadow in self.average.items()}, "updates": self.updates}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over an average that `state_dict` returned.

        Raises:
            ForgeError: Names or shapes are not those of the average; nothing has changed then.
        """
        check_same(self.average, state["average"], "The saved average")
        for name, shadow in self.average.items():
            shadow.copy_(state["average"][name])
        self.updates = int(state["updates"])

    def _grouped(self) -> list[tuple[list[Tensor], list[Tensor]]]:
        """Shadows and tensors that one kernel can take together, in parts where they must be converted first."""
        groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
        numbers: Counter[Any] = Counter()
        for name, shadow in self.average.items():
            tensor = self.tensors[name]
            kind: tuple[Any, ...] = (shadow.device, shadow.dtype)
            if (tensor.device, tensor.dtype) != kind:
                part = ON_CPU if shadow.device.type == "cpu" else ON_DEVICE
                kind = (*kind, numbers[kind] // part)
                numbers[kind[:2]] += tensor.numel()
            shadows, tensors = groups[kind]
            shadows.append(shadow)
            tensors.append(tensor)
        return list(groups.values())

    def __repr__(self) -> str:
        numbers = sum(shadow.numel() for shadow in self.average.values())
        return f"EMA({len(self.average)} tensors, {numbers:,} numbers, {self.updates} updates)"


def check_same(average: Mapping[str, Tensor], tensors: Mapping[str, Tensor], whose: str) -> None:
    """Raise unless every averaged tensor has its like.

    Raises:
        ForgeError: Names or shapes are not those of the average.
    """
    if missing := [name for name in average if name not in tensors]:
        raise ForgeError(
            f"{whose} lacks {len(missing)} of the {len(average)} averaged tensors, the first being {missing[0]!r}. It "
            "must have the same layers and the same adapter, not merged: after training, that is trainer.model."
        )
    for name, shadow in average.items():
        if tensors[name].shape != shadow.shape:
            raise ForgeError(
                f"{name} has the shape {tuple(tensors[name].shape)}, and its average {tuple(shadow.shape)}. Rank and "
                "base model must be those of the run that was averaged."
            )
