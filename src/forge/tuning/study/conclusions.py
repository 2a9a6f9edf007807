"""What may be concluded from a study, and what may not."""

from __future__ import annotations

import math
from typing import Any

from .reading import StudyRecord, TrialRecord, trained
from .wording import STATUS, count, figure

SAME = 0.005
"""A difference of the held-out loss up to half a per cent is treated as none: nobody repeated it with another seed."""
FEW = 10
_EDGE = 0.05  # of the range


def tokens(study: StudyRecord) -> tuple[int, int]:
    """Training tokens spent, and what the same trials would have taken to their ends.

    Trials that failed or did not fit are in neither: they had no end to be run to.
    """
    spent = whole = 0
    for trial in trained(study.trials):
        done = trial.tokens or 0
        share = trial.steps / trial.total_steps if trial.steps and trial.total_steps else 1.0
        spent += done
        whole += round(done / min(1.0, share))
    return spent, whole


def saved_share(study: StudyRecord) -> float:
    """The share of training tokens that were not spent because trials were stopped; 0 where nothing is known."""
    spent, whole = tokens(study)
    return 1 - spent / whole if whole else 0.0


def conclusions(study: StudyRecord) -> list[str]:
    """What the figures say, sentence by sentence: first what happened, then how far to trust it."""
    return [*_happened(study), *_gained(study), *caveats(study)]


def caveats(study: StudyRecord) -> list[str]:
    """How far the winner is to be trusted."""
    best = study.best()
    if best is None:
        return []
    said = [_flattered(study), *edges(study, best)]
    done = len(study.ranked())
    if done < FEW:
        said.append(f"{count(done, 'completed trial')}: enough for a setting that works, too few to say which matters.")
    near = [trial for trial in study.ranked() if trial is not best and _same(trial.loss, best.loss)]
    if near:
        numbers = ", ".join(str(trial.number) for trial in near[:5]) + (", ..." if len(near) > 5 else "")
        said.append(
            f"{'Trial' if len(near) == 1 else 'Trials'} {numbers} ended within {SAME:.1%} of the winner's loss: "
            "without another seed they cannot be told apart, so any of them will do."
        )
    return said


def edges(study: StudyRecord, trial: TrialRecord) -> list[str]:
    """For each setting that lies at the edge of what was searched, the advice to widen it."""
    said = []
    for name, dimension in study.space.items():
        if (edge := _edge(dimension, trial.params.get(name))) is not None:
            word, low, high = edge
            said.append(
                f"The winner's {name}={figure(trial.params[name])} is at the {word} edge of what was searched "
                f"({figure(low)} to {figure(high)}): the best may lie beyond it. Widen the range and go on."
            )
    return said


def _happened(study: StudyRecord) -> list[str]:
    parts = [f"{number:,} {STATUS.get(status, status)}" for status, number in study.counts.items()]
    said = [f"{count(len(study.trials), 'trial')}: {', '.join(parts)}." if parts else "No trial was begun."]
    spent, whole = tokens(study)
    if whole > spent:
        said.append(
            f"{spent:,} training tokens were spent; the same trials run to their ends would have taken {whole:,}: "
            f"{1 - spent / whole:.0%} saved."
        )
    return said


def _gained(study: StudyRecord) -> list[str]:
    best = study.best()
    if best is None:
        return ["No trial was completed, so there is no winner: look at what stopped them."]
    said = []
    base = study.base.get("loss")
    if base is not None and best.loss is not None:
        what = f"Held-out loss {base:.4g} without an adapter, {best.loss:.4g} with the winner's (trial {best.number})"
        if best.loss < base:
            said.append(f"{what}: {1 - best.loss / base:.1%} lower.")
        else:
            said.append(f"{what}: the search found nothing that is better than the base on these rows.")
    for name, label in (
        ("bert_score", "BERTScore F1"),
        ("llm_judge_score", "LLM judge"),
        ("combined_score", "Combined score"),
    ):
        if name in study.base and name in best.scores and (name != "combined_score" or study.objective == "combined"):
            before, after = study.base[name], best.scores[name]
            better = "better" if after > before else "not better"
            said.append(f"{label}: {before:.4g} for the base, {after:.4g} for the winner: {better}.")
    first = next(iter(study.ranked()), None)
    if study.objective != "loss" and first is not None and first is not best:
        said.append(
            f"Trial {first.number} has the lowest held-out loss ({first.loss:.4g}); {study.objective} chose "
            f"trial {best.number}."
        )
    return said


def _flattered(study: StudyRecord) -> str:
    done = count(len(study.ranked()), "completed trial")
    return (
        f"The winner was chosen among {done} on these held-out rows, and the best of many flatters itself: "
        "what it is worth, rows say that chose nothing."
    )


def _edge(dimension: dict[str, Any], value: Any) -> tuple[str, float, float] | None:
    """Which edge, and from where to where; None inside, and where nothing can lie beyond."""
    if not _is_number(value):
        return None
    if "choices" in dimension:
        choices = dimension["choices"]
        if len(choices) < 3 or not all(map(_is_number, choices)):
            return None
        low, high = min(choices), max(choices)
        at_low, at_high = value <= low, value >= high
    else:
        low, high = dimension["low"], dimension["high"]
        if not low < high:
            return None
        scale = math.log if dimension.get("log") and low > 0 else float
        place = (scale(value) - scale(low)) / (scale(high) - scale(low))
        at_low, at_high = place <= _EDGE, place >= 1 - _EDGE
    if at_low and low > 0:  # below nothing there is nothing
        return "lower", low, high
    return ("upper", low, high) if at_high else None


def _same(loss: float | None, best: float | None) -> bool:
    return loss is not None and best is not None and abs(loss - best) <= SAME * abs(best)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
