"""Gradient norms in groups, and how far a step moves the weights: a few kernels over all tensors, no read."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

SAMPLE = 2**24
"""At most so many weights are copied to see how far a step moved them: 64 MiB in fp32."""

_ATTENTION = ("attn", "attention", "mixer")
_MLP = ("mlp", "feed_forward", "ffn", "experts", "moe", "fc1", "fc2", "dense_h_to_4h", "dense_4h_to_h")


class GradientGroups:
    """The trainable parameters, and the groups that each belongs to.

    Args:
        model: Read once, for names and classes.
    """

    def __init__(self, model: nn.Module) -> None:
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.parameters = [parameter for _, parameter in named]
        members: dict[str, list[int]] = defaultdict(list)
        for index, (name, _) in enumerate(named):
            for group in _groups_of(name, model):
                members[group].append(index)
        self.names = sorted(members)
        self._members = [members[name] for name in self.names]
        self._matrix: Tensor | None = None
        self.zero_streak: Tensor | None = None

    def norms(self) -> Tensor:
        """The 2-norm of every group's gradients and, last, of all of them: shape (groups + 1,), fp32, on the device."""
        gradients = [parameter.grad for parameter in self.parameters]
        device = self.parameters[0].device
        zero = torch.zeros((), device=device)
        present = [gradient for gradient in gradients if gradient is not None]
        norms = iter(torch._foreach_norm(present, 2, dtype=torch.float32) if present else ())
        each = torch.stack([zero if gradient is None else next(norms).to(device) for gradient in gradients])
        squares = each.square()
        # Not a product: 0 times the NaN of one group would be everybody's.
        groups = torch.where(self._membership(device), squares, 0).sum(1)
        return torch.cat([groups, squares.sum()[None]]).sqrt()

    def count_zeros(self, norms: Tensor) -> None:
        """Count, on the device, how often in a row a group's norm was exactly zero.

        Looks at gradients that are not finite do not count: clipping by an infinite norm makes the finite ones 0.
        """
        groups, total = norms[:-1], norms[-1]
        if self.zero_streak is None:
            self.zero_streak = torch.zeros_like(groups)
        counted = torch.where(groups == 0, self.zero_streak + 1, 0)
        self.zero_streak = torch.where(total.isfinite(), counted, self.zero_streak)

    def _membership(self, device: torch.device) -> Tensor:
        if self._matrix is None or self._matrix.device != device:
            matrix = torch.zeros(len(self.names), len(self.parameters), dtype=torch.bool)
            for row, members in enumerate(self._members):
                matrix[row, members] = True
            self._matrix = matrix.to(device)
        return self._matrix


class UpdateRatio:
    """How far one optimizer step moves the weights, relative to their size: ||after - before|| / ||before||.

    Over an evenly spaced sample of whole tensors, of at most `SAMPLE` weights.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        total = sum(parameter.numel() for parameter in parameters)
        every = max(1, -(-total // SAMPLE))
        self._sample: list[Any] = []
        room = SAMPLE
        for parameter in parameters[::every]:
            if parameter.numel() <= room:
                self._sample.append(parameter)
                room -= parameter.numel()
        self._before: list[Tensor] | None = None

    def before_step(self) -> None:
        """Copy the sample."""
        self._before = [parameter.detach().clone() for parameter in self._sample]

    def after_step(self) -> Tensor | None:
        """The ratio, on the device."""
        if not self._before:
            return None
        before, self._before = self._before, None
        device = before[0].device
        moved = torch._foreach_sub([parameter.detach() for parameter in self._sample], before)
        sizes = [
            torch.stack([norm.to(device) for norm in torch._foreach_norm(tensors, 2, dtype=torch.float32)])
            for tensors in (moved, before)
        ]
        ratio: Tensor = sizes[0].norm() / sizes[1].norm()
        return ratio


@torch.no_grad()
def first_bad_weight(model: nn.Module) -> str | None:
    """The name of a trainable parameter that holds NaN or infinity; a read for each parameter."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    # A sum is finite only if every part of it is; in fp32, and without a copy of the weights.
    sums = [parameter.sum(dtype=torch.float32).item() for _, parameter in named]
    return next((name for (name, _), total in zip(named, sums, strict=True) if not math.isfinite(total)), None)


def _groups_of(name: str, model: nn.Module) -> list[str]:
    """The kind of module that a parameter is in, and which of LoRA's matrices it is."""
    parts = name.split(".")
    groups = [_kind(parts, model)]
    groups += [part for part in ("lora_A", "lora_B") if part in parts]
    groups += ["lora_A"] if "lora_embedding_A" in parts else ["lora_B"] if "lora_embedding_B" in parts else []
    return groups


def _kind(parts: list[str], model: nn.Module) -> str:
    from torch import nn

    lowered = [part.lower() for part in parts]
    module: Any = model
    for part in parts[:-1]:
        module = getattr(module, part)
        if "norm" in type(module).__name__.lower():
            return "norms"
        if isinstance(module, nn.Embedding):
            return "embeddings"
    if any(part.startswith("lora_embedding") or part in ("lm_head", "embed_out") for part in lowered):
        return "embeddings"
    if any(word in part for part in lowered for word in _ATTENTION):
        return "attention"
    if any(word in part for part in lowered for word in _MLP):
        return "mlp"
    return "norms" if any("norm" in part for part in lowered) else "other"
