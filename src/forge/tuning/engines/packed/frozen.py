"""The layers that no trial of a pack adapts: backward stops above them, and what they compute may be kept."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ....freezing import PrefixCache
from ....models.below import modules_beside
from ....models.truncation import restore, truncate

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class FrozenPrefix:
    """Truncates a base below the lowest layer that any slot adapts, and moves the boundary as slots come and go.

    Args:
        model: the base, all of it frozen.
        cache: whether a PrefixCache serves what lies below, to all slots alike.
        args: the trainer's arguments, in which the cache looks for what it cannot serve.
    """

    def __init__(self, model: PreTrainedModel, *, cache: bool, args: Any) -> None:
        self._model, self._wanted, self._args = model, cache, args
        self._depth = 0
        self._cache: PrefixCache | None = None
        # The cache serves a trainer: of ours it sees the model, the arguments and that it trains.
        self._trainer: Any = SimpleNamespace(
            model=model,
            args=args,
            is_in_train=True,
            callback_handler=SimpleNamespace(callbacks=[]),
            remove_callback=lambda _: None,
        )

    def move(self, depth: int) -> None:
        """Put the boundary above so many layers."""
        if depth == self._depth:
            return
        self.end()
        if depth:
            truncate(self._model, depth, modules_beside(self._model).values())
            self._depth = depth
            if self._wanted:
                self._cache = PrefixCache().attach(self._trainer)

    def end(self) -> None:
        """Give the layers back."""
        if self._cache is not None:
            self._cache.detach()
            self._cache = None
        if self._depth:
            restore(self._model)
            self._depth = 0
