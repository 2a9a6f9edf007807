"""BERTScore of answers against references, over the `bert-score` package.

BERTScore (Zhang et al. 2020, arXiv:1904.09675) matches every token of the answer with the most similar one of the
reference, by the cosine of an encoder's contextual embeddings: precision is the mean over the answer's tokens, recall
over the reference's, F1 their harmonic mean. The matching is bert-score's own function, and the numbers are its own
numbers; what breaks it is handled here, and texts are encoded in fewer, better filled batches.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ConflictError, ForgeError, NonFiniteError
from .embeddings import EmbeddingCache, embed, is_cut, match, token_ids
from .encoder import find_encoder, find_tokenizer, load_encoder
from .known_encoders import baseline

if TYPE_CHECKING:
    import torch

    from .encoder import LoadedEncoder

logger = logging.getLogger(__name__)

WINDOW = 16
"""Batches of pairs whose embeddings are in memory at once."""


@dataclass(frozen=True)
class BertScores:
    """Precision, recall and F1 of each pair, in the order of the candidates.

    >>> scores = BertScores((0.8, 0.9), (0.7, 0.9), (0.746, 0.9), encoder="roberta-large", num_layers=17)
    >>> scores.describe()
    'BERTScore 0.823 on 2 pairs (precision 0.850, recall 0.800)'

    Args:
        precision: how much of the candidate is in the reference.
        recall: how much of the reference is in the candidate.
        f1: their harmonic mean.
        encoder: the model whose embeddings were compared.
        num_layers: which of its layers.
        weights: the digest of the encoder's weights.
        rescaled: whether scores count from bert-score's baseline; they may then be below 0.
        empty: pairs that score 0 because the candidate, or every reference, holds no token to compare.
        cut: texts that were longer than the encoder reads, and compared as far as it does.
    """

    precision: tuple[float, ...]
    recall: tuple[float, ...]
    f1: tuple[float, ...]
    encoder: str = ""
    num_layers: int = 0
    weights: str = ""
    rescaled: bool = False
    empty: int = 0
    cut: int = 0

    def __len__(self) -> int:
        return len(self.f1)

    @property
    def mean(self) -> float:
        """The mean F1: what "the BERTScore" of a system is."""
        return math.fsum(self.f1) / len(self.f1)

    def describe(self) -> str:
        """The result as a sentence."""
        precision, recall = (math.fsum(values) / len(self) for values in (self.precision, self.recall))
        text = f"BERTScore {self.mean:.3f} on {_count(len(self), 'pair')} "
        text += f"({'rescaled, ' if self.rescaled else ''}precision {precision:.3f}, recall {recall:.3f})"
        if self.empty:
            text += f"; {_count(self.empty, 'pair')} scored 0, being empty"
        if self.cut:
            text += f"; {_count(self.cut, 'text')} compared in part, being longer than the encoder reads"
        return text

    def to_dict(self) -> dict[str, Any]:
        """All of it, and the mean, for JSON."""
        return {"mean": self.mean, **asdict(self)}


class BertScore:
    """Scores candidates against references with one encoder, which is loaded once.

    Making one reads the encoder's config and tokenizer and refuses what could not be scored; the weights come with the
    first `score`, or with `load`. Embeddings of references are kept for the next call: those of a base and of a tuned
    model's answers are the same. Calls from several threads wait for one another.

    Args:
        model_type: A hub id or a local folder; None for bert-score's choice for `lang`.
        num_layers: The layer whose output is compared, 0 being the embeddings; None for bert-score's choice where it
            has one for this model, else the last, with a warning.
        device: "cuda", "cpu", ...; None for the first where there is one.
        batch_size: Texts encoded, and pairs matched, at a time.
        lang: Two letters; decides the model where none is named, and the baseline.
        rescale_with_baseline: Whether scores count from what random pairs of sentences score with this encoder and
            language, instead of from 0: easier to read, the ranking is the same.

    Raises:
        UnsupportedError: There is no such encoder here, it is none, or it has no baseline; the message says what helps.
        ForgeError: A layer, size or device that does not exist.
    """

    def __init__(
        self,
        model_type: str | os.PathLike[str] | None = None,
        num_layers: int | None = None,
        device: str | None = None,
        *,
        batch_size: int = 64,
        lang: str = "en",
        rescale_with_baseline: bool = False,
    ) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ForgeError(f"batch_size={batch_size!r}: give a whole number of at least 1.")
        if not isinstance(lang, str) or not lang:
            raise ForgeError(f"lang={lang!r}: give a language as two letters, such as 'en'.")
        from bert_score.utils import lang2model

        self.device = _device(device)
        name = lang2model[lang.lower()] if model_type is None else os.path.expanduser(os.fspath(model_type))  # noqa: PTH111
        self._encoder = find_encoder(name, num_layers)
        known_as, layer = self._encoder.known_as, self._encoder.num_layers
        self._baseline = baseline(name, known_as, layer, lang.lower()) if rescale_with_baseline else None
        self._tokenizer = find_tokenizer(self._encoder)
        self.batch_size = batch_size
        self._loaded_encoder: LoadedEncoder | None = None
        self._references = EmbeddingCache()
        self._lock = threading.Lock()

    @property
    def model_type(self) -> str:
        """The encoder's hub id or folder."""
        return self._encoder.name

    @property
    def num_layers(self) -> int:
        """The layer whose output is compared."""
        return self._encoder.num_layers

    @property
    def max_tokens(self) -> int:
        """How much of a text is read, special tokens included."""
        return int(self._tokenizer.model_max_length)

    def __repr__(self) -> str:
        rescaled = ", rescaled" if self._baseline is not None else ""
        return f"BertScore({self.model_type!r}, layer {self.num_layers} of {self._encoder.of_layers}{rescaled})"

    def load(self) -> BertScore:
        """Load the weights now, so that what is wrong with them shows before a training and not after it.

        Raises:
            UnsupportedError: Weights are missing from the checkpoint.
        """
        with self._lock:
            self._loaded()
        return self

    def score(self, candidates: Iterable[str], references: Iterable[str | Sequence[str]]) -> BertScores:
        """Compare each candidate with its reference.

        Texts without a token to compare (empty, white space, control characters) score 0, rescaled or not, also where
        both are; bert-score stops at them. With several references to a candidate each of the three scores is its best
        one, as in bert-score.

        Args:
            candidates: The answers.
            references: One text per candidate, or several.

        Raises:
            ConflictError: Unequal numbers, none at all, or what is no text.
            NonFiniteError: The encoder computed NaN.
        """
        groups = _groups(candidates, references)
        with self._lock:
            encoder = self._loaded()
            texts = dict.fromkeys(text for candidate, own in groups for text in (candidate, *own))
            ids = {text: token_ids(self._tokenizer, text) for text in texts}
            pairs = [(candidate, one) for candidate, own in groups for one in own if ids[candidate] and ids[one]]
            raw = self._matched(encoder, pairs, ids)
            cut = sum(is_cut(self._tokenizer, text, own) for text, own in ids.items())
        return self._result(groups, ids, raw, cut, encoder.digest)

    def _loaded(self) -> LoadedEncoder:
        if self._loaded_encoder is None:
            self._loaded_encoder = load_encoder(self._encoder, self.device)
        return self._loaded_encoder

    def _matched(self, encoder: LoadedEncoder, pairs: list[tuple[str, str]], ids: dict[str, list[int]]) -> torch.Tensor:
        """bert-score's precision, recall and F1 of each pair, (pairs, 3)."""
        import torch

        scores = [torch.zeros(0, 3)]
        present = {reference for _, reference in pairs}
        for start in range(0, len(pairs), WINDOW * self.batch_size):
            window = pairs[start : start + WINDOW * self.batch_size]
            here = dict.fromkeys(text for pair in window for text in pair)
            known = self._references.get(here)
            new = {text: ids[text] for text in here if text not in known}
            known |= embed(encoder, self._tokenizer, new, self.batch_size, self.device)
            for first in range(0, len(window), self.batch_size):
                batch = window[first : first + self.batch_size]
                scores.append(match([(known[candidate], known[one]) for candidate, one in batch], self.device))
            self._references.add({one: known[one] for _, one in window}, present)
        raw = torch.cat(scores)
        # bert-score turns a NaN F1 into 0; precision and recall still have it.
        if not bool(torch.isfinite(raw).all()):
            candidate, reference = pairs[int((~torch.isfinite(raw)).any(dim=1).nonzero()[0])]
            raise NonFiniteError(
                f"{self.model_type} computed NaN for {_short(candidate)} against {_short(reference)}. Try another "
                "encoder, or device='cpu'."
            )
        return raw

    def _result(
        self, groups: list[tuple[str, list[str]]], ids: dict[str, list[int]], raw: torch.Tensor, cut: int, weights: str
    ) -> BertScores:
        """Each candidate's best scores, from those of its pairs."""
        import torch

        table, empty, start = torch.zeros(len(groups), 3), 0, 0
        for row, (candidate, own) in enumerate(groups):
            matched = sum(bool(ids[candidate] and ids[one]) for one in own)
            if matched:
                best = raw[start : start + matched].max(dim=0)[0]
                table[row] = best if self._baseline is None else (best - self._baseline) / (1 - self._baseline)
            empty += not matched
            start += matched
        precision, recall, f1 = (tuple(column) for column in table.T.tolist())
        result = BertScores(
            precision,
            recall,
            f1,
            encoder=self._encoder.label,
            num_layers=self.num_layers,
            weights=weights,
            rescaled=self._baseline is not None,
            empty=empty,
            cut=cut,
        )
        logger.info(result.describe())
        return result


