"""The held-out loss, over the tokens that are learnt, in batches whose logits have a bound."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ConflictError
from .generation import as_it_was

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED = -100
# Logits in one batch: 1 GiB where they are float32. A single row may have more; no batch is smaller than one.
MOST_LOGITS = 2**28
# Positions whose logits are in float32 at once.
POSITIONS = 512


@dataclass(frozen=True)
class HeldOutLoss:
    """Cross-entropy on held-out samples.

    >>> loss = HeldOutLoss((6.0, 2.0), (3, 1))
    >>> loss.mean, round(loss.perplexity, 3), loss.per_sample
    (2.0, 7.389, (2.0, 2.0))

    Args:
        sums: The negative log-likelihood of each sample's learnt tokens, in nats.
        tokens: How many those are.
    """

    sums: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Nats per learnt token, over all tokens: long samples count for more."""
        total = sum(self.tokens)
        return sum(self.sums) / total if total else math.nan

    @property
    def perplexity(self) -> float:
        """`exp(mean)`; infinite where that overflows."""
        return math.exp(self.mean) if self.mean < 700 or math.isnan(self.mean) else math.inf

    @property
    def per_sample(self) -> tuple[float, ...]:
        """The mean of each sample; NaN where nothing is learnt."""
        return tuple(total / count if count else math.nan for total, count in zip(self.sums, self.tokens, strict=True))


def held_out_loss(
    model: PreTrainedModel,
    input_ids: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    *,
    batch_size: int = 8,
    progress: bool = False,
) -> HeldOutLoss:
    """The loss of a model on samples, as the standard trainers define it, weighted by token.

    The Trainer's `eval_loss` is a mean over batches; this one is over tokens, and so does not depend on the batches.

    Args:
        model: A causal language model; left as it was.
        input_ids: Token ids, a list a sample.
        labels: The same, with -100 for what is not learnt.
        batch_size: Samples at a time, at most; fewer where their logits would be more than 2**28 numbers.
        progress: Show a bar.

    Raises:
        ConflictError: Samples and labels of different lengths, or a token that the model does not know.
    """
    import torch
    from tqdm.auto import tqdm

    embedding = model.get_input_embeddings().weight
    _check(input_ids, labels, embedding.shape[0])
    sums, tokens = [0.0] * len(input_ids), [0] * len(input_ids)
    with (
        as_it_was(model),
        torch.no_grad(),
        tqdm(total=len(input_ids), desc="Held-out loss", unit="sample", disable=not progress) as bar,
    ):
        for batch in _batches([len(ids) for ids in input_ids], batch_size, embedding.shape[0]):
            width = max(len(input_ids[index]) for index in batch)
            rows = [list(input_ids[index]) + [0] * (width - len(input_ids[index])) for index in batch]
            mask = [[1] * len(input_ids[index]) + [0] * (width - len(input_ids[index])) for index in batch]
            logits = model(
                input_ids=torch.tensor(rows, device=embedding.device),
                attention_mask=torch.tensor(mask, device=embedding.device),
                use_cache=False,
            ).logits[:, -width:]  # prompt tuning puts its virtual tokens in front
            for row, index in enumerate(batch):
                sums[index], tokens[index] = _negative_log_likelihood(logits[row], labels[index])
            bar.update(len(batch))
    return HeldOutLoss(tuple(sums), tuple(tokens))


def _check(input_ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], vocabulary: int) -> None:
    if len(input_ids) != len(labels):
        raise ConflictError(f"{len(input_ids)} samples and {len(labels)} labels: give one list of labels a sample.")
    for index, (ids, own) in enumerate(zip(input_ids, labels, strict=True)):
        if len(ids) != len(own):
            raise ConflictError(f"Sample {index} has {len(ids)} tokens and {len(own)} labels: give one label a token.")
        if ids and not 0 <= max(ids) < vocabulary:
            raise ConflictError(
                f"Sample {index} has token {max(ids)}, but the model has {vocabulary} embeddings. Was it prepared with "
                "another tokenizer, or the model not resized?"
            )


def _batches(lengths: list[int], batch_size: int, vocabulary: int) -> list[list[int]]:
    """Samples of like length together, the longest first."""
    order = sorted((index for index, length in enumerate(lengths) if length), key=lambda index: -lengths[index])
    batches: list[list[int]] = []
    for index in order:
        room = batches and len(batches[-1]) < batch_size
        if room and (len(batches[-1]) + 1) * lengths[batches[-1][0]] * vocabulary <= MOST_LOGITS:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _negative_log_likelihood(logits: Any, labels: Sequence[int]) -> tuple[float, int]:
    """The sum over the learnt tokens of one sample, in float32, and their number."""
    import torch

    targets = torch.tensor(labels[1:], device=logits.device)
    learnt = (targets != IGNORED).nonzero().squeeze(-1)
    total = 0.0
    for places in torch.split(learnt, POSITIONS):
        total += torch.nn.functional.cross_entropy(logits[places].float(), targets[places], reduction="sum").item()
    return total, int(learnt.numel())
