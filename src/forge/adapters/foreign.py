"""Adapters that were attached without forge: taken off where that gives the base back exactly, refused elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .. import compat
from ..errors import ForgeError
from .kinds import what_stays
from .memento import end_prefix_cache

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .source import Source

_REMEDY = (
    "Pass restore_from=... (the checkpoint that the base was loaded from: its folder or hub id, a state dict, or "
    "another copy of the model), or load the base again. attach_adapter(model, config) in place of get_peft_model, or "
    "of the trainer's peft_config, remembers the base the next time. The model is left as it is."
)


def unload_foreign(model: Any, base: Any, source: Source | None) -> None:
    """Make the base what `from_pretrained` returns.

    Args:
        model: the PeftModel, or the base.
        base: the model inside it.
        source: where the base's values can be read.

    Raises:
        ForgeError: that cannot be done exactly. Nothing is changed then.
    """
    configs = getattr(model, "peft_config", None) or getattr(base, "peft_config", None) or {}
    reasons = list(_reasons(base, configs))
    if reasons and source is None:
        raise ForgeError(
            f"The base cannot be brought back exactly: {_said(reasons)}. The adapter was attached without forge, and "
            f"nothing in the model has the values from before. {_REMEDY}"
        )
    values = {} if source is None else _values(base, source, reasons)
    end_prefix_cache(base)
    _thaw(base)
    take_off(base)
    for tensor, value in values.items():
        with torch.no_grad():
            tensor.copy_(value)
    _reset(base)


def take_off(module: Any) -> None:
    """Put back what PEFT's layers wrap, of any kind and nested in any way."""
    for name, child in list(module.named_children()):
        inner = child
        while (wrapped := compat.wrapped_by_adapter(inner)) is not None and wrapped is not inner:
            inner = wrapped
        if inner is not child:
            module._modules[name] = inner
        take_off(inner)


@dataclass(frozen=True)
class _Reason:
    """Why the base is not what it was, and which of its parameters may have changed by it."""

    text: str
    concerns: Callable[[str], bool] = bool  # of any name


def _said(reasons: list[_Reason]) -> str:
    return "; ".join(dict.fromkeys(reason.text for reason in reasons))


def _reasons(base: nn.Module, configs: Any) -> Iterator[_Reason]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in base.modules() if isinstance(module, BaseTunerLayer)]
    if configs and not layers and any(_has_layers(config) for config in configs.values()):
        yield _Reason("its adapters were taken off before, by merge_and_unload() or unload(): which, nothing shows")
    if layers and not configs:
        yield _Reason("it has adapters without a config that says what they are")
    for name, config in configs.items():
        stays = what_stays(config)
        if stays is not None and stays.startswith("bias="):
            yield _Reason(f"adapter {name!r}: {stays}", lambda name: name.endswith("bias"))
        elif stays is not None:
            yield _Reason(f"adapter {name!r}: {stays}")
    if any(layer.merged for layer in layers):
        yield _Reason("an adapter is merged into the weights (unmerging rounds)")
    biases = any(getattr(config, "bias", "none") not in ("none", False, None) for config in configs.values())
    trained = {
        name: None
        for name, parameter in _own_parameters(base)
        if parameter.requires_grad and not (biases and name.endswith("bias"))
    }
    if trained:
        shown = ", ".join(list(trained)[:3]) + (" and others" if len(trained) > 3 else "")
        yield _Reason(f"{shown} of the base trained", lambda name: name in trained)


def _has_layers(config: Any) -> bool:
    """Whether an adapter of this kind sits in layers of the model, and not in front of it."""
    return not getattr(config, "is_prompt_learning", False)


