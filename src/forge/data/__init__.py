"""Data that is what you think it is: recognised, rendered, masked, split without leakage, and reported."""

from __future__ import annotations

from .inspect import preview
from .prepare import prepare_dataset
from .prepared import PreparedData
from .question import question_and_reference
from .report import DataReport
from .shown import Preview
from .tokens import encode_prompt, pad_token_id, stop_token_ids

__all__ = [
    "DataReport",
    "PreparedData",
    "Preview",
    "encode_prompt",
    "pad_token_id",
    "prepare_dataset",
    "preview",
    "question_and_reference",
    "stop_token_ids",
]
