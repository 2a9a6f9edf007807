"""The cross-entropy of many rows without their logits: tile by tile, its gradient with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ....errors import UnsupportedError
from ....models.layers import text_attribute, unwrap

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# Logits at a time: as many numbers as 4,096 tokens of a vocabulary of 32,768 have.
TILE_LOGITS = 2**27
_CLOSE = 1e-3


@dataclass(frozen=True)
class _Asked:
    """What the loss is of, beside the hidden states.

    Args:
        head: from hidden states to logits.
        targets: (tokens,).
        weights: (tokens,).
        tile: tokens at a time.
    """

    head: Callable[[Tensor], Tensor]
    targets: Tensor
    weights: Tensor
    tile: int


class _TiledLoss(torch.autograd.Function):
    """The weighted sum of negative log-likelihoods; its gradient is computed with it, and kept instead of logits."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, asked: _Asked) -> Any:
        losses, gradients = [], []
        for start in range(0, len(asked.targets), asked.tile):
            part = slice(start, start + asked.tile)
            with torch.enable_grad():
                leaf = hidden[part].detach().requires_grad_()
                loss = _losses(asked.head(leaf), asked.targets[part])
                (gradient,) = torch.autograd.grad((loss * asked.weights[part]).sum(), leaf)
            losses.append(loss.detach())
            gradients.append(gradient)
        ctx.save_for_backward(torch.cat(gradients))
        each = torch.cat(losses)
        ctx.mark_non_differentiable(each)
        return (each * asked.weights).sum(), each

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype), None


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.nn.functional.cross_entropy(wide, targets, reduction="none")


def weighted_loss(
    hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, weights: Tensor, *, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the tokens' losses, and each token's own.

    Args:
        hidden: (tokens, width), the decoder's output where something is learnt.
        head: from hidden states to logits; frozen.
        targets: (tokens,), the token that follows.
        weights: (tokens,).
        vocabulary: logits of a token.

    Returns:
        A number that gradients flow from, and (tokens,) of them without.
    """
    tile = max(1, TILE_LOGITS // vocabulary)
    total, each = _TiledLoss.apply(hidden, _Asked(head, targets, weights, tile))  # type: ignore[no-untyped-call]
    return total, each


def head_of(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """From the decoder's output to logits, as the model itself has them: scaled or capped where its config says so.

    Raises:
        UnsupportedError: the model has no such head.
    """
    base: Any = unwrap(model)
    layer = base.get_output_embeddings()
    if layer is None:
        raise UnsupportedError(f"{type(base).__name__} has no head for language modelling.")
    cap = text_attribute(base.config, "final_logit_softcapping")
    factor = text_attribute(base.config, "logit_scale")  # Cohere
    divisor = text_attribute(base.config, "logits_scaling")  # Granite

    def head(hidden: Tensor) -> Tensor:
        logits: Tensor = layer(hidden)
        if factor:
            logits = logits * factor
        if divisor:
            logits = logits / divisor
        return torch.tanh(logits / cap) * cap if cap else logits

    return head


def decoder_of(model: PreTrainedModel) -> Any:
    """The module from token ids to the hidden states that the head reads."""
    base: Any = unwrap(model)
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
    return decoder if decoder is not None and decoder is not base else getattr(base, base.base_model_prefix)


def prove_head(model: PreTrainedModel) -> None:
    """Hold decoder and head against the model's own logits on a few tokens.

    Raises:
        UnsupportedError: they differ: the model does something in between that forge does not know.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(8, device=device)[None] * 7 % vocabulary
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            own = model(input_ids=ids, use_cache=False).logits.float()
            hidden = decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state
            made = head_of(model)(hidden).float()
    finally:
        model.train(was)
    if own.shape != made.shape or not torch.allclose(own, made, rtol=_CLOSE, atol=_CLOSE * float(own.abs().max())):
        raise UnsupportedError(
            f"{type(model).__name__} makes its logits in a way that packed training does not know. Search it with "
            "engine='shared', which trains through its own forward."
        )
