"""One call from a model and held-out data to loss, answers and scores."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data import PreparedData, prepare_dataset, question_and_reference
from ..errors import ConflictError
from .generation import Answer, Prompt, answer, encode_prompts
from .loss import held_out_loss
from .result import EvaluatedSample, EvaluationResult
from .scoring import check_samples, choose, score_answers

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .bert_score import BertScore
    from .judges import Judge

logger = logging.getLogger(__name__)


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: PreparedData | Dataset | list[dict[str, Any]] | str | os.PathLike[str],
    *,
    bert_score: BertScore | bool = True,
    judge: Judge | str | bool | None = None,
    max_eval_samples: int | None = 256,
    judge_samples: int | None = 64,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    name: str | None = None,
    progress: bool = True,
) -> EvaluationResult:
    """Held-out loss, answers, BERTScore and a judge's opinion of a model.

    The answer to the last question of each sample is generated greedily with the model's own chat template and stop
    tokens, and compared with the answer in the data. Everything that can be refused is refused before the first forward
    pass. Should scoring fail when the answers are there, they are saved first, and the log says where.

    Args:
        model: A causal language model, with or without adapters; left as it was.
        tokenizer: Its tokenizer; not changed.
        dataset: What `prepare_dataset` made (its validation part) or takes. Of preference pairs, the chosen answer.
        bert_score: A `BertScore`; True for `BertScore()`, whose encoder comes from the hub; False for none.
        judge: A judge or its name; True for the one that `FORGE_JUDGE` names, else this model's base; None for none.
        max_eval_samples: At most so many samples, chosen by a fixed seed: the same for every model on the same data.
            None for all.
        judge_samples: At most so many of them are shown to the judge.
        max_new_tokens: The longest answer, in tokens.
        batch_size: Samples at a time.
        name: What to call the model in the report; by default its own name.
        progress: Show progress bars.

    Returns:
        An `EvaluationResult`: `.print()`, `.save(folder)`, and `compare_results` for two of them.

    Raises:
        ForgeError: The data, a size, the encoder or the judge will not do; the message says why and what to change.
    """
    check_samples("max_eval_samples", max_eval_samples)
    check_samples("judge_samples", judge_samples)
    encoder, critic = _encoder(bert_score), _critic(judge, model, tokenizer)
    rows, notes = _held_out(dataset, tokenizer, max_eval_samples)
    asked = [place for place, row in enumerate(rows) if row.prompt is not None]
    encoded = encode_prompts(
        model,
        tokenizer,
        [row.prompt for row in rows if row.prompt is not None],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        template_options=[row.template_options for row in rows if row.prompt is not None],
    )
    if not asked:
        notes += ("The samples have no questions, so there are no answers to score: the loss is all there is.",)
        encoder = critic = None

    loss = held_out_loss(
        model, [row.input_ids for row in rows], [row.labels for row in rows], batch_size=batch_size, progress=progress
    )
    answers = answer(model, tokenizer, encoded, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress)
    result = EvaluationResult(
        name or _name(model),
        tuple(_samples(rows, loss.sums, loss.tokens, dict(zip(asked, answers, strict=True)))),
        {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "dtype": str(model.dtype), **_versions()},
        notes=notes + _doubts(answers, max_new_tokens),
    )
    try:
        return score_answers(result, bert_score=encoder, judge=critic, judge_samples=judge_samples)
    except BaseException:
        folder = Path(tempfile.mkdtemp(prefix="forge-answers-"))
        result.save(folder)
        logger.error(
            "Scoring failed, but the %d answers are kept: score_answers(EvaluationResult.load(%r), ...)",
            len(answers),
            str(folder),
        )
        raise


@dataclass(frozen=True)
class _Row:
    input_ids: list[int]
    labels: list[int]
    prompt: Prompt | None
    reference: str | None
    template_options: dict[str, Any]


def _held_out(dataset: Any, tokenizer: Any, most: int | None) -> tuple[list[_Row], tuple[str, ...]]:
    """The chosen samples, tokenised, and what to know of them."""
    notes: tuple[str, ...] = ()
    if isinstance(dataset, PreparedData):
        if dataset.validation is None:
            raise ConflictError(
                "The prepared data have no validation part, and what a model was trained on shows little. Prepare "
                "them with validation=0.1, or pass data.train if that is what you want."
            )
        prepared = dataset.validation
    elif {"input_ids", "labels"} <= set(getattr(dataset, "column_names", None) or ()):
        prepared = dataset
    else:
        made = prepare_dataset(dataset, tokenizer)
        prepared = made.train if made.validation is None else made.validation
        if dropped := sum(len(rows) for rows in made.report.splits[-1].dropped.values()):
            notes += (f"{dropped} rows of the data were left out; prepare_dataset(...).report says which and why.",)
    if "chosen" in prepared.column_names:  # preference pairs: the chosen answer is the good one
        keep = [name for name in ("prompt", "chosen") if name in prepared.column_names]
        pairs = prepared.select_columns(keep).rename_column("chosen", "completion")
        prepared = prepare_dataset(pairs, tokenizer, format="prompt-completion").train
    if len(prepared) == 0:
        raise ConflictError("There are no samples to evaluate on. Give a data set with at least one row.")
    chosen = choose(range(len(prepared)), most)
    if len(chosen) < len(prepared):
        notes += (f"On {len(chosen)} of {len(prepared):,} samples, chosen by a fixed seed (max_eval_samples).",)
    return [_row(row) for row in prepared.select(chosen)], notes


def _row(row: Mapping[str, Any]) -> _Row:
    asked = question_and_reference(dict(row))
    prompt, reference = asked if asked is not None else (None, None)
    tools = row.get("tools")
    options = {
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        "chat_template_kwargs": row.get("chat_template_kwargs"),
    }
    kept = {name: value for name, value in options.items() if value}
    return _Row(list(row["input_ids"]), list(row["labels"]), prompt, reference, kept)


def _samples(
    rows: list[_Row], sums: tuple[float, ...], tokens: tuple[int, ...], answers: dict[int, Answer]
) -> list[EvaluatedSample]:
    return [
        EvaluatedSample(
            prompt=row.prompt,
            reference=row.reference,
            answer=answers[place].text if place in answers else None,
            cut=place in answers and answers[place].cut,
            nll=sums[place],
            tokens=tokens[place],
        )
        for place, row in enumerate(rows)
    ]


def _encoder(bert_score: BertScore | bool) -> BertScore | None:
    from .bert_score import BertScore

    if isinstance(bert_score, bool):
        return BertScore() if bert_score else None
    if not isinstance(bert_score, BertScore):
        raise ConflictError(
            f"bert_score={bert_score!r}: give a BertScore, such as BertScore('roberta-large'), True or False."
        )
    return bert_score


def _critic(judge: Judge | str | bool | None, model: Any, tokenizer: Any) -> Judge | None:
    from .judges import Judge, default_judge, get_judge

    if judge is None or judge is False:
        return None
    if isinstance(judge, (str, bool)):
        chosen = default_judge() if isinstance(judge, bool) else judge
        return get_judge(chosen, model=model, tokenizer=tokenizer) if chosen == "local" else get_judge(chosen)
    if not isinstance(judge, Judge):
        raise ConflictError(f"judge={judge!r}: give a judge from get_judge(...), its name, True, or None for none.")
    return judge


def _doubts(answers: list[Answer], max_new_tokens: int) -> tuple[str, ...]:
    cut, empty = sum(one.cut for one in answers), sum(not one.text for one in answers)
    doubts = []
    if cut:
        doubts.append(f"{cut} of {len(answers)} answers were cut at {max_new_tokens} tokens (max_new_tokens).")
    if empty:
        doubts.append(f"{empty} of {len(answers)} answers are empty; BERTScore gives them 0.")
    return tuple(doubts)


def _name(model: Any) -> str:
    base = str(getattr(model.config, "_name_or_path", "") or type(model).__name__).rstrip("/")
    status = getattr(model, "get_model_status", None)
    adapted = status is not None and status().enabled is not False
    return (Path(base).name if Path(base).is_dir() else base) + " with adapter" * adapted


def _versions() -> dict[str, str]:
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}
