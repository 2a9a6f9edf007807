"""What a reader of the report should know, in sentences without their full stop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..compat import default_max_length
from .formats import Layout
from .lengths import counted, lost
from .rows import Sample
from .template import ChatTemplate
from .tokens import render
from .way import Way

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def notes(layout: Layout, way: Way, tokenizer: PreTrainedTokenizerBase, columns: Sequence[str]) -> Iterator[str]:
    """On the columns and the chat template."""
    known = {*layout.columns.values(), "tools", "chat_template_kwargs"}
    if unused := [column for column in columns if column not in known]:
        yield f"columns not used: {', '.join(unused)}"
    if way.rendered:
        yield "the prompts hold the chat template's control tokens already and were taken as they are"
    elif way.template is None and layout.format != "text":
        yield "the tokenizer has no chat template, so prompt and answer follow each other as plain text"
    if way.template is None or not way.chat:
        return
    yield from way.template.notes
    if tokenizer.eos_token_id not in way.template.ends:
        yield (
            f"the tokenizer's end token is {tokenizer.eos_token}, but answers end with "
            f"{' or '.join(way.stop_tokens(tokenizer))}: generate with "
            "eos_token_id=forge.stop_token_ids(tokenizer)"
        )


def notes_on_rows(samples: Sequence[Sample], unlearnt_turns: Sequence[int]) -> Iterator[str]:
    """On what of the rows is not learnt."""
    if turns := sum(unlearnt_turns):
        yield (
            f"{turns:,} answers are only context: their weight is 0, nothing is asked before them, or the chat "
            "template does not write them as they were said"
        )
    if left := sum(bool(sample.unanswered) for sample in samples):
        yield f"{left:,} conversations end with messages that nobody answers, which were left out"
    if sum(isinstance(sample.rejected, str) for sample in samples) == len(samples):
        yield "the preferences stay plain text, without the chat template"


def warnings_on_length(layout: Layout, max_length: int | None, lengths: Sequence[int]) -> Iterator[str]:
    """On the length to which the trainer itself cuts."""
    preference = layout.format == "preference"
    limit, config = default_max_length(preference), "DPOConfig" if preference else "SFTConfig"
    if limit is not None and (max_length is None or max_length > limit):
        rows, tokens = lost([min(length, max_length or length) for length in lengths], limit)
        if rows:
            yield (
                f"{config} cuts rows to max_length={limit:,} unless told otherwise: {rows:,} training rows would lose "
                f"{tokens:,} tokens. Pass {config}(max_length={max_length})"
            )
    elif preference and max_length is not None and max_length != limit and max(lengths) > max_length:
        yield f"preferences are tokenised, and cut, by DPOTrainer: pass DPOConfig(max_length={max_length})"


def warnings_on_unwritten(rows: Sequence[int]) -> Iterator[str]:
    """On words that the chat template leaves out."""
    if rows:
        yield (
            f"the chat template does not write all that is said in {counted(len(rows), 'row')} (calls and results of "
            f"tools, thoughts, or roles, that it does not know), and a model will not see it {_numbers(rows)}"
        )


def warnings_on_tools(way: Way, samples: Sequence[Sample]) -> Iterator[str]:
    """On tools that the chat template does not tell the model of."""
    if way.template is not None and (rows := [s.row for s in samples if s.tools and not _told(way.template, s)]):
        yield (
            f"the chat template writes nothing of the tools of {counted(len(rows), 'row')}, so a model will not know "
            f"them {_numbers(rows)}"
        )


def _told(template: ChatTemplate, sample: Sample) -> bool:
    if isinstance(sample.prompt, str) or isinstance(sample.answer, str):
        return False
    said: dict[str, Any] = {"chat_template": template.text, "options": sample.options}
    messages = sample.prompt + sample.answer
    with_tools, without = (render(template.tokenizer, messages, tools=t, **said) for t in (sample.tools, None))
    return with_tools != without


def warnings_on_words(way: Way, samples: Sequence[Sample]) -> Iterator[str]:
    """On words that the tokenizer takes for control tokens."""
    if way.template is None or not way.chat:
        return
    marks = way.template.structure.marks
    holding = [s.row for s in samples if any(mark in said for said in _contents(s) for mark in marks)]
    if holding:
        yield (
            f"in {len(holding):,} rows somebody's words hold control tokens of the chat template, which end turns "
            f"where none ends {_numbers(holding)}"
        )


def _numbers(rows: Sequence[int]) -> str:
    return f"(rows {', '.join(str(row) for row in rows[:5])}{', ...' if len(rows) > 5 else ''})"


def _contents(sample: Sample) -> Iterator[str]:
    parts: tuple[Any, ...] = (sample.prompt, sample.answer, sample.rejected or [])
    return (message["content"] for part in parts if not isinstance(part, str) for message in part)
