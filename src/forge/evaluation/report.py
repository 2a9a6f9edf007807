"""Evaluations as a page: the figures, what they rest on, and the answers side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..reporting import Page

if TYPE_CHECKING:
    from .compare import Comparison
    from .result import EvaluatedSample, EvaluationResult

# What a person reads, and a page that opens at once; result.json has all of them.
MOST_SAMPLES = 100


def page(results: Sequence[EvaluationResult], comparison: Comparison | None = None) -> Page:
    """The report of one evaluation, or of several of the same samples."""
    names = [result.model for result in results]
    made = Page("Evaluation", " against ".join(names))
    if len(results) == 1:
        made.facts(results[0].figures())
    else:
        figures = comparison.figures() if comparison is not None else [result.figures() for result in results]
        rows = dict.fromkeys(name for one in figures for name in one)
        made.table(("figure", *names), [(name, *(one.get(name, "-") for one in figures)) for name in rows])
    if comparison is not None:
        made.heading("What may be concluded")
        for line in comparison.conclusions():
            made.notice(line, kind="note")
    for note in notes(results):
        made.notice(note, kind="note")
    answered = [place for place, one in enumerate(results[0].samples) if one.answer is not None]
    if answered:
        made.heading("Answers" if len(results) == 1 else "Answers, side by side")
        if len(answered) > MOST_SAMPLES:
            made.text(f"The first {MOST_SAMPLES} of {len(answered)}; result.json has them all.")
        made.table(("question", "reference", *names), [_row(results, place) for place in answered[:MOST_SAMPLES]])
    made.heading("How it was measured")
    made.table(("setting", *names), _settings(results))
    return made


def notes(results: Sequence[EvaluationResult]) -> list[str]:
    """The notes of all; those that not all share say whose they are."""
    said = []
    for note in dict.fromkeys(note for result in results for note in result.notes):
        whose = [result.model for result in results if note in result.notes]
        said.append(note if len(whose) == len(results) else f"{', '.join(whose)}: {note}")
    return said


def _settings(results: Sequence[EvaluationResult]) -> list[tuple[str, ...]]:
    said = [_flat(result.settings) | _flat({"judge": result.judge_usage or {}}) for result in results]
    return [(name, *(one.get(name, "-") for one in said)) for name in dict.fromkeys(n for one in said for n in one)]


def _flat(values: object, name: str = "") -> dict[str, str]:
    if not isinstance(values, dict):
        return {} if values is None else {name: f"{values:g}" if isinstance(values, float) else str(values)}
    return {
        key: text
        for inner, value in values.items()
        for key, text in _flat(value, f"{name} {inner}".strip().replace("_", " ")).items()
    }


def _row(results: Sequence[EvaluationResult], place: int) -> tuple[str, ...]:
    first = results[0].samples[place]
    return (first.question, first.reference or "", *(_answer(result.samples[place]) for result in results))


def _answer(sample: EvaluatedSample) -> str:
    scores = []
    if sample.bert_f1 is not None:
        scores.append(f"F1 {sample.bert_f1:.3f}")
    if sample.was_judged:
        scores.append("judge failed" if sample.judge_score is None else f"judge {sample.judge_score:.1f}")
    if sample.cut:
        scores.append("cut short")
    said = f"{sample.answer or '(empty)'}\n[{', '.join(scores)}]" if scores else sample.answer or "(empty)"
    why = sample.judge_reason or sample.judge_error
    return f"{said}\n{why}" if why else said