def _groups(candidates: Iterable[str], references: Iterable[str | Sequence[str]]) -> list[tuple[str, list[str]]]:
    """Each candidate with its references.

    Raises:
        ConflictError: Unequal numbers, none at all, or what is no text.
    """
    for name, value in {"candidates": candidates, "references": references}.items():
        if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
            raise ConflictError(f"{name} is a {type(value).__name__}: give a list with a text for each pair.")
    texts, answers = list(candidates), list(references)
    if len(texts) != len(answers):
        raise ConflictError(
            f"{len(texts)} candidates and {len(answers)} references: give one (or a list) per candidate."
        )
    if not texts:
        raise ConflictError("There are no pairs to score: candidates and references are empty lists.")
    groups = []
    for row, (candidate, own) in enumerate(zip(texts, answers, strict=True)):
        several = [own] if isinstance(own, str) else list(own) if isinstance(own, Sequence) else [own]
        if not several:
            raise ConflictError(f"references[{row}] is an empty list: give at least one text (it may be empty).")
        for name, value in [("candidates", candidate), *(("references", one) for one in several)]:
            if not isinstance(value, str):
                raise ConflictError(f"{name}[{row}] is {value!r}, a {type(value).__name__}: it must be a text.")
        groups.append((candidate, several))
    return groups


def _device(device: str | None) -> str:
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ForgeError(f"device={device!r} cannot be used here: {reason}. Leave it out, or say 'cpu'.") from error
    return str(device)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:39] + "…")
