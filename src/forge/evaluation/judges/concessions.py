"""What servers that speak one protocol do not know of it."""

from __future__ import annotations

from collections.abc import Callable

from .reply import Reply


class Concessions:
    """What a server does not take, found out by asking.

    Servers of one protocol differ in what they know of it. A refused request is sent again without what the refusal
    names, else without what is likeliest; what helped is left out from then on.

    Args:
        words: By concession, in the order in which they are tried unnamed, the words of refusals that name it.
        unnamed: Those that are tried even when the refusal does not name them.
    """

    def __init__(self, words: dict[str, tuple[str, ...]], *, unnamed: tuple[str, ...] = ()) -> None:
        self.words = words
        self.unnamed = unnamed
        self.made: frozenset[str] = frozenset()

    def send(self, request: Callable[[frozenset[str]], Reply], refusal: Callable[[Exception], str | None]) -> Reply:
        """Send a request.

        Args:
            request: Sends it with these concessions.
            refusal: The server's words in an exception that is a refusal of the request, None for any other.
        """
        made = self.made
        while True:
            try:
                reply = request(made)
            except Exception as error:
                said = refusal(error)
                more = None if said is None else self._next(said.lower(), made)
                if more is None:
                    raise
                made |= {more}
                continue
            self.made |= made
            return reply

    def _next(self, said: str, made: frozenset[str]) -> str | None:
        left = [name for name in self.words if name not in made]
        named = [name for name in left if any(word in said for word in self.words[name])]
        return next(iter([*named, *(name for name in left if name in self.unnamed)]), None)
