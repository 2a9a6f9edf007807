"""The scores of systems that are to be compared, and on which samples a judge's scores can be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import ConflictError
from .combined import check_bert_score, check_judge_score


@dataclass(frozen=True)
class SystemScores:
    """The scores of one system, sample by sample; every system has the same samples in the same order.

    Args:
        bert: BERTScore's F1 of each answer.
        judge: 0 to 100, None for what was not judged; None altogether where no judge was asked.
    """

    bert: Sequence[float]
    judge: Sequence[float | None] | None = None


def check_systems(systems: Mapping[str, SystemScores]) -> int:
    """The number of samples.

    Raises:
        ConflictError: No systems, no samples, or different numbers of them.
        ForgeError: What is no score.
    """
    if not systems:
        raise ConflictError("There are no systems to rank.")
    counts = {name: len(scores.bert) for name, scores in systems.items()}
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ConflictError(f"The systems have different numbers of samples ({said}): score all on the same ones.")
    samples = next(iter(counts.values()))
    if not samples:
        raise ConflictError("There are no samples to rank by.")
    for name, scores in systems.items():
        for place, value in enumerate(scores.bert):
            check_bert_score(f"{name}: bert[{place}]", value)
        if scores.judge is not None and len(scores.judge) != samples:
            raise ConflictError(
                f"{name} has {len(scores.judge)} judge scores and {samples} samples: give one a sample, None where it "
                "was not judged."
            )
        for place, score in enumerate(scores.judge or ()):
            if score is not None:
                check_judge_score(f"{name}: judge[{place}]", score)
    return samples


def judged_in_all(systems: Mapping[str, SystemScores]) -> tuple[list[int], list[str]]:
    """The samples that the judge's part of every system rests on, none where it has no part; and why, in sentences."""
    own = {
        name: {place for place, score in enumerate(scores.judge or ()) if score is not None}
        for name, scores in systems.items()
    }
    without = [name for name, places in own.items() if not places]
    if len(without) == len(systems):
        return [], []
    if without:
        lacking = f"{without[0]} has" if len(without) == 1 else f"{', '.join(without)} have"
        return [], [
            f"All are ranked by BERTScore alone: {lacking} no judge scores, and scores with and without a judge "
            "are not comparable."
        ]
    common = sorted(set.intersection(*own.values()))
    best = max(own, key=lambda name: len(own[name]))
    samples = len(systems[best].bert)
    if 2 * len(common) < len(own[best]):
        return [], [
            f"All are ranked by BERTScore alone: only {len(common)} samples were judged in every system, fewer than "
            f"half of the {len(own[best])} judged in {best}."
        ]
    if len(common) == samples:
        return common, []
    least = min(own, key=lambda name: len(own[name]))
    said = f"The judge's part rests on {len(common)} of {samples} samples"
    if len(own[least]) < len(own[best]) or len(common) < len(own[least]):
        said += f", those judged in every system ({best}: {len(own[best])}, {least}: {len(own[least])})"
    return common, [said + "."]
