"""LP-LoRA: freeze the lower layers, keep adapters in the upper ones, and make backward stop between them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import ConflictError, ForgeError, ForgeWarning, UnsupportedError
from ..models.anatomy import unpacked_numel
from ..models.below import modules_beside, trained_embeddings
from ..models.layers import decoder_layers, decoder_layers_path, named_base_modules, unwrap
from ..models.truncation import restore, truncate
from .adapters import RemovedAdapters, excluding, refuse_trained, remove_adapters
from .report import FreezeReport
from .selection import select_layers

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel

_KEPT = "_forge_freezing"  # on the base model: a copy of the model brings its own along


@dataclass
class _Freezing:
    """What was changed in a model.

    Args:
        adapters: what was taken out.
        switched_off: the names of the base model's parameters that trained before.
        had_adapters: whether the model was one of PEFT's.
    """

    had_adapters: bool
    adapters: RemovedAdapters = field(default_factory=RemovedAdapters)
    switched_off: list[str] = field(default_factory=list)


def setup_lp_lora_style(
    model: PreTrainedModel | PeftModel,
    freeze_ratio: float | None = None,
    *,
    frozen_layers: int | Sequence[int] | None = None,
    freeze_embeddings: bool = True,
) -> FreezeReport:
    """Freeze the lower share of the decoder layers, and make backward stop there, whatever trainer comes.

    The frozen layers lose their adapters, run without autograd and are never checkpointed; backward visits the others
    only. Loss and gradients of what trains are those that it would have without. Call it on the model that has its
    adapters (on `trainer.model`, where the trainer attaches them), before `train()`.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 16}
    >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, **tiny))
    >>> report = setup_lp_lora_style(model, freeze_ratio=0.5)
    >>> print(report)
    2 of 4 decoder layers frozen (0-1); backward stops below layer 2; 1,064 parameters train, 1,056 were frozen
    >>> report.undo()
    >>> all(parameter.requires_grad for parameter in model.parameters())
    True

    Args:
        model: plain, quantised or wrapped by PEFT; changed in place. Called again, it starts from the model as it was
            before the first call.
        freeze_ratio: the share of the layers to freeze, from the lowest up, in [0, 1), rounded down. 0.5 by default.
        frozen_layers: instead of a share, how many, or a list of indices. Of a list, those that lie below the lowest
            layer that trains cost no backward; the others are frozen and passed.
        freeze_embeddings: also whatever comes before the first layer (token and position embeddings and their norms);
            with tied weights the output head too. False leaves them as they are, and raises when they train.

    Raises:
        ForgeError: a share, number or index that the model does not have, or nothing is left that trains.
        ConflictError: something below the frozen layers trains (embeddings, a vision tower, a projector), or their
            adapters have learnt something already.
        UnsupportedError: no transformers model, or one whose decoder layers are not found.
    """
    _refuse_other_objects(model)
    chosen = select_layers(len(decoder_layers(model)), freeze_ratio, frozen_layers)
    if not chosen and freeze_ratio != 0 and frozen_layers is None:
        warnings.warn(
            f"freeze_ratio={0.5 if freeze_ratio is None else freeze_ratio} of {len(decoder_layers(model))} layers is "
            "less than one: none is frozen. Choose a larger share, or 0 if that is meant.",
            ForgeWarning,
            stacklevel=2,
        )
    unfreeze(model)
    refuse_trained(model, chosen)
    trained_before = _trainable(model)
    freezing = _Freezing(had_adapters=hasattr(model, "peft_config"))
    vars(unwrap(model))[_KEPT] = freezing
    try:
        embeddings = _freeze(model, freezing, chosen, freeze_embeddings=freeze_embeddings)
        trainable = _trainable(model)
        if not trainable:
            raise ForgeError(
                f"Nothing would train with the decoder layers {chosen or '(none)'} frozen: no parameter of the others "
                "requires gradients. Attach adapters to them (get_peft_model), or freeze fewer layers."
            )
    except BaseException:
        unfreeze(model)
        raise
    path = decoder_layers_path(unwrap(model))
    return FreezeReport(
        decoder_layers=path,
        num_layers=len(decoder_layers(model)),
        frozen_layers=chosen,
        boundary=_boundary(chosen),
        frozen_parameters=trained_before - trainable,
        trainable_parameters=trainable,
        adapters_removed=len(freezing.adapters.wrappers),
        embeddings_frozen=embeddings,
        exclude_modules=excluding(path, chosen) if chosen else None,
        _undo=partial(unfreeze, model),
    )


def unfreeze(model: PreTrainedModel | PeftModel) -> None:
    """Give a model back as it was before `setup_lp_lora_style`; the same as the report's `undo()`.

    What was learnt since stays. Where adapters were attached after the freezing, the base weights stay frozen: PEFT did
    that, and not forge. Adapters that were merged or unloaded meanwhile do not come back. A model in which nothing was
    frozen is left as it is. Not while it trains: the optimizer does not know what comes back.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 16}
    >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **tiny))
    >>> _ = setup_lp_lora_style(model)
    >>> unfreeze(model)
    >>> model.model.embed_tokens.weight.requires_grad
    True

    Args:
        model: the one that was frozen, or a copy of it.

    Raises:
        UnsupportedError: no transformers model.
    """
    _refuse_other_objects(model)
    base = unwrap(model)
    freezing: _Freezing | None = vars(base).pop(_KEPT, None)
    if freezing is None:
        return
    restore(base)
    freezing.adapters.put_back(model)
    if not freezing.had_adapters and hasattr(model, "peft_config"):
        return
    parameters = dict(base.named_parameters())
    for name in freezing.switched_off:
        if name in parameters:
            parameters[name].requires_grad_(True)


def _freeze(model: Any, freezing: _Freezing, chosen: Sequence[int], *, freeze_embeddings: bool) -> tuple[str, ...]:
    """Freeze; what was changed is noted as it is, so that an error can be undone. Returns the embeddings' names."""
    freezing.adapters = remove_adapters(model, chosen)
    base = unwrap(model)
    layers = decoder_layers(model)
    _switch_off(base, freezing, [p for index in chosen for p in layers[index].parameters()])
    if _boundary(chosen) == 0 and not freeze_embeddings:
        return ()  # nothing lies below that would not train
    beside = modules_beside(model)
    for name, module in beside.items():
        trained = next((each for each, p in module.named_parameters() if p.requires_grad), None)
        if trained is not None:
            raise ConflictError(
                f"{name}.{trained} trains, and feeds the decoder below its frozen layers, where backward does not "
                f"come. Freeze it first (model.get_submodule({name!r}).requires_grad_(False), on the base model; or an "
                "adapter that does not target it), or freeze no layers."
            )
    _refuse_prompts(model)
    truncation = truncate(model, _boundary(chosen), beside.values())
    below = trained_embeddings(model, truncation)
    if below:
        _refuse_embeddings(model, below, freeze_embeddings=freeze_embeddings)
        _switch_off(base, freezing, list(below.values()))
    return tuple(below)


