"""What LoRA should adapt: every linear layer of the language decoder, its experts, and nothing else."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import compat
from ..errors import UnsupportedError
from .experts import Experts, is_linear
from .layers import name_in_layer, text_attribute
from .matching import TargetNamer

if TYPE_CHECKING:
    from torch import nn

_TOWERS = (
    "vision|visual|vit|image|img|video|audio|speech|sound|tower|encoder|"
    "projector|connector|merger|resampler|perceiver|qformer|aligner|vq"
)
_LINEARS = (
    "[qkvo]_proj|out_proj|qkv_proj|gate_proj|up_proj|down_proj|gate_up_proj|w[123]|"  # Llama and its heirs, Phi-3
    "q_[ab]_proj|kv_a_proj_with_mqa|kv_b_proj|"  # DeepSeek's latent attention
    "c_attn|q_attn|c_proj|c_fc|fc_in|fc_out|fc[12]|"  # GPT-2, GPT-J, OPT, Phi
    "query_key_value|dense|dense_h_to_4h|dense_4h_to_h|Wqkv"  # GPT-NeoX, Falcon, Bloom, MPT
)
DEFAULT_TARGET_PATTERN = (
    rf"(?!(?:.*[._])?(?:{_TOWERS})[^.]*\.)"
    r"(?:.*\.)?(?:layers|layer|h|blocks)\.\d+\."
    rf"(?:.*\.)?(?<!\.experts\.)(?:{_LINEARS})"
)
"""What to adapt when no model is known: the linear layers of the common families, by name, below numbered layers and
outside everything that is called like a vision or audio tower. Fused experts are left out, because no pattern of
modules reaches them alike in all versions of PEFT. A model makes it exact, experts included."""


@dataclass(frozen=True)
class LoraTargets:
    """What `peft.LoraConfig` should say for one model.

    Args:
        target_modules: suffixes of module names where these are exact, otherwise one regular expression.
        target_parameters: suffixes of parameter names: fused experts, and the weights of linear layers that PEFT
            would mistake for fused experts if they were named as modules.
        fan_in_fan_out: whether the layers are GPT-2's `Conv1D`, which stores its weight transposed.
        uncovered: matrices that LoRA should adapt and PEFT cannot, relative to a decoder layer.
        bypassed: linear layers left out because a state-space kernel reads their weight itself, past any adapter.
        linear_parameters: those of `target_parameters` that are weights of linear layers, relative to a decoder layer;
            PEFT cannot adapt them where the linear layers are quantised.
    """

    target_modules: tuple[str, ...] | str
    target_parameters: tuple[str, ...] = ()
    fan_in_fan_out: bool = False
    uncovered: tuple[str, ...] = ()
    bypassed: tuple[str, ...] = ()
    linear_parameters: tuple[str, ...] = ()

    def lora_kwargs(self, *, quantized: bool = False) -> dict[str, Any]:
        """The arguments of `peft.LoraConfig` that these targets decide.

        >>> LoraTargets(("q_proj", "v_proj")).lora_kwargs()
        {'target_modules': ['q_proj', 'v_proj']}

        Args:
            quantized: whether the model's linear layers are, or will be, packed to 4 or 8 bits.

        Raises:
            UnsupportedError: when a part of the decoder cannot be adapted.
        """
        modules = self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules)
        packed = self.linear_parameters if quantized else ()
        if self.uncovered or packed:
            raise UnsupportedError(
                f"PEFT cannot adapt {', '.join(self.uncovered + packed)} in the decoder layers"
                + (" of a quantised model. Choose a precision that is not quantised, or say" if packed else ". Say")
                + f" yourself which modules are enough; it can adapt target_modules={modules!r}."
            )
        kwargs: dict[str, Any] = {"target_modules": modules}
        if self.target_parameters:
            kwargs["target_parameters"] = list(self.target_parameters)
        if self.fan_in_fan_out:
            kwargs["fan_in_fan_out"] = True
        return kwargs


def find_targets(model: nn.Module, modules: dict[str, nn.Module], layers_path: str, experts: Experts) -> LoraTargets:
    """The LoRA targets of a model whose `named_base_modules` are `modules`.

    Raises:
        UnsupportedError: when the decoder has neither a linear layer nor a fused expert.
    """
    layers = {name: module for name, module in modules.items() if name.startswith(f"{layers_path}.")}
    linears = [name for name, module in layers.items() if is_linear(module) and not _within(name, experts.routers)]
    bypassed = [name for name in linears if _bypassed(name, modules) or not compat.lora_can_adapt(model, name)]
    wanted = [name for name in linears if name not in set(bypassed)]
    config: Any = model.config
    if not wanted and not experts.parameters:
        seen = sorted({name.rpartition(".")[2] for name, module in modules.items() if is_linear(module)})
        raise UnsupportedError(
            f"No linear layer to adapt in {layers_path!r} of {type(model).__name__}, model type {config.model_type!r}. "
            f"Linear modules elsewhere in the model: {', '.join(seen) or 'none'}. Pass target_modules=[...]."
        )
    named = TargetNamer(model, modules, layers_path).name_exactly(wanted, list(experts.parameters))
    raw = _large_raw_parameters(layers, experts, hidden_size=text_attribute(config, "hidden_size") or 1)
    return LoraTargets(
        target_modules=named.target_modules,
        target_parameters=named.target_parameters,
        fan_in_fan_out=bool(wanted) and all(type(modules[name]).__name__ == "Conv1D" for name in wanted),
        uncovered=_unique_in_layer(raw, layers_path),
        bypassed=_unique_in_layer(bypassed, layers_path),
        linear_parameters=_unique_in_layer(named.linear_parameters, layers_path),
    )


def _unique_in_layer(names: Iterable[str], layers_path: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name_in_layer(name, layers_path) for name in names))


def _within(name: str, roots: Iterable[str]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def _bypassed(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether the state-space mixer around a linear layer uses the layer's weight without calling the layer.

    Mamba's fused kernels take `self.out_proj.weight`, and Jamba multiplies by `self.dt_proj.weight`; a LoRA layer there
    would never be called. Nothing but the mixer's code tells (the gated delta nets of Qwen3-Next do call theirs).
    """
    owner, _, leaf = name.rpartition(".")
    if not hasattr(modules[owner], "A_log"):
        return False
    try:
        code = inspect.getsource(type(modules[owner]))
    except (OSError, TypeError):  # a class without a file
        return False
    return re.search(rf"\bself\.{re.escape(leaf)}\.weight\b(?![.\[])", code) is not None


def _large_raw_parameters(layers: dict[str, nn.Module], experts: Experts, *, hidden_size: int) -> list[str]:
    """Parameters as large as a matrix of the model that belong to no kind of layer which LoRA knows."""
    from torch import nn
    from torch.nn.modules.conv import _ConvNd

    found = []
    for name, module in layers.items():
        if is_linear(module) or isinstance(module, (nn.Embedding, _ConvNd)) or _within(name, experts.routers):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            full_name = f"{name}.{key}"
            if parameter.ndim >= 2 and parameter.numel() >= hidden_size**2 and full_name not in experts.parameters:
                found.append(full_name)
    return found
