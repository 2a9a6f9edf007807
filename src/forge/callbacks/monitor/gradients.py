"""Gradient norms in groups, and how far a step moves the weights: a few kernels over all tensors, no read."""

from __future__ import annotations

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
        return torch.cat([self._membership(device) @ squares, squares.sum()[None]]).sqrt()

    def count_zeros(self, norms: Tensor) -> None:
        """Count, on the device, how often in a row a group's norm was exactly zero."""
        groups = norms[:-1]
        if self.zero_streak is None:
            self.zero_streak = torch.zeros_like(groups)
        self.zero_streak = torch.where(groups == 0, self.zero_streak + 1, 0)

    def drop(self) -> None:
        """Throw the gradients away: the optimizer passes over parameters without one, its state included."""
        for parameter in self.parameters:
            parameter.grad = None

    def _membership(self, device: torch.device) -> Tensor:
        if self._matrix is None or self._matrix.device != device:
            matrix = torch.zeros(len(self.names), len(self.parameters))
            for row, members in enumerate(self._members):
                matrix[row, members] = 1
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
