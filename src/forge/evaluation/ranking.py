"""Which system is best, as far as the samples tell.

Two rules keep a ranking honest. Scores with and without a judge are different quantities, so all systems are ranked
with it or all without. And a difference that could be chance is a tie.

A tie is not transitive: a may tie with b, and b with c, where a is better than c. So a place is shared with the group's
best: in the order of the scores, a system that cannot be told apart from the best of the group before it joins that
group, and the first that can opens the next one, at the place that it has in the order (1, 1, 3). `tied_with` names
every system that one cannot be told apart from, whatever its place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from ..reporting import Table
from .bootstrap import Difference, Interval, check_bootstrap, difference, fewest_samples, percentiles, resampled_sums
from .combined import BERT_WEIGHT, JUDGE_WEIGHT, combined_score
from .systems import SystemScores, check_systems, judged_in_all

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class RankedSystem:
    """One system's place.

    Args:
        place: 1 is best; systems that tie with the best of their group share it.
        name: The system's.
        bert: Its mean BERTScore over all samples.
        judge: Its mean judge score over the samples judged in every system; None where all are ranked without.
        combined: What it is ranked by.
        interval: Of that.
        tied_with: The systems that it cannot be told apart from, in the order of the ranking.
    """

    place: int
    name: str
    bert: float
    judge: float | None
    combined: float
    interval: Interval
    tied_with: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class Ranking:
    """The systems in order; made by `rank`.

    Args:
        rows: The systems, the best first.
        differences: What the first of a pair has more than the second, for every pair in the order of the rows.
        samples: How many there are.
        judged_samples: On how many of them the judge's part rests; 0 where all are ranked without.
        confidence: Of the intervals.
        notes: What a reader must know, in sentences.
    """

    rows: tuple[RankedSystem, ...]
    differences: Mapping[tuple[str, str], Difference]
    samples: int
    judged_samples: int
    confidence: float
    notes: tuple[str, ...]

    @property
    def with_judge(self) -> bool:
        """Whether the judge counts."""
        return self.judged_samples > 0

    def conclusions(self) -> list[str]:
        """What may be said of each system beside the best of its group or of the one before, then the notes."""
        measure = "combined score" if self.with_judge else "BERTScore"
        said, best = [], self.rows[0]
        for row in self.rows[1:]:
            gap = self.differences[best.name, row.name]
            if row.place == best.place:
                said.append(f"{measure}: no difference can be shown between {best.name} and {row.name} ({gap}).")
            else:
                said.append(f"{measure}: {best.name} is better than {row.name} ({gap}).")
                best = row
        return [line[0].upper() + line[1:] for line in said] + list(self.notes)

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON; an end of an interval that is not finite is None."""
        return {
            "rows": [{**asdict(row), "interval": _finite(asdict(row.interval))} for row in self.rows],
            "differences": [
                {"first": first, "second": second, **_finite(asdict(gap))}
                for (first, second), gap in self.differences.items()
            ],
            "samples": self.samples,
            "judged_samples": self.judged_samples,
            "confidence": self.confidence,
            "notes": list(self.notes),
        }

    def print(self) -> None:
        """Show the places as a table."""
        self._table().print()

    def __str__(self) -> str:
        return str(self._table())

    def __repr__(self) -> str:
        return f"Ranking({', '.join(f'{row.place}. {row.name}' for row in self.rows)})"

    def _table(self) -> Table:
        judged = ("judge",) if self.with_judge else ()
        measure = ("combined",) if self.with_judge else ()
        interval = f"{100 * self.confidence:.4g}% interval"
        table = Table(
            ("system", "place", "BERTScore", *judged, *measure, interval, "tied with"),
            title=f"{len(self.rows)} systems on {self.samples:,} samples",
        )
        for row in self.rows:
            table.add(
                row.name,
                row.place,
                f"{row.bert:.3f}",
                *(() if row.judge is None else (f"{row.judge:.1f}", f"{row.combined:.3f}")),
                f"[{row.interval.low:.3f}, {row.interval.high:.3f}]",
                ", ".join(row.tied_with) or "-",
            )
        table.footer = "\n".join(self.notes)
        return table


