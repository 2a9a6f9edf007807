"""Scores for answers that are there: BERTScore of each, a judge's opinion of some."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from ..errors import ConflictError
from .result import EvaluatedSample, EvaluationResult, content_of

if TYPE_CHECKING:
    from .bert_score import BertScore
    from .generation import Prompt
    from .judges import Judge

logger = logging.getLogger(__name__)


def score_answers(
    result: EvaluationResult,
    *,
    bert_score: BertScore | bool = False,
    judge: Judge | str | None = None,
    judge_samples: int | None = 64,
) -> EvaluationResult:
    """Score the answers of a result, again or for the first time; nothing is generated.

    Args:
        result: From `evaluate_model`, or loaded from where it was saved.
        bert_score: Scores every answer against its reference: a `BertScore`, or True for `BertScore()`. Scores that are
            there stay if False.
        judge: Is asked about answers; a judge, or the name of one that needs no model. Opinions that are there stay if
            None.
        judge_samples: About how many, chosen by a fixed seed: the same for every model on the same data. None for all.

    Raises:
        ConflictError: `judge_samples` below one, or no answer to score.
    """
    check_samples("judge_samples", judge_samples)
    encoder, critic = as_encoder(bert_score), as_judge(judge)
    if (encoder or critic) and not result.answered:
        raise ConflictError(
            "No sample has a question and an answer, so there is nothing to score. Plain text has a loss only: pass "
            "bert_score=False and judge=None, or data with questions."
        )
    scored = result if encoder is None else _with_bert_score(result, encoder)
    scored = scored if critic is None else _with_judge(scored, critic, judge_samples)
    if scored is not result and scored.judge_score is not None and scored.bert_score is not None:
        logger.info(scored.describe()[-1])
    return scored


def as_encoder(bert_score: BertScore | bool) -> BertScore | None:
    """The encoder that is meant; True means bert-score's own choice.

    Raises:
        ConflictError: What is no BertScore.
    """
    from .bert_score import BertScore

    if isinstance(bert_score, bool):
        return BertScore() if bert_score else None
    if not isinstance(bert_score, BertScore):
        raise ConflictError(
            f"bert_score={bert_score!r}: give a BertScore, such as BertScore('roberta-large'), True or False."
        )
    return bert_score


def as_judge(judge: Judge | str | bool | None, **local: Any) -> Judge | None:
    """The judge that is meant; True means the default one.

    Args:
        judge: A judge, its name, True, or None or False for none.
        local: What the judge "local" needs: model and tokenizer.

    Raises:
        ForgeError: What is no judge, or one that is not ready.
    """
    from .judges import Judge, default_judge, get_judge

    if judge is None or judge is False:
        return None
    if isinstance(judge, (str, bool)):
        chosen = default_judge() if isinstance(judge, bool) else judge
        return get_judge(chosen, **local) if chosen == "local" else get_judge(chosen)
    if not isinstance(judge, Judge):
        raise ConflictError(f"judge={judge!r}: give a judge from get_judge(...), its name, True, or None for none.")
    return judge


def choose(places: Sequence[int], count: int | None) -> list[int]:
    """At most `count` of them, in their order: by a fixed seed, so every model is asked the same."""
    if count is None or count >= len(places):
        return list(places)
    return sorted(random.Random(0).sample(list(places), count))


def check_samples(name: str, count: int | None) -> None:
    """Refuse a bound that bounds nothing."""
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise ConflictError(f"{name}={count!r}: give a whole number of at least 1, or None for all.")


def _with_bert_score(result: EvaluationResult, encoder: BertScore) -> EvaluationResult:
    samples = list(result.samples)
    places = [place for place, one in enumerate(samples) if one.answer is not None]
    scores = encoder.score(*_texts(samples, places))
    for place, precision, recall, f1 in zip(places, scores.precision, scores.recall, scores.f1, strict=True):
        samples[place] = replace(samples[place], bert_precision=precision, bert_recall=recall, bert_f1=f1)
    used = {"encoder": scores.encoder, "layer": scores.num_layers, "weights": scores.weights}
    settings = {**result.settings, "bert_score": {**used, "rescaled": scores.rescaled}}
    notes = [note for note in result.notes if not note.startswith("BERTScore:")]
    if scores.cut:
        notes.append(
            f"BERTScore: {scores.cut} texts are longer than the {encoder.max_tokens} tokens that its encoder reads, "
            "and were compared as far as it does."
        )
    if scores.empty:
        notes.append(f"BERTScore: {scores.empty} answers or references are empty and score 0.")
    return replace(result, samples=tuple(samples), settings=settings, notes=tuple(notes))


def _with_judge(result: EvaluationResult, judge: Judge, judge_samples: int | None) -> EvaluationResult:
    samples = [replace(one, judge_score=None, judge_reason="", judge_error=None) for one in result.samples]
    asked = choose([place for place, one in enumerate(samples) if one.answer is not None], judge_samples)
    answers, references = _texts(samples, asked)
    verdict = judge.score([_plain(samples[place].prompt) for place in asked], answers, references)
    for place, one in zip(asked, verdict.judgements, strict=True):
        samples[place] = replace(samples[place], judge_score=one.score, judge_reason=one.reason, judge_error=one.error)
    used = {"name": verdict.judge, "model": verdict.model, "rubric": verdict.rubric, "identity": verdict.identity}
    notes = [note for note in result.notes if not note.startswith("LLM judge:")]
    if verdict.judged < verdict.total:
        notes.append(verdict.describe() + ".")
    return replace(
        result,
        samples=tuple(samples),
        settings={**result.settings, "judge": used},
        judge_usage=asdict(verdict.usage),
        notes=tuple(notes),
    )


def _texts(samples: list[EvaluatedSample], places: list[int]) -> tuple[list[str], list[str]]:
    return [samples[place].answer or "" for place in places], [samples[place].reference or "" for place in places]


def _plain(prompt: Prompt | None) -> str | list[dict[str, str]]:
    """A prompt in words only, as judges read it."""
    if prompt is None or isinstance(prompt, str):
        return prompt or ""
    return [{"role": str(message["role"]), "content": content_of(message)} for message in prompt]