def _own_parameters(base: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    from ..models.layers import named_base_modules

    for prefix, module in named_base_modules(base).items():
        yield from module.named_parameters(prefix, recurse=False)


def _values(base: nn.Module, source: Source, reasons: list[_Reason]) -> dict[Tensor, Tensor]:
    """What has another value in the source, by its tensor."""
    named: dict[nn.Parameter, list[str]] = {}
    for name, parameter in _own_parameters(base):
        named.setdefault(parameter, []).append(name)
    found: dict[Tensor, Tensor] = {}
    missing = []
    for parameter, names in named.items():
        if not any(reason.concerns(name) for reason in reasons for name in names):
            continue
        packed = not parameter.is_floating_point() or hasattr(parameter, "quant_state")
        value = None if packed else source.find(names)
        if value is None or value.shape != parameter.shape:
            missing.append(names[0])
        elif not torch.equal(parameter.detach(), value.detach().to(parameter.device, parameter.dtype)):
            found[parameter] = value
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise ForgeError(
            f"restore_from has no values for {', '.join(missing[:4])}{more}, which may have changed "
            f"({_said(reasons)}). {_REMEDY}"
        )
    return found


def _thaw(base: nn.Module) -> None:
    if "_forge_freezing" in vars(base):
        from ..freezing import unfreeze

        unfreeze(base)


def _reset(base: Any) -> None:
    """What trainers and PEFT leave behind, out; what `from_pretrained` leaves, in."""
    for module in base.modules():
        values = vars(module)
        _remove_hooks(module)
        if module is base and "_hf_hook" not in values:  # accelerate's dispatch of a model over devices stays
            values.pop("forward", None)
        values.pop("_original_forward", None)
        if "gradient_checkpointing" in values:
            module.gradient_checkpointing = False
            if getattr(type(module), "gradient_checkpointing", None) is False:  # the class says so already
                del module.gradient_checkpointing
        for name in ("_gradient_checkpointing_func", "_require_grads_hook", "_require_grads_hooks", "peft_config"):
            values.pop(name, None)
        if values.get("_hf_peft_config_loaded"):
            module._hf_peft_config_loaded = False
    _cast_back(base)
    for parameter in base.parameters():
        parameter.grad = None
        parameter.requires_grad_(parameter.is_floating_point() and not hasattr(parameter, "quant_state"))
    base.eval()
    _reset_config(base)
    _reset_dropout(base)


def _remove_hooks(module: Any) -> None:
    """Those by which PEFT and the trainers make the embeddings' outputs require gradients."""
    for key, hook in list(module._forward_hooks.items()):
        if getattr(hook, "__name__", "") in ("make_inputs_require_grads", "make_inputs_require_grad"):
            for hooks in (
                module._forward_hooks,
                module._forward_hooks_with_kwargs,
                module._forward_hooks_always_called,
            ):
                hooks.pop(key, None)


def _cast_back(base: Any) -> None:
    """`prepare_model_for_kbit_training` casts what is not packed to fp32, which loses nothing on the way back."""
    dtype = getattr(getattr(base, "config", None), "dtype", None)
    if not getattr(base, "is_quantized", False) or dtype not in (torch.float16, torch.bfloat16):
        return
    kept = tuple(getattr(base, "_keep_in_fp32_modules", None) or ()) + tuple(
        getattr(base, "_keep_in_fp32_modules_strict", None) or ()
    )
    for name, parameter in base.named_parameters():
        if parameter.dtype == torch.float32 and not any(part in kept for part in name.split(".")):
            parameter.data = parameter.data.to(dtype)


def _reset_config(base: Any) -> None:
    """Trainers switch `use_cache` off for checkpointing, and a router's logits on for its loss."""
    config, generation = getattr(base, "config", None), getattr(base, "generation_config", None)
    if config is None:
        return
    cache = getattr(generation, "use_cache", None)
    for each in {id(found): found for found in (config, config.get_text_config())}.values():
        default = type(each)()
        if hasattr(each, "use_cache"):
            each.use_cache = getattr(default, "use_cache", True) if cache is None else cache
        if getattr(each, "output_router_logits", False):
            each.output_router_logits = getattr(default, "output_router_logits", False)


def _reset_dropout(base: Any) -> None:
    """DPOTrainer sets the dropout of all modules to 0; what it was, the model's class knows."""
    dropouts = {name: module for name, module in base.named_modules() if isinstance(module, torch.nn.Dropout)}
    if not any(module.p == 0 for module in dropouts.values()) or not hasattr(base, "config"):
        return
    with torch.device("meta"):
        built = dict(type(base)(base.config).named_modules())
    for name, module in dropouts.items():
        if isinstance(built.get(name), torch.nn.Dropout):
            module.p = built[name].p
