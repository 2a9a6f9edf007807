"""One call from a model and held-out data to loss, answers and scores."""

from __future__ import annotations

import hashlib
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
from .generation import Answer, Prompt, answer, context_of, encode_prompts
from .loss import held_out_loss
from .result import EvaluatedSample, EvaluationResult
from .scoring import as_encoder, as_judge, check_samples, choose, score_answers

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
    if not hasattr(model, "generate") or not (name is None or isinstance(name, str)):
        raise ConflictError(
            f"model={model!r:.60}, name={name!r:.60}: give a model that is loaded, such as "
            "AutoModelForCausalLM.from_pretrained(model_id), and a text for its name."
        )
    check_samples("max_eval_samples", max_eval_samples)
    check_samples("judge_samples", judge_samples)
    encoder = as_encoder(bert_score)
    critic = as_judge(judge, model=model, tokenizer=tokenizer, progress=progress)
    called, versions = name or _name(model), _versions()
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
    _check_lengths(rows, model)
    if isinstance(judge, (str, bool)) and critic is not None and critic.name == "local" and not _has_adapters(model):
        notes += ("The judge is the evaluated model itself, which has no adapters to switch off: it tells little.",)
    if not asked:
        notes += ("The samples have no questions, so there are no answers to score: the loss is all there is.",)
        encoder = critic = None

    loss = held_out_loss(
        model, [row.input_ids for row in rows], [row.labels for row in rows], batch_size=batch_size, progress=progress
    )
    answers = answer(model, tokenizer, encoded, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress)
    result = EvaluationResult(
        called,
        tuple(_samples(rows, loss.sums, loss.tokens, dict(zip(asked, answers, strict=True)))),
        {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "dtype": str(model.dtype), **versions},
        notes=notes + _doubts(answers, max_new_tokens),
    )
    try:
        if encoder is not None:
            result = score_answers(result, bert_score=encoder)
        return result if critic is None else score_answers(result, judge=critic, judge_samples=judge_samples)
    except BaseException:
        _rescue(result)
        raise


@dataclass(frozen=True)
class _Row:
    input_ids: list[int]
    labels: list[int]
    prompt: Prompt | None
    reference: str | None
    template_options: dict[str, Any]
    digest: str


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
        made = prepare_dataset(pairs, tokenizer, format="prompt-completion")
        prepared = made.train
        if repeated := len(pairs) - len(prepared):
            notes += (f"{repeated} of {len(pairs)} pairs were left out: their chosen answers repeat, or are empty.",)
    if len(prepared) == 0:
        raise ConflictError("There are no samples to evaluate on. Give a data set with at least one row.")
    chosen = choose(range(len(prepared)), most)
    if len(chosen) < len(prepared):
        notes += (f"On {len(chosen)} of {len(prepared):,} samples, chosen by a fixed seed (max_eval_samples).",)
    return [_row(row) for row in prepared.select(chosen)], notes


def _row(row: Mapping[str, Any]) -> _Row:
    asked = question_and_reference(dict(row)) if set(row) - _TOKENS else None
    prompt, reference = asked if asked is not None else (None, None)
    options = {name: row.get(name) for name in ("tools", "chat_template_kwargs")}
    kept = {name: json.loads(value) if isinstance(value, str) else value for name, value in options.items() if value}
    there = row.get("attention_mask") or [1] * len(row["input_ids"])  # rows may have been padded, on either side
    input_ids, labels = (
        [token for token, real in zip(row[column], there, strict=True) if real] for column in ("input_ids", "labels")
    )
    digest = hashlib.sha256(json.dumps([input_ids, labels]).encode()).hexdigest()[:16]
    return _Row(input_ids, labels, prompt, reference, kept, digest)


_TOKENS = {"input_ids", "labels", "attention_mask", "assistant_masks", "completion_mask", "position_ids", "seq_lengths"}


def _check_lengths(rows: list[_Row], model: Any) -> None:
    context, longest = context_of(model), max(len(row.input_ids) for row in rows)
    if context is not None and longest > context:
        crowded = sum(len(row.input_ids) > context for row in rows)
        raise ConflictError(
            f"{crowded} of {len(rows)} samples are longer than the model's context of {context} tokens (the longest: "
            f"{longest}). Prepare them with prepare_dataset(..., max_length={context})."
        )


def _rescue(result: EvaluationResult) -> None:
    """Keep answers that took long, whatever went wrong with their scores."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="forge-answers-"))
        result.save(folder)
    except (OSError, ValueError) as error:
        logger.error("Scoring failed, and the answers could not be saved either: %s", error)
        return
    logger.error(
        "Scoring failed, but the %d answers are kept: score_answers(EvaluationResult.load(%r), ...)",
        len(result.answered),
        str(folder),
    )


def _samples(
    rows: list[_Row], sums: tuple[float, ...], tokens: tuple[int, ...], answers: dict[int, Answer]
) -> list[EvaluatedSample]:
    return [
        EvaluatedSample(
            prompt=row.prompt,
            reference=row.reference,
            answer=answers[place].text if place in answers else None,
            digest=row.digest,
            cut=place in answers and answers[place].cut,
            nll=sums[place],
            tokens=tokens[place],
        )
        for place, row in enumerate(rows)
    ]


def _doubts(answers: list[Answer], max_new_tokens: int) -> tuple[str, ...]:
    cut, empty = sum(one.cut for one in answers), sum(not one.text for one in answers)
    doubts = []
    if cut:
        doubts.append(f"{cut} of {len(answers)} answers were cut at {max_new_tokens} tokens (max_new_tokens).")
    if empty:
        doubts.append(f"{empty} of {len(answers)} answers are empty.")
    return tuple(doubts)


def _has_adapters(model: Any) -> bool:
    return bool(getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False))


def _name(model: Any) -> str:
    base = str(getattr(model.config, "_name_or_path", "") or type(model).__name__).rstrip("/")
    active = any(getattr(module, "disable_adapters", True) is False for module in model.modules())
    adapted = active or bool(getattr(model, "prompt_encoder", None))  # prompt tuning and its kin have no layers
    return (Path(base).name if Path(base).is_dir() else base) + " with adapter" * adapted


def _versions() -> dict[str, str]:
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}
