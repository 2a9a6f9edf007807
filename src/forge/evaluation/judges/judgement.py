"""What a judge said about answers, and on how many of them that rests."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

# What no file can hold (half of a surrogate pair), and what a terminal would obey.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class Judgement:
    """What a judge said about one answer.

    Args:
        score: 0 to 100; None where there is none, which is not a score of 0.
        reason: In the judge's words, without control characters.
        error: Why there is no score.
    """

    score: float | None = None
    reason: str = ""
    error: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", _printable(self.reason))
        object.__setattr__(self, "error", None if self.error is None else _printable(self.error))


@dataclass(frozen=True)
class Usage:
    """What judging took.

    Args:
        requests: Replies that came, unreadable ones included; what a cache knew took none.
        prompt_tokens: That were read for them.
        completion_tokens: That were written for them.
        cached: Samples that were not asked about: judged before, or twice in the list.
        uncounted: Replies without token counts.
        cost: In the currency of the prices; None without prices, or where tokens were not counted.
    """

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached: int = 0
    uncounted: int = 0
    cost: float | None = None


@dataclass(frozen=True)
class JudgeResult:
    """One judgement a sample, in their order.

    >>> result = JudgeResult("openai", "m", "0a", (Judgement(80.0), Judgement(None, error="no answer within 60 s")))
    >>> result.describe()
    'LLM judge: mean 80.0 on 1 of 2 samples; 1 missing: no answer within 60 s'

    Args:
        judge: The judge's name.
        model: The model that judged.
        rubric: The digest of what it was told.
        judgements: One a sample.
        usage: What it took.
        identity: Sixteen hexadecimal digits that tell this judge from others of its name and model: a digest of the
            server, or of the weights, the chat template and the length of replies.
    """

    judge: str
    model: str
    rubric: str
    judgements: tuple[Judgement, ...]
    usage: Usage = Usage()
    identity: str = ""

    @property
    def scores(self) -> list[float]:
        """Those that there are."""
        return [one.score for one in self.judgements if one.score is not None]

    @property
    def mean(self) -> float | None:
        """Of the scores that there are; None without any."""
        scores = self.scores
        return sum(scores) / len(scores) if scores else None

    @property
    def judged(self) -> int:
        """How many samples have a score."""
        return len(self.scores)

    @property
    def total(self) -> int:
        """How many samples there are."""
        return len(self.judgements)

    def describe(self) -> str:
        """The mean, on how many samples it rests, and why the others are missing."""
        mean = "no score" if self.mean is None else f"mean {self.mean:.1f}"
        line = f"LLM judge: {mean} on {self.judged} of {self.total} samples"
        reasons = Counter(one.error or "unknown" for one in self.judgements if one.score is None)
        if not reasons:
            return line
        commonest, times = reasons.most_common(1)[0]
        missing = self.total - self.judged
        share = "" if times == missing else f" (so {times} of them)"
        return f"{line}; {missing} missing: {commonest}{share}"

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        return {
            **{"judge": self.judge, "model": self.model, "rubric": self.rubric, "identity": self.identity},
            **{"mean": self.mean, "judged": self.judged, "total": self.total},
            "usage": asdict(self.usage),
            "judgements": [asdict(one) for one in self.judgements],
        }


def _printable(text: str) -> str:
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)