def rank(
    systems: Mapping[str, SystemScores], *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Ranking:
    """Put systems in order by `combined_score`, and say which differences the samples show.

    A system without any judge score makes all of them be ranked by BERTScore alone. Where single scores are missing,
    the judge's part of every system rests on the samples that were judged in all; if those are fewer than half of what
    the best covered system has, it would be another comparison than the one asked for, and all are ranked without it.
    The notes say which it was, and why.

    Differences come from a paired bootstrap, stratified: judged samples and the others are drawn separately, so that
    each draw has as many judged ones, and the same draws serve all systems. The intervals are not corrected for the
    number of systems: among many equal ones, about one pair in twenty is told apart by chance.

    >>> base = SystemScores([0.70, 0.72, 0.69, 0.71, 0.70, 0.74], [60, 55, 62, 58, 61, 64])
    >>> tuned = SystemScores([0.81, 0.83, 0.80, 0.82, 0.83, 0.84], [78, 74, 80, 79, 77, 83])
    >>> print(*rank({"base": base, "tuned": tuned}).conclusions(), sep=chr(10))
    Combined score: tuned is better than base (+0.156 [+0.151, +0.162]).

    Args:
        systems: Their scores by name, over the same samples in the same order.
        confidence: Of the intervals.
        resamples: How often to draw.
        seed: Of the draws.

    Raises:
        ConflictError: No systems, no samples, or different numbers of them.
        ForgeError: What is no score; a confidence, number or seed that is none.
    """
    check_bootstrap(confidence, resamples, seed)
    samples = check_systems(systems)
    judged, notes = judged_in_all(systems)
    bert = {name: _mean(scores.bert, range(samples)) for name, scores in systems.items()}
    judge = {name: _mean(scores.judge or (), judged) if judged else None for name, scores in systems.items()}
    combined = {name: combined_score(bert[name], judge[name]) for name in systems}
    draws = dict(zip(systems, _draws(systems, samples, judged, resamples, seed).T, strict=True))
    order = sorted(systems, key=lambda name: -combined[name])
    decisive = len(judged) or samples
    gaps = {}
    for first, second in combinations(order, 2):
        gap = combined[first] - combined[second]
        gaps[first, second] = difference(gap, draws[first] - draws[second], decisive, confidence)
    ties = {name: tuple(other for other in order if other != name and _is_tie(gaps, name, other)) for name in order}
    rows = []
    for name, place in _places(order, ties).items():
        low, high = (-math.inf, math.inf) if decisive == 1 else percentiles(draws[name], confidence)
        interval = Interval(low, combined[name], high)
        rows.append(RankedSystem(place, name, bert[name], judge[name], combined[name], interval, ties[name]))
    if len(order) > 1 and decisive < (fewest := fewest_samples(confidence)):
        what = "judged sample" if judged else "sample"
        notes.append(
            f"{decisive} {what}{'s' * (decisive != 1)} cannot show a difference, whatever the scores: "
            f"{100 * confidence:.4g}% confidence takes at least {fewest}."
        )
    notes += _ties_across(rows)
    return Ranking(tuple(rows), gaps, samples, len(judged), confidence, tuple(notes))


def _draws(
    systems: Mapping[str, SystemScores], samples: int, judged: list[int], resamples: int, seed: int
) -> NDArray[np.floating[Any]]:
    """The systems' scores in each draw, (resamples, systems).

    A combined score is a sum over samples, of 0.4 BERTScore / n each and of 0.6 judge / 100 m for the m judged ones; so
    a draw is a sum too.
    """
    import numpy as np

    share = BERT_WEIGHT if judged else 1.0
    table = np.array([scores.bert for scores in systems.values()], dtype=np.float64).T * share / samples
    if not judged:
        return resampled_sums([table], resamples, seed)
    judge = np.array([[(scores.judge or ())[place] for place in judged] for scores in systems.values()], np.float64).T
    others = np.setdiff1d(np.arange(samples), judged)
    return resampled_sums([table[judged] + JUDGE_WEIGHT * judge / 100 / len(judged), table[others]], resamples, seed)


def _places(order: list[str], ties: Mapping[str, tuple[str, ...]]) -> dict[str, int]:
    """The place of each, in order: that of the best of its group."""
    places: dict[str, int] = {}
    best = order[0]
    for position, name in enumerate(order, start=1):
        if best not in (name, *ties[name]):
            best = name
        places[name] = places.get(best, position)
    return places


def _is_tie(gaps: Mapping[tuple[str, str], Difference], one: str, other: str) -> bool:
    return (gaps[one, other] if (one, other) in gaps else gaps[other, one]).is_tie


def _ties_across(rows: Sequence[RankedSystem]) -> list[str]:
    """Pairs at different places that cannot be told apart either."""
    pairs = [(a, b) for a, b in combinations(rows, 2) if a.place != b.place and b.name in a.tied_with]
    return [
        f"{a.name} (place {a.place}) and {b.name} (place {b.place}) cannot be told apart either; places go by the "
        "difference from the best of each group."
        for a, b in pairs
    ]


def _mean(values: Sequence[float | None], places: Sequence[int]) -> float:
    found = [value for place in places if (value := values[place]) is not None]
    return math.fsum(found) / len(found)


def _finite(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value if math.isfinite(value) else None for name, value in found.items()}
