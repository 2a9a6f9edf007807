"""What a judge is told to look for."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import pairwise

from ...errors import ConflictError

_CRITERIA = """\
How well does the answer serve the person who wrote the last message of the conversation?
- helpful: it does what was asked, completely, at a fitting length, in the language of the conversation;
- correct: what it claims is true and it contradicts nothing that was said before;
- faithful: where there is a reference, it says what that says. Other words are fine, another meaning is not."""

_BANDS = (
    (90, "Nothing of substance could be better."),
    (70, "Right and useful, with small gaps or needless text."),
    (50, "Partly right: something important is missing or wrong."),
    (25, "Mostly wrong, off the point, or of little use."),
    (0, "Wrong, empty, unintelligible, harmful, or no answer to the question."),
)


@dataclass(frozen=True)
class Rubric:
    """Criteria in words, and what scores between 0 and 100 stand for.

    >>> Rubric("Is the answer polite?").bands[-1]
    (0, 'Wrong, empty, unintelligible, harmful, or no answer to the question.')

    Args:
        criteria: What to look for. It is an instruction to the judge: never put text into it that is to be judged.
        bands: The lowest score of each band and its meaning, the highest band first, the last one from 0. Anchors make
            the scores of one judge comparable from sample to sample, not those of two judges with each other.

    Raises:
        ConflictError: Empty criteria, or bands that do not fall from at most 100 to 0.
    """

    criteria: str = _CRITERIA
    bands: tuple[tuple[int, str], ...] = _BANDS

    def __post_init__(self) -> None:
        if not isinstance(self.criteria, str) or not self.criteria.strip():
            raise ConflictError(f"criteria={self.criteria!r}: say in words what the judge is to look for.")
        edges = [edge for edge, _ in self.bands]
        falling = all(high > low for high, low in pairwise(edges))
        if not edges or edges[-1] != 0 or edges[0] > 100 or not falling:
            raise ConflictError(f"The bands begin at {edges}: they must fall from at most 100 to 0.")

    @classmethod
    def of(cls, rubric: Rubric | str | None) -> Rubric:
        """A rubric, or one with these criteria, or the default."""
        if rubric is None:
            return cls()
        return rubric if isinstance(rubric, Rubric) else cls(rubric)

    @property
    def text(self) -> str:
        """The criteria and the bands, as the judge reads them."""
        upper = [101, *(edge for edge, _ in self.bands)]
        lines = [f"{low} to {above - 1}: {meaning}" for above, (low, meaning) in zip(upper, self.bands, strict=False)]
        return f"{self.criteria.strip()}\n\nScores:\n" + "\n".join(lines)

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that change with every word of it."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]
