"""How many floating-point operations a training step needs: the numerator of MFU (model FLOPs utilisation).

Counted are the multiplications and additions that the model's mathematics asks for: each matrix product as 2 per weight
and token (Kaplan et al. 2020, arXiv:2001.08361, section 2.1), and attention's two products on top, as in the definition
of MFU (PaLM, arXiv:2204.02311, appendix B). The choices made:

- Recomputation (activation checkpointing) is not counted, as in PaLM: it is work of the hardware, not of the model. Nor
  are gradients that reach nothing trainable, which checkpointing's `enable_input_require_grads` asks for.
- Attention is counted without the causal mask's saving, again as in PaLM: each token is matched with all S tokens of
  its row. A sliding window (or chunk) narrower than the row does count, as min(S, window).
- Backward costs 2 per weight for the gradient of a matrix's input where something before the matrix trains, and 2 for
  the gradient of the weight where that trains. So a frozen prefix costs no backward and a frozen matrix the first part
  only: full fine-tuning is 6 per weight and token in all, LoRA a little over 4.
- Of a mixture's experts those that a token passes, LoRA on fused experts alike, as x A B. (PEFT first multiplies A by B
  to a whole weight and learns from that weight's gradient: work of the implementation, which grows with the experts.)
- Layers whose outputs a PrefixCache serves are not run: their forward pass is not counted for the served tokens.
- The embeddings are a lookup, 0; the output head is a product, tied or not, made for every token of the row.
- Not counted: norms, activations, softmax, rotary tables, convolutions and scans of state-space layers, DoRA's norms,
  adapters that are not LoRA and those of embeddings, the unpacking of quantised weights, the loss, the optimizer.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from .products import DecoderProducts


@dataclass(frozen=True)
class AttentionScores:
    """The two products of attention, q k^T and p v, in all layers that have the same window.

    Args:
        forward_per_pair: FLOPs for one token and one token of its row.
        backward_per_pair: the same for backward, which multiplies twice for each of the two, where it comes by.
        window: how many tokens each is matched with at most, None for the whole row.
        prefix_per_pair: how much of `forward_per_pair` is that of the layers below the boundary.
    """

    forward_per_pair: float
    backward_per_pair: float
    window: int | None = None
    prefix_per_pair: float = 0.0


@dataclass(frozen=True)
class TrainingFlops:
    """The model FLOPs of training; made by `training_flops`.

    >>> flops = TrainingFlops(2e9, 4e9, (AttentionScores(1e5, 2e5),))
    >>> flops.forward(8192, sequence_length=2048) / 8192 - 2e9  # attention, for one token
    204800000.0
    >>> f"{flops.step(8192, sequence_length=2048):.3g}"
    '5.42e+13'

    Args:
        forward_per_token: of the matrix products, attention scores aside.
        backward_per_token: the same for backward.
        attention: the attention scores, by window.
        note: what of the model is not counted; None when all of it is.
        prefix_per_token: how much of `forward_per_token` is that of the layers below the boundary at which backward
            stops (`setup_lp_lora_style`).
    """

    forward_per_token: float
    backward_per_token: float
    attention: tuple[AttentionScores, ...] = ()
    note: str | None = None
    prefix_per_token: float = 0.0

    def forward(self, tokens: int, sequence_length: int, *, served: float = 0.0) -> float:
        """FLOPs of a forward pass alone (evaluation, DPO's reference model).

        Args:
            tokens: of all rows together, padding included: the hardware multiplies it too.
            sequence_length: tokens in a row; of rows packed without a border between the samples, the whole row's.
            served: the share of the tokens, in [0, 1], for which a cache stood in for the layers below the boundary.
        """
        run = self.forward_per_token - served * self.prefix_per_token
        for part in self.attention:
            run += (part.forward_per_pair - served * part.prefix_per_pair) * _matched(part, sequence_length)
        return tokens * run

    def step(self, tokens: int, sequence_length: int, *, served: float = 0.0) -> float:
        """FLOPs of forward and backward, with the arguments of `forward`; a sum over the micro-batches of a step."""
        scores = sum(part.backward_per_pair * _matched(part, sequence_length) for part in self.attention)
        return self.forward(tokens, sequence_length, served=served) + tokens * (self.backward_per_token + scores)


def training_flops(model: nn.Module) -> TrainingFlops:
    """Read from a live model what a token costs, with what trains now (read again after freezing anything).

    What trains before a matrix is told by the order of the layers and, inside the lowest one that backward visits, by
    the shapes (see products.py). Approximated there, by a part of that one layer's backward at the most: a norm that
    trains is taken to stand before all matrices of its layer, blocks that stand side by side (Falcon-7B, GPT-J) to
    follow each other, and the scores to have all their gradients even where only q or only v trains.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 32}
    >>> llama = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
    >>> flops = training_flops(llama)
    >>> flops.forward_per_token == 2 * (4 * 8 * 8 + 3 * 8 * 16 + 8 * 32)  # attention, MLP, head
    True
    >>> flops.backward_per_token / flops.forward_per_token
    2.0
    >>> _ = llama.model.requires_grad_(False)
    >>> training_flops(llama).backward_per_token == 2 * 8 * 32  # the head's weight alone
    True

    Args:
        model: a transformers causal language model, plain, quantised or wrapped by PEFT, before anything shards it.
            Of a multimodal model the language decoder is counted, and `note` says so.

    Raises:
        UnsupportedError: no decoder is found in the model, or not how many of its experts a token passes.
    """
    from .products import DecoderProducts
    from .truncation import truncated_layers

    return _counted(DecoderProducts(model), truncated_layers(model))


def _counted(found: DecoderProducts, boundary: int) -> TrainingFlops:
    lowest = min(found.trained_positions(), default=None)
    forward = backward = prefix = 0.0
    for product in found.products():
        behind = product.behind_trained or (lowest is not None and lowest < product.position)
        forward += 2 * product.weights
        prefix += 2 * product.weights * (0 <= product.position[0] < boundary)
        backward += 2 * product.weights * (behind + product.trains)
    # The scores have no weight: backward multiplies for both factors of both products, or not at all.
    features: dict[int | None, float] = defaultdict(float)
    visited: dict[int | None, float] = defaultdict(float)
    skipped: dict[int | None, float] = defaultdict(float)
    for part in found.scores():
        features[part.window] += part.features
        visited[part.window] += part.features * (lowest is not None and lowest < part.position)
        skipped[part.window] += part.features * (part.position[0] < boundary)
    note = f"{found.linears_beside} linear layers beside the language decoder (towers, projectors) are not counted"
    return TrainingFlops(
        forward_per_token=forward,
        backward_per_token=backward,
        attention=tuple(
            AttentionScores(2 * total, 4 * visited[window], window, 2 * skipped[window])
            for window, total in features.items()
        ),
        note=note if found.linears_beside else None,
        prefix_per_token=prefix,
    )


def _matched(scores: AttentionScores, sequence_length: int) -> int:
    return sequence_length if scores.window is None else min(sequence_length, scores.window)
