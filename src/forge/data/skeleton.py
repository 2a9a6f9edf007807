"""What a chat template writes around the messages, found once for each order of roles.

Finding an answer means rendering everything before it, which for a conversation of n messages is n renderings of up to
n messages. But templates write the same around a message whatever it says. So the search is done on placeholders, once
for each order of roles, and a conversation fits if its text is exactly the placeholders' text with its own contents put
in. One that does not fit is searched itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .tokens import Messages

Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class Skeleton:
    """The text of an order of roles without the contents.

    Args:
        pieces: what stands before, between and after the contents.
        answers: for each answer the index of its message, how far into the piece before it it begins, and how far into
            the piece after it it ends.
    """

    pieces: tuple[str, ...]
    answers: tuple[tuple[int, int, int], ...]

    def fit(self, contents: list[str], whole: str) -> Spans | None:
        """Where the answers stand in a text; None if it is not these pieces around these contents."""
        for said in (contents, [content.strip() for content in contents]):
            if sum(map(len, self.pieces)) + sum(map(len, said)) != len(whole):
                continue
            if self.pieces[0] + "".join(c + p for c, p in zip(said, self.pieces[1:], strict=True)) == whole:
                return self._spans(said)
        return None

    def _spans(self, contents: list[str]) -> Spans:
        begins, position = [], 0  # of the pieces
        for piece, content in zip(self.pieces, [*contents, ""], strict=True):
            begins.append(position)
            position += len(piece) + len(content)
        return [(begins[index] + start, begins[index + 1] + end) for index, start, end in self.answers]


def skeleton(
    roles: tuple[str, ...], find: Callable[[Messages], tuple[str, dict[int, tuple[int, int]]]]
) -> Skeleton | None:
    """The skeleton of an order of roles, None where its answers do not each stand between the pieces around them.

    Args:
        roles: of the messages.
        find: the text of messages, and where in it each answer stands, by its message's index.
    """
    contents = [f"placeholder{index}of{len(roles)}." for index in range(len(roles))]
    text, spans = find([{"role": role, "content": said} for role, said in zip(roles, contents, strict=True)])
    pieces, begins, position = [], [], 0
    for said in contents:
        found = text.find(said, position)
        if found < 0 or text.count(said) != 1:
            return None
        pieces.append(text[position:found])
        begins.append(position)
        position = found + len(said)
    pieces.append(text[position:])
    begins.append(position)
    answers = []
    for index, (start, end) in sorted(spans.items()):
        into, out = start - begins[index], end - begins[index + 1]
        if not (0 <= into <= len(pieces[index]) and 0 <= out <= len(pieces[index + 1])):
            return None
        answers.append((index, into, out))
    return Skeleton(tuple(pieces), tuple(answers))
