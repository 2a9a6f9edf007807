"""Samples in tokens, and what of them is learnt."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ForgeError, UnsupportedError
from .messages import first_five
from .rows import Sample
from .template import ChatTemplate
from .tokens import Messages, TemplateRefusalError, beginning, encode_text, render, shared_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(slots=True)
class Tokens:
    """A row in tokens.

    Args:
        ids: of the whole; of a preference, of the prompt with the chosen answer.
        learnt: for each whether a model is trained to say it.
        unlearnt_turns: answers that are only context.
        unwritten: messages that say something that the chat template does not write.
        prompt: of a preference, how many tokens are the prompt's.
        rejected: of a preference, the ids of the prompt with the rejected answer.
    """

    ids: Sequence[int]
    learnt: Sequence[int]
    unlearnt_turns: int = 0
    prompt: int = 0
    rejected: Sequence[int] | None = None
    unwritten: int = 0

    @property
    def length(self) -> int:
        """What `max_length` counts: the tokens, of a preference those of the longer side."""
        return max(len(self.ids), len(self.rejected or ()))


class Encoder:
    """Turns samples into tokens as the trainers would, and says which row it was that could not be.

    Args:
        tokenizer: the model's.
        template: how its conversations are written; None if it has no chat template.
        end: what is written after text that no chat template ends.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None, end: str) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.end = end
        self._beginning = beginning(tokenizer)

    def encode(self, sample: Sample) -> Tokens:
        """One sample.

        Raises:
            TemplateRefusalError: the chat template would not write it.
            UnsupportedError: the tokenizer cannot tell the prompt's tokens from the answer's.
        """
        if sample.rejected is not None:
            return self._preference(sample)
        if isinstance(sample.prompt, str) or isinstance(sample.answer, str):
            return self._plain(str(sample.prompt), str(sample.answer))
        assert self.template is not None
        found = self.template.encode(sample.prompt + sample.answer, len(sample.prompt), sample.tools, sample.options)
        return Tokens(found.ids, found.learnt, found.unlearnt_turns, unwritten=found.unwritten)

    def _plain(self, prompt: str, answer: str) -> Tokens:
        """Text, tokenised whole as TRL does, so that words at the seam are what they are in running text."""
        ids, places = encode_text(self.tokenizer, prompt + self._ended(answer), self._beginning)
        if not self.tokenizer.is_fast:
            return self._without_places(prompt, ids)
        # Some tokenizers place white space nowhere, so what is learnt is all from the answer's first token on; what is
        # first of all is predicted by nothing.
        first = next((index for index, (_, end) in enumerate(places) if end > len(prompt)), len(ids))
        return Tokens(ids, [index >= max(first, 1) for index in range(len(ids))])

    def _without_places(self, prompt: str, ids: list[int]) -> Tokens:
        """Text of a tokenizer that does not say where its tokens are: the prompt's are known if they come first."""
        asked = encode_text(self.tokenizer, prompt, self._beginning)[0] if prompt else []
        if ids[: len(asked)] != asked:
            raise UnsupportedError(
                f"{type(self.tokenizer).__name__} does not say where in the text its tokens are, and a prompt's tokens "
                "change with the answer after it, so they cannot be told apart. Load the fast tokenizer: "
                "AutoTokenizer.from_pretrained(...)."
            )
        return Tokens(ids, [index >= max(len(asked), 1) for index in range(len(ids))])

    def _ended(self, text: str) -> str:
        # A conversation that was rendered before may end with a line end after its last token.
        return text if text.rstrip().endswith(self.end) else text + self.end

    def trim(self, sample: Sample) -> None:
        """Take the white space away after the end of preferred texts: DPOTrainer would write a second end after it."""
        if isinstance(sample.answer, str) and isinstance(sample.rejected, str):
            sample.answer, sample.rejected = self._trimmed(sample.answer), self._trimmed(sample.rejected)

    def _trimmed(self, text: str) -> str:
        bare = text.rstrip()
        return bare if bare.endswith(self.end) else text

    def _preference(self, sample: Sample) -> Tokens:
        """Both sides as DPOTrainer tokenises them; what they and the prompt share is the prompt."""
        if isinstance(sample.prompt, str):
            texts = [sample.prompt, *(sample.prompt + self._ended(str(a)) for a in (sample.answer, sample.rejected))]
            prompt, chosen, rejected = (list(self.tokenizer(text)["input_ids"]) for text in texts)
        else:
            prompt = self._rendered(sample, sample.prompt, add_generation_prompt=True)
            assert isinstance(sample.answer, list)
            assert isinstance(sample.rejected, list)
            chosen = self._rendered(sample, sample.prompt + sample.answer)
            rejected = self._rendered(sample, sample.prompt + sample.rejected)
        shared = min(shared_length(prompt, chosen), shared_length(prompt, rejected))
        return Tokens(chosen, [index >= shared for index in range(len(chosen))], prompt=shared, rejected=rejected)

    def _rendered(self, sample: Sample, messages: Messages, *, add_generation_prompt: bool = False) -> list[int]:
        text = render(
            self.tokenizer,
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=sample.tools,
            options=sample.options,
        )
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_all(encoder: Encoder, samples: Sequence[Sample], name: str) -> list[Tokens]:
    """All samples in tokens, held compactly.

    Raises:
        ForgeError: the chat template refuses rows; the message names the first five.
    """
    encoded: list[Tokens] = []
    refused: list[str] = []
    for sample in samples:
        found = _encoded_or_refused(encoder, sample)
        if isinstance(found, str):
            refused.append(found)
        else:
            encoded.append(found)
    if refused:
        more, listed = first_five(refused)
        raise ForgeError(
            f"The model's chat template refuses {len(refused):,} of the {len(samples):,} rows of {name}{more}:\n"
            f"  {listed}\n"
            "Change these rows to what the template knows (Gemma and Mistral: user and assistant in turn, and no "
            "system message where the family has none: put its text before the first question), or set "
            "tokenizer.chat_template."
        )
    return encoded


def _encoded_or_refused(encoder: Encoder, sample: Sample) -> Tokens | str:
    encoder.trim(sample)
    try:
        found = encoder.encode(sample)
    except TemplateRefusalError as refusal:
        return f"row {sample.row}, {_culprit(encoder, sample)}: {refusal}"
    # A million rows as lists of Python's numbers would not fit where the data set does.
    found.ids, found.learnt = array("i", found.ids), bytes(found.learnt)
    found.rejected = None if found.rejected is None else array("i", found.rejected)
    return found


def _culprit(encoder: Encoder, sample: Sample) -> str:
    """The message from which on the template refuses a conversation."""
    messages = [*sample.prompt, *sample.answer]
    for count in range(1, len(messages)):
        asked = [message for message in messages[:count] if isinstance(message, dict)]
        try:
            render(encoder.tokenizer, asked, tools=sample.tools, options=sample.options)
        except TemplateRefusalError:
            return f"message {count - 1} ({asked[-1]['role']})"
    return f"message {len(messages) - 1} ({messages[-1]['role']})" if isinstance(messages[-1], dict) else "text"
