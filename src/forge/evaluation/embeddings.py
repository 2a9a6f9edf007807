"""Texts as bert-score sees them: token ids, embeddings, weights; and the matching of pairs of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import UnsupportedError

if TYPE_CHECKING:
    import torch

    from .encoder import LoadedEncoder

CACHE_BYTES = 256 * 2**20
"""What a `BertScore` keeps of earlier references; a token takes 4 bytes for each of the encoder's dimensions."""


FULL = 0.75
"""A text that is shorter than this share of the longest in its batch begins another one: one long text among short ones
would make them all long."""


class Embedded(NamedTuple):
    """One text.

    Args:
        vectors: a row for each token, (tokens, width), on the CPU.
        weights: what each token counts, (tokens,): 0 for [CLS] and [SEP], 1 for the others.
    """

    vectors: torch.Tensor
    weights: torch.Tensor


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """bert-score's token ids of a text; none where no token of them would count."""
    from bert_score.utils import sent_encode

    if not text.strip():  # sent_encode would ask for a method that transformers 5's fast tokenizers have no more
        return []
    ids = [int(token) for token in sent_encode(tokenizer, text)]
    return ids if any(_weights(tokenizer, ids)) else []


def is_cut(tokenizer: Any, text: str, ids: Sequence[int]) -> bool:
    """Whether the text was longer than what its ids are of."""
    limit = int(tokenizer.model_max_length)
    if len(ids) < limit:
        return False
    return len(tokenizer.encode(text.strip(), max_length=limit + 1, truncation=True)) > limit


def embed(
    encoder: LoadedEncoder, tokenizer: Any, texts: Mapping[str, list[int]], batch_size: int, device: str
) -> dict[str, Embedded]:
    """Encode texts, given with their token ids: those of like length together, so that little of a batch is padding.

    bert-score sorts by the number of words, which says less, and in no order among equals. A text's embedding does not
    depend on its batch: where padding would change it, there is none.
    """
    import torch
    from bert_score.utils import bert_encode, padding

    model = encoder.module
    known = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    if (most := max((max(ids) for ids in texts.values()), default=0)) >= known:
        raise UnsupportedError(
            f"The encoder's tokenizer made token {most}, and the encoder has {known} embeddings: they do not belong "
            "together. Pass a folder whose tokenizer is the encoder's own."
        )
    # The attention mask hides what stands in the padding, so any id will do for a tokenizer that has none.
    pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    order = sorted(texts, key=lambda text: -len(texts[text]))
    found: dict[str, Embedded] = {}
    for batch in _batches(order, texts, batch_size, same_length=encoder.feels_padding):
        padded, lengths, mask = padding([texts[text] for text in batch], pad)
        vectors = bert_encode(model, padded.to(device), attention_mask=mask.to(device)).cpu()
        for row, text in enumerate(batch):
            weights = torch.tensor(_weights(tokenizer, texts[text]))
            found[text] = _never_two(vectors[row, : int(lengths[row])], weights)
    return found


def match(pairs: Sequence[tuple[Embedded, Embedded]], device: str) -> torch.Tensor:
    """Precision, recall and F1 of one batch of (candidate, reference), (pairs, 3), by bert-score's greedy matching.

    Where no token of the other text is similar at all, bert-score's matching finds the padding of the batch, with a
    similarity of 0; so a batch here is a batch there.
    """
    import torch
    from bert_score.utils import greedy_cos_idf

    candidates, references = zip(*pairs, strict=True)
    with torch.no_grad():
        scores = greedy_cos_idf(*_padded(references, device), *_padded(candidates, device))
    return torch.stack(scores, dim=-1).cpu()


class EmbeddingCache:
    """Embeddings of earlier calls, up to a number of bytes.

    What the present call reads is never dropped for what it adds: going through more texts than there is room for,
    again and again, would else find none of them.

    >>> len(EmbeddingCache())
    0
    """

    def __init__(self, max_bytes: int = CACHE_BYTES) -> None:
        self.max_bytes = max_bytes
        self._bytes = 0
        self._kept: OrderedDict[str, Embedded] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, texts: Iterable[str]) -> dict[str, Embedded]:
        """Those of the texts that are kept."""
        found = {text: self._kept[text] for text in texts if text in self._kept}
        for text in found:
            self._kept.move_to_end(text)
        return found

    def add(self, found: Mapping[str, Embedded], present: set[str]) -> None:
        """Keep what fits; what goes for it was read longest ago, and is not among `present`."""
        for text, one in found.items():
            if text in self._kept:
                continue
            size = _bytes(one)
            while self._bytes + size > self.max_bytes and self._kept:
                oldest = next(iter(self._kept))
                if oldest in present:
                    return
                self._bytes -= _bytes(self._kept.pop(oldest))
            if self._bytes + size <= self.max_bytes:
                # A view would keep its whole batch alive.
                self._kept[text] = Embedded(one.vectors.clone(), one.weights)
                self._bytes += size


def _batches(
    order: list[str], texts: Mapping[str, list[int]], batch_size: int, *, same_length: bool
) -> list[list[str]]:
    """Texts, the longest first, in batches of which at most a quarter is padding, or nothing."""
    share = 1 if same_length else FULL
    batches: list[list[str]] = []
    for text in order:
        open_one = batches and len(batches[-1]) < batch_size
        if open_one and len(texts[text]) >= share * len(texts[batches[-1][0]]):
            batches[-1].append(text)
        else:
            batches.append([text])
    return batches


def _weights(tokenizer: Any, ids: Sequence[int]) -> list[float]:
    ignored = (tokenizer.sep_token_id, tokenizer.cls_token_id)
    return [0.0 if token in ignored else 1.0 for token in ids]


def _never_two(vectors: torch.Tensor, weights: torch.Tensor) -> Embedded:
    """bert-score takes two tokens for [CLS] and [SEP] of an empty text, and a word of T5's has two: itself and the end.

    A token that stands there twice, the second time without weight, changes no maximum and no mean.
    """
    import torch

    if len(weights) == 2:
        vectors, weights = torch.cat([vectors, vectors[-1:]]), torch.cat([weights, weights.new_zeros(1)])
    return Embedded(vectors, weights)


def _padded(texts: Sequence[Embedded], device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Vectors, mask and weights of texts, as `greedy_cos_idf` takes them; it writes into them."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    vectors = pad_sequence([one.vectors for one in texts], batch_first=True, padding_value=2.0).to(device)
    weights = pad_sequence([one.weights for one in texts], batch_first=True).to(device)
    lengths = torch.tensor([len(one.weights) for one in texts])
    mask = torch.arange(vectors.shape[1]).unsqueeze(0) < lengths.unsqueeze(1)
    return vectors, mask.to(device), weights


def _bytes(one: Embedded) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in one)
