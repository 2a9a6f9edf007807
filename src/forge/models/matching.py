"""Naming modules and parameters so that PEFT adapts exactly those.

PEFT takes module names as suffixes or as one regular expression, and parameter names as suffixes. Which of these is
exact depends on the rest of the model (a vision tower has a `q_proj` too) and on what PEFT makes of the names (in some
mixtures of experts it rewrites them), so each is checked against the whole model before it is used.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .. import compat
from ..errors import UnsupportedError
from .layers import name_in_layer

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ExactNames:
    """Names that PEFT matches with exactly the wanted modules and parameters."""

    target_modules: tuple[str, ...] | str
    target_parameters: tuple[str, ...]
    linear_parameters: tuple[str, ...]
    """Full names of the linear layers' weights among the parameters."""


class TargetNamer:
    """Finds names for parts of one model, whose `named_base_modules` are `modules`."""

    def __init__(self, model: nn.Module, modules: dict[str, nn.Module], layers_path: str) -> None:
        self._model = model
        self._layers_path = layers_path
        self._module_names = [name for name in modules if name]
        self._parameter_names = [
            f"{name}.{key}" for name, module in modules.items() for key, _ in module.named_parameters(recurse=False)
        ]

    def name_exactly(self, modules: list[str], parameters: list[str]) -> ExactNames:
        """The shortest names of these modules and parameters, full names, that match them and nothing else.

        Raises:
            UnsupportedError: when the installed PEFT leaves no way to name them.
        """
        weights: list[str] = []
        for _ in range(2):
            as_modules = [name for name in modules if f"{name}.weight" not in set(weights)]
            target_parameters = tuple(self._parameter_suffixes([*parameters, *weights]))
            for target_modules in self._candidates(as_modules):
                if self._matched(target_modules, target_parameters) == ({*as_modules}, {*parameters, *weights}):
                    return ExactNames(target_modules, target_parameters, tuple(weights))
            # In some families PEFT takes the names of dense layers (`down_proj`) for those of the fused experts and
            # would leave the dense layers out. Named by their weights, they are adapted all the same.
            weights = [f"{name}.weight" for name in self._mistaken(modules)]
        raise UnsupportedError(
            f"No target_modules name exactly the layers of {type(self._model).__name__} that LoRA should adapt: the "
            "installed PEFT rewrites them. Pass target_modules=[...] to choose yourself."
        )

    def _candidates(self, modules: list[str]) -> Iterator[tuple[str, ...] | str]:
        """Ways to name the modules, the shortest first; the last, all full names, leaves no doubt."""
        suffixes = self._module_suffixes(modules)
        if suffixes is not None:
            yield suffixes
        if modules:
            yield self._pattern(modules)
        yield tuple(modules)

    def _module_suffixes(self, modules: list[str]) -> tuple[str, ...] | None:
        """The shortest suffixes that no other module's name has; None where names differ only above the layer."""
        wanted = set(modules)
        clashing = {tail for name in self._module_names if name not in wanted for tail in _tails(name)}
        suffixes: dict[str, None] = {}
        for name in modules:
            within = name_in_layer(name, self._layers_path)
            short = next((tail for tail in reversed(list(_tails(within))) if tail not in clashing), None)
            if short is None:
                return None
            suffixes[short] = None
        return tuple(suffixes)

    def _pattern(self, modules: list[str]) -> str:
        """One regular expression: the path of the layers, any index, and the leaves grouped by their parents."""
        leaves: dict[str, dict[str, None]] = {}
        for name in modules:
            parent, dot, leaf = name_in_layer(name, self._layers_path).rpartition(".")
            any_index = r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in parent.split("."))
            leaves.setdefault(any_index + re.escape(dot), {})[re.escape(leaf)] = None
        branches = "|".join(f"{parent}(?:{'|'.join(group)})" for parent, group in leaves.items())
        return rf"{re.escape(self._layers_path)}\.\d+\.(?:{branches})"

    def _parameter_suffixes(self, parameters: list[str]) -> list[str]:
        """Names within a layer where no other parameter ends alike, full names otherwise; PEFT takes no pattern."""
        wanted = set(parameters)
        clashing = {tail for name in self._parameter_names if name not in wanted for tail in _tails(name)}
        short = ((name, name_in_layer(name, self._layers_path)) for name in parameters)
        return list(dict.fromkeys(name if within in clashing else within for name, within in short))

    def _mistaken(self, modules: list[str]) -> list[str]:
        """The modules that PEFT does not adapt even when it is given their full names."""
        kinds: dict[str, bool] = {}
        for name in modules:
            kind = name_in_layer(name, self._layers_path)
            if kind not in kinds:
                kinds[kind] = self._matched((name,), ()) != ({name}, set())
        return [name for name in modules if kinds[name_in_layer(name, self._layers_path)]]

    def _matched(
        self, target_modules: tuple[str, ...] | str, target_parameters: tuple[str, ...]
    ) -> tuple[set[str], set[str]] | None:
        """The modules and parameters that PEFT would adapt, None where it would refuse or change ranks."""
        resolved = compat.resolve_lora_targets(self._model, target_modules, target_parameters)
        if resolved is None:
            return None
        modules, parameters = resolved
        if isinstance(modules, str):
            pattern = re.compile(modules)
            matched = {name for name in self._module_names if pattern.fullmatch(name)}
        else:
            matched = _ending_with(self._module_names, modules)
        return matched, _ending_with(self._parameter_names, parameters)


def _tails(name: str) -> Iterator[str]:
    """The suffixes of a dotted name, the longest first.

    >>> list(_tails("mlp.gate.weight"))
    ['mlp.gate.weight', 'gate.weight', 'weight']
    """
    while name:
        yield name
        name = name.partition(".")[2]


def _ending_with(names: Iterable[str], suffixes: Iterable[str]) -> set[str]:
    """The names that have one of the suffixes."""
    wanted = set(suffixes)
    return {name for name in names if any(tail in wanted for tail in _tails(name))}
