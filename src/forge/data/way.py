"""How the rows of a data set become tokens: through the chat template, or as the text that they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ConflictError, UnsupportedError
from .choose import choose_template
from .formats import Layout
from .rows import Sample
from .source import Rows
from .template import ChatTemplate
from .tokens import control_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Way:
    """How rows become tokens.

    Args:
        template: the tokenizer's, None where it has none or plain text is learnt.
        rendered: whether the rows have been through it already.
        end: what is written after text that no template ends.
    """

    template: ChatTemplate | None
    rendered: bool
    end: str

    @property
    def chat(self) -> bool:
        """Whether questions and answers that are text become messages."""
        return self.template is not None and not self.rendered

    @property
    def origin(self) -> str:
        """Where the masks come from, "none" where no template is used."""
        return self.template.origin if self.template is not None and self.chat else "none"

    def stop_tokens(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
        """What an answer ends with, in the tokenizer's spelling."""
        if self.template is None or not self.chat:
            return (self.end,)
        known = control_tokens(tokenizer)
        return tuple(known.get(token, str(token)) for token in sorted(self.template.ends))

    def check(self, samples: Sequence[Sample]) -> None:
        """Refuse messages that nothing can write.

        Raises:
            UnsupportedError: there are messages and no chat template.
        """
        first = next((sample.row for sample in samples if sample.conversational), None)
        if first is not None and self.template is None:
            raise UnsupportedError(
                f"Row {first} holds messages, and the tokenizer has no chat template to write them with (base models "
                "often have none). Set tokenizer.chat_template, take the instruct model's tokenizer, or pass text "
                "columns (prompt and completion)."
            )


def find_way(rows: Rows, layout: Layout, tokenizer: PreTrainedTokenizerBase) -> Way:
    """How the rows of a data set become tokens.

    Raises:
        UnsupportedError: the chat template cannot be masked, or nothing can end a text.
        ConflictError: some prompts are rendered and others are not.
    """
    template = None
    if layout.format != "text" and getattr(tokenizer, "chat_template", None):
        template = choose_template(tokenizer)
    rendered = template is not None and rendered_before(rows, layout, template)
    if rendered and template is not None and template.ends and layout.format != "preference":  # DPOTrainer adds its own
        return Way(template, rendered, control_tokens(tokenizer)[min(template.ends)])
    if tokenizer.eos_token is None:
        raise UnsupportedError(
            "The tokenizer has no eos_token to end texts with, so a model could not learn to stop. "
            "Set tokenizer.eos_token."
        )
    return Way(template, rendered, str(tokenizer.eos_token))


def rendered_before(rows: Rows, layout: Layout, template: ChatTemplate) -> bool:
    """Whether prompts that are text have been through the chat template already.

    Such pairs are taken as they are: another template around them would teach the model control tokens where none will
    be. All prompts must agree, since a mixture cannot be meant.

    Raises:
        ConflictError: some prompts have and others have not.
    """
    column = layout.columns.get("prompt") or layout.columns.get("instruction")
    if column is None:
        return False
    heads, opening = template.structure.heads, template.structure.opening

    def is_rendered(prompt: str) -> bool:
        # One that only mentions a control token, be it first of all, is somebody's words.
        return prompt.lstrip().startswith(heads) or bool(opening and prompt.rstrip().endswith(opening))

    texts = [
        (number, prompt)
        for number, row in enumerate(rows)
        if isinstance(prompt := row.get(column), str) and prompt.strip()
    ]
    marked = [number for number, prompt in texts if is_rendered(prompt)]
    if not marked or len(marked) == len(texts):
        return bool(marked)
    shown = ", ".join(str(number) for number in marked[:5])
    raise ConflictError(
        f"{len(marked):,} of the {len(texts):,} prompts of {rows.name} hold control tokens of the chat template (rows "
        f"{shown}{', ...' if len(marked) > 5 else ''}), the others do not. Rendered prompts are taken as they are and "
        "plain ones are rendered; prepare the two kinds apart, or strip the tokens."
    )
