"""The base, and how good it is with an adapter and without: measured once, and kept in a folder."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters import safe_unload_peft_adapters
from ..evaluation import EvaluationResult, evaluate_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .settle import Settled

logger = logging.getLogger("forge.tuning")


def load_base(settled: Settled) -> PreTrainedModel:
    """The model that was handed in, or the one whose id was."""
    model = settled.model
    if not isinstance(model, str):
        return model
    from transformers import AutoModelForCausalLM

    logger.info("Loading %s.", model)
    return AutoModelForCausalLM.from_pretrained(model, **settled.preset.model_kwargs())


def evaluated(settled: Settled, model: Any, name: str, folder: Path) -> EvaluationResult:
    """The evaluation of a model, from its folder if it is there.

    Args:
        settled: data, encoder, and what of them is used.
        model: with its adapter, or without.
        name: of the evaluation.
        folder: that it is kept in.
    """
    if (folder / "result.json").is_file():
        return EvaluationResult.load(folder)
    config = settled.config
    result = evaluate_model(
        model,
        settled.tokenizer,
        settled.data,
        bert_score=settled.encoder or False,
        judge=config.judge,
        max_eval_samples=config.max_eval_samples,
        judge_samples=config.judge_samples,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.eval_batch_size,
        name=name,
    )
    result.save(folder)
    return result


def evaluated_adapter(
    settled: Settled, base: AbstractContextManager[PreTrainedModel], adapter: Path, name: str
) -> EvaluationResult:
    """The evaluation of a saved adapter, beside it in its folder.

    Args:
        settled: data, encoder, and what of them is used.
        base: gives the base for as long as it is needed.
        adapter: the adapter's folder.
        name: of the evaluation.
    """
    from peft import PeftModel

    folder = adapter.with_name("evaluation")
    if (folder / "result.json").is_file():
        return EvaluationResult.load(folder)
    with base as model:
        adapted = PeftModel.from_pretrained(model, str(adapter))
        try:
            return evaluated(settled, adapted, name, folder)
        finally:
            safe_unload_peft_adapters(adapted)


def scores_of(result: EvaluationResult) -> dict[str, float]:
    """The figures of an evaluation by the names that trackers use."""
    found = {
        "loss": result.loss.mean,
        "bert_score": result.bert_score,
        "llm_judge_score": result.judge_score,
        "combined_score": result.combined,
    }
    return {name: float(value) for name, value in found.items() if value is not None}