def _switch_off(base: nn.Module, freezing: _Freezing, parameters: list[Any]) -> None:
    wanted = {id(parameter) for parameter in parameters if parameter.requires_grad}
    for name, parameter in base.named_parameters():
        if id(parameter) in wanted:
            freezing.switched_off.append(name)
            parameter.requires_grad_(False)


def _refuse_embeddings(model: nn.Module, below: dict[str, nn.Parameter], *, freeze_embeddings: bool) -> None:
    base_parameters = {id(p) for module in named_base_modules(model).values() for p in module.parameters(recurse=False)}
    adapters = [name for name, parameter in below.items() if id(parameter) not in base_parameters]
    if adapters:
        raise ConflictError(
            f"{adapters[0]} trains below the frozen layers, where backward does not come: the adapter covers the "
            "embeddings (modules_to_save, trainable_token_indices or target_modules). Leave them out of the adapter, "
            "or freeze no layers."
        )
    if not freeze_embeddings:
        raise ConflictError(
            f"{next(iter(below))} trains below the frozen layers, where backward does not come. Pass "
            "freeze_embeddings=True, or freeze it yourself (requires_grad_(False))."
        )


def _refuse_prompts(model: Any) -> None:
    for name, config in getattr(model, "peft_config", {}).items():
        if config.is_prompt_learning:
            raise ConflictError(
                f"The adapter {name!r} is {type(config).__name__}: it learns what goes into the lowest layer, below "
                "the frozen ones, where backward does not come. Take LoRA, or freeze no layers."
            )


def _refuse_other_objects(model: Any) -> None:
    from torch import nn

    if isinstance(getattr(model, "module", None), nn.Module) and not hasattr(unwrap(model), "config"):
        raise UnsupportedError(
            f"The model is wrapped ({type(model).__name__}). Freeze its layers before anything wraps it; in a Trainer: "
            "setup_lp_lora_style(trainer.model) before trainer.train()."
        )
    if not isinstance(model, nn.Module) or not hasattr(unwrap(model), "config"):
        raise UnsupportedError(
            f"setup_lp_lora_style freezes layers of a transformers model or a PeftModel, not of a "
            f"{type(model).__name__}. Load the model first."
        )


def _boundary(chosen: Sequence[int]) -> int:
    """The lowest layer that is not frozen."""
    frozen = set(chosen)
    return next(index for index in range(len(frozen) + 1) if index not in frozen)


def _trainable(model: nn.Module) -> int:
    return sum(unpacked_numel(parameter) for parameter in model.parameters() if parameter.requires_grad)
