"""Mixtures of experts: which parameters are the experts, and which module routes between them.

Names do not tell (`gate` is a router in Mixtral and half of an MLP elsewhere); structure does. Experts are a stack of E
equal matrices: one 3-dimensional parameter, or a list of E modules. Their router is the neighbour that ends in E
outputs. A neighbour with a single output weighs the shared expert against the others (Qwen2-MoE) and is a gate too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .layers import base_modules_below

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
    stacks = {
        name: stack
        for name, module in modules.items()
        if name.startswith(f"{layers_path}.") and (stack := _stack(name, module)) is not None
    }
    gates = {name: _gates(modules, name, stacks, layers_path) for name in stacks}
    # Without a router a stack of matrices is something else (block-diagonal heads, for instance), unless it stands
    # beside one that has a router: then it holds the shared experts.
    blocks = {_parent(name) for name, found in gates.items() if found}
    parameters = [key for name, stack in stacks.items() if _parent(name) in blocks for key in stack.parameters]
    return Experts(frozenset().union(*gates.values()), tuple(parameters))


@dataclass(frozen=True)
class _Stack:
    """A module that holds equal matrices: how many, and the names of the fused parameters if they are fused."""

    size: int
    parameters: tuple[str, ...] = ()


def _stack(name: str, module: nn.Module) -> _Stack | None:
    from torch import nn
    from torch.nn.modules.conv import _ConvNd

    if isinstance(module, nn.ModuleList):
        return _Stack(len(module)) if len(module) > 1 else None
    if isinstance(module, _ConvNd):
        return None
    fused = {
        f"{name}.{key}": parameter.shape[0]
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and min(parameter.shape) > 1 and parameter.dtype.is_floating_point
    }
    return _Stack(min(fused.values()), tuple(fused)) if fused else None


def _gates(modules: dict[str, nn.Module], name: str, stacks: dict[str, _Stack], layers_path: str) -> set[str]:
    """The routers of the stack `name`: beside it, or beside a module around it, up to the decoder layer."""
    size = stacks[name].size
    block = _parent(name)
    beside = _outputs_in(modules, block, stacks)
    while len(block) > len(layers_path):
        outputs = _outputs_in(modules, block, stacks)
        if any(last == size for _, last in outputs.values()):
            return {child for child, (matrices, last) in outputs.items() if last == size or (matrices, last) == (1, 1)}
        block = _parent(block)
    # Some routers also score experts that are not in the stack: shared ones (Inkling), or one that does nothing (Zaya).
    if len(stacks[name].parameters) > 1:
        return {child for child, (_, last) in beside.items() if size < last <= 2 * size}
    return set()


def _outputs_in(modules: dict[str, nn.Module], block: str, stacks: dict[str, _Stack]) -> dict[str, tuple[int, int]]:
    """For each child of `block` that is no stack: how many matrices it has, and the outputs of the last."""
    found = {}
    for key, child in modules[block].named_children():
        name = f"{block}.{key}"
        widths = _matrix_outputs(child)
        if widths and not any(stack == name or stack.startswith(f"{name}.") for stack in stacks):
            found[name] = (len(widths), widths[-1])
    return found


def _matrix_outputs(root: nn.Module) -> list[int]:
    """The number of outputs of every matrix in `root`."""
    outputs: list[int] = []
    for module in base_modules_below(root):
        if is_linear(module):  # a quantised weight has lost its shape, the layer has not; Conv1D calls it nf
            width: Any = getattr(module, "out_features", None) or module.nf
            outputs.append(int(width))
        else:
            matrices = (p for p in module.parameters(recurse=False) if p.ndim >= 2 and min(p.shape) > 1)
            outputs += [p.shape[0] for p in matrices]
    return outputs


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
