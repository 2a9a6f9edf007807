"""Is the model better? Held-out loss, BERTScore, LLM judges, and what may be concluded from them."""

from __future__ import annotations

from .bert_score import BertScore, BertScores
from .bootstrap import bootstrap_interval, paired_bootstrap
from .combined import combined_score
from .compare import Comparison, compare_results
from .evaluate import evaluate_model
from .judges import Judge, Judgement, JudgeResult, Rubric, get_judge, list_judges, register_judge
from .ranking import Ranking, rank
from .result import EvaluatedSample, EvaluationResult
from .scoring import score_answers
from .systems import SystemScores

__all__ = [
    "BertScore",
    "BertScores",
    "Comparison",
    "EvaluatedSample",
    "EvaluationResult",
    "Judge",
    "JudgeResult",
    "Judgement",
    "Ranking",
    "Rubric",
    "SystemScores",
    "bootstrap_interval",
    "combined_score",
    "compare_results",
    "evaluate_model",
    "get_judge",
    "list_judges",
    "paired_bootstrap",
    "rank",
    "register_judge",
    "score_answers",
]
