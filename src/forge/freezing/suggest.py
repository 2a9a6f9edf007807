"""Which share of the layers to freeze: measured on a few batches, reported with its noise and with what it saves.

The literature does not agree on which layers matter. Lee et al. 2019 (arXiv:1911.03090) keep nine tenths of the quality
with only the upper quarter trained; AutoFreeze (arXiv:2102.01386) freezes from below as well, and finds that a boundary
chosen in advance costs accuracy; LISA (arXiv:2403.17919) sees LoRA change the bottom and the top of the model most;
surgical fine-tuning (arXiv:2210.11466) finds that it depends on the shift: the lower layers for one of the input, the
upper ones for one of the output. So the model and the data at hand are asked, and three answers stand side by side:

- *AdamW*: the share of the layers' sum of |gradient| that is frozen. Adam's first step moves every weight by
  the learning rate against its gradient's sign, so that the loss falls by the rate times that sum, to first order.
- *SGD*: the share of the squared norm, which is what a step of plain gradient descent is proportional to.
- *importance*: the share of Block Influence, 1 - cosine similarity of a layer's input and output (ShortGPT,
  arXiv:2403.03853). It tells what removing a layer would change, which is not what freezing it would.

The gradient relative to the weight, which surgical fine-tuning selects by, says nothing of adapters: LoRA's B begins at
0 and has no size. (Its A has no gradient for the same reason, and B's stands for both.)

All of it is first order and of the first step. The layers above the boundary make up for some of what is given up, and
that is not measured here; nor are the embeddings and the head. Norms of single batches hold their noise as well, which
lifts all layers: shares of very small batches lean towards an even spread.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..errors import ForgeError, UnsupportedError
from ..models.layers import unwrap
from ..models.truncation import layers_in_ratio
from .costs import StepCost, step_costs
from .probe import Probed, probe
from .suggestion import Boundary, FreezeSuggestion, ProbedLayer, said

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_ERRORS = 2  # standard errors on either side: about 95% of what the noise does


def suggest_freeze_ratio(
    model: PreTrainedModel | PeftModel, batches: Iterable[Mapping[str, Any]], *, tolerance: float = 0.25
) -> FreezeSuggestion:
    """Measure on a few batches which share of the layers can be frozen, and at what cost.

    The rule: the largest number of lowest layers that hold at most `tolerance` of the sum of |gradient|. It says what
    the first step would give up and no more than that; freeze, train and compare before you trust it.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> _ = torch.manual_seed(0)
    >>> tiny = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 16}
    >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, **tiny))
    >>> batches = [{"input_ids": torch.randint(16, (2, 8))} for _ in range(4)]
    >>> suggestion = suggest_freeze_ratio(model, batches, tolerance=0.6)
    >>> suggestion.frozen_layers, suggestion.freeze_ratio
    (2, 0.5)
    >>> [round(boundary.cost.plain, 2) for boundary in suggestion.boundaries]
    [1.0, 0.84, 0.68, 0.53]

    Args:
        model: a causal language model with its weights, plain, quantised or wrapped by PEFT, as it will be trained:
            with its adapters attached. It is left as it was, gradients and random numbers included.
        batches: dicts of tensors from a collator, such as `islice(trainer.get_train_dataloader(), 8)`; moved to the
            model's device. Without `labels` every token that `attention_mask` does not leave out is learnt. Where the
            mask is not one of rows and tokens, all tokens count for the importance.
        tolerance: the share that may be given up, in [0, 1). Layers that learn alike give up the share that is frozen:
            the default suggests a quarter of them, and more or less only where the lower ones learn less or more.

    Returns:
        The suggestion, with its reason and its noise, and the same numbers for every boundary. Run as in evaluation,
        without dropout.

    Raises:
        ForgeError: no batches, one that is no dict of tensors or supervises nothing, or no gradient reaches the layers.
        NonFiniteError: a loss or a gradient is NaN or infinite.
        UnsupportedError: not a causal language model with its weights in memory.
    """
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 <= tolerance < 1:
        raise ForgeError(f"tolerance={tolerance!r}: it is the share that may be given up, at least 0 and less than 1.")
    probed = probe(model, batches)
    if probed.absolute is not None and not any(map(sum, probed.absolute)):
        raise ForgeError(
            f"No gradient reached the decoder layers of {type(unwrap(model)).__name__}, although parameters in them "
            "train: their adapters are switched off, or multiply zeros. Probe the model as it will be trained."
        )
    try:
        costs: Sequence[StepCost | None] = step_costs(model, probed.row_length, as_adapted=probed.absolute is None)
    except UnsupportedError:  # what cannot be counted is left out; the measurements do not need it
        costs = [None] * len(probed.trains)
    return _suggestion(probed, costs, float(tolerance))


def _suggestion(probed: Probed, costs: Sequence[StepCost | None], tolerance: float) -> FreezeSuggestion:
    """Apply the rule."""
    depth = len(probed.trains)
    read = probed.importance if probed.absolute is None else probed.absolute
    boundaries = tuple(
        Boundary(
            frozen_layers=number,
            freeze_ratio=ratio_of(number, depth),
            gradient_share=None if probed.absolute is None else _share_below(probed.absolute, number),
            squared_share=None if probed.squared is None else _share_below(probed.squared, number),
            importance_share=_share_below(probed.importance, number),
            error=_error_below(read, number),
            cost=costs[number],
        )
        for number in range(depth)
    )
    chosen = _largest(boundaries, tolerance, 0)
    lone = len(read) < 2
    plausible = None if lone else (_largest(boundaries, tolerance, _ERRORS), _largest(boundaries, tolerance, -_ERRORS))
    return FreezeSuggestion(
        freeze_ratio=boundaries[chosen].freeze_ratio,
        frozen_layers=chosen,
        num_layers=depth,
        reason=_reason(probed, boundaries, chosen, plausible, tolerance),
        within_noise=plausible is None or plausible[0] != plausible[1],
        plausible=plausible,
        measure="importance" if probed.absolute is None else "gradient",
        tolerance=tolerance,
        already_frozen=_already_frozen(probed),
        batches=len(read),
        tokens=probed.tokens,
        layers=tuple(_layer(probed, index) for index in range(depth)),
        boundaries=boundaries,
    )


def ratio_of(frozen_layers: int, num_layers: int) -> float:
    """The simplest share that comes to a number of layers, however it is rounded down.

    >>> ratio_of(7, 30), ratio_of(1, 3), 29 / 100 * 100, ratio_of(29, 100)
    (0.25, 0.5, 28.999999999999996, 0.291)
    """
    for parts in (1, 2, 4, 10, 20, 100, 1_000, 10_000, 100_000):
        least = -(-frozen_layers * parts // num_layers)
        for share in (least / parts, (least + 1) / parts):
            if share < 1 and int(share * num_layers) == layers_in_ratio(share, num_layers) == frozen_layers:
                return share
    raise ForgeError(f"{frozen_layers} of {num_layers} layers: no share in [0, 1) is that.")


def _largest(boundaries: Sequence[Boundary], tolerance: float, errors: float) -> int:
    """The most layers that may be frozen if the shares are off by so many standard errors."""
    return max(
        b.frozen_layers
        for b in boundaries
        if not b.frozen_layers or b.share + errors * (b.error or 0.0) <= tolerance  # none can always be frozen
    )


def _share_below(values: Sequence[Sequence[float]], number: int) -> float:
    total = sum(sum(batch) for batch in values)
    return sum(sum(batch[:number]) for batch in values) / total if total else 0.0


def _error_below(values: Sequence[Sequence[float]], number: int) -> float | None:
    """Standard error of a ratio of two means over the same batches (Cochran, Sampling Techniques, chapter 6)."""
    count, total = len(values), sum(sum(batch) for batch in values)
    if count < 2 or not total:
        return None
    share = _share_below(values, number)
    residuals = sum((sum(batch[:number]) - share * sum(batch)) ** 2.0 for batch in values)
    return math.sqrt(count * residuals / (count - 1)) / total


def _layer(probed: Probed, index: int) -> ProbedLayer:
    absolute, squared = probed.absolute, probed.squared
    return ProbedLayer(
        trains=probed.trains[index],
        gradient_sum=None if absolute is None else fmean(batch[index] for batch in absolute),
        gradient_norm=None if squared is None else fmean(batch[index] for batch in squared) ** 0.5,
        importance=fmean(batch[index] for batch in probed.importance),
    )


def _already_frozen(probed: Probed) -> int:
    return probed.trains.index(True) if any(probed.trains) else 0


def _reason(
    probed: Probed, boundaries: Sequence[Boundary], chosen: int, plausible: tuple[int, int] | None, tolerance: float
) -> str:
    depth = len(boundaries)
    what = "the layers' importance" if probed.absolute is None else "the layers' sum of |gradient|"
    allowed = f"the tolerance is {tolerance:.0%}"
    held = f"{_lowest(chosen)} of {depth} {'holds' if chosen == 1 else 'hold'} {said(boundaries[chosen])} of {what}"
    if depth == 1:
        sentences = ["The only layer there is has to train."]
    elif chosen + 1 == depth:
        sentences = [f"{held}; {allowed}."]
    elif chosen:
        sentences = [f"{held}, one more {said(boundaries[chosen + 1])}; {allowed}."]
    else:
        sentences = [f"The lowest layer of {depth} alone holds {said(boundaries[1])} of {what}; {allowed}."]
    if frozen := _already_frozen(probed):
        sentences.append(f"{_lowest(frozen)} {'does' if frozen == 1 else 'do'} not train as it is.")
    if plausible is None:
        sentences.append("Of one batch the noise is not known: probe a few.")
    elif plausible[0] != plausible[1]:
        sentences.append(f"Within noise: other batches could have said {plausible[0]} to {plausible[1]} layers.")
    if probed.absolute is None:
        sentences.append(
            "Nothing in the layers would train as it is, so this rests on what they do and not on what training would "
            "change: attach the adapters and probe again."
        )
    sentences.append("To first order, at the start of training: no promise.")
    return " ".join(sentences)


def _lowest(number: int) -> str:
    return "Layer 0" if number == 1 else f"Layers 0-{number - 1}"
