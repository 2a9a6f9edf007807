"""Mixtures of experts: which parameters are the experts, and which module routes between them.

Names do not tell (`gate` is a router in Mixtral and half of an MLP elsewhere); structure does. Experts are a stack of E
equal matrices: one 3-dimensional parameter, or a list of E modules. Their router is the neighbour whose one matrix
has E outputs. A neighbour with a single output weighs the shared expert against the others (Qwen2-MoE) and is a
gate too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forge.models.layers import base_modules_below

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Experts:
    """What a search for experts found; full names, relative to the transformers model."""

    routers: frozenset[str]
    parameters: tuple[str, ...]
    """Fused experts, in the order of the model."""


def is_linear(module: nn.Module) -> bool:
    """Whether LoRA knows the module as a linear layer: `nn.Linear`, its bitsandbytes kin, and GPT-2's `Conv1D`."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def find_experts(modules: dict[str, nn.Module], layers_path: str) -> Experts:
    """Experts and routers among the decoder layers of `modules` (a `named_base_modules`)."""
    routers: set[str] = set()
    parameters: list[str] = []
    stacks = _expert_stacks(modules, layers_path)
    for owner, (num_experts, fused) in stacks.items():
        gates = _gates(modules, owner, num_experts, layers_path, stacks)
        if gates:  # without a router a stack of matrices is something else, block-diagonal heads for instance
            routers.update(gates)
            parameters.extend(fused)
    return Experts(frozenset(routers), tuple(parameters))


def _expert_stacks(modules: dict[str, nn.Module], layers_path: str) -> dict[str, tuple[int, list[str]]]:
    """The owners of stacked matrices: their number of experts, and the names of the fused parameters if any."""
    from torch import nn
    from torch.nn.modules.conv import _ConvNd

    stacks: dict[str, tuple[int, list[str]]] = {}
    for name, module in modules.items():
        if not name.startswith(f"{layers_path}."):
            continue
        if isinstance(module, nn.ModuleList) and len(module) > 1:
            stacks[name] = (len(module), [])
        if isinstance(module, _ConvNd):
            continue
        fused = {
            f"{name}.{key}": parameter.shape[0]
            for key, parameter in module.named_parameters(recurse=False)
            if parameter.ndim == 3 and min(parameter.shape) > 1 and parameter.dtype.is_floating_point
        }
        if fused:
            stacks[name] = (next(iter(fused.values())), list(fused))
    return stacks


def _gates(
    modules: dict[str, nn.Module],
    owner: str,
    num_experts: int,
    layers_path: str,
    stacks: dict[str, tuple[int, list[str]]],
) -> set[str]:
    """The routers beside `owner`: among its siblings, then among its parent's, up to the decoder layer."""
    block = owner.rpartition(".")[0]
    while len(block) > len(layers_path):
        siblings = {f"{block}.{name}": child for name, child in modules[block].named_children()}
        outputs = {
            name: _matrix_outputs(child)
            for name, child in siblings.items()
            if not any(stack == name or stack.startswith(f"{name}.") for stack in stacks)
        }
        if [num_experts] in outputs.values():
            return {sibling for sibling, widths in outputs.items() if widths in ([num_experts], [1])}
        block = block.rpartition(".")[0]
    return set()


def _matrix_outputs(root: nn.Module) -> list[int]:
    """The number of outputs of every matrix in `root`."""
    outputs: list[int] = []
    for module in base_modules_below(root):
        if is_linear(module):  # a quantised weight has lost its shape, the layer has not; Conv1D calls it nf
            width: Any = getattr(module, "out_features", None) or module.nf
            outputs.append(int(width))
        else:
            outputs += [p.shape[0] for p in module.parameters(recurse=False) if p.ndim >= 2]
    return outputs
