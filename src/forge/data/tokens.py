"""Which tokens pad, which stop, and what a prompt is in tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import dropwhile, takewhile
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

Messages = list[dict[str, Any]]

# What families reserve for padding, or never write for another purpose.
_PADDING = (
    "<|finetune_right_pad_id|>",
    "<|finetune_right_pad|>",
    "<pad>",
    "<|pad|>",
    "[PAD]",
    "<|padding|>",
    "<|PAD_TOKEN|>",
    "<｜▁pad▁｜>",  # noqa: RUF001
)
_QUESTION, _ANSWER = "forge-probe-question", "forge-probe-answer"


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token to pad with: the tokenizer's own, else one that its vocabulary keeps for padding, else its end token.

    The tokenizer is not changed. Padding with the end token is harmless where labels and attention masks come from
    lengths, as they do in forge and in TRL's collators; it is not where labels are found by comparing ids.

    Args:
        tokenizer: of the model that will be trained or asked.

    Raises:
        UnsupportedError: it has none of the three.
    """
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    vocabulary = tokenizer.get_vocab()
    for token in _PADDING:
        if token in vocabulary:
            return int(vocabulary[token])
    if tokenizer.eos_token_id is not None:
        return int(tokenizer.eos_token_id)
    raise UnsupportedError(
        "The tokenizer has no padding token and no end token, and batches need something to fill rows up with. "
        "Set tokenizer.pad_token to a token of its vocabulary."
    )


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None) -> list[int]:
    """The tokens at which an answer is over, without repetition.

    They are the end tokens of the generation config, the tokenizer's, and the token that the chat template writes after
    an answer, which is found by rendering one: many published tokenizers name another token as their end.

    Args:
        tokenizer: with or without a chat template.
        generation_config: the model's `generation_config`, if there is one.
    """
    configured = getattr(generation_config, "eos_token_id", None)
    found = list(configured) if isinstance(configured, (list, tuple)) else [configured]
    found += [tokenizer.eos_token_id, end_of_turn_id(tokenizer)]
    return list(dict.fromkeys(int(token) for token in found if token is not None))


def end_of_turn_id(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None, *, answered: bool = False
) -> int | None:
    """The control token with which the chat template ends an answer; None where it writes none after it.

    Args:
        tokenizer: with or without a chat template.
        chat_template: instead of the tokenizer's own.
        answered: look at an answer that a further question follows, instead of the last.
    """
    if chat_template is None and not getattr(tokenizer, "chat_template", None):
        return None
    messages = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    if answered:
        messages += [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    try:
        text = render(tokenizer, messages, chat_template=chat_template)
    except TemplateRefusalError:
        return None
    before, _, after = text.rpartition(_ANSWER)
    if not before:
        return None
    controls = control_tokens(tokenizer)
    ids = [int(token) for token in tokenizer(after, add_special_tokens=False)["input_ids"]]
    # Cohere closes the answer before it ends the turn: the tokenizer's own end token goes before the first of a run.
    run = list(takewhile(controls.__contains__, dropwhile(lambda token: token not in controls, ids)))
    if not run:
        return None
    return int(tokenizer.eos_token_id) if tokenizer.eos_token_id in run else run[0]


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The added tokens that stand for something other than text, with their spelling.

    Some families (Gemma) add runs of white space to the vocabulary as well: these are text.
    """
    added = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items() if str(token).strip()}
    special = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=False))
    return added | special


class TemplateRefusalError(Exception):
    """The chat template refused the messages; the text says in whose words."""


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    *,
    chat_template: str | None = None,
    add_generation_prompt: bool = False,
    tools: list[Any] | None = None,
    options: dict[str, Any] | None = None,
) -> str:
    """The text that the chat template makes of messages.

    Raises:
        TemplateRefusalError: it would not, or could not.
    """
    from jinja2 import TemplateError

    said: dict[str, Any] = {"chat_template": chat_template, "add_generation_prompt": add_generation_prompt}
    said["tools"] = tools or None
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **said, **(options or {})))
    except (TemplateError, TypeError, KeyError, ValueError, AttributeError) as error:
        if isinstance(error, TypeError) and (written := _arguments_as_text(messages)) != messages:
            return render(
                tokenizer, written, **said, options=options
            )  # DeepSeek's templates want the arguments of calls as JSON
        raise TemplateRefusalError(str(error) or type(error).__name__) from error


def _arguments_as_text(messages: Messages) -> Messages:
    def written(call: Any) -> Any:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or isinstance(function.get("arguments"), str):
            return call
        return {
            **call,
            "function": {**function, "arguments": json.dumps(function.get("arguments"), ensure_ascii=False)},
        }

    return [
        {**message, "tool_calls": [written(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Messages | str,
    *,
    tools: list[Any] | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """The tokens after which a model answers.

    Args:
        tokenizer: of the model that is asked.
        prompt: messages, which go through the chat template and end with its generation prompt; or plain text, which is
            tokenised as the tokenizer does, with its beginning-of-sequence token and without an end.
        tools: handed to the chat template.
        chat_template_kwargs: handed to the chat template.

    Raises:
        UnsupportedError: messages, and the tokenizer has no chat template, or it refuses them.
    """
    if isinstance(prompt, str):
        return encode_text(tokenizer, prompt)[0]
    if not getattr(tokenizer, "chat_template", None):
        raise UnsupportedError(
            "The prompt is a list of messages and the tokenizer has no chat template to write them with. "
            "Set tokenizer.chat_template, or ask with plain text."
        )
    try:
        text = render(tokenizer, prompt, add_generation_prompt=True, tools=tools, options=chat_template_kwargs)
    except TemplateRefusalError as refusal:
        roles = [message.get("role") for message in prompt]
        raise UnsupportedError(f"The chat template refuses a prompt with the roles {roles}: {refusal}.") from refusal
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that a tokenizer writes before any text: a beginning-of-sequence token, or none."""
    bare, whole = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    added = next((start for start in range(len(whole)) if whole[start : start + len(bare)] == bare), 0)
    return whole[:added]


def encode_text(
    tokenizer: PreTrainedTokenizerBase, text: str, before: Sequence[int] | None = None
) -> tuple[list[int], list[tuple[int, int]]]:
    """Plain text in tokens, and where in the text each stands.

    With one beginning-of-sequence token, if the tokenizer writes one, which stands at (0, 0); never with an end token
    that is not in the text. Slow tokenizers say of no token where it stands.

    Args:
        tokenizer: the model's.
        text: any.
        before: the tokenizer's `beginning`, if it is known already.
    """
    bare = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
    ids = list(bare["input_ids"])
    places = list(bare["offset_mapping"]) if tokenizer.is_fast else [(0, 0)] * len(ids)
    if ids and ids[0] == tokenizer.bos_token_id:  # the text brings its own
        return ids, places
    first = list(beginning(tokenizer) if before is None else before)
    return first + ids, [(0, 0)] * len(first) + places


def shared_length(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
