"""Scores for answers that are there: BERTScore of each, a judge's opinion of some."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

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
    bert_score: BertScore | None = None,
    judge: Judge | None = None,
    judge_samples: int | None = 64,
) -> EvaluationResult:
    """Score the answers of a result, again or for the first time; nothing is generated.

    Args:
        result: From `evaluate_model`, or loaded from where it was saved.
        bert_score: Scores every answer against its reference; scores that are there stay if None.
        judge: Is asked about answers; opinions that are there stay if None.
        judge_samples: About how many, chosen by a fixed seed: the same for every model on the same data. None for all.

    Raises:
        ConflictError: `judge_samples` below one, or no answer to score.
    """
    check_samples("judge_samples", judge_samples)
    if (bert_score or judge) and not result.answered:
        raise ConflictError(
            "No sample has a question and an answer, so there is nothing to score. Plain text has a loss only: pass "
            "bert_score=False and judge=None, or data with questions."
        )
    samples, settings, usage = list(result.samples), dict(result.settings), result.judge_usage
    places = [place for place, one in enumerate(samples) if one.answer is not None]
    if bert_score is not None:
        scores = bert_score.score(*_texts(samples, places))
        for place, precision, recall, f1 in zip(places, scores.precision, scores.recall, scores.f1, strict=True):
            samples[place] = replace(samples[place], bert_precision=precision, bert_recall=recall, bert_f1=f1)
        settings["bert_score"] = {
            "encoder": scores.encoder,
            "layer": scores.num_layers,
            "rescaled": scores.rescaled,
        }
    if judge is not None:
        asked = choose(places, judge_samples)
        answers, references = _texts(samples, asked)
        verdict = judge.score([_plain(samples[place].prompt) for place in asked], answers, references)
        for place in places:
            samples[place] = replace(samples[place], judge_score=None, judge_reason="", judge_error=None)
        for place, one in zip(asked, verdict.judgements, strict=True):
            samples[place] = replace(
                samples[place], judge_score=one.score, judge_reason=one.reason, judge_error=one.error
            )
        settings["judge"] = {"name": verdict.judge, "model": verdict.model, "rubric": verdict.rubric}
        usage = asdict(verdict.usage)
    scored = replace(result, samples=tuple(samples), settings=settings, judge_usage=usage)
    if scored.judge_score is not None and scored.bert_score is not None:
        logger.info(scored.describe()[-1])
    return scored


def choose(places: Sequence[int], count: int | None) -> list[int]:
    """At most `count` of them, in their order: by a fixed seed, so every model is asked the same."""
    if count is None or count >= len(places):
        return list(places)
    return sorted(random.Random(0).sample(list(places), count))


def check_samples(name: str, count: int | None) -> None:
    """Refuse a bound that bounds nothing."""
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise ConflictError(f"{name}={count!r}: give a whole number of at least 1, or None for all.")


def _texts(samples: list[EvaluatedSample], places: list[int]) -> tuple[list[str], list[str]]:
    return [samples[place].answer or "" for place in places], [samples[place].reference or "" for place in places]


def _plain(prompt: Prompt | None) -> str | list[dict[str, str]]:
    """A prompt in words only, as judges read it."""
    if prompt is None or isinstance(prompt, str):
        return prompt or ""
    return [{"role": str(message["role"]), "content": content_of(message)} for message in prompt]
