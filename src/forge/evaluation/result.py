"""What an evaluation found, sample by sample: as a table, as JSON, as a folder that can be loaded again."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConflictError
from ..reporting import Table
from .bootstrap import Interval, bootstrap_interval
from .combined import combined_score
from .loss import HeldOutLoss

if TYPE_CHECKING:
    from .generation import Prompt

RESULT = "result.json"
REPORT = "report.html"


@dataclass(frozen=True)
class EvaluatedSample:
    """One held-out sample: what was asked, what a good answer is, and what the model made of it.

    Args:
        prompt: Chat messages or text; None where a sample has no question (plain text).
        reference: The answer in the data; None likewise.
        answer: The model's; None likewise.
        digest: Of its tokens and of which are learnt: what the loss is taken on.
        cut: Whether the longest allowed answer was reached.
        nll: The negative log-likelihood of the tokens that are learnt, in nats, summed.
        tokens: How many those are.
        bert_precision: BERTScore of the answer against the reference; None where it was not computed.
        bert_recall: Likewise.
        bert_f1: Likewise.
        judge_score: 0 to 100; None where no judge was asked, or where it failed.
        judge_reason: Why, in the judge's words.
        judge_error: Why there is no score although a judge was asked.
    """

    prompt: Prompt | None = None
    reference: str | None = None
    answer: str | None = None
    digest: str = ""
    cut: bool = False
    nll: float = 0.0
    tokens: int = 0
    bert_precision: float | None = None
    bert_recall: float | None = None
    bert_f1: float | None = None
    judge_score: float | None = None
    judge_reason: str = ""
    judge_error: str | None = None

    @property
    def was_judged(self) -> bool:
        """Whether a judge was asked."""
        return self.judge_score is not None or self.judge_error is not None

    @property
    def question(self) -> str:
        """The prompt as people read it: the last thing said, after the turns before it."""
        if self.prompt is None or isinstance(self.prompt, str):
            return self.prompt or ""
        turns = [f"{message['role']}: {content_of(message)}" for message in self.prompt]
        return content_of(self.prompt[0]) if len(turns) == 1 else "\n".join(turns)


@dataclass(frozen=True, repr=False)
class EvaluationResult:
    """What `evaluate_model` found.

    Args:
        model: The model's name.
        samples: One by one, in the order of the data.
        settings: What was asked for: sizes, encoder, judge, versions.
        judge_usage: What the judge cost: its requests, tokens and, where prices were given, money.
        notes: What a reader should know before believing the numbers.
    """

    model: str
    samples: tuple[EvaluatedSample, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    judge_usage: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()

    @property
    def loss(self) -> HeldOutLoss:
        """The held-out loss: `.mean` in nats per learnt token, `.perplexity`, `.per_sample`."""
        return HeldOutLoss(tuple(one.nll for one in self.samples), tuple(one.tokens for one in self.samples))

    @property
    def answered(self) -> tuple[EvaluatedSample, ...]:
        """The samples with a question and an answer."""
        return tuple(one for one in self.samples if one.answer is not None)

    @property
    def bert_scores(self) -> list[float]:
        """BERTScore's F1 of every answer that has one."""
        return [one.bert_f1 for one in self.samples if one.bert_f1 is not None]

    @property
    def bert_score(self) -> float | None:
        """The mean of BERTScore's F1; None where it was not computed."""
        return _mean(self.bert_scores)

    @property
    def judge_scores(self) -> list[float]:
        """The judge's scores, 0 to 100; what it failed to judge is missing, not 0."""
        return [one.judge_score for one in self.samples if one.judge_score is not None]

    @property
    def judge_score(self) -> float | None:
        """The mean of the judge's scores; None without any."""
        return _mean(self.judge_scores)

    @property
    def combined(self) -> float | None:
        """0.4 BERTScore + 0.6 judge / 100, or BERTScore alone; None without BERTScore."""
        return None if self.bert_score is None else combined_score(self.bert_score, self.judge_score)

    def bert_interval(self, *, confidence: float = 0.95) -> Interval | None:
        """The bootstrap interval of BERTScore's mean over the samples; None where it was not computed."""
        return bootstrap_interval(self.bert_scores, confidence=confidence) if self.bert_scores else None

    def describe(self) -> list[str]:
        """The findings in sentences.

        >>> sample = EvaluatedSample("Hi", "Hello!", "Hello.", nll=3.0, tokens=2, bert_f1=0.823, judge_score=78.5)
        >>> print(*EvaluationResult("m", (sample,)).describe(), sep=chr(10))
        held-out loss 1.500, perplexity 4.48 (2 tokens of 1 sample)
        LLM judge: mean 78.5 on 1 of 1 samples
        BERTScore 0.823, judge 78.5, combined 0.800
        """
        lines = []
        if tokens := sum(self.loss.tokens):
            said = f"{tokens:,} tokens of {_count(len(self.samples), 'sample')}"
            lines.append(f"held-out loss {self.loss.mean:.3f}, perplexity {self.loss.perplexity:.2f} ({said})")
        if asked := sum(one.was_judged for one in self.samples):
            mean = "no score" if self.judge_score is None else f"mean {self.judge_score:.1f}"
            lines.append(f"LLM judge: {mean} on {len(self.judge_scores)} of {asked} samples")
        if self.bert_score is not None and self.judge_score is not None:
            scores = f"BERTScore {self.bert_score:.3f}, judge {self.judge_score:.1f}"
            lines.append(f"{scores}, combined {self.combined:.3f}")
        elif self.bert_score is not None:
            lines.append(f"BERTScore {self.bert_score:.3f}")
        return lines

    def print(self) -> None:
        """Print the figures as a table, and what a reader should know."""
        table = self._table()
        table.footer = "\n".join(self.notes)
        table.print()

    def __str__(self) -> str:
        table = self._table()
        table.footer = "\n".join(self.notes)
        return str(table)

    def __repr__(self) -> str:
        return f"EvaluationResult({self.model!r}, {'; '.join(self.describe()) or 'nothing scored'})"

    def figures(self) -> dict[str, str]:
        """The figures by name, as people write them."""
        found: dict[str, str] = {"samples": str(len(self.samples))}
        if sum(self.loss.tokens):
            found |= {"held-out loss": f"{self.loss.mean:.4f}", "perplexity": f"{self.loss.perplexity:.3f}"}
        if (interval := self.bert_interval()) is not None:
            some = f" (on {len(self.bert_scores)})" if len(self.bert_scores) < len(self.samples) else ""
            found["BERTScore F1"] = f"{interval.mean:.4f} [{interval.low:.4f}, {interval.high:.4f}]{some}"
        if asked := sum(one.was_judged for one in self.samples):
            mean = "-" if self.judge_score is None else f"{self.judge_score:.1f}"
            found["LLM judge"] = f"{mean} (on {len(self.judge_scores)} of {asked})"
        if self.combined is not None and self.judge_score is not None:
            found["combined"] = f"{self.combined:.4f}"
        if self.answered:
            found["answers cut short"] = f"{sum(one.cut for one in self.answered)} of {len(self.answered)}"
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON knows it; figures that are not finite are None."""
        return {
            "model": self.model,
            "loss": _finite(self.loss.mean),
            "perplexity": _finite(self.loss.perplexity),
            "bert_score": self.bert_score,
            "judge_score": self.judge_score,
            "judged": len(self.judge_scores),
            "combined": self.combined,
            "settings": dict(self.settings),
            "judge_usage": None if self.judge_usage is None else dict(self.judge_usage),
            "notes": list(self.notes),
            "samples": [{**asdict(one), "nll": _finite(one.nll)} for one in self.samples],
        }

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `result.json` and `report.html` into a folder, which is made; return the report's path."""
        from .report import page

        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), ensure_ascii=False, indent=1, allow_nan=False)
        (target / RESULT).write_text(text, encoding="utf-8", errors="replace")
        page([self]).save(target / REPORT)
        return target / REPORT

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> EvaluationResult:
        """What `save` wrote: from its folder, or any file in it.

        Raises:
            ConflictError: The folder holds no result, or one of another kind.
        """
        path = Path(folder).parent / RESULT if Path(folder).is_file() else Path(folder) / RESULT
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            samples = tuple(
                EvaluatedSample(**{**one, "nll": math.nan if one["nll"] is None else one["nll"]})
                for one in found["samples"]
            )
            return cls(found["model"], samples, found["settings"], found["judge_usage"], tuple(found["notes"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConflictError(
                f"{path} is no saved evaluation ({type(error).__name__}: {error}). Give the folder that "
                "EvaluationResult.save wrote."
            ) from error

    def _table(self) -> Table:
        table = Table(("figure", "value"), title=f"Evaluation of {self.model}")
        for name, value in self.figures().items():
            table.add(name, value)
        return table


def _mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def content_of(message: Mapping[str, Any]) -> str:
    """A chat message in words: its text, its parts that are text, and its calls of tools as JSON."""
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    calls = message.get("tool_calls")
    return str(content or "") + (json.dumps(calls, ensure_ascii=False) if calls else "")
