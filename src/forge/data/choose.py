"""Which way of finding the answers a chat template allows, proven on a short conversation before any row is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..compat import has_generation_markers, training_chat_template
from ..errors import UnsupportedError
from .marked import marked_answers, runs
from .structure import probe
from .template import REMEDY, ChatTemplate
from .tokens import TemplateRefusalError, control_tokens, end_of_turn_id, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def choose_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """The way in which a tokenizer's conversations are masked, proven on a short one.

    Raises:
        UnsupportedError: none of the ways works, or the tokenizer cannot say where in the text its tokens are.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedError(
            f"{type(tokenizer).__name__} does not say where in the text its tokens are, so answers cannot be told from "
            "prompts. Load the fast tokenizer: AutoTokenizer.from_pretrained(...)."
        )
    own = tokenizer.get_chat_template()
    _check_plain(tokenizer)
    dated = _dated(own)
    if not has_generation_markers(own):
        known = training_chat_template(tokenizer)
        return by_prefix(tokenizer, dated) if known is None else by_training_template(tokenizer, known, dated)
    if _stop_is_learnt(tokenizer, None):
        try:
            otherwise = by_prefix(tokenizer)
        except UnsupportedError:
            otherwise = None
        ends = _ends(tokenizer, None)
        return ChatTemplate(tokenizer, None, "markers", ends, marked=True, notes=dated, otherwise=otherwise)
    why = "the template's own markers leave the end-of-turn token out, so answers were found without them"
    return by_prefix(tokenizer, (*dated, why))


def by_training_template(
    tokenizer: PreTrainedTokenizerBase, training: str, notes: tuple[str, ...] = ()
) -> ChatTemplate:
    """Answers in TRL's training template, found if they can be, else as it marks them.

    Found, they begin after the generation prompt and end with the end-of-turn token, whichever version of TRL knows the
    family; some of TRL's markers begin earlier and most end with the line end after it.
    """
    if render(tokenizer, probe(4)) != render(tokenizer, probe(4), chat_template=training):
        notes += (
            "conversations are written by TRL's training template, which differs from the model's own: earlier answers "
            "keep their reasoning, or the last its end-of-turn token",
        )
    ends = _ends(tokenizer, training)
    try:
        found = _prove_prefixes(tokenizer, training)
    except UnsupportedError:
        found = False
    return ChatTemplate(tokenizer, training, "TRL", ends, marked=not found, notes=notes)


def by_prefix(tokenizer: PreTrainedTokenizerBase, notes: tuple[str, ...] = ()) -> ChatTemplate:
    """Answers found between what is written before them and their end-of-turn token.

    Raises:
        UnsupportedError: they cannot be.
    """
    every_turn = _prove_prefixes(tokenizer, None)
    if not every_turn:
        notes += (
            "the template rewrites answers once another message follows (reasoning models do), so only the last answer "
            "of a conversation is learnt; split conversations into one row for each answer to learn all",
        )
    return ChatTemplate(tokenizer, None, "prefix", _ends(tokenizer, None), every_turn=every_turn, notes=notes)


def _check_plain(tokenizer: PreTrainedTokenizerBase) -> None:
    try:
        written = render(tokenizer, probe(2))
    except TemplateRefusalError as refusal:
        raise UnsupportedError(
            f"The chat template refuses a plain question and answer: {refusal}. {REMEDY}"
        ) from refusal
    if not all(message["content"] in written for message in probe(2)):
        raise UnsupportedError(
            "The chat template does not write a content that is text (those of vision models want a list of parts), "
            "and forge prepares text only. Set tokenizer.chat_template to one that does."
        )


def _ends(tokenizer: PreTrainedTokenizerBase, template: str | None) -> frozenset[int]:
    found = (end_of_turn_id(tokenizer, template), end_of_turn_id(tokenizer, template, answered=True))
    return frozenset(end for end in found if end is not None)


def _stop_is_learnt(tokenizer: PreTrainedTokenizerBase, template: str | None) -> bool:
    """Whether each marked answer of a short conversation ends with a control token, white space apart."""
    controls = control_tokens(tokenizer)
    for length in (2, 4):
        ids, marked = marked_answers(tokenizer, probe(length), template, None, None)
        spans = runs(marked)
        if len(spans) != length // 2:
            return False
        for start, end in spans:
            said = [token for token in ids[start:end] if tokenizer.decode([token]).strip()]
            if not said or said[-1] not in controls:
                return False
    return True


def _prove_prefixes(tokenizer: PreTrainedTokenizerBase, template: str | None) -> bool:
    """Whether answers before the last can be learnt as well; raises where not even the last can."""
    messages = probe(4)
    try:
        whole, alone = (render(tokenizer, said, chat_template=template) for said in (messages, messages[:2]))
        asked = [
            render(tokenizer, messages[:index], chat_template=template, add_generation_prompt=True) for index in (1, 3)
        ]
    except TemplateRefusalError as refusal:
        raise UnsupportedError(f"The chat template refuses a plain conversation: {refusal}.") from refusal
    if end_of_turn_id(tokenizer, template) is None:
        raise UnsupportedError(
            "The chat template writes no end-of-turn token after an answer, so a model could not learn to stop. "
            "Let tokenizer.chat_template write eos_token after what the assistant says."
        )
    if not (whole.startswith(asked[1]) and alone.startswith(asked[0])):
        raise UnsupportedError(
            "What the chat template writes before an answer changes once the answer is there (reasoning models do this "
            f"when their thoughts are dropped), so it is not known what a model would learn. {REMEDY}"
        )
    ended = end_of_turn_id(tokenizer, template, answered=True)
    if ended is None or not whole.startswith(asked[0]):
        return False
    stop = control_tokens(tokenizer)[ended]
    said = whole[len(asked[0]) :].partition(stop)[0]
    return alone[len(asked[0]) :].startswith(said)


def _dated(template: str) -> tuple[str, ...]:
    if "strftime_now" not in template:
        return ()
    return ("the chat template writes today's date into every prompt: prepared on another day, the data differ",)
