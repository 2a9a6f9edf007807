"""LLM judges: a score from 0 to 100 and a reason for each answer, from a model on this machine or behind a server."""

from __future__ import annotations

from .judge import Judge
from .judgement import Judgement, JudgeResult, Usage
from .registry import default_judge, get_judge, list_judges, register_judge
from .reply import Reply
from .rubric import Rubric

__all__ = [
    "Judge",
    "JudgeResult",
    "Judgement",
    "Reply",
    "Rubric",
    "Usage",
    "default_judge",
    "get_judge",
    "list_judges",
    "register_judge",
]
