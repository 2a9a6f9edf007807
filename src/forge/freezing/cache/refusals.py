"""Runs that a cache cannot serve, found before they begin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...errors import ConflictError, UnsupportedError
from ...models.below import modules_beside
from ...models.layers import decoder_layers, text_attribute, unwrap
from .fingerprint import decoder_of

if TYPE_CHECKING:
    from torch import nn


def refuse(trainer: Any, model: Any, depth: int) -> None:
    """Raise for runs in which the states are no function of the sample, or are not asked for one by one."""
    args = trainer.args
    for on, what in (
        (getattr(args, "torch_compile", False), "torch_compile=True compiles the layers that the cache skips"),
        (getattr(trainer, "is_fsdp_enabled", False), "FSDP shards the layers that the cache skips"),
        (getattr(trainer, "is_deepspeed_enabled", False), "DeepSpeed may shard the layers that the cache skips"),
        (getattr(args, "n_gpu", 0) > 1, f"n_gpu={getattr(args, 'n_gpu', 0)} copies the model to each GPU at each step"),
    ):
        if on:
            raise UnsupportedError(f"{what}: a PrefixCache does not work there. Train without one of the two.")
    if modules_beside(model):
        raise UnsupportedError(
            f"A PrefixCache knows a sample by its token ids, and {type(unwrap(model)).__name__} makes embeddings of "
            "images too. Train without the cache."
        )
    if getattr(args, "neftune_noise_alpha", None):
        raise ConflictError(
            f"neftune_noise_alpha={args.neftune_noise_alpha} adds noise to the embeddings, so that no two epochs have "
            "the same states. Train without the noise, or without the cache."
        )
    found = dropout_below(model, depth)
    if found:
        raise ConflictError(
            f"{found}: below the boundary it makes other states in every epoch. Set it to 0 in the config before "
            "loading the model, or train without the cache."
        )
    base: Any = unwrap(model)
    if text_attribute(base.config, "output_router_logits"):
        refuse_router()


def refuse_router() -> None:
    """Raise: the auxiliary loss is on."""
    raise ConflictError(
        "The router's auxiliary loss looks at the routers of all layers, also of those that the cache would skip. "
        "Switch it off (router_aux_loss_coef=0.0 in SFTConfig, output_router_logits=False in the model's config), or "
        "train without the cache."
    )


def dropout_below(model: nn.Module, depth: int) -> str | None:
    """Something below the boundary that draws random numbers in training: where, and how much; None without."""
    from torch import nn

    layers = decoder_layers(model)
    below = [(f"decoder layer {index}", layers[index]) for index in range(depth)]
    below += [(name, child) for name, child in decoder_of(model).named_children() if child is not layers]
    for where, module in below:
        for name, found in module.named_modules():
            if isinstance(found, nn.modules.dropout._DropoutNd) and found.p > 0:
                return f"{name or where} of {where} is {found}"
            for attribute, value in vars(found).items():  # attention takes its share as a number
                if ("drop" in attribute or "jitter" in attribute) and isinstance(value, float) and value > 0:
                    return f"{attribute}={value} in {name} of {where}"
    base: Any = unwrap(model)
    share = text_attribute(base.config, "layerdrop")
    return f"layerdrop={share} in the config" if share else None
