"""A sample token by token, and what of it is learnt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, Any

from .tokens import control_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Latin-1, so that they print where nothing else does.
LINE_END, LEARNT = "\xb6", ("\xab", "\xbb")


@dataclass(frozen=True)
class Token:
    """One token.

    Args:
        id: its number.
        text: what it adds to the text; a character of several tokens stands with the last of them.
        learnt: whether a model is trained to say it.
        special: whether it is a control token.
    """

    id: int
    text: str
    learnt: bool
    special: bool


@dataclass(frozen=True)
class Preview:
    """What is learnt from a sample.

    `print()` colours it: green is learnt, grey is only read, control tokens are bold. Without colour the same is said
    by signs: what stands between « and » is learnt, and ¶ is a line end that is a token or part of one.

    Args:
        parts: name -> tokens; one part called "", for a preference "chosen" and "rejected".
    """

    parts: dict[str, tuple[Token, ...]] = field(repr=False)

    @property
    def tokens(self) -> tuple[Token, ...]:
        """All tokens, of a preference those with the chosen answer."""
        return next(iter(self.parts.values()))

    def __repr__(self) -> str:
        return f"Preview({self._summary(self.tokens)})"

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def print(self) -> None:
        """Show it in colour where the terminal can."""
        from rich.console import Console
        from rich.text import Text

        console = Console(highlight=False)
        for name, tokens in self.parts.items():
            console.print(Text(self._heading(name, tokens), style="bold"))
            text = Text()
            for learnt, run in _runs(tokens):
                text.append(LEARNT[0] if learnt else "", style="green")
                for token in run:
                    style = "green" if learnt else "bright_black"
                    text.append(_visible(token.text), style=f"bold {style}" if token.special else style)
                text.append(LEARNT[1] if learnt else "", style="green")
            console.print(text, soft_wrap=True)

    def _repr_html_(self) -> str:
        blocks = []
        for name, tokens in self.parts.items():
            spans = []
            for learnt, run in _runs(tokens):
                inner = "".join(
                    f"<b>{escape(_visible(token.text))}</b>" if token.special else escape(_visible(token.text))
                    for token in run
                )
                colour = "background:#c8e6c9;color:#10391a" if learnt else "color:#777"
                marks = LEARNT if learnt else ("", "")
                spans.append(f'<span style="{colour}">{marks[0]}{inner}{marks[1]}</span>')
            heading = escape(self._heading(name, tokens))
            blocks.append(f'<p>{heading}</p><pre style="white-space:pre-wrap">{"".join(spans)}</pre>')
        return "".join(blocks)

    def _lines(self) -> Iterator[str]:
        for name, tokens in self.parts.items():
            yield self._heading(name, tokens)
            yield "".join(
                (LEARNT[0] if learnt else "")
                + "".join(_visible(token.text) for token in run)
                + (LEARNT[1] if learnt else "")
                for learnt, run in _runs(tokens)
            )

    def _heading(self, name: str, tokens: Sequence[Token]) -> str:
        return (f"{name}: " if name else "") + self._summary(tokens)

    @staticmethod
    def _summary(tokens: Sequence[Token]) -> str:
        return f"{len(tokens):,} tokens, {sum(token.learnt for token in tokens):,} learnt"


def tokens_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], learnt: Sequence[Any]) -> tuple[Token, ...]:
    """Tokens with the text that each adds."""
    controls = control_tokens(tokenizer)
    found: list[Token] = []
    waiting: list[int] = []
    for position, (token, says) in enumerate(zip(ids, learnt, strict=True)):
        waiting.append(int(token))
        text = _decoded(tokenizer, waiting)
        # Half a character decodes to the replacement sign; the next token may complete it.
        whole = (
            "\ufffd" not in text or len(waiting) > 4 or position == len(ids) - 1 or int(ids[position + 1]) in controls
        )
        found.append(Token(int(token), text if whole else "", bool(says), int(token) in controls))
        if whole:
            waiting.clear()
    return tuple(found)


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    piece = tokenizer.convert_ids_to_tokens(ids[0])
    # SentencePiece decoders drop the space that a text begins with.
    spaces = len(piece) - len(piece.lstrip("\u2581")) if isinstance(piece, str) else 0
    return " " * max(0, spaces - (len(text) - len(text.lstrip(" ")))) + text


def _visible(text: str) -> str:
    return text.replace("\n", f"{LINE_END}\n")


def _runs(tokens: Sequence[Token]) -> Iterator[tuple[bool, list[Token]]]:
    for learnt, run in groupby(tokens, key=lambda token: token.learnt):
        yield learnt, list(run)
