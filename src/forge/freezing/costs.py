"""What a training step costs with the lowest layers frozen, in FLOPs and relative to none of them frozen.

With F for a layer's forward and B for its backward (2 F with all weights trained, a little over F with adapters), alike
layers cost F + (1-f) B of F + B when the share f of them is frozen, F + (1-f) (F + B) of 2 F + B when those that
backward visits are checkpointed, and (1-f) of everything when a cache answers for the frozen ones. Here each product is
counted for itself, as `training_flops` does, the output head included; what that leaves out is left out here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..models.layers import decoder_layers, unwrap, without_adapters
from ..models.products import DecoderProducts, Position

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class StepCost:
    """A step's cost, as a share of the same step's with no layer frozen.

    Args:
        plain: without checkpointing.
        cached: without it, the frozen layers' outputs from a cache.
        checkpointed: with the layers that backward visits recomputed.
        checkpointed_cached: with both.
    """

    plain: float
    cached: float
    checkpointed: float
    checkpointed_cached: float


@dataclass(frozen=True)
class _Part:
    """A product: by a matrix, or the two of attention, whose factors both come from activations.

    Args:
        position: as in `Product`.
        weights: how many a token meets, or numbers that it multiplies with other tokens'.
        behind_trained: gradients reach its input whatever trains before `position`.
        trains: whether the weight does.
        scores: whether it is attention's.
    """

    position: Position
    weights: float
    behind_trained: bool = False
    trains: bool = False
    scores: bool = False

    def backward(self, lowest: Position, *, trains: bool) -> float:
        """In forward passes: one for the gradient of each factor that needs it."""
        behind = self.behind_trained or lowest < self.position
        return self.weights * (2 * behind if self.scores else behind + trains)


def step_costs(model: nn.Module, sequence_length: int, *, as_adapted: bool = False) -> list[StepCost]:
    """The cost for every number of frozen layers, none of them first.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 2, "vocab_size": 2}
    >>> half = step_costs(LlamaForCausalLM(LlamaConfig(num_hidden_layers=8, **tiny)), 1)[4]
    >>> round(half.plain, 2), round(half.checkpointed, 2), round(half.cached, 2)  # 2/3, 5/8 and 1/2
    (0.67, 0.63, 0.5)

    Args:
        model: with what trains now; freezing k layers also freezes the embeddings, and a head that is tied to them.
        sequence_length: tokens in a row.
        as_adapted: not what trains now, but what small adapters on all layers would cost.

    Raises:
        UnsupportedError: see `training_flops`.
    """
    found = DecoderProducts(model)
    depth = len(decoder_layers(model))
    parts = [
        *(_Part(p.position, p.weights, p.behind_trained, p.trains and not as_adapted) for p in found.products()),
        *(
            _Part(s.position, s.features * min(s.window or sequence_length, sequence_length), scores=True)
            for s in found.scores()
        ),
    ]
    trained = list(found.trained_positions())
    tied_head = (depth + 1, 0) if _tied(model) else None

    def cost(frozen: int) -> tuple[float, float, float]:
        """Forward and backward, what is recomputed of it, and what a cache spares."""
        kept = [position for position in trained if not frozen or position[0] >= frozen]
        lowest = (frozen, -1) if as_adapted else min(kept, default=(depth + 2, 0))
        forward = sum(part.weights for part in parts)
        backward = sum(
            part.backward(lowest, trains=part.trains and not (frozen and part.position == tied_head))
            for part in parts
            if not frozen or part.position[0] >= frozen
        )
        recomputed = sum(part.weights for part in parts if max(lowest[0], 0) <= part.position[0] < depth)
        spared = sum(part.weights for part in parts if part.position[0] < frozen)
        return forward + backward, recomputed, spared

    step, recomputed, _ = cost(0)
    return [
        StepCost(
            plain=now / step,
            cached=(now - spared) / step,
            checkpointed=(now + again) / (step + recomputed),
            checkpointed_cached=(now + again - spared) / (step + recomputed),
        )
        for now, again, spared in map(cost, range(depth))
    ]


def _tied(model: nn.Module) -> bool:
    """Whether the output head is the embeddings' own weight."""
    base: Any = unwrap(model)
    try:
        ends = base.get_input_embeddings(), base.get_output_embeddings()
    except (AttributeError, NotImplementedError):  # not every architecture can name them
        return False
    weights = [getattr(without_adapters(end), "weight", None) for end in ends if end is not None]
    return len(weights) == 2 and weights[0] is weights[1]
