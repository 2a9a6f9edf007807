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
        self.tensors: dict[str, Tensor] = dict(first_of.values())
        if not self.tensors:
            raise ForgeError("There is nothing to average: no tensor was given. Unfreeze parameters or add an adapter.")
        for name, tensor in self.tensors.items():
            if not tensor.is_floating_point() or tensor.is_meta:
                raise ForgeError(
                    f"{name} is {tensor.dtype} on {tensor.device}: only floating-point values that are in memory can "
                    "be averaged."
                )
        self.average: dict[str, Tensor] = {
            name: tensor.detach().to(
                device or tensor.device, torch.promote_types(tensor.dtype, torch.float32), copy=True
            )
            for name, tensor in self.tensors.items()
        }
        self.updates = 0
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

    @torch.no_grad()
    def copy_to(self, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Write the average into tensors of the same names, each in its own dtype and on its own device.

        Args:
            tensors: By default those that are averaged.

        Raises:
            ForgeError: Names or shapes are not those of the average; nothing has been written then.
        """
        targets = self.tensors if tensors is None else tensors
        self._check(targets, "The model")
        for name, shadow in self.average.items():
            targets[name].detach().copy_(shadow)

    def state_dict(self) -> dict[str, Any]:
        """`{"average": {name: tensor}, "updates": int}`; the tensors are copies."""
        return {"average": {name: shadow.clone() for name, shadow in self.average.items()}, "updates": self.updates}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over an average that `state_dict` returned.

        Raises:
            ForgeError: Names or shapes are not those of the average; nothing has changed then.
        """
        self._check(state["average"], "The saved average")
        for name, shadow in self.average.items():
            shadow.copy_(state["average"][name])
        self.updates = int(state["updates"])

    def _check(self, tensors: Mapping[str, Tensor], whose: str) -> None:
        if missing := [name for name in self.average if name not in tensors]:
            raise ForgeError(
                f"{whose} lacks {len(missing)} of the {len(self.average)} averaged tensors, the first being "
                f"{missing[0]!r}. It must have the same layers and the same adapter, not yet merged."
            )
        for name, shadow in self.average.items():
            if tensors[name].shape != shadow.shape:
                raise ForgeError(
                    f"{name} has the shape {tuple(tensors[name].shape)}, and its average {tuple(shadow.shape)}. "
                    "Rank and base model must be those of the run that was averaged."
                )

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
