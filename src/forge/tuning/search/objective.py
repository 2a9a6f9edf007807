"""Which figure decides which trial is the best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ...errors import ConflictError, ForgeError

if TYPE_CHECKING:
    from ...evaluation import EvaluationResult
    from ..config import TuningConfig

Name = Literal["combined", "bert_score", "loss"]
OBJECTIVES = ("combined", "bert_score", "loss")


@dataclass(frozen=True)
class Objective:
    """The figure that decides, and when it is measured.

    >>> Objective("loss").direction, Objective("bert_score", score_every_trial=True).direction
    ('minimize', 'maximize')

    Args:
        name: "combined" (of BERTScore and a judge), "bert_score", or "loss" (held-out).
        score_every_trial: whether every completed trial is scored; if not, the sampler sees held-out losses, and only
            the finalists are scored.
        finalists: the trials with the lowest held-out losses that are scored in the end.
    """

    name: Name
    score_every_trial: bool = False
    finalists: int = 3

    @classmethod
    def of(cls, config: TuningConfig) -> Objective:
        """That of a config: combined when a judge is given, else BERTScore, else the loss.

        Raises:
            ConflictError: a figure that nothing measures.
        """
        name = config.objective
        judged, encoded = config.judge is not None, config.bert_score is not False
        if name is None:
            name = "combined" if judged and encoded else "bert_score" if encoded else "loss"
        if name == "combined" and not (judged and encoded):
            missing = "a judge: set judge='local', say" if encoded else "an encoder: set bert_score=True"
            raise ConflictError(f"objective='combined' needs {missing}, or take objective='bert_score' or 'loss'.")
        if name == "bert_score" and not encoded:
            raise ConflictError(
                "objective='bert_score' and bert_score=False: set bert_score=True, or objective='loss'."
            )
        return cls(name, config.score_every_trial, config.finalists)  # type: ignore[arg-type]

    @property
    def scores(self) -> bool:
        """Whether answers are generated and scored at all."""
        return self.name != "loss"

    @property
    def direction(self) -> Literal["minimize", "maximize"]:
        """Of the study's values."""
        return "maximize" if self.score_every_trial and self.scores else "minimize"

    def value(self, result: EvaluationResult) -> float:
        """The figure of an evaluation.

        Raises:
            ForgeError: it could not be measured.
        """
        found: Any = {"combined": result.combined, "bert_score": result.bert_score, "loss": result.loss.mean}[self.name]
        if found is None:
            raise ForgeError(f"The evaluation of {result.model!r} has no {self.name}: nothing was scored.")
        return float(found)

    def better(self, one: float, other: float) -> bool:
        """Whether the first of two values is the better one."""
        return one < other if self.name == "loss" else one > other
